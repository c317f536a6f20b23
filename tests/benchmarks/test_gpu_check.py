"""gpu_check judges rightly: broken kernels are seen, parts end as they should, the arithmetic holds; no server."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.gpu_check import bandwidth, parts, servers
from benchmarks.gpu_check.__main__ import exit_status, make_table
from benchmarks.gpu_check.bandwidth import Measured, quotients, unmet
from benchmarks.gpu_check.parts import PARTS, Context, Part, chosen_parts, chosen_setups, run_part
from benchmarks.gpu_check.pool import Pool, Shape, first_heads, make_config
from benchmarks.gpu_check.reference import Mismatch
from benchmarks.gpu_check.servers import Answer, compare, judge
from benchmarks.harness import SERVER_FLAGS
from sglang_hybridkv.cache.compressed_cache import CompressedCache
from sglang_hybridkv.compressors.hybridkv import HybridKV
from tests.builders import fresh_generator

CONTEXT = Context("cpu", lambda: pytest.fail("no server is started"), 5)


class TestKernels:
    """The part that runs the tests of the kernels, on tests of its own."""

    def rows(self, monkeypatch, tmp_path, code):
        (tmp_path / "tests" / "kernels").mkdir(parents=True)
        (tmp_path / "tests" / "kernels" / "test_some_op.py").write_text(code)
        monkeypatch.setattr(parts, "ROOT", tmp_path)
        return list(parts.kernel_rows(CONTEXT))

    def test_a_row_says_what_ran_and_what_failed(self, monkeypatch, tmp_path):
        code = "import os, pytest\ndef test_a(): pass\ndef test_b(): assert 1 + 1 == 3\ndef test_c(): pytest.skip('')\n"
        code += "def test_seed(): assert os.environ['HYBRIDKV_TEST_SEED'] == '5'\n"
        (row,) = self.rows(monkeypatch, tmp_path, code)
        assert (row["op"], row["cases"], row["ok"], row["failed_cases"], row["seed"]) == ("some_op", 3, False, 1, 5)
        assert row["failures"][0].startswith("test_b: ")
        json.dumps(row)

    @pytest.mark.parametrize(
        ("code", "is_sound"), [("def test_a(): pass\n", True), ("import no_such_package\n", False)]
    )
    def test_sound_kernels_pass_and_tests_that_cannot_be_collected_fail(self, monkeypatch, tmp_path, code, is_sound):
        (row,) = self.rows(monkeypatch, tmp_path, code)
        assert row["ok"] == is_sound

    def test_tests_of_a_gpu_are_left_out_without_one(self, monkeypatch, tmp_path):
        code = "import pytest\n@pytest.mark.gpu\ndef test_a(): pass\n"
        with pytest.raises(Mismatch, match="ended with status 5"):
            self.rows(monkeypatch, tmp_path, code)

    def test_without_pytest_one_sentence_says_so(self, monkeypatch):
        monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(Mismatch, match="their tests, which need pytest and hypothesis: no pytest here"):
            list(parts.kernel_rows(CONTEXT))


def test_pages_that_are_given_back_are_nobody_s():
    shape = Shape(torch.float32, 8, 2, 64)
    sizes = {"num_pages": 80, "num_host_pages": 60, "max_context": 300}
    pool = Pool(shape, HybridKV(make_config(shape, 0.3, 0.5)), **sizes, generator=fresh_generator())
    requests = [pool.add_prompt(170), pool.add_prompt(19)]
    pool.compress(requests[0], first_heads(shape, 1))
    pool.append_token(requests[0])
    assert pool.table.is_dynamic[requests[0].row].tolist() == [[True, False]] * 2
    pages = pool.free + requests[0].reservation.pages.tolist() + [p for each in requests for p in each.pages if p]
    assert sorted(pages) == list(range(1, 80))
    pool.cache.check_integrity()


class TestBandwidth:
    def quotients(self, share=1.0, **changes):
        """Of kernels that move this share of the bytes in the time which that takes."""
        values = {"decode_bytes": 10**9, "summary_bytes": 10**8, "stock_bytes": 10**10}
        values |= {"decode_ms": 0.25, "step_ms": 0.275, "stock_ms": 2.5}
        values = {name: share * value for name, value in values.items()}
        return quotients(Measured(**values | {"copy_gb_s": 4000.0, "layers_measured": 28} | changes))

    def test_kernels_that_only_move_their_bytes_reach_all_of_it(self):
        row = self.quotients()
        assert row["bandwidth_share"] == pytest.approx(1)
        assert row["bound_share"] == pytest.approx(1)
        assert unmet(row) == []

    def test_fewer_layers_mean_the_same(self):
        assert self.quotients(0.5, layers_measured=14) == self.quotients()

    def test_slow_kernels_miss_the_criteria(self):
        missed = unmet(self.quotients(decode_ms=0.5, step_ms=3.0))
        assert [line.split()[0] for line in missed] == ["bandwidth_share", "bound_share"]

    def test_the_bound_of_the_published_table(self):
        """KV of 16 requests of 32k tokens at 57,344 bytes, a tenth kept, a quarter of the heads with summaries."""
        full = 16 * 32768 * 57344
        row = self.quotients(stock_bytes=full, decode_bytes=full // 10, summary_bytes=full // 256)
        assert row["byte_bound"] == pytest.approx(2.47, abs=0.01)

    def test_the_small_workload_runs(self):
        row = bandwidth.measure(dataclasses.replace(bandwidth.SMALL, context=256, num_steps=1), "cpu", 3)
        assert row["decode_bytes"] < 0.2 * row["stock_bytes"]
        assert row["stock_kernel"] == "ours, dense"
        assert 0 <= row["chunk_hit_rate"] <= 1

    @pytest.mark.parametrize(("change", "message"), [(0.1, "largest relative error"), (math.nan, "are not finite")])
    def test_a_baseline_that_computes_something_else_is_not_timed(self, change, message):
        tiny, attend = dataclasses.replace(bandwidth.SMALL, context=256, num_steps=1), CompressedCache.attend

        def wrong(cache, layer_idx, q, rows, *args):
            is_dense = not cache.memory.table.num_pages[rows].any()
            return attend(cache, layer_idx, q, rows, *args) + (change if is_dense else 0.0)

        with mock.patch.object(CompressedCache, "attend", wrong), pytest.raises(Mismatch, match=message):
            bandwidth.measure(tiny, "cpu", 3)

    @pytest.mark.slow
    def test_sglangs_kernel_is_called_as_it_wants_to_be(self):
        """Its answer, interpreted, is the reference's; in a process of its own, as Triton decides once."""
        pytest.importorskip("triton")
        code = """
import torch
from benchmarks.gpu_check import bandwidth
from benchmarks.gpu_check.pool import Pool, Shape, make_config
from benchmarks.gpu_check.step import DecodeStep
from sglang_hybridkv.compressors.hybridkv import HybridKV
shape = Shape(torch.float32, 8, 2, 64)
generator = torch.Generator().manual_seed(5)
sizes = {"num_pages": 60, "num_host_pages": 40, "max_context": 200}
pool = Pool(shape, HybridKV(make_config(shape, 0.5, 0.5)), **sizes, generator=generator)
requests = [pool.add_prompt(length) for length in (5, 17)]
step = DecodeStep(pool, len(requests))
step.load(requests)
bandwidth.sglang_decode(pool, step, requests)()
bandwidth.check_step(step, requests)
"""
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr


