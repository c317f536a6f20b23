"""Replay attends to what the engine's kernels attend to, and its prompts do not depend on what was computed before."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from benchmarks.quality.cases import CONTEXTS
from benchmarks.quality.models import TINY_MODEL
from benchmarks.replay import Prompt, Replay, ReplayedModel, compress, everything, observe
from benchmarks.scenes import ask, draw_scene, user_message
from hybridkv_kernels.chunks import CHUNK_SCORES, CODE_HEADER
from sglang_hybridkv.requests.spans import VisualSpan
from tests.builders import TinyPool, fresh_generator, full_attention, make_compressor

LAYERS, HEADS, GROUP, HEAD_DIM, LENGTH, ANSWER = 3, 2, 3, 32, 203, 4
SETTINGS = {
    **{
        f"half dynamic, {score}": ("hybridkv", {"max_dynamic_heads": 0.5, "chunk_score": score})
        for score in CHUNK_SCORES
    },
    "pairs of tokens": ("hybridkv", {"max_dynamic_heads": 0.5, "chunk_size": 2}),
    "static": ("hybridkv", {"theta": 0.0}),
    "dynamic": ("hybridkv", {"max_dynamic_heads": 1.0}),
    "hysteresis": ("hybridkv", {"max_dynamic_heads": 0.5, "hysteresis": 1.0}),
    # Queries are random: the cosine of two is above this as often as below.
    "prefetch": ("hybridkv", {"max_dynamic_heads": 0.5, "prefetch": "previous_query", "prefetch_similarity": 1e-6}),
    "prefetch of pages": (
        "hybridkv",
        {"max_dynamic_heads": 0.5, "chunk_score": "mean_max", "prefetch": "previous_query", "prefetch_similarity": 0.1},
    ),
    "rounded": ("hybridkv", {"max_dynamic_heads": 0.5, "host_dtype": "int8"}),
    "rounded pages": ("hybridkv", {"max_dynamic_heads": 1.0, "host_dtype": "int8", "chunk_score": "mean_max"}),
    "pages of 16": ("hybridkv", {"max_dynamic_heads": 0.5, "page_size": 16}),
    "snapkv": ("snapkv", {}),
    "look-m": ("look-m", {}),
    "quest": ("quest", {}),
}


def compressor_of(name: str, budget: float, **config: Any) -> Any:
    return make_compressor(name, LAYERS, HEADS, budget=budget, min_prompt_tokens=1, min_head_pages=1, **config)


class Engine:
    """The engine's own pool and kernels on one random prompt and its answer: the same for the same `seed`."""

    def __init__(self, compressor: Any, seed: int):
        shape = {"num_layers": LAYERS, "num_kv_heads": HEADS, "group_size": GROUP, "head_dim": HEAD_DIM}
        self.pool = TinyPool(torch.Generator().manual_seed(seed), compressor=compressor, **shape)
        self.request = self.pool.add_prompt(LENGTH)
        self.q = self.pool.randn(LAYERS, LENGTH + ANSWER, HEADS * GROUP, HEAD_DIM)
        k, v = (x.transpose(1, 2) for x in (self.request.keys, self.request.values))
        spans = (VisualSpan(20, 150, "image"),)
        self.prompt = Prompt(torch.arange(LENGTH), self.q[:, :LENGTH], k, v, torch.zeros(9), spans, HEAD_DIM**-0.5)

    def decode(self) -> torch.Tensor:
        """[L, ANSWER, H * G * D]: attention of the answer's tokens, one step each."""
        pool, request = self.pool, self.request
        seen = observe(self.prompt, pool.compressor)
        observed = (seen.statistic, seen.salience, seen.query_rms)
        pool.compress(request, *observed, spans=self.prompt.spans)
        outs = []
        for i in range(ANSWER):
            pool.append_token(request)
            q = self.q[:, LENGTH + i].unsqueeze(1)
            outs.append([pool.decode([request], layer_idx, q[layer_idx]).flatten() for layer_idx in range(LAYERS)])
        return torch.stack([torch.stack(layers) for layers in outs], dim=1)


