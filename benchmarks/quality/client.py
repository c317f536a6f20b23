"""Ask an OpenAI endpoint one question, with log-probabilities and SGLang's record of the request."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.quality.cases import END_OF_TURN, Exchange

MAX_ANSWER_TOKENS = 64
NUM_TOP_LOGPROBS = 20
REQUEST_SECONDS = 300.0


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
    record : the compressor's record of the request; None on a stock server.
    """

    text: str
    prompt_tokens: int
    tokens: list[str]
    top: list[dict[str, float]]
    record: dict[str, Any] | None


def forcing_processor() -> str:
    """Return SGLang's serialised form of a logit processor that makes a request write given tokens first."""
    import dill
    import torch
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    # Local, so that it is sent by value: the server need not have this module.
    class WriteFirst(CustomLogitProcessor):  # type: ignore[misc]
        def __call__(self, logits: Any, custom_param_list: Any = None) -> Any:
            for row, params in zip(logits, custom_param_list, strict=True):
                # The dict belongs to the request and lives as long.
                step = params["step"] = params.get("step", -1) + 1
                if step < len(params["write"]):
                    row.fill_(-torch.inf)
                    row[params["write"][step]] = 0.0
            return logits

    return json.dumps({"callable": dill.dumps(WriteFirst).hex()})


class Client:
    """Asks one endpoint; safe to use from several threads.

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
        """Send the requests of an exchange and return the scored answer, of at most `max_tokens`."""
        if exchange.first is not None:
            self._chat(exchange.first, {})
        if exchange.forced is None:
            return self._chat(exchange.messages, {"max_tokens": max_tokens})
        return self._chat_forced(exchange.messages, exchange.forced)

    def _chat(self, messages: list[dict[str, Any]], extra: dict[str, Any]) -> Reply:
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": MAX_ANSWER_TOKENS,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": NUM_TOP_LOGPROBS,
            # Of SGLang: carries the compressor's record of this very request.
            "return_meta_info": True,
        }
        answer = self.post("/v1/chat/completions", body | extra)
        try:
            choice = answer["choices"][0]
            positions = (choice.get("logprobs") or {}).get("content") or []
            return Reply(
                text=choice["message"].get("content") or "",
                prompt_tokens=answer["usage"]["prompt_tokens"],
                tokens=[position["token"] for position in positions],
                top=[{t["token"]: round(t["logprob"], 4) for t in position["top_logprobs"]} for position in positions],
                record=(choice.get("meta_info") or {}).get("kv_compressor"),
            )
        except (KeyError, IndexError, TypeError) as error:
            raise BadAnswer(f"{self.url}/v1/chat/completions answered without {error}") from None

    def _chat_forced(self, messages: list[dict[str, Any]], forced: str) -> Reply:
        self._processor = self._processor or forcing_processor()
        ids = self.post("/tokenize", {"model": self.model, "prompt": forced, "add_special_tokens": False})["tokens"]
        extra = {
            "max_tokens": len(ids) + MAX_ANSWER_TOKENS,
            # The written text holds the end of a turn, which must not end the request.
            "ignore_eos": True,
            "skip_special_tokens": False,
            "custom_logit_processor": self._processor,
            "custom_params": {"write": ids},
        }
        reply = self._chat(messages, extra)
        if not reply.text.startswith(forced):
            raise BadAnswer(
                f"{self.url} did not write what second_in_place makes it write; it has to be SGLang, started with "
                "--enable-custom-logit-processor"
            )
        end = next((i for i, token in enumerate(reply.tokens[len(ids) :]) if token == END_OF_TURN), None)
        kept = slice(len(ids), None if end is None else len(ids) + end + 1)
        text = reply.text[len(forced) :].split(END_OF_TURN)[0]
        return Reply(text, reply.prompt_tokens, reply.tokens[kept], reply.top[kept], reply.record)

    def close(self) -> None:
        """Close the connections."""
        self.http.close()