class TestServers:
    @staticmethod
    def answer(ids, shift=0.0):
        return Answer(tuple(ids), tuple(-0.5 * i + shift for i in range(len(ids))), {"compressed": True})

    def row(self, ours, stock, dtype):
        running = {"overlap": True, "decode_graphs": "full", "device": "cuda", "attention_backend": "triton"}
        return compare(ours, stock) | running | {"dtype": dtype}

    def test_differences_count_while_both_have_read_the_same(self):
        stock = [self.answer([1, 2, 3, 4]), self.answer([5, 6])]
        ours = [self.answer([1, 2, 9, 4], 0.125), self.answer([5, 6])]
        row = compare(ours, stock)
        assert (row["same_tokens"], row["requests"]) == (1, 2)
        assert row["common_prefix"] == pytest.approx(4 / 6, abs=1e-4)
        assert row["max_logprob_difference"] == 0.125

    def test_fp32_wants_the_same_tokens_and_bf16_close_ones(self):
        stock, ours = [self.answer([1, 2, 3])], [self.answer([1, 2, 4], 0.01)]
        judge(self.row(ours, stock, "bfloat16"))
        with pytest.raises(Mismatch, match="tokens differ"):
            judge(self.row(ours, stock, "float32"))
        with pytest.raises(Mismatch, match="log-probs differ by 0.01"):
            judge(self.row([self.answer([1, 2, 3], 0.01)], stock, "float32"))

    @pytest.mark.parametrize("change", [{"overlap": False}, {"decode_graphs": "disabled"}])
    def test_graphs_and_overlap_have_to_be_on(self, change):
        stock = [self.answer([1, 2, 3])]
        with pytest.raises(Mismatch, match="overlap|graphs"):
            judge(self.row(stock, stock, "bfloat16") | change)

    def test_a_gpu_server_has_the_asked_backend_and_graphs(self):
        flags, env = servers.Setup("cuda", "flashinfer", "bfloat16").flags(servers.Load((100,), 4), 0.1)
        assert flags[flags.index("--attention-backend") + 1] == "flashinfer"
        assert flags.count("--attention-backend") == 1
        assert "--disable-cuda-graph" not in flags
        assert "--disable-overlap-schedule" not in flags
        assert flags[flags.index("--kv-compressor-budget") + 1] == "0.1"
        assert env == {}

    def test_a_gpu_server_has_the_flags_that_its_host_needs(self, monkeypatch):
        monkeypatch.setenv(SERVER_FLAGS, "--mm-attention-backend triton_attn")
        flags, _ = servers.Setup("cuda", "triton", "float16").flags(servers.Load((100,), 4), None)
        assert flags[flags.index("--mm-attention-backend") + 1] == "triton_attn"
        assert (
            "--mm-attention-backend" not in servers.Setup("cpu", "x", "float32").flags(servers.Load((9,), 4), None)[0]
        )

    def test_no_gpu_server_is_asked_in_fp32(self):
        assert {setup.dtype for setup in servers.setups("cuda")[0]} == {"float16", "bfloat16"}

    def test_without_a_gpu_only_its_backend_runs(self):
        assert [setup.attention_backend for setup in servers.setups("cpu")[0]] == ["torch_native"]