def replay_answer(replay: Replay, engine: Engine, at_once: int) -> torch.Tensor:
    """[L, B, ANSWER, H * G * D]: the same of replay, `at_once` tokens in a step; the engine has decoded before."""
    own = [x.transpose(1, 2) for x in (engine.request.keys, engine.request.values)]
    by_layer = []
    for layer_idx in range(LAYERS):
        outs = []
        for start in range(LENGTH, LENGTH + ANSWER, at_once):
            states = (x[layer_idx, start : start + at_once].transpose(0, 1)[None] for x in (engine.q, *own))
            q, k, v = (x.expand(len(replay.held), -1, -1, -1) for x in states)
            outs.append(replay.attend(layer_idx, q, k, v, engine.prompt.scaling).transpose(1, 2).flatten(2))
        by_layer.append(torch.cat(outs, dim=1))
    return torch.stack(by_layer)


@pytest.mark.parametrize("at_once", [1, ANSWER])
def test_attention_of_every_setting_is_that_of_the_engine(at_once: int) -> None:
    seed = fresh_generator().initial_seed()
    compressors = [compressor_of(name, 0.3, **config) for name, config in SETTINGS.values()]
    engines = [Engine(compressor, seed) for compressor in compressors]
    expected = [engine.decode() for engine in engines]
    prompt = engines[0].prompt
    held = [compress(prompt, one) for one in compressors]
    outs = replay_answer(Replay(None, prompt, held), engines[0], at_once)
    for out, label, one in zip(outs.unbind(1), SETTINGS, expected, strict=True):
        assert torch.allclose(out, one, rtol=1e-4, atol=1e-5), label


def test_everything_is_full_attention() -> None:
    engine = Engine(compressor_of("hybridkv", 1.0), fresh_generator().initial_seed())
    engine.decode()
    replay = Replay(None, engine.prompt, [everything(engine.prompt, engine.pool.compressor)])
    outs = replay_answer(replay, engine, 2)[:, 0].double()
    for layer_idx in range(LAYERS):
        for i, position in enumerate(range(LENGTH, LENGTH + ANSWER)):
            k, v = (x[layer_idx, :, : position + 1] for x in (engine.request.keys, engine.request.values))
            expected = full_attention(engine.q[layer_idx, position], k, v, engine.prompt.scaling)
            torch.testing.assert_close(outs[layer_idx, i], expected.flatten(), rtol=1e-4, atol=1e-5)


def test_resident_share_counts_what_the_engine_holds() -> None:
    prompt = Engine(compressor_of("hybridkv", 1.0), fresh_generator().initial_seed()).prompt
    held = compress(prompt, compressor_of("hybridkv", 0.3, max_dynamic_heads=0.5))
    pages = LENGTH // 8
    kept = int(held.num_pages.sum())
    vectors = -(-(CODE_HEADER + pages) // 2)  # half of two bits an element is a sixteenth of a key of 16 bits
    summaries = int(held.is_dynamic.sum()) * -(-vectors // 16)
    assert kept <= 0.3 * pages * LAYERS * HEADS < kept + 1
    device = -(-(kept + summaries) // (LAYERS * HEADS)) + 1  # and the dense tail's page
    assert held.record(LENGTH)["resident_ratio"] == pytest.approx(device / (pages + 1))


@pytest.fixture(scope="module")
def model() -> ReplayedModel:
    return ReplayedModel(TINY_MODEL)


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
    replay = Replay(model, prompt, [everything(prompt, compressor_of("hybridkv", 1.0))])
    replay.step(ids[:, 72:75])
    logits = replay.step(ids[:, 75:])
    torch.testing.assert_close(logits[0, -1], whole.logits, rtol=1e-3, atol=1e-3)
