"""The part e2e of gpu_check without a server: its plan, its rows and what they are judged by."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.bench_serving import Stream, Unfit
from benchmarks.gpu_check import e2e, fixed_heads, parts
from benchmarks.gpu_check.e2e import AIMS, Client, e2e_rows, held, hit_rate, judge
from benchmarks.gpu_check.e2e_plan import HEADS, Load, Plan, Setup, flags_of, host_bytes, make_plan, setups
from benchmarks.gpu_check.fixed_heads import FixedHeads, FixedHeadsConfig
from benchmarks.models import dummy_7b
from benchmarks.models.make_models import make_model
from sglang_hybridkv.compressors import PromptObservation
from tests.builders import ALL_HEADS, fresh_generator

LOAD = Load(2, 100, 8)
KV_OF_7B = 28 * 4 * 2 * 128 * 2
"""Bytes of a token's keys and values."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint's folder with a config of Qwen2.5-VL-7B's shape."""
    base = make_model(dummy_7b.BASE)
    config = dummy_7b.shape_of_7b(json.loads((base / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_shape_is_that_of_the_7b_model(folder):
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(folder).text_config
    assert (text.num_hidden_layers, text.num_key_value_heads, text.num_attention_heads) == (28, 4, 28)
    assert text.hidden_size // text.num_attention_heads == 128
    assert len(text.layer_types) == 28, "made anew, not those of the small model"


class TestPlan:
    def plan(self, *words: str, device: str = "cuda") -> Plan:
        parser = argparse.ArgumentParser()
        for name in ("requests", "prompt-tokens", "kv-config"):
            parser.add_argument(f"--{name}")
        for name in ("new-tokens", "wall-requests"):
            parser.add_argument(f"--{name}", type=int)
        args = parser.parse_args(words)
        args.device, args.model_path, args.server_seconds = device, None, 900.0
        return make_plan(args)

    def test_by_itself_it_has_the_loads_of_the_aims(self):
        assert [(load.requests, load.prompt_tokens) for load in self.plan().loads] == [(16, 32768), (64, 8192)]
        assert len(self.plan(device="cpu").loads) == 1

    def test_a_run_can_be_cut_to_one_load(self):
        plan = self.plan("--requests", "16", "--prompt-tokens", "32768", "--wall-requests", "0")
        assert plan.all_loads == (Load(16, 32768, 128),)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--requests", "16"), "--requests has 1 numbers and --prompt-tokens has 2"),
            (("--requests", "16,many"), "--requests = '16,many' is not allowed"),
            (("--new-tokens", "1"), "--new-tokens = 1 is not allowed"),
            (("--kv-config", '{"chunk_sise": 8}'), "did you mean 'chunk_size'"),
        ],
    )
    def test_bad_options_are_refused_in_words(self, words, message):
        with pytest.raises(ValueError, match=message):
            self.plan(*words)

    def test_the_wall_is_twice_what_stock_holds(self):
        plan = self.plan()
        assert plan.wall.prompt_tokens == 8192
        assert plan.pool_tokens < plan.wall.requests * plan.wall.tokens <= 2 * plan.pool_tokens
        assert plan.pool_tokens > 16 * (32768 + 128), "all prompts of a load fit"

    def test_the_host_store_holds_the_rows_of_dynamic_heads(self, folder):
        plan = self.plan("--requests", "16", "--prompt-tokens", "32768", "--wall-requests", "0")
        tokens = 16 * 32768
        quarter, dynamic, defaults = (
            host_bytes(plan, Setup(kind, "triton"), folder) for kind in ("heads", "dynamic", "defaults")
        )
        assert tokens * KV_OF_7B / 4 < quarter < 1.1 * tokens * KV_OF_7B / 4
        assert dynamic == pytest.approx(4 * quarter, rel=1e-6)
        assert defaults == pytest.approx(quarter * 38 / 28, rel=1e-6)  # 0.34 of 112 heads

    @pytest.mark.parametrize(
        "setup", [Setup("stock", "flashinfer"), Setup("heads", "triton"), Setup("defaults", "fa3")]
    )
    def test_servers_differ_in_backend_and_compressor_only(self, setup, folder, tmp_path):
        plan = self.plan("--kv-config", '{"chunk_size": 8}')
        flags, env = flags_of(plan, setup, folder, tmp_path)
        stock, _ = flags_of(plan, Setup("stock", setup.backend), folder, tmp_path)
        assert flags[: len(stock)] == stock
        assert flags[flags.index("--attention-backend") + 1] == setup.backend
        assert flags.count("--attention-backend") == 1
        assert flags[flags.index("--load-format") + 1] == "dummy"
        assert (setup.kind == "heads") == ("PYTHONPATH" in env)
        if setup.kind != "stock":
            config = json.loads(flags[flags.index("--kv-compressor-config") + 1])
            assert (config["chunk_size"], config.get("dynamic_heads")) == (8, 0.25 if setup.kind == "heads" else None)

    def test_prefill_and_decode_may_have_backends_of_their_own(self, folder, tmp_path):
        flags, _ = flags_of(self.plan(), Setup("stock", "flashinfer+triton"), folder, tmp_path)
        found = {phase: flags[flags.index(f"--{phase}attention-backend") + 1] for phase in ("", "prefill-", "decode-")}
        assert found == {"": "triton", "prefill-": "flashinfer", "decode-": "triton"}

    def test_setups_are_chosen_by_name(self):
        assert parts.chosen_setups("stock:triton,heads:flashinfer", "cuda") == ("stock:triton", "heads:flashinfer")
        standard, _, _ = setups("cuda")
        assert standard[0].kind == "stock", "what ours is compared with runs first"


class TestFixedHeads:
    @pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
    def test_the_first_heads_of_each_layer_are_dynamic_and_budgets_add_up(self, share):
        compressor = FixedHeads(FixedHeadsConfig(dynamic_heads=share))
        salience = torch.rand(3, 4, 160, generator=fresh_generator())
        observation = PromptObservation(torch.zeros(3, 4, 2), salience, torch.ones(160, dtype=torch.bool), 20)
        plan = compressor.plan(observation, 60, most_dynamic=ALL_HEADS)
        assert plan.is_dynamic.tolist() == [[head < 4 * share for head in range(4)]] * 3
        assert plan.num_head_pages.sum() == 60
        assert int(plan.is_dynamic.sum()) == compressor.config.most_dynamic_heads(12, 160)
        assert not compressor.plan(observation, 60, most_dynamic=0).is_dynamic.any()

    def test_a_server_finds_it_by_its_name_and_nobody_else_does(self, tmp_path):
        code = "from sglang_hybridkv.compressors import get_compressor as get\n"
        code += "print(get('fixed-heads').config_class.per_request[-1])"
        environment = {**os.environ, **fixed_heads.environment(tmp_path)}
        asked = [sys.executable, "-c", code]
        known = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
        assert known.stdout.strip() == "dynamic_heads", known.stderr
        unknown = subprocess.run(asked, env=os.environ, capture_output=True, text=True, check=False)
        assert "'fixed-heads' is unknown" in unknown.stderr


def load_row(server: str, heads: str, **changes: Any) -> dict[str, Any]:
    """A complete row of a load."""
    row = {"measured": "load", "setup": f"{server}:triton", "server": server, "attention_backend": "triton"}
    row |= {"heads": heads, "requests": 16, "prompt_tokens": 32768, "startup_s": 70.0, "compressed": 16}
    row |= {"ttft_ms": 1010.0, "ttft_dense_ms": None if server == "stock" else 1000.0, "ttft_hit_ms": 9.0}
    row |= {"ttft_all_ms": 9.0, "ttft_all_hit_ms": 9.0, "decode_tok_s": 100.0, "decode_tok_s_hit": 100.0}
    row |= {"step_ms": 10.0, "chunk_hit_rate": 0.9, "dynamic_heads": 28, "kv_of_stock": 0.11}
    return row | changes


class TestJudging:
    def judged(self, row: dict[str, Any], *stock: dict[str, Any], has_gpu: bool = True) -> dict[str, Any]:
        earlier: list[dict[str, Any]] = []
        for one in stock:
            earlier.append(judge(one, earlier, has_gpu=has_gpu))
        return judge(row, earlier, has_gpu=has_gpu)

    def test_the_fastest_stock_server_is_the_measure(self):
        stock = [load_row("stock", "stock", decode_tok_s=rate) for rate in (100.0, 80.0)]
        other = load_row("stock", "stock", decode_tok_s=900.0, requests=64)
        row = self.judged(load_row("heads", "quarter", decode_tok_s=170.0), *stock, other)
        assert (row["speedup"], row["speedup_aim"], row["ok"], row["judged"]) == (1.7, 1.6, True, True)

    @pytest.mark.parametrize(
        ("heads", "change", "message"),
        [
            ("quarter", {"decode_tok_s": 150.0}, "speedup is 1.5, expected at least 1.6"),
            ("static", {"decode_tok_s": 190.0}, "speedup is 1.9, expected at least 2"),
            ("defaults", {"kv_of_stock": 0.12}, "kv_of_stock is 0.12, expected at most 0.117"),
            ("dynamic", {"ttft_ms": 1040.0}, "ttft_growth is 0.04, expected at most 0.03"),
            ("quarter", {"startup_s": 73.0}, "startup_growth_s is 3, expected at most 2"),
        ],
    )
    def test_a_missed_aim_is_a_failure_on_a_gpu_only(self, heads, change, message):
        row = load_row("heads", heads, **{"decode_tok_s": 250.0} | change)
        stock = load_row("stock", "stock")
        assert self.judged(row, stock)["failures"] == [message]
        on_cpu = self.judged(row, stock, has_gpu=False)
        assert (on_cpu["failures"], on_cpu["judged"]) == ([], False)
        name = message.split()[0]
        assert {name, f"{name}_aim"} <= on_cpu.keys(), "figure and aim are there all the same"

    def test_aims_of_other_head_types_do_not_count(self):
        row = self.judged(load_row("dynamic", "dynamic", kv_of_stock=0.14), load_row("stock", "stock"))
        assert row["ok"]
        assert "kv_of_stock_aim" not in row

    def test_without_stock_nothing_is_compared_with_it(self):
        row = self.judged(load_row("heads", "quarter"))
        assert (row["speedup"], row["startup_growth_s"], row["ok"]) == (None, None, True)
        assert row["ttft_growth"] == 0.01

    @pytest.mark.parametrize("field", ["decode_tok_s", "ttft_hit_ms", "ttft_dense_ms", "chunk_hit_rate"])
    def test_a_row_that_lacks_a_measurement_fails_anywhere(self, field):
        row = self.judged(load_row("heads", "quarter", **{field: None}), has_gpu=False)
        assert row["failures"] == [f"{field} was not measured"]

    def test_requests_served_dense_fail(self):
        row = self.judged(load_row("heads", "quarter", compressed=12), has_gpu=False)
        assert row["failures"] == ["4 of 16 requests were served dense"]

    def test_the_wall_is_compared_with_stock_and_has_no_aim(self):
        wall = {"measured": "wall", "setup": "x", "attention_backend": "triton", "startup_s": 1.0, "requests": 9}
        stock = wall | {"server": "stock", "heads": "stock", "tok_s": 20.0}
        row = self.judged(wall | {"server": "heads", "heads": "quarter", "tok_s": 50.0}, stock)
        assert (row["wall_speedup"], row["ok"]) == (2.5, True)

    def test_every_aim_is_about_a_head_type_that_is_measured(self):
        measured = {heads for kinds in HEADS.values() for heads in kinds} | {"defaults"}
        assert all(set(aim.heads) <= measured for aim in AIMS)


def stream(ttft_ms: float = 5.0, **record: Any) -> Stream:
    meta = {"prompt_tokens": 99, "cached_tokens": 96, "num_retractions": 0}
    own = {"resident_ratio": 0.12, "host_bytes": 7, "static_heads": 3, "dynamic_heads": 1, "compressed": True} | record
    events = tuple((1.0 + 0.1 * i, i + 1) for i in range(LOAD.new_tokens))
    return Stream(ttft_ms, events, meta | ({} if record.get("stock") else {"kv_compressor": own}))


class TestMeasuring:
    def test_what_requests_hold_is_a_share_of_stock(self):
        row = held([stream(), stream(resident_ratio=0.14)])
        assert (row["kv_of_stock"], row["pool_tokens"], row["host_bytes"], row["compressed"]) == (0.13, 26, 14, 2)
        assert held([stream(stock=True)])["kv_of_stock"] == 1.0

    def test_the_hit_rate_is_of_the_chunks_between_two_states(self):
        states = [{"chunk_fetch_hit_rate": None, "chunk_fetch_bytes": 0}]
        states += [{"chunk_fetch_hit_rate": rate, "chunk_fetch_bytes": size} for rate, size in ((0.5, 100), (0.8, 120))]
        assert hit_rate(states[0], states[1]) == 0.5
        assert hit_rate(states[1], states[2]) == pytest.approx(1 - 20 / 400)
        assert hit_rate(states[0], states[0]) is None
        assert hit_rate(None, None) is None

    def test_requests_carry_the_head_type_and_stock_is_told_nothing(self):
        told = []

        def answer(server, ids, new_tokens, **body):
            told.append(body)
            return stream()

        with mock.patch.object(e2e, "stream_answer", answer):
            for share in (0.0, None):
                client = Client(mock.Mock(), share, time.monotonic() + 9, 5)
                client.ask([1], 2)
                client.ask([1], 2, enabled=False)
        settings = [body.get("custom_params", {}).get("kv_compressor") for body in told]
        assert settings == [{"dynamic_heads": 0.0}, {"enabled": False}, None, {"enabled": False}]

    def test_a_server_whose_time_is_over_is_asked_no_more(self):
        client = Client(mock.Mock(), None, time.monotonic() - 1, 5)
        with pytest.raises(Unfit, match="--server-seconds"):
            client.ask([1], 2)

    def test_rows_are_complete_and_prompts_distinct(self):
        asked = []

        def answer(server, ids, new_tokens, **body):
            asked.append(tuple(ids))
            return stream()

        server = mock.Mock()
        server.compressor_state.side_effect = [
            {"chunk_fetch_hit_rate": None, "chunk_fetch_bytes": 0},
            {"chunk_fetch_hit_rate": 0.5, "chunk_fetch_bytes": 700},
        ]
        with mock.patch.object(e2e, "stream_answer", answer):
            row = e2e.measure(Client(server, 0.25, time.monotonic() + 9, 5), LOAD, "heads")
        assert all(row[name] is not None for name in (*e2e.MEASURED, *e2e.OURS, "chunk_hit_rate"))
        assert (row["decode_tok_s"], row["step_ms"], row["fetched_bytes_per_step"]) == (20.0, 100.0, 100)
        # A warm-up, three prompts alone, three dense ones, and those of the load; all but the dense ones twice.
        assert (len(set(asked)), len(asked)) == (1 + 3 + 3 + 2, 2 + 6 + 3 + 4)
        json.dumps(row)


class TestServers:
    def rows(self, measurements: Any, some: list[Setup]) -> list[dict[str, Any]]:
        plan = Plan("cpu", (LOAD,), 0, model=make_model("tiny-qwen2"))
        server = mock.MagicMock()
        with mock.patch.multiple(e2e, Server=server, _measurements=measurements):
            return list(e2e_rows(plan, some, 5))

    def test_a_server_that_fails_is_a_row_with_its_flags_and_the_next_one_still_runs(self):
        def measurements(server, plan, setup, deadline, seed):
            yield load_row(setup.kind, "quarter")
            if setup.kind == "heads":
                raise RuntimeError("it ended")

        rows = self.rows(measurements, [Setup("heads", "torch_native"), Setup("defaults", "torch_native")])
        assert [(row["server"], row["ok"]) for row in rows] == [("heads", True), ("heads", False), ("defaults", True)]
        assert rows[1]["failures"] == ["heads:torch_native: RuntimeError: it ended"]
        assert "--kv-compressor" in rows[1]["flags"]
        json.dumps(rows)


def test_nothing_is_timed_before_the_host_store_has_grown():
    """And nobody waits for stock, which has none, or beyond the time of the server."""
    states = [{"host_store": {"pinned_bytes": pinned, "limit_bytes": 3}} for pinned in (1, 2, 3)]
    with mock.patch.object(e2e.time, "sleep"):
        for given, deadline, asked in ((states, float("inf"), 3), ([None], float("inf"), 1), (states, 0.0, 1)):
            server = mock.Mock()
            server.compressor_state.side_effect = given
            e2e._wait_for_growth(server, deadline)
            assert server.compressor_state.call_count == asked