def part_of(rows: Callable[[Context], Iterator[dict]], skipped=()) -> Part:
    return Part("kernels", "a part", rows, lambda device: skipped)


class TestParts:
    def test_correctness_comes_before_timings_whatever_was_asked(self):
        names = [part.name for part in chosen_parts("concurrency, bandwidth,kernels,server")]
        assert names == ["kernels", "server", "bandwidth", "concurrency"]

    @pytest.mark.parametrize("names", ["", "kernels,", "kernels,speed"])
    def test_unknown_parts_are_refused_in_words(self, names):
        with pytest.raises(ValueError, match="legal: kernels, server, bandwidth, concurrency"):
            chosen_parts(names)

    def test_unknown_setups_are_refused_in_words(self):
        assert chosen_setups(" triton:float16,", "cuda") == ("triton:float16",)
        with pytest.raises(ValueError, match="--setups = 'triton' is not allowed; legal: torch_native:float32"):
            chosen_setups("triton", "cpu")

    @pytest.mark.parametrize(("wanted", "asked"), [((), ["a", "b"]), (("b:float32",), ["b"])])
    def test_a_server_that_fails_is_a_row_and_the_next_one_still_runs(self, wanted, asked):
        setups = [servers.Setup("cpu", name, "float32") for name in "ab"]
        context = dataclasses.replace(CONTEXT, model=Path, setups=wanted)
        failing = mock.Mock(side_effect=RuntimeError("it ended"))
        with mock.patch.multiple(servers, setups=lambda device: (setups, []), comparisons=failing):
            rows = list(parts.server_rows(context))
        assert [row["attention_backend"] for row in rows] == asked
        for row in rows:
            assert not row["ok"]
            assert row["failures"] == [f"{row['attention_backend']}:float32: RuntimeError: it ended"]

    def test_every_part_says_what_it_leaves_out(self):
        """Something without a GPU; with one nothing, unless a package is missing."""
        for part in PARTS:
            assert part.skipped("cpu"), part.name
            assert all("GPU" in reason or "CPU" in reason for reason in part.skipped("cpu"))
            assert all("not installed" in reason for reason in part.skipped("cuda"))

    def test_a_row_that_failed_fails_its_part_and_the_rest_still_runs(self):
        put: list[dict] = []
        rows = [{"op": "a", "ok": False, "failures": ["wrong"]}, {"op": "b", "ok": True, "failures": []}]
        outcome = run_part(part_of(lambda context: iter(rows)), CONTEXT, put.append)
        assert (outcome.status, outcome.fault, outcome.rows) == ("failed", "a wrong", 2)
        assert [row["op"] for row in put] == ["a", "b"]
        assert exit_status([outcome]) == 1

    @pytest.mark.parametrize("error", [Mismatch("differs"), RuntimeError("CUDA error")])
    def test_what_a_part_raises_fails_it_and_no_other(self, error):
        def rows(context):
            yield {"ok": True}
            raise error

        failed = run_part(part_of(rows), CONTEXT, lambda row: None)
        good = run_part(part_of(lambda context: iter([{"ok": True}])), CONTEXT, lambda row: None)
        assert (failed.status, good.status) == ("failed", "reduced")
        assert str(error) in (failed.fault or "")
        assert (exit_status([good, failed]), exit_status([good])) == (1, 0)

    def test_a_part_without_a_row_has_not_passed(self):
        outcome = run_part(part_of(lambda context: iter(())), CONTEXT, lambda row: None)
        assert (outcome.status, outcome.fault) == ("failed", "no check ran")

    def test_rows_of_a_small_machine_have_no_quotients_to_quote(self):
        tiny = dataclasses.replace(bandwidth.SMALL, context=256, num_steps=1)
        with mock.patch.object(bandwidth, "SMALL", tiny):
            rows = list(parts.bandwidth_rows(CONTEXT))
        named = [(row["page_size"], row["chunk_score"], row["host_dtype"]) for row in rows]
        assert named == list(parts.BANDWIDTH_CHUNKS)
        for row in rows:
            assert row["ok"]
            assert not row["judged"]
            assert not set(bandwidth.QUOTIENTS) & set(row)
            assert row["still_ms"] > 0
            assert row["fetched_bytes"] > 0
            json.dumps(row)

    def test_the_table_names_every_part(self):
        outcome = run_part(part_of(lambda context: iter([{"ok": True}]), ("x: no GPU",)), CONTEXT, lambda row: None)
        table = make_table([outcome], "cpu")
        assert list(table.columns[-1].cells) == ["x: no GPU"]
        assert table.row_count == 1
