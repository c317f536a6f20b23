"""What clients do beside asking once: salts, samples, sessions, log-probs of the prompt, giving up and asking again."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from benchmarks.harness import Server
from tests.e2e.checks import (
    TOLERANCE,
    Answer,
    Reference,
    ask,
    assert_compressed,
    assert_nothing_lost,
    assert_same,
    assert_same_first_token,
    flush_cache,
    read_answer,
    request_body,
    settle,
)
from tests.e2e.conftest import CHUNK_TOKENS, OBSERVED_ROWS
from tests.e2e.prompts import IMAGE_TOKENS, Prompt, Vision, text

pytestmark = pytest.mark.server

_seeds = itertools.count(12000, 100)


@pytest.mark.parametrize("key", ["cache_salt", "extra_key"])
def test_what_one_key_has_cached_is_not_another_s(tenth: Server, key: str) -> None:
    """And the plan of the prompt is the same under each of them."""
    prompt = text(next(_seeds), 640)
    first, other, again = [ask(tenth, prompt, 8, **{key: value}) for value in ("a", "b", "a")]
    assert (first.cached, other.cached, again.cached) == (0, 0, 640 - OBSERVED_ROWS)
    assert first.record["plan"] == other.record["plan"] == again.record["plan"] is not None
    assert first.ids == other.ids == again.ids


@pytest.mark.parametrize("key", ["cache_salt", "extra_key"])
def test_under_every_key_the_answer_is_stock_s(tenth: Server, stock: Reference, vision: Vision, key: str) -> None:
    """At budget 1 and without compression, with an image, and whatever the others have left in the cache."""
    seed = next(_seeds)
    prompt = text(seed, 300) + vision.image(seed) + text(seed + 1, 60)
    expected = stock.ask(prompt)
    for value, own in (("a", {"budget": 0.1}), ("b", {"budget": 1.0}), ("c", {"enabled": False}), ("d", None)):
        params = {} if own is None else {"custom_params": {"kv_compressor": own}}
        answer = ask(tenth, prompt, sampling_params=params, **{key: value})
        assert answer.cached == 0
        if value in "bc":
            assert_same(answer, expected)
        else:
            assert_compressed(answer)
            assert_same_first_token(answer, expected)
    assert ask(tenth, prompt, **{key: "c"}).cached > 0


@pytest.mark.parametrize("parts_read", [0, 1, 6, 40])
def test_several_samples_whose_client_leaves(tenth: Server, parts_read: int) -> None:
    with tenth.stream("/generate", request_body(text(next(_seeds), 600), 1000, sampling_params={"n": 4})) as answers:
        for _ in range(parts_read):
            next(answers)
    assert_nothing_lost(tenth)


def test_two_images_and_several_samples(tenth: Server, vision: Vision) -> None:
    """SGLang wants a list of images for each prompt then, and answers a flat one with status 400."""
    seed = next(_seeds)
    prompt = text(seed, 200) + vision.images(seed, 2) + text(seed + 1, 60)
    body = request_body(prompt, 8, sampling_params={"n": 2})
    assert tenth.client.post("/generate", json=body).status_code == 400
    body["image_data"] = [body["image_data"]]
    samples = [read_answer(answer) for answer in tenth.client.post("/generate", json=body).raise_for_status().json()]
    assert len({sample.record["plan"] for sample in samples}) == 1
    for sample in samples:
        assert_compressed(sample)
    assert_nothing_lost(tenth)


def test_a_session_after_an_image_has_the_plan_of_the_whole_prompt(tenth: Server, vision: Vision) -> None:
    seed = next(_seeds)
    session = tenth.client.post("/open_session", json={"capacity_of_str_len": 10000}).raise_for_status().json()

    def turn(prompt: Prompt, rid: str | None) -> Answer:
        return ask(tenth, prompt, 12, session_params={"id": session, "rid": rid})

    opening = text(seed, 300) + vision.images(seed, 2) + text(seed + 1, 60)
    first = turn(opening, None)
    assert_compressed(first)
    question = text(seed + 2, 80)
    second = turn(question, first.meta["id"])
    assert second.meta["prompt_tokens"] == first.meta["prompt_tokens"] + 12 + 80
    tenth.client.post("/close_session", json={"session_id": session}).raise_for_status()
    flush_cache(tenth)
    whole = ask(tenth, opening + Prompt(tuple(first.ids)) + question, 12)
    assert second.record["plan"] == whole.record["plan"] is not None
    assert second.ids == whole.ids
    assert_nothing_lost(tenth)


def test_log_probs_of_a_prompt_with_an_image_at_the_border_of_a_part(
    tenth: Server, stock: Reference, vision: Vision
) -> None:
    """First alone, then beside what the tree has of it: the prompt's own log-probs are exact, and stock's."""
    seed = next(_seeds)
    prompt = text(seed, CHUNK_TOKENS - IMAGE_TOKENS // 2) + vision.image(seed) + text(seed + 1, 90)
    asked = {"logprob_start_len": 0}
    ours = [ask(tenth, prompt, 8, **asked) for _ in range(2)]
    theirs = ask(stock.server, prompt, 8, **asked)
    for answer in ours:
        assert_compressed(answer)
        assert_same_first_token(answer, theirs)
        pairs = zip(answer.meta["input_token_logprobs"], theirs.meta["input_token_logprobs"], strict=True)
        values = [(mine[0], other[0]) for mine, other in pairs if mine[0] is not None]
        assert len(values) >= len(prompt.ids) - 2
        assert max(abs(mine - other) for mine, other in values) <= TOLERANCE


def test_giving_up_and_asking_again_under_a_shared_prefix(tenth: Server, vision: Vision) -> None:
    """Twelve rounds, beside requests with images that share nothing with them."""
    seed = next(_seeds)
    shared = text(seed, 400)

    def give_up_and_ask_again(i: int) -> str:
        prompt = shared + text(seed + 1 + i % 3, 150)
        with tenth.stream("/generate", request_body(prompt, 500)) as answers:
            for _ in range(i % 4):
                next(answers)
        return str(ask(tenth, prompt, 4).record["plan"])

    with ThreadPoolExecutor(3) as pool:
        images = [pool.submit(ask, tenth, vision.images(seed + i, 5) + text(seed + i, 40), 20) for i in range(6)]
        plans = list(pool.map(give_up_and_ask_again, range(12)))
        for future in images:
            assert_compressed(future.result())
    assert [plans[i : i + 3] for i in range(0, 12, 3)] == [plans[:3]] * 4
    assert len(set(plans)) == 3
    assert not settle(tenth)
    assert_nothing_lost(tenth)


@pytest.mark.parametrize("damage", ["truncated", "no picture", "no base64"])
def test_a_damaged_image_is_refused_and_those_beside_it_go_on(tenth: Server, vision: Vision, damage: str) -> None:
    seed = next(_seeds)
    prompt = text(seed, 200) + vision.image(seed) + text(seed + 1, 60)
    head, data = prompt.images[0].split(",")
    damaged = {"truncated": data[: len(data) // 8 * 4], "no picture": "AAEC" * 400, "no base64": "#" + data}[damage]
    body = request_body(prompt, 8) | {"image_data": [f"{head},{damaged}"]}
    with tenth.stream("/generate", request_body(text(seed + 2, 500), 60)) as answers:
        next(answers)
        response = tenth.client.post("/generate", json=body)
        assert response.status_code == 400
        assert "IMAGE data at index 0" in response.text
        *_, last = answers
    assert last["meta_info"]["completion_tokens"] == 60
    assert_compressed(ask(tenth, prompt, 8))
    assert_nothing_lost(tenth)


def test_requests_with_images_that_never_decode_hold_no_memory(tenth: Server, vision: Vision) -> None:
    """Of 800 the scheduler's memory stayed within four mebibytes; what one image becomes is one."""

    def ask_for_one_token(i: int) -> None:
        prompt = text(seed + 10 + i, 300) + vision.images(seed + i % 4, 2) + text(seed, 60)
        assert ask(tenth, prompt, 1).record["reason"] == "no_decode"

    seed = next(_seeds)
    [scheduler] = [child for child in psutil.Process(tenth.process.pid).children() if "scheduler" in child.name()]
    resident = []
    for numbers in (range(30), range(30, 80)):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask_for_one_token, numbers))
        resident.append(scheduler.memory_info().rss)
    assert resident[1] - resident[0] < 20 * 2**20
    assert_nothing_lost(tenth)


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_weights_are_updated_while_compressed_streams_run(tenth: Server, vl_model: Path, mode: str) -> None:
    """With the same ones, so that what was compressed before and what is computed after belong together."""
    seed = next(_seeds)
    prompts = [text(seed + i, 500 + 60 * i) for i in range(3)]
    quiet = [ask(tenth, prompt, 240) for prompt in prompts]
    tenth.client.post("/flush_cache").raise_for_status()
    with ExitStack() as stack:
        streams = [stack.enter_context(tenth.stream("/generate", request_body(prompt, 240))) for prompt in prompts]
        for events in streams:
            assert next(events)["meta_info"]["finish_reason"] is None
        tenth.client.post("/pause_generation", json={"mode": mode}).raise_for_status()
        update = {"model_path": str(vl_model), "flush_cache": mode == "retract"}
        tenth.client.post("/update_weights_from_disk", json=update).raise_for_status()
        tenth.client.post("/continue_generation", json={}).raise_for_status()
        answers = [read_answer(list(events)[-1]) for events in streams]
    for answer, before in zip(answers, quiet, strict=True):
        assert answer.record["plan"] == before.record["plan"] is not None
        assert answer.meta["completion_tokens"] == 240
        # What a retracted request has generated is computed again, exactly.
        assert answer.ids == before.ids or mode == "retract"
    assert_nothing_lost(tenth)
