"""What diagnose measures of the tiny model: laws of budget and residency, and agreement with plain attention."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import diagnose
from benchmarks.compressed_prompt import CompressedPrompt, make_compressor
from benchmarks.diagnose import MEASURES, measure_prompt, rank_correlation, result_rows
from benchmarks.scenes import Question, Scene, ask, draw_scene
from benchmarks.traced_model import Trace, TracedModel, full_attention
from hybridkv_kernels.score_heads import STATISTICS
from tests import builders

MODEL = Path(diagnose.__file__).parent / "models" / "tiny-qwen2_5_vl-scenes"
SHORT = {"min_prompt_tokens": 1, "min_head_pages": 1}
ALL_STATIC, ALL_DYNAMIC = {"theta": 0.0}, {"max_dynamic_heads": 1.0}


@pytest.fixture(scope="module")
def model() -> TracedModel:
    return TracedModel(str(MODEL))


@pytest.fixture(scope="module")
def drawn() -> tuple[Scene, Question]:
    """Two images of 12 x 11 and 9 x 7 cells."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"scene seed {seed}")
    rng = np.random.default_rng(seed)
    scene = draw_scene(rng, [(12, 11), (9, 7)], arrangement="shuffled")
    return scene, ask(rng, scene, "chain")


@pytest.fixture(scope="module")
def trace(model: TracedModel, drawn: tuple[Scene, Question]) -> Trace:
    return model.trace(*drawn)


def compressor_of(budget: float, **config: Any) -> Any:
    return make_compressor("hybridkv", json.dumps(SHORT | config), budget)


def test_a_trace_knows_where_images_and_answer_lie(trace: Trace, drawn: tuple[Scene, Question]) -> None:
    scene, _ = drawn
    assert [span.end - span.start for span in trace.spans] == [12 * 11, 9 * 7]
    assert sum(span.end - span.start for span in trace.spans) == scene.num_visual_tokens
    assert 0 < trace.spans[0].start < trace.spans[0].end < trace.spans[1].start < trace.spans[1].end < trace.prompt_len
    assert trace.prompt_len < trace.q.shape[1] == trace.k.shape[1] == trace.v.shape[1]


def test_the_answer_changes_nothing_of_the_prompt(
    model: TracedModel, trace: Trace, drawn: tuple[Scene, Question]
) -> None:
    scene, question = drawn
    other = model.trace(scene, Question(question.kind, question.text, question.answer[::-1]))
    assert other.prompt_len == trace.prompt_len
    for mine, theirs in ((trace.q, other.q), (trace.k, other.k), (trace.v, other.v)):
        torch.testing.assert_close(mine[:, : trace.prompt_len], theirs[:, : trace.prompt_len], rtol=1e-3, atol=1e-4)
    assert not torch.equal(trace.k[:, trace.prompt_len :], other.k[:, trace.prompt_len :])


def test_full_attention_is_what_the_model_computed(model: TracedModel, drawn: tuple[Scene, Question]) -> None:
    outputs = []
    layers = model.model.model.language_model.layers
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0][0]))
        for layer in layers
    ]
    trace = model.trace(*drawn)
    for hook in hooks:
        hook.remove()
    assert len(outputs) == len(trace.q)
    for layer_idx, output in enumerate(outputs):
        for position in (0, trace.prompt_len - 1, trace.q.shape[1] - 1):
            mine, probs = full_attention(trace, layer_idx, position)
            torch.testing.assert_close(mine.flatten(), output[position], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:2]))


@pytest.mark.parametrize("heads", [ALL_STATIC, ALL_DYNAMIC, {"theta": 0.7, "max_dynamic_heads": 1.0}])
def test_nothing_is_lost_at_budget_one(trace: Trace, heads: dict[str, float]) -> None:
    measured = measure_prompt(trace, compressor_of(1.0, **heads))
    assert measured["output_error"].max() < 1e-4
    torch.testing.assert_close(measured["captured_mass"], torch.ones_like(measured["captured_mass"]))
    assert (measured["needle_survival"] == 1).all()


@pytest.mark.parametrize("budget", [0.1, 0.35])
@pytest.mark.parametrize("heads", [ALL_STATIC, ALL_DYNAMIC, {"theta": 0.7, "max_dynamic_heads": 1.0}])
def test_measures_keep_their_laws(trace: Trace, heads: dict[str, float], budget: float) -> None:
    measured = measure_prompt(trace, compressor_of(budget, **heads))
    assert set(measured) == {*MEASURES, *STATISTICS}
    assert measured["rows_kept"].sum() <= budget * trace.prompt_len * measured["rows_kept"].numel()
    for name in ("captured_mass", "needle_survival", *STATISTICS):
        assert (measured[name] >= 0).all()
        assert (measured[name] <= 1 + 1e-5).all()
    assert (measured["output_error"] >= 0).all()
    assert measured["output_error"].max() > 1e-3, "something is lost"
    if heads != {"theta": 0.7, "max_dynamic_heads": 1.0}:
        assert measured["is_dynamic"].unique().tolist() == [float(heads == ALL_DYNAMIC)]


