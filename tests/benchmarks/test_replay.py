"""Replay attends to what the engine's kernels attend to, and its prompts do not depend on what was computed before."""

from __future__ import annotations

import dataclasses
import json
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from benchmarks.compressed_prompt import CompressedPrompt, make_compressor
from benchmarks.quality.cases import CONTEXTS
from benchmarks.replay import Prompt, Replay, ReplayedModel, compress, everything
from benchmarks.scenes import ask, draw_scene, user_message
from benchmarks.traced_model import Trace, full_attention
from hybridkv_kernels.select_chunks import CHUNK_SCORES
from sglang_hybridkv.requests.spans import VisualSpan
from tests.benchmarks.test_diagnose import MODEL, SHORT
from tests.builders import fresh_generator

LAYERS, HEADS, GROUP, HEAD_DIM, LENGTH, ANSWER = 3, 2, 3, 32, 203, 4
SETTINGS = {
    **{
        f"half dynamic, {score}": ("hybridkv", {"max_dynamic_heads": 0.5, "chunk_score": score})
        for score in CHUNK_SCORES
    },
    "pairs of tokens": ("hybridkv", {"max_dynamic_heads": 0.5, "chunk_size": 2}),
    "static": ("hybridkv", {"theta": 0.0}),
    "dynamic": ("hybridkv", {"max_dynamic_heads": 1.0}),
    "pages of 16": ("hybridkv", {"max_dynamic_heads": 0.5, "page_size": 16}),
    "snapkv": ("snapkv", {}),
    "look-m": ("look-m", {}),
    "quest": ("quest", {}),
}


def draw_trace() -> tuple[Trace, Prompt]:
    generator = fresh_generator()

    def states(heads: int) -> torch.Tensor:
        return torch.randn(LAYERS, LENGTH + ANSWER, heads, HEAD_DIM, generator=generator)

    q, k, v = states(HEADS * GROUP), states(HEADS), states(HEADS)
    spans = (VisualSpan(20, 150, "image"),)
    trace = Trace(q, k, v, LENGTH, spans, HEAD_DIM**-0.5, 1.0)
    ids = torch.arange(LENGTH)
    return trace, Prompt(ids, q[:, :LENGTH], k[:, :LENGTH], v[:, :LENGTH], torch.zeros(9), spans, trace.scaling)


def compressor_of(name: str, budget: float, config: dict[str, Any]) -> Any:
    fields = SHORT if name in ("hybridkv", "quest", "snapkv", "look-m") else {}
    return make_compressor(name, json.dumps(fields | config), budget)


def decode(replay: Replay, trace: Trace, layer_idx: int, at_once: int) -> torch.Tensor:
    """[B, ANSWER, H * G * D]: attention of the answer's tokens, `at_once` in a step."""
    outs = []
    for start in range(LENGTH, LENGTH + ANSWER, at_once):
        states = (x[layer_idx, start : start + at_once].transpose(0, 1)[None] for x in (trace.q, trace.k, trace.v))
        q, k, v = (x.expand(len(replay.held), -1, -1, -1) for x in states)
        outs.append(replay.attend(layer_idx, q, k, v, trace.scaling).transpose(1, 2).flatten(2))
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("at_once", [1, ANSWER])
def test_attention_of_every_setting_is_that_of_the_engine(at_once: int) -> None:
    trace, prompt = draw_trace()
    held = [compress(prompt, compressor_of(name, 0.3, config), label) for label, (name, config) in SETTINGS.items()]
    replay = Replay(None, prompt, held)  # type: ignore[arg-type]
    for layer_idx in range(LAYERS):
        outs = decode(replay, trace, layer_idx, at_once)
        for out, (name, config) in zip(outs, SETTINGS.values(), strict=True):
            engine = CompressedPrompt(trace, compressor_of(name, 0.3, config))
            expected = torch.stack([engine.decode(layer_idx, LENGTH + i).flatten() for i in range(ANSWER)])
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_everything_is_full_attention() -> None:
    trace, prompt = draw_trace()
    replay = Replay(None, prompt, [everything(prompt, compressor_of("hybridkv", 1.0, {}))])  # type: ignore[arg-type]
    for layer_idx in range(LAYERS):
        out = decode(replay, trace, layer_idx, 2)[0]
        expected = [full_attention(trace, layer_idx, LENGTH + i)[0].flatten() for i in range(ANSWER)]
        torch.testing.assert_close(out, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_resident_share_counts_what_the_engine_holds() -> None:
    _, prompt = draw_trace()
    held = compress(prompt, compressor_of("hybridkv", 0.3, {"max_dynamic_heads": 0.5}), "")
    pages = LENGTH // 8
    kept = int(held.num_pages.sum())
    summaries = int(held.is_dynamic.sum()) * -(-pages // 16)
    assert kept <= 0.3 * pages * LAYERS * HEADS < kept + 1
    device = -(-(kept + summaries) // (LAYERS * HEADS)) + 1  # and the dense tail's page
    assert held.record(LENGTH)["resident_ratio"] == pytest.approx(device / (pages + 1))


@pytest.fixture(scope="module")
def model() -> ReplayedModel:
    return ReplayedModel(MODEL)


def assert_same_prompt(mine: Prompt, theirs: Prompt) -> None:
    for field in dataclasses.fields(Prompt):
        one, other = getattr(mine, field.name), getattr(theirs, field.name)
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        else:
            assert one == other


def test_a_prompt_is_the_same_whatever_was_computed_before(model: ReplayedModel) -> None:
    """A shared beginning changes nothing; a base with another beginning is not used."""
    generator = fresh_generator()
    ids = torch.randint(10, 200, (3, 90), generator=generator)
    ids[1, :60] = ids[0, :60]
    prompts = [{"input_ids": row[None]} for row in ids]
    base = model.prefill(prompts[0])
    for inputs in prompts[1:]:
        assert_same_prompt(model.prefill(inputs), model.prefill(inputs, base))


def test_pictures_are_read_once_for_all_questions_about_them(model: ReplayedModel) -> None:
    rng = np.random.default_rng(fresh_generator().initial_seed())
    scene = draw_scene(rng, CONTEXTS[400], arrangement="coherent")
    first, second = (model.encode([user_message(scene, ask(rng, scene, kind))]) for kind in ("get", "list"))
    base = model.prefill(first)
    alone = model.prefill(second)
    with mock.patch.object(model.model.model.visual, "forward", side_effect=AssertionError("read again")):
        after = model.prefill(second, base)
    assert_same_prompt(alone, after)


def test_decoding_everything_is_what_the_model_computes(model: ReplayedModel) -> None:
    ids = torch.randint(10, 200, (1, 80), generator=fresh_generator())
    whole = model.prefill({"input_ids": ids})
    prompt = model.prefill({"input_ids": ids[:, :72]})
    replay = Replay(model, prompt, [everything(prompt, compressor_of("hybridkv", 1.0, {}))])
    replay.step(ids[:, 72:75])
    logits = replay.step(ids[:, 75:])
    torch.testing.assert_close(logits[0, -1], whole.logits, rtol=1e-3, atol=1e-3)
