"""A prompt has one plan: types, pages and kept tokens of all heads depend on the prompt and the settings alone.

`meta_info.kv_compressor.plan` is a digest of all three, so that equal digests are equal plans to the bit. Answers are
compared as well: token for token, log-probs within the tolerance of all server tests. What retractions leave of a plan
is in test_retraction.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from benchmarks.harness import Server, parallel
from tests.e2e.checks import (
    Answer,
    ask,
    assert_compressed,
    assert_same,
    flush_cache,
    read_answer,
    request_body,
)
from tests.e2e.conftest import OBSERVED_ROWS, VL, make_server, run_servers
from tests.e2e.prompts import Prompt, Vision, text

pytestmark = pytest.mark.server

PAGE = 16
NEW_TOKENS = 24
CHUNK_SIZES = (64, 512, 8192)
_seeds = itertools.count(11000, 100)


@pytest.fixture(scope="module")
def chunked() -> Iterator[list[Server]]:
    """One server for each of CHUNK_SIZES."""
    yield from run_servers(
        *(make_server(VL, 0.1, chunked_prefill_size=size, name=f"chunk-{size}") for size in CHUNK_SIZES)
    )


@pytest.fixture(params=["text", "ends-in-a-page", "images", "image-last"])
def prompt(request: pytest.FixtureRequest, vision: Vision) -> Prompt:
    """One that no server has seen; with images, fewer text rows than are observed follow the last one."""
    seed = next(_seeds)
    return {
        "text": text(seed, 640),
        "ends-in-a-page": text(seed, 651),
        "images": text(seed, 10) + vision.images(seed, 5) + text(seed + 1, 9),
        "image-last": text(seed, 300) + vision.images(seed, 2),
    }[request.param]


def first_answer(server: Server, prompt: Prompt) -> Answer:
    """Of a prompt that the server has not seen, alone."""
    answer = ask(server, prompt, NEW_TOKENS)
    assert_compressed(answer)
    assert answer.cached == 0
    return answer


def assert_same_plan(answer: Answer, first: Answer) -> None:
    """The plan to the bit, and what is generated over it."""
    assert_compressed(answer)
    assert answer.record["plan"] == first.record["plan"]
    assert_same(answer, first)


def test_asked_again(tenth: Server, prompt: Prompt) -> None:
    first = first_answer(tenth, prompt)
    again = ask(tenth, prompt, NEW_TOKENS)
    assert again.cached > 0
    assert_same_plan(again, first)


def test_asked_again_after_another_request_has_extended_the_tree(tenth: Server, prompt: Prompt) -> None:
    """The tree then holds the whole prompt and more, and could give all but its last token."""
    first = first_answer(tenth, prompt)
    ask(tenth, prompt + text(next(_seeds), 100), NEW_TOKENS)
    assert_same_plan(ask(tenth, prompt, NEW_TOKENS), first)


@pytest.mark.parametrize("shared", [300, 301, 607, 608, 609, 630])
def test_a_hit_that_ends_before_in_or_behind_the_observed_rows(tenth: Server, shared: int) -> None:
    seed = next(_seeds)
    prompt = text(seed, 640)
    other = Prompt(prompt.ids[:shared]) + text(seed + 1, 640 - shared)
    ask(tenth, other, 1)
    after_hit = ask(tenth, prompt, NEW_TOKENS)
    assert after_hit.cached == min(shared, 640 - OBSERVED_ROWS) // PAGE * PAGE
    flush_cache(tenth)
    assert_same_plan(after_hit, first_answer(tenth, prompt))


def test_several_samples(tenth: Server, prompt: Prompt) -> None:
    """SGLang caches the prompt first, so that each sample is a hit."""
    body = request_body(prompt, NEW_TOKENS, sampling_params={"n": 3})
    if prompt.images:
        body["image_data"] = [body["image_data"]]  # with n, SGLang wants a list for each prompt
    samples = [read_answer(answer) for answer in tenth.client.post("/generate", json=body).raise_for_status().json()]
    assert any(sample.cached for sample in samples)
    flush_cache(tenth)
    first = first_answer(tenth, prompt)
    for sample in samples:
        assert_same_plan(sample, first)


def test_in_a_batch_with_others(tenth: Server, vision: Vision) -> None:
    seed = next(_seeds)
    prompts = [text(seed + i, 340 + 41 * i) for i in range(4)]
    prompts += [text(seed + 5 + i, 20) + vision.images(seed + 10 * i, 5 + i) + text(seed + 7, 12) for i in range(2)]
    together = parallel(lambda prompt: ask(tenth, prompt, NEW_TOKENS), prompts)
    flush_cache(tenth)
    for prompt, answer in zip(prompts, together, strict=True):
        assert_same_plan(answer, first_answer(tenth, prompt))


def test_in_chunks_of_any_size(chunked: list[Server], prompt: Prompt) -> None:
    """Of 64 tokens some windows lie in two chunks."""
    answers = [first_answer(server, prompt) for server in chunked]
    for answer in answers[1:]:
        assert_same_plan(answer, answers[0])