@pytest.mark.parametrize("heads", [ALL_STATIC, ALL_DYNAMIC, {"theta": 0.7, "max_dynamic_heads": 1.0}])
def test_a_head_attends_to_what_is_called_resident_and_to_the_tail(trace: Trace, heads: dict[str, float]) -> None:
    prompt = CompressedPrompt(trace, compressor_of(0.2, **heads))
    for layer_idx in range(len(trace.q)):
        for position in range(trace.prompt_len, trace.q.shape[1]):
            out = prompt.decode(layer_idx, position)
            keep = torch.ones(trace.k.shape[2], position + 1, dtype=torch.bool)
            keep[:, : prompt.covered] = prompt.resident(layer_idx)
            counts = prompt.table.num_head_pages[1, layer_idx] * prompt.compressor.config.page_size
            assert prompt.resident(layer_idx).sum(1).tolist() == counts.tolist()
            k, v = (rows[layer_idx, : position + 1].transpose(0, 1) for rows in (trace.k, trace.v))
            expected = builders.full_attention(trace.q[layer_idx, position], k, v, trace.scaling, keep)
            torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-4)


def test_two_measurements_agree(trace: Trace) -> None:
    compressor = compressor_of(0.2, theta=0.7, max_dynamic_heads=1.0)
    first, again = (measure_prompt(trace, compressor) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_prompt_that_would_stay_dense_is_refused(trace: Trace) -> None:
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens is served dense: the prompt has fewer than"):
        CompressedPrompt(trace, make_compressor("hybridkv", '{"min_prompt_tokens": 5000}', 0.5))
    with pytest.raises(ValueError, match=r"is served dense: the budget is below"):
        CompressedPrompt(trace, compressor_of(0.05, min_head_pages=8))


def plain_rank_correlation(x: list[float], y: list[float]) -> float:
    ranks = [[sum(b < a for b in values) + sum(b == a for b in values) / 2 for a in values] for values in (x, y)]
    centred = [[rank - sum(values) / len(values) for rank in values] for values in ranks]
    dot, xx, yy = (
        sum(a * b for a, b in zip(p, q, strict=True))
        for p, q in ((centred[0], centred[1]), (centred[0], centred[0]), (centred[1], centred[1]))
    )
    return dot / (xx * yy) ** 0.5


def test_rank_correlation() -> None:
    rng = np.random.default_rng()
    x = rng.integers(0, 6, 40).astype(float)
    y = x + rng.integers(0, 4, 40)
    assert rank_correlation(x, y) == pytest.approx(plain_rank_correlation(x.tolist(), y.tolist()))
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1.0)
    assert rank_correlation(x, -(x**3)) == pytest.approx(-1.0)
    assert rank_correlation(x, np.ones(40)) is None


def test_rows_are_means_over_prompts_and_the_last_one_over_heads() -> None:
    generator = builders.fresh_generator()
    measured = [{name: torch.rand(3, 2, generator=generator) for name in (*MEASURES, *STATISTICS)} for _ in range(4)]
    rows = list(result_rows(measured))
    places = [(layer, head) for layer in range(3) for head in range(2)]
    assert [(row["layer"], row["kv_head"]) for row in rows] == [*places, (None, None)]
    flat = [{name: row[name] for name in MEASURES} | row["statistics"] for row in rows]
    for name in measured[0]:
        stacked = torch.stack([one[name] for one in measured])
        assert [row[name] for row in flat[:-1]] == pytest.approx(stacked.mean(0).flatten().tolist(), abs=1e-5)
        assert flat[-1][name] == pytest.approx(stacked.mean().item(), abs=1e-5)
    assert set(rows[-1]["error_correlation"]) == set(STATISTICS)
    assert "error_correlation" not in rows[0]


@pytest.fixture
def arguments(model: TracedModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a short run; the checkpoint is loaded once for all tests, after the path was checked."""
    monkeypatch.setattr(diagnose, "TracedModel", lambda path, dtype: model if path == str(MODEL) else TracedModel(path))
    common = ["--model-path", str(MODEL), "--scene", "shuffled", "--layout", "9x9", "--task", "get", "--num-prompts"]
    return [*common, "2", "--budget", "0.3", "--config", json.dumps(SHORT)]


def test_one_json_object_a_head_and_one_for_all(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert diagnose.main([*arguments, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 4 * 2 + 1
    for row in rows:
        assert {"compressor", "budget", "layer", "kv_head", "statistics", "commit", "machine", "versions"} <= set(row)
        assert set(row["statistics"]) == set(STATISTICS)
        assert row["config"] == SHORT
        assert (row["n"], row["task"], row["scene"]) == (2, "get", "shuffled")
    assert rows[-1]["layer"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model-path", "nowhere"], "--model-path = 'nowhere' is not a checkpoint"),
        (["--compressor", "best"], "--kv-compressor = 'best' is unknown"),
        (["--budget", "1.5"], "--kv-compressor-budget = 1.5 is not allowed"),
        (["--config", "{"], "is not valid JSON"),
        (["--task", "sing"], "'sing'"),
        (["--scene", "upside-down"], "'upside-down'"),
        (["--config", '{"min_prompt_tokens": 900}'], "tokens is served dense"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert diagnose.main([*arguments, *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err.splitlines()[-1]


@pytest.mark.parametrize(
    "flags", [["--layout", "20"], ["--layout", "axb"], ["--num-prompts", "0"], ["--dtype", "int8"]]
)
def test_bad_flags_are_refused(arguments: list[str], flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        diagnose.main([*arguments, *flags])
    assert exit_.value.code == 2
    assert flags[1] in capsys.readouterr().err
