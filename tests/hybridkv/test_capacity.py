import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from sglang_hybridkv.cli.capacity import (
    Load,
    Machine,
    ModelShape,
    break_even,
    plan_compressed,
    plan_stock,
    pool_tokens,
    saved_a_year,
    tokens_per_s_of,
)
from sglang_hybridkv.cli.main import main
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
QWEN2_5_VL_7B = ModelShape(num_layers=28, num_kv_heads=4, head_dim=128, element_bytes=2, weight_bytes=15_231_000_000)
"""The language model, in bfloat16: 7.6 billion weights."""
H200_COPY_GB_S, LINK_GB_S = 4000.0, 50.0


def test_the_step_of_stock_on_an_h200_is_what_its_bytes_say():
    rows = map(json.loads, (RESULTS / "gpu_h200.jsonl").read_text().splitlines())
    [row] = [row for row in rows if row.get("job") == "big" and row["name"] == "stock-fi"]
    load = Load(row["context"], 256)
    pool = row["batch"] * (load.prompt_tokens + load.new_tokens)
    plan = plan_stock(QWEN2_5_VL_7B, Machine(pool, H200_COPY_GB_S, LINK_GB_S), [load])
    assert plan.requests_at_once == row["batch"]
    assert plan.step_ms == pytest.approx(row["ms_per_step"], rel=0.15)
    assert plan.tokens_per_s == pytest.approx(row["decode_tok_s"], rel=0.15)


def test_the_tokens_that_an_h200_held_are_those_of_the_pages():
    """That run had a quarter of the heads dynamic, and the prompts' end dense when the record was made."""
    rows = map(json.loads, (RESULTS / "gpu_h200.jsonl").read_text().splitlines())
    [row] = [row for row in rows if row.get("job") == "big" and row["name"] == "ours-triton-hybrid"]
    shares = {"max_dynamic_heads": 0.25, "long_prompt_dynamic_heads": 0.25}
    config = HybridKVConfig(chunk_score="mean_max", page_size=8, budget=0.1, **shares)
    machine = Machine(16 * row["context"], H200_COPY_GB_S, LINK_GB_S)
    plan = plan_compressed(QWEN2_5_VL_7B, machine, [Load(row["context"], 8)], config, 0.0)
    assert plan.resident_ratio == pytest.approx(row["meta"]["resident_ratio"], rel=0.01)
    [per_request] = {plan.host_bytes / plan.requests_at_once}
    assert per_request == row["meta"]["host_bytes"]


def test_the_pool_is_what_the_weights_leave():
    tokens = pool_tokens(QWEN2_5_VL_7B, 141e9, 0.88)
    assert tokens == (0.88 * 141e9 - 15_231_000_000) // (2 * 28 * 4 * 128 * 2)
    with pytest.raises(ValueError, match=r"--gpu-gb: 7.0 GB for weights and pool are not more than the 15.2 GB"):
        pool_tokens(QWEN2_5_VL_7B, 8e9, 0.88)


