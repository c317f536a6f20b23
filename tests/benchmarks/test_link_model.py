"""The link model counts what the engine counts, and its arithmetic is right on a trace made by hand."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import link_model
from benchmarks.chunk_trace import TracedReplay, Traffic, rounded
from benchmarks.link_model import (
    LONG_CONTEXT,
    LONG_HEADS,
    LONG_REQUESTS,
    MEASURES,
    Measure,
    long_prompt,
    summary,
    table,
)
from benchmarks.replay import compress
from tests.benchmarks.test_replay import ANSWER, HEADS, LAYERS, Engine, compressor_of, replay_answer
from tests.builders import fresh_generator

# One head, three steps, five chunks; it begins with the first two and always has the last one.
CHOSEN = torch.tensor([[[1, 0, 1, 0, 1], [1, 0, 0, 1, 1], [1, 0, 0, 1, 1]]], dtype=torch.bool)
FIRST = torch.tensor([[1, 1, 0, 0, 1]], dtype=torch.bool)
FORCED = torch.tensor([[0, 0, 0, 0, 1]], dtype=torch.bool)


def hand_made(waits: list[bool]) -> Traffic:
    traffic = Traffic.empty(3)
    traffic.add(CHOSEN, FIRST, FORCED, torch.tensor(waits))
    return traffic


def answer(traffic: Traffic, **changes: object) -> dict[str, object]:
    quality = {"kl": torch.tensor([0.5, 0.0, 0.25]), "kept": torch.tensor([False, True, True]), "dynamic_heads": 1}
    return {"traffic": traffic, **quality, **changes}


class TestArithmetic:
    def test_a_chunk_is_fetched_when_the_step_before_had_not_chosen_it(self):
        traffic = hand_made([True, False, True])
        assert traffic.chosen.tolist() == [2, 2, 2]
        assert traffic.fetched.tolist() == [1, 1, 0]
        assert traffic.waited.tolist() == [1, 0, 0]
        assert (traffic.corrected.tolist(), traffic.layers.tolist()) == ([1, 0, 1], [1, 1, 1])

    def test_the_first_step_counts_for_itself(self):
        measure = MEASURES[5]
        row = summary(measure, [answer(hand_made([True, False, True]))], head_dim=64)
        assert (row["answers"], row["steps"], row["first_hit_rate"]) == (1, 2, 0.5)
        assert (row["hit_rate"], row["chosen_per_step"], row["correction_rate"]) == (0.75, 2, 0.5)
        assert row["bytes_per_step"] == 0.5 * 2 * 64 * 2, "half a chunk of one row of keys and one of values"
        assert row["waited_share"] == 0
        assert (row["kl"], row["tokens_kept"], row["answers_kept"]) == (0.25, round(2 / 3, 4), 0)

    @pytest.mark.parametrize(
        ("measure", "size"),
        [
            (Measure("pages", {"chunk_size": 8}), 8 * 512),
            (Measure("tokens"), 512),
            (Measure("one byte", host_dtype="int8"), 256 + 16),
        ],
    )
    def test_bytes_of_a_chunk(self, measure, size):
        assert measure.chunk_bytes(128) == size

    def test_long_prompts_move_the_same_share_of_their_own_rows(self):
        tokens, pages = (long_prompt(Measure("", config), 0.1, 0.5) for config in ({}, {"chunk_size": 8}))
        dynamic, rows = tokens["long_dynamic_heads"], tokens["long_rows_per_dynamic_head"]
        assert dynamic == round(0.34 * LONG_HEADS)
        budget = 0.1 * LONG_CONTEXT * LONG_HEADS
        assert rows * (dynamic + (LONG_HEADS - dynamic) / 2) == pytest.approx(budget, rel=1e-3)
        for row, gb_s, always in ((tokens, 28, 4 + 8), (pages, 50, 8 + 8)):
            fetched = LONG_REQUESTS * dynamic * (rows - always) * 0.1 * 512
            assert row["long_mb_per_step"] == pytest.approx(fetched / 1e6, rel=1e-3)
            assert row["long_link_ms"] == pytest.approx(fetched / gb_s / 1e6, rel=1e-2)
            assert row["long_waited_ms"] == pytest.approx(row["long_link_ms"] / 2, rel=1e-2)

    def test_the_table_has_a_line_for_each_row(self):
        head = {"model": "tiny", "scene": "text", "tasks": ["sequel"], "prompt_tokens": 1000}
        rows = [head | summary(measure, [answer(hand_made([True] * 3))], 64) for measure in MEASURES]
        lines = table([json.loads(json.dumps(row)) for row in rows]).splitlines()
        assert lines[0] == "`tiny`, 1 answers (sequel) about texts of 1,000 tokens, 2 steps:"
        assert [line.split("|")[1].strip() for line in lines[4:]] == [measure.name for measure in MEASURES]


@pytest.fixture(params=[{}, {"hysteresis": 0.0}, {"chunk_size": 8}, {"chunk_score": "mean_max"}])
def traced(request):
    """The engine after its answer, and the same answer traced."""
    compressor = compressor_of("hybridkv", 0.3, max_dynamic_heads=0.5, **request.param)
    engine = Engine(compressor, fresh_generator().initial_seed())
    engine.decode()
    held = compress(engine.prompt, compressor)
    replay = TracedReplay(None, engine.prompt, held, prefetch=False, whole=engine.prompt)
    replay_answer(replay, engine, ANSWER)
    return engine, replay


def test_traffic_is_what_the_engine_counts(traced):
    engine, replay = traced
    chosen, hits = engine.pool.counters.tolist()
    assert (int(replay.traffic.chosen.sum()), int(replay.traffic.fetched.sum())) == (chosen, chosen - hits)
    assert torch.equal(replay.traffic.waited, replay.traffic.fetched), "without prefetch attention waits for all"
    assert replay.traffic.layers.tolist() == [int(replay.held[0].is_dynamic.any(1).sum())] * ANSWER


class TestPrefetch:
    def queries(self):
        return torch.randn(1, HEADS, 3, ANSWER, 32, generator=fresh_generator())

    def pair(self):
        compressor = compressor_of("hybridkv", 0.3, max_dynamic_heads=1.0)
        engine = Engine(compressor, fresh_generator().initial_seed())
        engine.decode()
        held = compress(engine.prompt, compressor)
        return [TracedReplay(None, engine.prompt, held, prefetch=on, whole=engine.prompt) for on in (True, False)]

    def test_queries_that_are_alike_attend_to_what_the_last_one_chose(self, monkeypatch):
        mine, plain = self.pair()
        monkeypatch.setattr(mine, "waits", lambda *_: torch.tensor([True, False, True, False]))
        q = self.queries()
        ours, theirs = (next(iter(one._retrieve(0, q)))[2][:, 0] for one in (mine, plain))
        for step, source in enumerate([0, 0, 2, 2]):
            assert torch.equal(ours[:, step], theirs[:, source])
        assert torch.equal(mine.traffic.fetched, plain.traffic.fetched), "the traffic is the same, its moment is not"
        waits = torch.tensor([1, 0, 1, 0])
        assert torch.equal(mine.traffic.waited, plain.traffic.fetched * waits)

    def test_a_request_waits_when_the_mean_query_of_any_head_has_moved(self):
        mine, plain = self.pair()
        q = torch.ones(1, HEADS, 3, ANSWER, 32)
        q[0, 1, :, 2:] = -1
        assert mine.waits(0, q).tolist() == [True, False, True, False]
        assert plain.waits(0, q).all()


def test_rounding_changes_dynamic_heads_only_and_by_half_a_level():
    engine = Engine(compressor_of("hybridkv", 0.3), fresh_generator().initial_seed())
    is_dynamic = torch.zeros(LAYERS, HEADS, dtype=torch.bool)
    is_dynamic[1, 0] = True
    prompt, short = engine.prompt, rounded(engine.prompt, is_dynamic)
    change = (short.k - prompt.k).abs()
    assert torch.equal(short.k[0], prompt.k[0])
    assert (change[1, :, 1] == 0).all()
    levels = prompt.k[1, :, 0].abs().amax(-1) / 127
    assert (change[1, :, 0] <= levels[:, None] / 2 + 1e-6).all()
    assert (change[1, :, 0] > 0).any()


def test_no_measure_changes_what_is_dynamic():
    """They are compared at the same head types and the same number of rows."""
    compressors = [measure.compressor for measure in link_model.MEASURES]
    prompt = Engine(compressor_of("hybridkv", 1.0), fresh_generator().initial_seed()).prompt
    held = [compress(prompt, compressor) for compressor in compressors]
    for one in held[1:]:
        assert torch.equal(one.is_dynamic, held[0].is_dynamic)
        assert torch.equal(one.num_pages, held[0].num_pages)
