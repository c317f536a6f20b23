"""Ask a server, and judge its answers, its memory and its log."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Server
from tests.e2e.prompts import Prompt

TOLERANCE = 1e-4
SETTLE_SECONDS = 60.0
FAULTS = re.compile(r"leak detected|use-after-free|double free|Traceback|AssertionError", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """Generated tokens, their log-probs, the ten best of the first step, and meta_info."""

    ids: list[int]
    logprobs: list[float]
    first_top: dict[int, float]
    meta: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        return self.meta["kv_compressor"]

    @property
    def cached(self) -> int:
        return self.meta["cached_tokens"]


def request_body(prompt: Prompt, new_tokens: int, **body: Any) -> dict[str, Any]:
    """A /generate request: greedy, exactly `new_tokens` tokens, with log-probs."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True, **body.pop("sampling_params", {})}
    return {**prompt.body(), "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": 10, **body}


def read_answer(answer: dict[str, Any]) -> Answer:
    """What /generate returned, with the parts that tests compare."""
    meta = answer["meta_info"]
    pairs = [(value, token) for value, token, *_ in meta["output_token_logprobs"]]
    top = {token: value for value, token, *_ in (meta.get("output_top_logprobs") or [[]])[0]}
    return Answer([token for _, token in pairs], [value for value, _ in pairs], top, meta)


def ask(server: Server, prompt: Prompt, new_tokens: int = 24, **body: Any) -> Answer:
    """One answer."""
    return read_answer(server.generate(**request_body(prompt, new_tokens, **body)))


class Reference:
    """Answers of a stock server; each question is asked once."""

    def __init__(self, server: Server):
        self.server = server
        self._known: dict[tuple[Prompt, int], Answer] = {}

    def ask(self, prompt: Prompt, new_tokens: int = 24) -> Answer:
        key = (prompt, new_tokens)
        if key not in self._known:
            self._known[key] = ask(self.server, prompt, new_tokens)
        return self._known[key]


def assert_same(answer: Answer, stock: Answer) -> None:
    """Tokens identical, log-probs within TOLERANCE."""
    assert answer.meta["prompt_tokens"] == stock.meta["prompt_tokens"]
    assert answer.ids == stock.ids
    worst = max(abs(a - b) for a, b in zip(answer.logprobs, stock.logprobs, strict=True))
    assert worst <= TOLERANCE, f"log-probs differ by {worst:.1e}"
    assert_same_first_token(answer, stock)


def assert_same_first_token(answer: Answer, stock: Answer) -> None:
    """The first step's ten best tokens and their log-probs agree: the whole prompt was attended to exactly."""
    common = answer.first_top.keys() & stock.first_top.keys()
    assert len(common) >= 9, "the ten best tokens of the first step differ"  # the tenth may be a tie
    worst = max(abs(answer.first_top[token] - stock.first_top[token]) for token in common)
    assert worst <= TOLERANCE, f"log-probs of the first step differ by {worst:.1e}"


def assert_compressed(answer: Answer, *, both_types: bool = True) -> None:
    """Served through the compressed path; with `both_types`, by static and by dynamic heads."""
    record = answer.record
    assert record["compressed"], f"served dense: {record['reason']}"
    assert record["reason"] is None
    assert record["static_heads"] > 0
    if both_types:
        assert record["dynamic_heads"] > 0
        assert record["host_bytes"] > 0


def assert_dense(answer: Answer, reason: str) -> None:
    """Served by the stock path, and why."""
    record = answer.record
    assert (record["compressed"], record["reason"]) == (False, reason)
    assert (record["resident_ratio"], record["host_bytes"]) == (1.0, 0)
    assert (record["static_heads"], record["dynamic_heads"], record["plan"]) == (0, 0, None)


def loads(server: Server) -> dict[str, Any]:
    """The scheduler's own account of requests and tokens."""
    return server.client.get("/v1/loads").raise_for_status().json()["loads"][0]


def held(server: Server) -> dict[str, int]:
    """What should be zero on an idle server."""
    state, load = server.compressor_state() or {}, loads(server)
    used = [rank["used_host_tokens"] for rank in state.get("ranks", ())]
    return {
        "used_host_tokens": sum(used),
        **{name: state.get(name, 0) for name in ("device_kv_bytes", "stock_kv_bytes", "host_kv_bytes")},
        **{name: load[name] for name in ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")},
    }


def settle(server: Server) -> dict[str, int]:
    """Wait until the server is idle, which it is a moment after its last answer; returns what it still holds."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while any(held(server).values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return {name: value for name, value in held(server).items() if value}


def flush_cache(server: Server) -> None:
    """Forget the radix tree; SGLang refuses while a request runs."""
    settle(server)
    server.client.post("/flush_cache").raise_for_status()


def assert_nothing_lost(server: Server, *, largest_prompt: Prompt | None = None) -> None:
    """The server settles with every device and host page free, no fault in its log, and answers.

    `largest_prompt` needs nearly the whole pool, so that a lost page or a pinned prefix would refuse it.
    """
    left = settle(server)
    assert not left, f"an idle server still holds {left}"
    if largest_prompt is not None:
        answer = ask(server, largest_prompt, 2)
        assert answer.meta["completion_tokens"] == 2
        assert not any(held(server).values()), held(server)
    assert_healthy(server)


def assert_healthy(server: Server) -> None:
    """The process lives and its log shows no fault."""
    faults = [line for line in server.log_text().splitlines() if FAULTS.search(line)]
    assert not faults, faults[:3]
    assert server.alive()
    assert server.client.get("/health").status_code == 200
