"""gpu_check judges rightly: broken kernels are seen, parts end as they should, the arithmetic holds; no server."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch

from benchmarks.gpu_check import bandwidth, graphs, ops, parts, servers
from benchmarks.gpu_check.__main__ import exit_status, make_table
from benchmarks.gpu_check.bandwidth import quotients, unmet
from benchmarks.gpu_check.parts import PARTS, Context, Part, chosen_parts, run_part
from benchmarks.gpu_check.pool import Pool, Shape, make_config
from benchmarks.gpu_check.reference import Mismatch, PoolState, check_attention, check_retrieval
from benchmarks.gpu_check.servers import Answer, compare, judge
from tests.builders import fresh_generator

SMALL = Shape(torch.float32, 8, 2, 64)
CONTEXT = Context("cpu", lambda: pytest.fail("no server is started"), 5)


def small_pool(**changes):
    """A compressed request with a static and a dynamic head, and a dense one."""
    pool = Pool(
        SMALL,
        make_config(SMALL, 0.3, 0.5, **changes),
        num_pages=80,
        num_host_pages=60,
        max_context=300,
        device="cpu",
        generator=fresh_generator(),
    )
    rows = [pool.add(170), pool.add(19)]
    pool.compress(rows[0], 1)
    pool.append_token(rows[0])
    return pool, rows


@pytest.fixture(params=["mean_max", "key_codes"])
def step(request):
    """A pool after one retrieval of layer 0: pool, state before, queries and rows."""
    pool, rows = small_pool(chunk_score=request.param)
    before, q = PoolState.of(pool), pool.queries(2)
    pool.retrieve(0, q, torch.tensor(rows))
    return pool, before, q, rows


class TestShapes:
    def test_every_pair_of_values_occurs(self):
        shapes = ops.covering_shapes()
        names = ("dtype", "page_size", "group_size", "head_dim")
        values = dict(zip(names, (ops.DTYPES, ops.PAGE_SIZES, ops.GROUP_SIZES, ops.HEAD_DIMS), strict=True))
        for one, other in itertools.combinations(names, 2):
            seen = {(getattr(shape, one), getattr(shape, other)) for shape in shapes}
            assert seen == set(itertools.product(values[one], values[other]))

    def test_lengths_surround_a_page(self):
        assert set(ops.ragged_lengths(8, 50)) == {1, 7, 8, 9, 50}


class TestOps:
    @pytest.mark.parametrize("op", ops.OPS)
    def test_kernels_of_the_cpu_pass(self, op):
        row = ops.check_op(op, [SMALL, Shape(torch.bfloat16, 16, 7, 80)], "cpu", fresh_generator().initial_seed(), 6)
        assert row["ok"], row["failures"]
        assert row["cases"] == 2
        assert all(0 <= error < 0.1 for error in row["max_error"].values())

    @pytest.mark.parametrize("op", ops.OPS)
    def test_a_kernel_that_writes_nothing_fails(self, op):
        def broken(*args, **kwargs):
            if op in ("compact_kv", "retrieve_chunks"):
                return None
            if op == "fetch_chunks":
                return torch.tensor(0)
            if op == "score_heads":
                return torch.empty(2), torch.empty(2, args[2].shape[0])
            return torch.empty_like(args[0])

        callers = {"retrieve_chunks": "sglang_hybridkv.cache.retrieval", "decode_attn": "benchmarks.gpu_check.pool"}
        where = callers.get(op, "benchmarks.gpu_check.ops")
        if op == "select_chunks":

            def broken(q, summaries, counts, **rest):  # as many as wanted, but not the best
                return torch.arange(summaries.shape[1]) >= (summaries.shape[1] - counts)[:, None]

        with mock.patch(f"{where}.{op}", broken):
            row = ops.check_op(op, [SMALL], "cpu", fresh_generator().initial_seed(), 40)
        assert not row["ok"]
        assert row["failed_cases"] == 1
        assert "seed" in row["failures"][0]

    @pytest.mark.slow
    def test_triton_kernels_interpreted_in_a_process_of_their_own_pass(self):
        pytest.importorskip("triton")
        environment = os.environ | {"TRITON_INTERPRET": "1", "HYBRIDKV_KERNELS": "triton"}
        command = [sys.executable, "-m", "benchmarks.gpu_check.ops", "1", "compact_kv"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert [(row["op"], row["ok"]) for row in rows] == [("compact_kv", True)]
        assert "interpreted" in rows[0]["kernels"]


class TestReference:
    def test_a_sound_step_passes(self, step):
        pool, before, q, rows = step
        check_retrieval(pool, before, {0: q}, rows)
        lens = pool.lens(rows)
        assert check_attention(pool, 0, q, rows, pool.attend(0, q, torch.tensor(rows), lens)) < 1e-5

    def test_wrong_attention_is_seen(self, step):
        pool, _, q, rows = step
        out = pool.attend(0, q, torch.tensor(rows), pool.lens(rows))
        out[1, 0, 0] += 1e-3
        with pytest.raises(Mismatch, match="largest relative error"):
            check_attention(pool, 0, q, rows, out)
        out[1, 0, 0] = float("nan")
        with pytest.raises(Mismatch, match="1 outputs are not finite"):
            check_attention(pool, 0, q, rows, out)

    def test_a_row_that_is_not_the_host_stores_is_seen(self, step):
        pool, before, q, rows = step
        pages = pool.table.buffer_page_ids(rows[0], 0, torch.tensor([0]), pool.table.num_head_pages[rows[0], 0, :1])
        pool.views.v_pages[pages[0, 0], 3, 5] += 1
        with pytest.raises(Mismatch, match="values: 1 of"):
            check_retrieval(pool, before, {0: q}, rows)

    def test_a_write_to_another_page_is_seen(self, step):
        pool, before, q, rows = step
        pool.keys[1, int(pool.req_to_token[rows[1], 4]), 1, 0] += 1
        with pytest.raises(Mismatch, match="keys of other pages"):
            check_retrieval(pool, before, {0: q}, rows)

    def test_a_chunk_that_is_not_the_best_is_seen(self, step):
        pool, before, q, rows = step
        with pytest.raises(Mismatch, match="a chunk was left out"):
            check_retrieval(pool, before, {0: -q}, rows)

    def test_wrong_counters_are_seen(self, step):
        pool, before, q, rows = step
        pool.counters[1] += 1
        with pytest.raises(Mismatch, match="counted"):
            check_retrieval(pool, before, {0: q}, rows)


class TestPool:
    def test_nothing_is_lost_when_requests_come_and_go(self):
        pool, rows = small_pool()
        for row in rows:
            pool.remove(row)
        assert sorted(pool.free) == list(range(1, 80))
        assert pool.store.available() == 60
        assert pool.keys[:, 8:].isnan().all()
        assert not pool.table.num_pages.any()


class TestGraphs:
    @pytest.mark.parametrize("chunk_score", ["mean_max", "key_codes"])
    def test_a_changing_batch_passes(self, chunk_score):
        row = graphs.check_shape(SMALL, "cpu", fresh_generator().initial_seed(), 5, chunk_score)
        assert row["ok"]
        assert not row["captured"]

    def test_a_step_that_forgets_its_batch_is_seen(self):
        """As a graph does that reads rows from memory that nobody updates."""
        launch = graphs.DecodeStep.launch

        def stale(self):
            rows = self.rows.clone()
            self.rows.fill_(0)
            launch(self)
            self.rows.copy_(rows)

        with mock.patch.object(graphs.DecodeStep, "launch", stale), pytest.raises(Mismatch):
            graphs.check_shape(SMALL, "cpu", fresh_generator().initial_seed(), 5)


class TestBandwidth:
    def quotients(self, **changes):
        values = {"decode_bytes": 10**9, "summary_bytes": 10**8, "stock_bytes": 10**10, "copy_gb_s": 4000.0}
        values |= {"decode_ms": 0.25, "step_ms": 0.275, "stock_ms": 2.5, "layers_measured": 28}
        return quotients(**values | changes)

    def test_kernels_that_only_move_their_bytes_reach_all_of_it(self):
        row = self.quotients()
        assert row["bandwidth_share"] == pytest.approx(1)
        assert row["bound_share"] == pytest.approx(1)
        assert unmet(row) == []

    def test_fewer_layers_mean_the_same(self):
        parts_of = ("decode_bytes", "summary_bytes", "stock_bytes")
        few = {"decode_bytes": 10**9, "summary_bytes": 10**8, "stock_bytes": 10**10}
        few = {name: few[name] // 2 for name in parts_of} | {"decode_ms": 0.125, "step_ms": 0.1375, "stock_ms": 1.25}
        assert self.quotients(**few, layers_measured=14) == self.quotients()

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

    def test_a_baseline_that_computes_something_else_is_not_timed(self):
        def wrong(pool, layer_idx, q, rows, lens):
            return torch.ones_like(q)

        tiny = dataclasses.replace(bandwidth.SMALL, context=256, num_steps=1)
        with mock.patch.object(Pool, "attend", wrong), pytest.raises(Mismatch, match="largest relative error"):
            bandwidth.measure(tiny, "cpu", 3)

    @pytest.mark.slow
    def test_sglangs_kernel_is_called_as_it_wants_to_be(self):
        """Its answer, interpreted, is the reference's; in a process of its own, as Triton decides once."""
        pytest.importorskip("triton")
        code = """
import torch
from benchmarks.gpu_check import bandwidth, graphs
from benchmarks.gpu_check.pool import Pool, Shape, make_config
from benchmarks.gpu_check.reference import check_attention
shape = Shape(torch.float32, 8, 2, 64)
generator = torch.Generator().manual_seed(5)
sizes = {"num_pages": 60, "num_host_pages": 40, "max_context": 200}
pool = Pool(shape, make_config(shape, 0.5, 0.5), **sizes, device="cpu", generator=generator)
rows = [pool.add(length) for length in (5, 17, 33)]
step = graphs.DecodeStep(pool, len(rows))
step.load(rows)
bandwidth.sglang_decode(pool, step, rows)()
for layer_idx, q in enumerate(step.q):
    check_attention(pool, layer_idx, q, rows, step.out[layer_idx])
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

    def test_without_a_gpu_only_its_backend_runs_and_the_rest_is_named(self):
        found, skipped = servers.setups("cpu")
        assert [setup.attention_backend for setup in found] == ["torch_native"]
        assert "flashinfer" in skipped[0]
        assert "need a GPU" in skipped[0]


def part_of(rows: Callable[[Context], Iterator[dict]], skipped=()) -> Part:
    return Part("ops", "a part", rows, lambda device: skipped)


class TestParts:
    def test_correctness_comes_before_timings_whatever_was_asked(self):
        assert [part.name for part in chosen_parts("concurrency, bandwidth,graphs,ops,server")] == [
            "ops",
            "graphs",
            "server",
            "bandwidth",
            "concurrency",
        ]

    @pytest.mark.parametrize("names", ["", "ops,", "ops,speed"])
    def test_unknown_parts_are_refused_in_words(self, names):
        with pytest.raises(ValueError, match="legal: ops, graphs, server, bandwidth, concurrency"):
            chosen_parts(names)

    def test_without_a_gpu_every_part_says_what_it_leaves_out(self):
        for part in PARTS:
            assert part.skipped("cpu"), part.name
            assert all("GPU" in reason or "CPU" in reason for reason in part.skipped("cpu"))

    def test_with_a_gpu_nothing_is_left_out_but_packages(self):
        for part in PARTS:
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

    @pytest.mark.parametrize("printed", ["", '{"op": "compact_kv", "ok": true}\n'])
    def test_interpreted_kernels_that_end_early_fail_the_part(self, printed):
        done = subprocess.CompletedProcess([], 1, printed, "ImportError: no triton\n")
        with (
            mock.patch.object(parts.ops, "OPS", {}),
            mock.patch.object(subprocess, "run", return_value=done),
            pytest.raises(Mismatch, match="no triton"),
        ):
            list(parts.op_rows(CONTEXT))

    def test_rows_of_a_small_machine_have_no_quotients_to_quote(self):
        tiny = dataclasses.replace(bandwidth.SMALL, context=256, num_steps=1)
        with mock.patch.object(bandwidth, "SMALL", tiny):
            rows = list(parts.bandwidth_rows(CONTEXT))
        assert [(row["page_size"], row["chunk_score"]) for row in rows] == list(parts.BANDWIDTH_CHUNKS)
        for row in rows:
            assert row["ok"]
            assert not row["judged"]
            assert not set(bandwidth.QUOTIENTS) & set(row)
            json.dumps(row)

    def test_the_table_names_every_part(self):
        outcome = run_part(part_of(lambda context: iter([{"ok": True}]), ("x: no GPU",)), CONTEXT, lambda row: None)
        table = make_table([outcome], "cpu")
        assert list(table.columns[-1].cells) == ["x: no GPU"]
        assert table.row_count == 1
