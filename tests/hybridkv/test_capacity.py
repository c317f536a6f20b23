import json
from pathlib import Path

import pytest

from sglang_hybridkv.cli.capacity import Load, Machine, ModelShape, plan_compressed, plan_stock
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
    assert main([*model, *GIVEN, "--price", "3"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["stock", "hybridkv"]
    assert table[1].split()[-2:] == [str(plan["requests_at_once"]) for plan in plans.values()]
    assert table[-1].split()[-2:] == [f"{plan['cost_per_million']:.2f}" for plan in plans.values()]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--load", "2000"], "--load = '2000': expected tokens of prompt and answer, such as 8192+512"),
        (["--load", "2000+0"], "--load = '2000+0': expected tokens"),
        (["--load", "100+10"], "--load = 100+10 would be served without compression: "),
        (["--pool-tokens", "0"], "--pool-tokens = 0: expected a number above 0"),
        (["--memory-gb-s", "nan"], "--memory-gb-s = nan: expected a number above 0"),
        (["--fetched-share", "1.5"], "--fetched-share = 1.5: expected a number from 0 to 1"),
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
