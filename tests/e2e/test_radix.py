"""The tree holds exact prefixes only, and later requests find them as they do on stock SGLang.

Stock's pages hold one token here, ours 16: a shared prefix that ends with a page is found to the same length.
"""

from __future__ import annotations

import itertools

import pytest

from benchmarks.harness import Server
from tests.e2e.checks import (
    Reference,
    ask,
    assert_compressed,
    assert_dense,
    assert_nothing_lost,
    assert_same,
    assert_same_first_token,
    flush_cache,
    loads,
    request_body,
)
from tests.e2e.prompts import IMAGE_TOKENS, Prompt, Vision, text

pytestmark = pytest.mark.server

PREFIX_TOKENS = 10 + 3 * (IMAGE_TOKENS + 2)
assert PREFIX_TOKENS % 16 == 0
_seeds = itertools.count(5000, 10)


@pytest.fixture
def images(vision: Vision) -> Prompt:
    """A prefix of PREFIX_TOKENS that no other test has."""
    seed = next(_seeds)
    return text(seed, 10) + vision.images(seed, 3)


def ask_both(tenth: Server, stock: Reference, prompt: Prompt, new_tokens: int):
    """Our answer and stock's to a question that neither server has seen."""
    return ask(tenth, prompt, new_tokens), ask(stock.server, prompt, new_tokens)


def test_compression_is_real(tenth: Server, stock: Reference) -> None:
    """Otherwise all other tests would prove nothing: dropping nine tenths of the rows changes answers."""
    changed = 0
    for seed in range(3):
        prompt = text(4000 + seed, 1500)
        ours, theirs = ask_both(tenth, stock, prompt, 32)
        assert_compressed(ours)
        assert ours.record["resident_ratio"] < 0.2
        assert_same_first_token(ours, theirs)
        changed += ours.ids != theirs.ids
    assert changed


@pytest.mark.parametrize(
    ("length", "new_tokens", "reason"), [(30, 24, "budget_below_floor"), (300, 1, "no_decode"), (160, 24, None)]
)
def test_another_question_on_the_same_images(tenth, stock, images, length, new_tokens, reason) -> None:
    """Served dense every generated token can be compared, else those of the first step."""
    ours, theirs = ask_both(tenth, stock, images + text(1, 200), 24)
    assert_compressed(ours)
    assert_same_first_token(ours, theirs)
    ours, theirs = ask_both(tenth, stock, images + text(2, length), new_tokens)
    assert ours.cached == theirs.cached == PREFIX_TOKENS
    if reason is None:
        assert_compressed(ours)
        assert_same_first_token(ours, theirs)
    else:
        assert_dense(ours, reason)
        assert_same(ours, theirs)


def test_prefix_that_ends_within_a_page(tenth, stock, images) -> None:
    shared = images + text(7, 21)
    assert_compressed(ask_both(tenth, stock, shared + Prompt((1,)) + text(8, 200), 24)[0])
    ours, theirs = ask_both(tenth, stock, shared + Prompt((2,)) + text(9, 60), 1)
    assert theirs.cached == PREFIX_TOKENS + 21
    assert ours.cached == theirs.cached // 16 * 16
    assert_same(ours, theirs)


def test_question_while_the_first_one_is_still_decoding(tenth, stock, images) -> None:
    ask(stock.server, images + text(10, 200), 24)
    with tenth.stream("/generate", request_body(images + text(10, 200), 600)) as answers:
        assert next(answers)["meta_info"]["kv_compressor"]["compressed"]
        ours, theirs = ask_both(tenth, stock, images + text(11, 30), 24)
        assert ours.cached == theirs.cached == PREFIX_TOKENS
        assert_same(ours, theirs)


@pytest.mark.parametrize("length", [400, 411])
def test_tokens_generated_over_compressed_context_are_never_found(tenth, stock, length) -> None:
    prompt = text(4100 + length, length)
    answer = ask(tenth, prompt, 70)
    assert_compressed(answer)
    longer = prompt + Prompt(tuple(answer.ids)) + text(12, 100)
    ours, theirs = ask_both(tenth, stock, longer, 1)
    assert ours.cached == length // 16 * 16
    assert_same(ours, theirs)


def test_generated_tokens_of_an_abandoned_request_are_never_found(tenth, stock) -> None:
    prompt = text(4200, 400)
    with tenth.stream("/generate", request_body(prompt, 2000)) as answers:
        generated = next(answer for answer in answers if answer["meta_info"]["completion_tokens"] >= 40)
    assert_nothing_lost(tenth)
    ours, theirs = ask_both(tenth, stock, prompt + Prompt(tuple(generated["output_ids"])) + text(13, 50), 1)
    assert ours.cached == 400
    assert_same(ours, theirs)


def test_evicting_the_exact_prompt_leaves_its_request_alone(tenth: Server) -> None:
    """The prompt of a compressed request is evictable while it decodes."""
    prompt, filler = text(4400, 800), [text(4401 + i, 4700) for i in range(2)]
    alone = ask(tenth, prompt, 200)
    assert_compressed(alone)
    flush_cache(tenth)
    with tenth.stream("/generate", request_body(prompt, 200)) as answers:
        next(answers)
        for other in filler:
            ask(tenth, other, 1)
        assert loads(tenth)["num_running_reqs"] >= 1, "it was to be running still"
        *_, last = answers
    assert last["output_ids"] == alone.ids
    again = ask(tenth, prompt, 1)
    assert again.cached == 0, "the prompt was to be evicted"