def test_a_plan_s_rate_is_that_of_a_full_pool():
    machine, loads = Machine(500_000, H200_COPY_GB_S, LINK_GB_S), [Load(8192, 512)]
    for plan in (
        plan_stock(QWEN2_5_VL_7B, machine, loads),
        plan_compressed(QWEN2_5_VL_7B, machine, loads, HybridKVConfig(), 0.15),
    ):
        full = plan.requests_at_once
        rates = [tokens_per_s_of(plan, QWEN2_5_VL_7B, machine, count) for count in (1, full // 2, full, 2 * full)]
        assert rates[2] == rates[3] == pytest.approx(plan.tokens_per_s)
        assert rates == sorted(rates)


def test_prompts_from_the_break_even_on_cost_a_step_less():
    """With a slow link it lies further off, and at last nowhere."""
    found = []
    for link in (200.0, 50.0, 20.0, 1.0):
        machine = Machine(10**7, H200_COPY_GB_S, link)
        shortest = break_even(QWEN2_5_VL_7B, machine, 64, HybridKVConfig(), 0.15)
        found.append(math.inf if shortest is None else shortest)
        for prompt in () if shortest is None else (shortest, 4 * shortest):
            loads = [Load(prompt, 64)]
            stock, compressed = (
                tokens_per_s_of(plan, QWEN2_5_VL_7B, machine, 8)
                for plan in (
                    plan_stock(QWEN2_5_VL_7B, machine, loads),
                    plan_compressed(QWEN2_5_VL_7B, machine, loads, HybridKVConfig(), 0.15),
                )
            )
            assert compressed > stock
    assert found == sorted(found)
    assert found[0] < math.inf == found[-1]


def test_a_year_of_savings():
    stock = plan_stock(QWEN2_5_VL_7B, Machine(500_000, H200_COPY_GB_S, LINK_GB_S), [Load(8192, 512)])
    twice = dataclasses.replace(stock, tokens_per_s=2 * stock.tokens_per_s)
    assert saved_a_year(stock, twice, price=3.0) == pytest.approx(3.0 * 24 * 365)
    assert saved_a_year(stock, stock, price=3.0) == 0
    assert saved_a_year(dataclasses.replace(stock, tokens_per_s=0.0), twice, price=3.0) is None


def test_a_smaller_budget_holds_more_requests_and_a_smaller_host_store_fewer():
    machine, load = Machine(500_000, H200_COPY_GB_S, LINK_GB_S), [Load(8192, 512)]
    plans = [plan_compressed(QWEN2_5_VL_7B, machine, load, HybridKVConfig(budget=b), 0.15) for b in (0.5, 0.1, 0.05)]
    counts = [plan.requests_at_once for plan in (plan_stock(QWEN2_5_VL_7B, machine, load), *plans)]
    assert counts == sorted(counts)
    assert plans[1].resident_ratio < 0.2
    half = Machine(500_000, H200_COPY_GB_S, LINK_GB_S, host_bytes=plans[1].host_bytes // 2)
    few = plan_compressed(QWEN2_5_VL_7B, half, load, HybridKVConfig(budget=0.1), 0.15)
    assert few.requests_at_once == plans[1].requests_at_once // 2
    assert few.host_bytes <= half.host_bytes


def test_rounded_rows_take_less_of_the_host_and_of_the_link():
    machine, load = Machine(400_000, 4000.0, 50.0), [Load(8192, 512)]
    plain, rounded = (
        plan_compressed(QWEN2_5_VL_7B, machine, load, HybridKVConfig(host_dtype=host_dtype), 0.15)
        for host_dtype in ("same", "int8")
    )
    share = 272 / 512  # of a record of 128 elements a row
    assert rounded.host_bytes == pytest.approx(share * plain.host_bytes)
    assert rounded.link_bytes == pytest.approx(share * plain.link_bytes)
    assert (rounded.requests_at_once, rounded.step_bytes) == (plain.requests_at_once, plain.step_bytes)


def test_a_mix_lies_between_its_kinds():
    machine, kinds = Machine(500_000, H200_COPY_GB_S, LINK_GB_S), [Load(2000, 100), Load(30_000, 1000, 3)]
    short, long, mixed = (
        plan_compressed(QWEN2_5_VL_7B, machine, loads, HybridKVConfig(), 0.15).requests_at_once
        for loads in ([kinds[0]], [kinds[1]], kinds)
    )
    assert long < mixed < short


CONFIG = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
GIVEN = ["--pool-tokens", "100000", "--load", "2000+200", "--weight-gb", "0.27"]


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": CONFIG, "dtype": "bfloat16"}))
    return ["capacity", "--model-path", str(tmp_path)]


def test_table_and_json_say_the_same(model, capsys):
    assert main([*model, *GIVEN, "--price", "3", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    pool, shortest = plans.pop("pool_tokens"), plans.pop("break_even_prompt_tokens")
    assert pool == 100_000
    assert main([*model, *GIVEN, "--price", "3"]) == 0
    table, sentences = (part.splitlines() for part in capsys.readouterr().out.split("\n\n"))
    assert f"from prompts of {shortest:,} tokens on" in sentences[0]
    assert "which saves" in sentences[2]
    assert main([*model, *GIVEN, "--price", "3", "--link-gb-s", "0.5"]) == 0
    assert re.search(r"answers what 0\.\d+ stock servers do, which costs [\d,]+ more a year", capsys.readouterr().out)
    assert table[0].split() == ["stock", "hybridkv"]
    assert table[1].split()[-2:] == [str(plan["requests_at_once"]) for plan in plans.values()]
    assert table[-1].split()[-2:] == [f"{plan['cost_per_million']:.2f}" for plan in plans.values()]


@pytest.mark.parametrize(
    "layers", [{"layer_types": ["sliding_attention", "full_attention"]}, {"sliding_window_pattern": 6}]
)
def test_layers_with_a_window_are_not_planned(tmp_path, capsys, layers):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | layers))
    assert main(["capacity", "--model-path", str(tmp_path), *GIVEN]) != 0
    assert "the plan knows no layers with a window" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_plot_is_written(model, capsys, tmp_path, more):
    plot = tmp_path / "rates.png"
    assert main([*model, *GIVEN, *more, "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert json.loads(out) if more else out.endswith(f"written       {plot}\n")


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--load", "2000"], "--load = '2000': expected tokens of prompt and answer, such as 8192+512"),
        (["--load", "2000+0"], "--load = '2000+0': expected tokens"),
        (["--load", "100+10"], "--load = 100+10 would be served without compression: "),
        (["--pool-tokens", "0"], "--pool-tokens = 0: expected a number above 0"),
        (["--memory-gb-s", "nan"], "--memory-gb-s = nan: expected a number above 0"),
        (["--fetched-share", "1.5"], "--fetched-share = 1.5: expected a number from 0 to 1"),
        (["--mem-fraction-static", "1.5"], "--mem-fraction-static = 1.5: expected a number of at most 1"),
        (["--plot", "/nowhere/rates.png"], "/nowhere/rates.png cannot be written: No such file or directory"),
        (["--price", "-1"], "--price = -1.0: expected a number at least 0"),
        (["--kv-compressor", "gzip"], "--kv-compressor = 'gzip' is unknown"),
        (["--kv-compressor-budget", "2"], "--kv-compressor-budget = 2.0 is not allowed"),
        (["--model-path", "/nowhere"], "--model-path = /nowhere: /nowhere cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(model, capsys, more, complaint):
    assert main([*model, *GIVEN, *more]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
