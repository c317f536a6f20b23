"""Budget 1.0 through the compressed path gives stock SGLang's tokens and log-probs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from benchmarks.docs import SERVED_MODELS
from benchmarks.harness import Server, parallel
from benchmarks.models.make_models import SPECS, make_model
from tests.e2e.checks import (
    TOLERANCE,
    Answer,
    Reference,
    ask,
    assert_compressed,
    assert_nothing_lost,
    assert_same,
    read_answer,
    request_body,
)
from tests.e2e.conftest import CHUNK_TOKENS, OBSERVED_ROWS, VL, make_server, run_servers
from tests.e2e.prompts import Prompt, Vision, image_url, text

pytestmark = pytest.mark.server

NO_OVERLAP = "--disable-overlap-schedule"


@dataclass(frozen=True)
class Pair:
    """A compressing server at budget 1.0 and stock answers of the same model, one of `SPECS`."""

    model: str
    ours: Server
    stock: Reference

    def check(self, prompt: Prompt, new_tokens: int = 24) -> Answer:
        answer = ask(self.ours, prompt, new_tokens)
        self.compare(answer, prompt, new_tokens)
        return answer

    def compare(self, answer: Answer, prompt: Prompt, new_tokens: int = 24) -> None:
        assert_same(answer, self.stock.ask(prompt, new_tokens))
        assert_compressed(answer)


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Parameter: a model, or a model and flags of the compressing server."""
    model, *flags = request.param if isinstance(request.param, tuple) else (request.param,)
    ours = make_server(model, 1.0, None, *flags, name="full")
    theirs = None if model == VL else make_server(model, None, None, "--kv-compressor", "none", name="stock")
    reference = request.getfixturevalue("stock") if theirs is None else Reference(theirs)
    for _ in run_servers(*(server for server in (ours, theirs) if server is not None)):
        [architecture] = json.loads((make_model(model) / "config.json").read_text())["architectures"]
        assert model in SERVED_MODELS[architecture].checkpoints
        yield Pair(model, ours, reference)
        assert_nothing_lost(ours)


VISION = [VL, (VL, NO_OVERLAP, "--schedule-policy", "lpm")]
IN_ONE_TEST = ["tiny-glm4v_moe", "tiny-internvl"]  # that of images; its prompts have more text than a chunk holds, too
OTHER_VISION = ["tiny-qwen2_vl", "tiny-qwen3_vl", "tiny-qwen3_vl_moe", *IN_ONE_TEST]
every_vision = pytest.mark.parametrize("pair", VISION, indirect=True, ids=["overlap", "no-overlap"])
OTHERS = [name for name in SPECS if name != VL and name not in IN_ONE_TEST]
every_model = pytest.mark.parametrize("pair", [*VISION, *OTHERS], indirect=True)


@every_model
@pytest.mark.parametrize("length", [64, 160, 333])
def test_text(pair: Pair, length: int) -> None:
    pair.check(text(length, length))


@every_model
@pytest.mark.parametrize("last_chunk", [200, 5])
def test_chunked_prefill_also_with_fewer_rows_than_are_observed_in_the_last_chunk(pair: Pair, last_chunk: int) -> None:
    pair.check(text(last_chunk, CHUNK_TOKENS + last_chunk))


@every_model
def test_eight_at_once(pair: Pair) -> None:
    prompts = [text(100 + i, 80 + 67 * i) for i in range(8)]
    for prompt, answer in zip(prompts, parallel(lambda prompt: ask(pair.ours, prompt), prompts), strict=True):
        pair.compare(answer, prompt)


@every_vision
def test_long_answer(pair: Pair) -> None:
    pair.check(text(40, 340), 120)


SHOWN = {
    "one image": lambda vision: text(1, 20) + vision.image(1) + text(2, 40),
    "another shape and no text before it": lambda vision: vision.image(2, 140, 392) + text(3, 9),
    "several images": lambda vision: (
        text(4, 7) + vision.images(3, 3) + text(5, 12) + vision.image(6, 196, 112) + text(6, 33)
    ),
    "across the border of a chunk": lambda vision: text(7, CHUNK_TOKENS - 30) + vision.image(7) + text(8, 60),
    "at the end of the prompt": lambda vision: text(9, 50) + vision.image(8),
    "video": lambda vision: text(10, 15) + vision.video(1, 8) + text(11, 40),
    "video and image": lambda vision: text(12, 11) + vision.video(2, 4) + vision.image(9) + text(13, 21),
}


@every_vision
@pytest.mark.parametrize("show", SHOWN.values(), ids=SHOWN)
def test_images_and_videos(pair: Pair, vision: Vision, show: Callable[[Vision], Prompt]) -> None:
    pair.check(show(vision))


@pytest.mark.parametrize("pair", OTHER_VISION, indirect=True)
def test_images_and_videos_of_other_models(pair: Pair) -> None:
    """The longer ones of those above, then again from the cache, and a tenth of each."""
    vision = Vision(make_model(pair.model))
    sees = SERVED_MODELS[vision.config["architectures"][0]].sees
    shown = ["several images", "across the border of a chunk", "at the end of the prompt"]
    for i, name in enumerate([*shown, "video and image"] if "video" in sees else shown):
        show = SHOWN[name]
        prompt = vision.in_words(text(2000 + i, 20) + show(vision))  # with fewer tokens it would be dense
        pair.check(prompt)
        pair.check(prompt)
        long = vision.in_words(text(3000 + i, 400) + show(vision))
        answer = ask(pair.ours, long, sampling_params={"custom_params": {"kv_compressor": {"budget": 0.15}}})
        assert_compressed(answer)
        assert answer.record["resident_ratio"] < 0.3
        assert pair.check(long).cached >= 400, "the prefix is exact, whatever was compressed"


