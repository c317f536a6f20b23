"""What diagnose measures of the tiny model: laws of budget and residency, and agreement with plain attention."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import diagnose
from benchmarks.diagnose import MEASURES, Comparison, measure_prompt, result_rows
from benchmarks.quality.models import TINY_MODEL
from benchmarks.replay import Prompt, Replay, ReplayedModel, compress, everything
from benchmarks.scenes import ask, draw_scene, user_message
from hybridkv_kernels.score_heads import STATISTICS
from tests.builders import fresh_generator, full_attention, make_compressor

SHORT = {"min_prompt_tokens": 1, "min_head_pages": 1}
ALL_STATIC, ALL_DYNAMIC, MIXED = {"theta": 0.0}, {"max_dynamic_heads": 1.0}, {"theta": 0.7, "max_dynamic_heads": 1.0}


@pytest.fixture(scope="module")
def model() -> ReplayedModel:
    return ReplayedModel(TINY_MODEL)


@pytest.fixture(scope="module")
def asked(model: ReplayedModel) -> tuple[Prompt, torch.Tensor]:
    """Prompt of two images of 12 x 11 and 9 x 7 cells, and the right answer."""
    rng = np.random.default_rng(fresh_generator().initial_seed())
    scene = draw_scene(rng, [(12, 11), (9, 7)])
    question = ask(rng, scene, "chain")
    prompt = model.prefill(model.encode([user_message(scene, question)]))
    assert [span.end - span.start for span in prompt.spans] == [12 * 11, 9 * 7]
    return prompt, model.tokenizer(question.answer, add_special_tokens=False, return_tensors="pt")["input_ids"][0]


def compressor_of(budget: float, **config: Any) -> Any:
    return make_compressor("hybridkv", 4, 2, budget=budget, **SHORT, **config)


@pytest.mark.parametrize("budget", [1.0, 0.1, 0.35])
@pytest.mark.parametrize("heads", [ALL_STATIC, ALL_DYNAMIC, MIXED])
def test_measures_keep_their_laws(model, asked, heads: dict[str, float], budget: float) -> None:
    measured, accuracy = measure_prompt(model, *asked, compressor_of(budget, **heads))
    assert set(measured) == {*MEASURES, *STATISTICS}
    assert 0 <= accuracy <= 1
    assert measured["rows_kept"].sum() <= budget * len(asked[0].ids) * measured["rows_kept"].numel()
    for name in ("captured_mass", "needle_survival", *STATISTICS):
        assert (measured[name] >= 0).all()
        assert (measured[name] <= 1 + 1e-5).all()
    assert (measured["output_error"] >= 0).all()
    assert (measured["output_error"].max() < 1e-4) == (budget == 1.0), "nothing is lost at 1.0, and something below it"
    if budget == 1.0:
        torch.testing.assert_close(measured["captured_mass"], torch.ones_like(measured["captured_mass"]))
        assert (measured["needle_survival"] == 1).all()
    if heads is not MIXED:
        assert measured["is_dynamic"].unique().tolist() == [float(heads is ALL_DYNAMIC)]


@pytest.mark.parametrize("heads", [ALL_STATIC, ALL_DYNAMIC])
def test_error_mass_and_needle_are_those_of_plain_attention(heads: dict[str, float]) -> None:
    """One query over random keys, worked out head by head from the rows that `seen` names."""
    generator = fresh_generator()

    def states(num_heads: int, num_tokens: int) -> torch.Tensor:
        return torch.randn(1, num_heads, num_tokens, 32, generator=generator)

    q, k, v = states(6, 204), states(2, 204), states(2, 204)
    prompt = Prompt(torch.arange(203), *(x[:, :, :203].transpose(1, 2) for x in (q, k, v)), torch.zeros(9), (), 0.2)
    compressor = make_compressor("hybridkv", 1, 2, budget=0.3, **SHORT, **heads)
    comparison = Comparison(prompt, compress(prompt, compressor), everything(prompt, compressor))
    own = [x[:, :, 203:] for x in (q, k, v)]
    full = full_attention(q[0, :, 203], k[0], v[0], 0.2)
    seen = torch.cat((comparison.ours.seen(0, own[0])[0, :, 0], torch.ones(2, 1, dtype=torch.bool)), dim=1)
    torch.testing.assert_close(comparison.attend(0, *own, 0.2)[0, :, 0].double(), full, rtol=1e-4, atol=1e-5)
    lost = full_attention(q[0, :, 203], k[0], v[0], 0.2, seen) - full
    error = lost.view(2, -1).norm(dim=1) / full.view(2, -1).norm(dim=1)
    probs = (q[0, :, 203].view(2, 3, 32) @ k[0].transpose(1, 2) * 0.2).softmax(-1).mean(1)
    needle = seen.gather(1, probs[:, :203].argmax(1, keepdim=True))[:, 0]
    expected = torch.stack((error.float(), (probs * seen).sum(1), needle.float()))
    torch.testing.assert_close(comparison.found[:, 0], expected, rtol=1e-3, atol=1e-4)
    assert 0.2 < seen.float().mean() < 0.4


def test_each_query_finds_the_chunks_that_the_one_before_has_left() -> None:
    """With hysteresis they stay, so that the measures of a query depend on its place."""
    generator = fresh_generator()
    q, k, v = (torch.randn(1, heads, 208, 32, generator=generator) for heads in (6, 2, 2))
    prompt = Prompt(torch.arange(200), *(x[:, :, :200].transpose(1, 2) for x in (q, k, v)), torch.zeros(9), (), 0.2)
    compressor = make_compressor("hybridkv", 1, 2, budget=0.3, **SHORT, **ALL_DYNAMIC, hysteresis=2.0)
    comparison = Comparison(prompt, compress(prompt, compressor), everything(prompt, compressor))
    own = [x[:, :, 200:] for x in (q, k, v)]
    seen = Replay(None, prompt, [compress(prompt, compressor)]).seen(0, own[0])[0]  # [H, T, N]
    comparison.attend(0, *own, 0.2)
    captured = torch.zeros(2)
    for i in range(8):
        logits = q[0, :, 200 + i].view(2, 3, 32) @ k[0, :, : 201 + i].transpose(1, 2) * 0.2
        probs = logits.softmax(-1).mean(1)
        captured += (probs[:, :200] * seen[:, i]).sum(1) + probs[:, 200:].sum(1)
    torch.testing.assert_close(comparison.found[1, 0], captured, rtol=1e-4, atol=1e-5)


def test_rows_are_means_over_prompts_and_the_last_one_over_heads() -> None:
    generator = fresh_generator()
    measured = [{name: torch.rand(3, 2, generator=generator) for name in (*MEASURES, *STATISTICS)} for _ in range(4)]
    rows = list(result_rows(measured))
    places = [(layer, head) for layer in range(3) for head in range(2)]
    assert [(row["layer"], row["kv_head"]) for row in rows] == [*places, (None, None)]
    flat = [{name: row[name] for name in MEASURES} | row["statistics"] for row in rows]
    for name in measured[0]:
        stacked = torch.stack([one[name] for one in measured])
        assert [row[name] for row in flat[:-1]] == pytest.approx(stacked.mean(0).flatten().tolist(), abs=1e-5)
        assert flat[-1][name] == pytest.approx(stacked.mean().item(), abs=1e-5)


ARGUMENTS = ["--model-path", str(TINY_MODEL), "--scene", "shuffled", "--context", "400", "--task", "get"]
ARGUMENTS += ["--num-prompts", "2", "--budget", "0.3", "--config", json.dumps(SHORT)]


def test_one_json_object_a_head_and_one_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert diagnose.main([*ARGUMENTS, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 4 * 2 + 1
    for row in rows:
        assert {"compressor", "budget", "layer", "kv_head", "statistics", "commit", "machine", "versions"} <= set(row)
        assert row["config"] == SHORT
        assert (row["n"], row["task"], row["scene"]) == (2, "get", "shuffled")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model-path", "nowhere"], "--model-path = 'nowhere' is not the folder"),
        (["--compressor", "best"], "--kv-compressor = 'best' is unknown"),
        (["--task", "sing"], "'sing'"),
        (["--task", "read"], "--task = 'read': shuffled scenes have no right answer to it"),
        (["--num-prompts", "0"], "got 0"),
        (["--config", '{"min_prompt_tokens": 900}'], "tokens is served dense"),
    ],
)
def test_bad_input_is_one_sentence(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert diagnose.main([*ARGUMENTS, *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err.splitlines()[-1]
