"""Ask an OpenAI endpoint one question, with log-probabilities and SGLang's record of the request."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.quality.cases import END_OF_TURN, Exchange

MAX_ANSWER_TOKENS = 64
NUM_TOP_LOGPROBS = 20
REQUEST_SECONDS = 300.0
FORCED_LOGIT = 1.0
"""Logit of a token that is forced. The others are log-probabilities, none of which is above 0."""
LEAST_PROBABILITY = 1e-7
"""Least probability of a token that is forced: what it had before is known to about this accuracy."""
NEEDS_PROCESSOR = "it has to be SGLang, started with --enable-custom-logit-processor"


class Unreachable(RuntimeError):
    """The endpoint does not answer."""


class BadAnswer(RuntimeError):
    """The endpoint answered something that cannot be scored."""


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes
    ----------
    tokens, top : its tokens, and the log-probabilities of the likeliest ones at each of them.
    ids : ids of the tokens; empty where the endpoint does not tell them.
    record : the compressor's record of the request; None on a stock server.
    """

    text: str
    prompt_tokens: int
    tokens: list[str]
    top: list[dict[str, float]]
    record: dict[str, Any] | None
    ids: list[int] = field(default_factory=list)


def forcing_processor() -> str:
    """Return SGLang's serialised form of a logit processor that makes a request write given tokens first.

    The log-probabilities that the server reports are those after the processor. It therefore replaces the logits by
    their log-probabilities and lifts only the forced token above all of them, which `undo_forcing` takes back.
    """
    import dill
    import torch
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    # Local, so that it is sent by value: the server need not have this module, nor its constants.
    lifted = FORCED_LOGIT

    class WriteFirst(CustomLogitProcessor):  # type: ignore[misc]
        def __call__(self, logits: Any, custom_param_list: Any = None) -> Any:
            for row, params in zip(logits, custom_param_list, strict=True):
                # The dict belongs to the request and lives as long.
                step = params["step"] = params.get("step", -1) + 1
                if step < len(params["write"]):
                    row.copy_(torch.log_softmax(row.float(), dim=-1))
                    row[params["write"][step]] = lifted
            return logits

    return json.dumps({"callable": dill.dumps(WriteFirst).hex()})


def undo_forcing(token: str, top: dict[str, float]) -> dict[str, float]:
    """Return the log-probabilities before `forcing_processor` lifted a token, from those that the server reports.

    Let p be the probability that the forced token had. The softmax takes log(1 - p + e) from every logit: from the
    log-probabilities of all others, and from FORCED_LOGIT. So the forced token's value says how much to give back.
    """
    lost = FORCED_LOGIT - top[token]
    before = 1.0 + math.exp(FORCED_LOGIT) - math.exp(lost)
    own = math.log(min(1.0, max(LEAST_PROBABILITY, before)))
    return {name: own if name == token else min(0.0, value + lost) for name, value in top.items()}


def _rounded(top: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{token: round(value, 4) for token, value in position.items()} for position in top]