@pytest.mark.parametrize("pair", ["tiny-gemma3"], indirect=True)
def test_layers_with_a_window_at_a_small_budget(pair: Pair) -> None:
    """They stay on the device whatever the budget, and so does the prefix, exactly, in the tree."""
    prompt, settings = text(4000, 700), {"custom_params": {"kv_compressor": {"budget": 0.15}}}
    answer = ask(pair.ours, prompt, sampling_params=settings)
    assert_compressed(answer)
    assert answer.record["static_heads"] + answer.record["dynamic_heads"] == 8, "of the four layers without a window"
    # 105 of 700 tokens, 96 in the layers with a window, and what finds the chunks.
    assert 0.1 < answer.record["resident_ratio"] < 0.3
    assert pair.check(prompt).cached >= 600


@every_vision
@pytest.mark.parametrize("length", [320, 333, 352])
def test_same_prompt_again_computes_the_observed_rows_anew(pair: Pair, length: int) -> None:
    prompt = text(1000 + length, length)
    assert pair.check(prompt).cached == 0
    assert pair.check(prompt).cached == (length - OBSERVED_ROWS) // 16 * 16


@every_vision
def test_shared_prefix_and_new_suffix(pair: Pair, vision: Vision) -> None:
    prefix = text(14, 10) + vision.images(20, 3)
    pair.check(prefix + text(15, 100))
    # Of a short suffix the mark behind the last image is observed, too: the hit ends with the page before it.
    for seed, length, cached in ((16, 100, 208), (17, 13, 192), (18, CHUNK_TOKENS + 90, 208)):
        assert pair.check(prefix + text(seed, length)).cached == cached


@every_vision
def test_answer_as_part_of_the_next_prompt(pair: Pair) -> None:
    prompt = text(19, 400)
    answer = pair.check(prompt, 40)
    assert pair.check(prompt + Prompt(tuple(answer.ids)) + text(20, 30)).cached == 400


@every_vision
def test_eight_mixed_at_once(pair: Pair, vision: Vision) -> None:
    prompts = [text(50, 900), text(51, 70), text(52, 10) + vision.image(50) + text(53, 31), text(54, 256)]
    prompts += [text(55, 5) + vision.video(5, 4) + text(56, 12), text(57, CHUNK_TOKENS + 3)]
    prompts += [text(58, 1) + vision.images(55, 2) + text(59, 400), text(60, 511)]
    for prompt, answer in zip(prompts, parallel(lambda prompt: ask(pair.ours, prompt, 40), prompts), strict=True):
        pair.compare(answer, prompt, 40)


@every_vision
def test_same_prompt_four_times_at_once(pair: Pair) -> None:
    prompt = text(61, 480)
    for answer in parallel(lambda _: ask(pair.ours, prompt), range(4)):
        pair.compare(answer, prompt)


@every_vision
def test_compressed_beside_dense(pair: Pair) -> None:
    prompts = [text(62, 30), text(63, 300), text(64, 12), text(65, 200)]
    answers = parallel(lambda prompt: ask(pair.ours, prompt, 40), prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_same(answer, pair.stock.ask(prompt, 40))
    assert [answer.record["reason"] for answer in answers] == ["prompt_too_short", None, "prompt_too_short", None]


@every_vision
def test_two_samples_of_one_prompt(pair: Pair) -> None:
    prompt = text(66, 210)
    body = request_body(prompt, 24, sampling_params={"n": 2})
    response = pair.ours.client.post("/generate", json=body).raise_for_status()
    for answer in response.json():
        pair.compare(read_answer(answer), prompt)


@every_vision
def test_chat_over_several_turns(pair: Pair) -> None:
    ours, theirs = _converse(pair.ours), _converse(pair.stock.server)
    assert [answer for answer, _ in ours] == [answer for answer, _ in theirs]
    for (_, mine), (_, other) in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=0, abs=TOLERANCE)


def _converse(server: Server) -> list[tuple[str, list[float]]]:
    """Three turns about two images: text and log-probs of each answer."""
    images = [{"type": "image_url", "image_url": {"url": image_url(70 + i)}} for i in range(2)]
    question = {"type": "text", "text": "The quick brown fox jumps over the lazy dog. Describe the images, please."}
    messages: list[dict] = [{"role": "user", "content": [*images, question]}]
    turns = []
    for turn in range(3):
        body = {"model": "default", "messages": messages, "max_tokens": 20, "temperature": 0, "logprobs": True}
        before = server.compressor_state()
        response = server.client.post("/v1/chat/completions", json={**body, "ignore_eos": True}).raise_for_status()
        [choice] = response.json()["choices"]
        if before is not None:
            assert server.compressor_state()["compressed_requests"] == before["compressed_requests"] + 1
        answer = choice["message"]["content"]
        turns.append((answer, [token["logprob"] for token in choice["logprobs"]["content"]]))
        messages += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": f"What happens in image {turn}? You are a helpful assistant."},
        ]
    return turns