class Client:
    """A client of one endpoint, safe to use from several threads.

    Parameters
    ----------
    url : base URL of the server, with or without /v1.
    model : name in the requests.
    """

    def __init__(self, url: str, model: str = "default") -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        # trust_env: a proxy variable must not capture requests to this machine.
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.Client(base_url=self.url, timeout=REQUEST_SECONDS, trust_env=False, limits=limits)
        self._processor: str | None = None

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST and return the JSON answer; raises Unreachable or BadAnswer in one sentence."""
        try:
            response = self.http.post(path, json=body)
            if response.is_error:
                raise BadAnswer(f"{self.url}{path} answered HTTP {response.status_code}: {response.text[:300]}")
            answer: dict[str, Any] = response.json()
        except httpx.TransportError as error:
            raise Unreachable(f"{self.url} does not answer: {str(error) or type(error).__name__}") from None
        except json.JSONDecodeError:
            raise BadAnswer(f"{self.url}{path} answered with something that is not JSON") from None
        return answer

    def get(self, path: str) -> dict[str, Any] | None:
        """GET a JSON object; None when the server does not have it. Raises Unreachable."""
        try:
            response = self.http.get(path)
        except (httpx.TransportError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise Unreachable(f"{self.url} does not answer: {str(error) or type(error).__name__}") from None
        try:
            answer = response.json()
        except json.JSONDecodeError:
            return None
        return answer if response.is_success and isinstance(answer, dict) else None

    def ask(self, exchange: Exchange, max_tokens: int = MAX_ANSWER_TOKENS) -> Reply:
        """Send the requests of an exchange and return the scored answer, of at most `max_tokens`.

        The answer is what follows its beginning, where the exchange has one.
        """
        if exchange.first is not None:
            self._chat(exchange.first, {})
        if exchange.forced is None:
            reply = self._chat(exchange.messages, {"max_tokens": max_tokens})
        else:
            reply = self._chat_forced(exchange.messages, exchange.forced)
        return dataclasses.replace(reply, top=_rounded(reply.top))

    def force(self, messages: list[dict[str, Any]], ids: list[int]) -> list[dict[str, float]]:
        """Have the server write these tokens, and return the log-probabilities that it would have had at each one."""
        reply = self._write(messages, ids, 0)
        if reply.ids != ids:
            raise BadAnswer(f"{self.url} did not write what it was made to write; {NEEDS_PROCESSOR}")
        return _rounded([undo_forcing(token, top) for token, top in zip(reply.tokens, reply.top, strict=True)])

    def _chat(self, messages: list[dict[str, Any]], extra: dict[str, Any]) -> Reply:
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": MAX_ANSWER_TOKENS,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": NUM_TOP_LOGPROBS,
            # SGLang's field, which carries the compressor's record of this very request.
            "return_meta_info": True,
        }
        if messages[-1]["role"] == "assistant":
            body["continue_final_message"] = True
        answer = self.post("/v1/chat/completions", body | extra)
        try:
            choice = answer["choices"][0]
            positions = (choice.get("logprobs") or {}).get("content") or []
            meta = choice.get("meta_info") or {}
            return Reply(
                text=choice["message"].get("content") or "",
                prompt_tokens=answer["usage"]["prompt_tokens"],
                tokens=[position["token"] for position in positions],
                top=[{t["token"]: t["logprob"] for t in position["top_logprobs"]} for position in positions],
                record=meta.get("kv_compressor"),
                # Each entry is (log-probability, id, text).
                ids=[token_id for _, token_id, _ in meta.get("output_token_logprobs") or []],
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise BadAnswer(f"{self.url}/v1/chat/completions answered without {error}") from None

    def _write(self, messages: list[dict[str, Any]], ids: list[int], more: int) -> Reply:
        """Have the server write some tokens, and then up to `more` of its own."""
        self._processor = self._processor or forcing_processor()
        extra = {
            "max_tokens": len(ids) + more,
            # The written text holds the end of a turn, which must not end the request.
            "ignore_eos": True,
            "skip_special_tokens": False,
            "custom_logit_processor": self._processor,
            "custom_params": {"write": ids},
        }
        return self._chat(messages, extra)

    def _chat_forced(self, messages: list[dict[str, Any]], forced: str) -> Reply:
        ids = self.post("/tokenize", {"model": self.model, "prompt": forced, "add_special_tokens": False})["tokens"]
        reply = self._write(messages, ids, MAX_ANSWER_TOKENS)
        if not reply.text.startswith(forced):
            raise BadAnswer(f"{self.url} did not write what second_in_place makes it write; {NEEDS_PROCESSOR}")
        end = next((i for i, token in enumerate(reply.tokens[len(ids) :]) if token == END_OF_TURN), None)
        kept = slice(len(ids), None if end is None else len(ids) + end + 1)
        text = reply.text[len(forced) :].split(END_OF_TURN)[0]
        return Reply(text, reply.prompt_tokens, reply.tokens[kept], reply.top[kept], reply.record)

    def close(self) -> None:
        """Close the connections."""
        self.http.close()
