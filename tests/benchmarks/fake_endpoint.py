"""An OpenAI endpoint that knows the right answers about scenes and texts, and whatever else a test wants it to do."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from benchmarks.harness import ServerError
from benchmarks.quality import table
from benchmarks.quality.cases import END_OF_TURN
from benchmarks.quality.data import Questions, exchanges_of
from benchmarks.quality.servers import STOCK, ServerSpec
from sglang_hybridkv.compressors import get_compressor

COMPRESSED = {"compressed": True, "reason": None, "resident_ratio": 0.25, "host_bytes": 64, "static_heads": 3}
COMPRESSED |= {"dynamic_heads": 1}


class FakeEndpoint:
    """State of the endpoint; a test reads and changes it while it runs.

    Attributes
    ----------
    record : of every request; None for a stock server.
    config : settings of the compressor other than the defaults.
    wrong : keys of questions that it answers wrongly.
    dies_after : answers after which it hangs up; None for never.
    asked : keys of scored questions, in order.
    wrote : how many times it wrote nothing but what it was made to write.
    max_tokens : of the scored requests.
    before : how many questions were asked before one that is scored.
    most_new : most requests at once with images that were not seen before.
    slow : when set, a request takes a while.
    """

    def __init__(self, cells: Sequence[Questions], seed: int = 0) -> None:
        self.record: dict[str, Any] | None = COMPRESSED
        self.config: dict[str, Any] = {}
        self.wrong: set[str] = set()
        self.dies_after: int | None = None
        self.asked: list[str] = []
        self.max_tokens: set[int] = set()
        self.before = self.most_new = self.wrote = 0
        self._vocabulary: list[str] = []
        self._images: dict[str, bool] = {}
        self.slow = threading.Event()
        self.url = ""
        self.exchanges = {}
        for cell in cells:
            for index in range(cell.n):
                for exchange in exchanges_of(seed, cell, index, ()):
                    self.exchanges.setdefault(json.dumps(exchange.messages), []).append(exchange)

    def get(self, path: str) -> dict[str, Any] | None:
        """Answer a GET."""
        if path == "/v1/models":
            return {"data": []}
        config = get_compressor("hybridkv").config_class(budget=0.1, **self.config).model_dump(mode="json")
        state = {"kv_compressor": {"name": "hybridkv", "budget": 0.1, "config": config}} if self.record else {}
        return {"internal_states": [state]} if path == "/server_info" else None

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a chat request."""
        forced = body.get("custom_params", {}).get("write")
        known = self.exchanges.get(json.dumps(body["messages"]), [])
        # A first question looks like one of its own, but nothing that was asked has its key.
        exchange = next((e for e in known if (e.forced is not None) == (forced is not None)), None)
        if exchange is None and forced is not None:
            self.wrote += 1
            return self._answer("", "", forced)
        if exchange is None:
            self.before += 1
            return self._answer("whatever", "", [])
        self.asked.append(exchange.key)
        self.max_tokens.add(body["max_tokens"])
        said = "nothing of the kind" if exchange.key in self.wrong else exchange.question.answer or "free text"
        return self._answer(said, exchange.forced or "", forced or [])

    @contextlib.contextmanager
    def looking(self, messages: list[dict[str, Any]]) -> Iterator[None]:
        """Keep count of the images, or texts, that are being looked at for the first time."""
        parts = messages[0]["content"]
        urls = (part["image_url"]["url"] for part in parts if isinstance(part, dict) and part["type"] == "image_url")
        image = next(urls, str(parts)[:200])
        self._images.setdefault(image, True)
        self.most_new = max(self.most_new, sum(self._images.values()))
        if self.slow.is_set():
            threading.Event().wait(0.2)
        yield
        self._images[image] = False

    def id_of(self, token: str) -> int:
        """Number of a token, by the order in which they were first used."""
        if token not in self._vocabulary:
            self._vocabulary.append(token)
        return self._vocabulary.index(token)

    def _answer(self, said: str, forced: str, write: list[int]) -> dict[str, Any]:
        own = [] if write and not forced else [*said.replace(" ", " \0").split("\0"), END_OF_TURN]
        tokens = [self._vocabulary[i] for i in write] + own
        top = [{"token": "?", "logprob": math.log(0.1)}]
        content = [
            {"token": t, "logprob": 0.0, "top_logprobs": [{"token": t, "logprob": math.log(0.9)}, *top]} for t in tokens
        ]
        text = "".join(map(self._vocabulary.__getitem__, write)) + said + (END_OF_TURN + "junk" if forced else "")
        choice = {"message": {"content": text}, "logprobs": {"content": content}}
        choice["meta_info"] = {"output_token_logprobs": [(0.0, self.id_of(token), token) for token in tokens]}
        if self.record is not None:
            choice["meta_info"]["kv_compressor"] = self.record
        return {"choices": [choice], "usage": {"prompt_tokens": 1610}}


def _handler(endpoint: FakeEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _send(self, answer: dict[str, Any] | None) -> None:
            raw = json.dumps(answer or {}).encode()
            self.send_response(200 if answer is not None else 404)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self) -> None:
            self._send(endpoint.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                return self._send({"tokens": [endpoint.id_of(c) for c in body["prompt"]]})
            if endpoint.dies_after is not None and len(endpoint.asked) >= endpoint.dies_after:
                return self.connection.close()
            with endpoint.looking(body["messages"]):
                answer = endpoint.chat(body)
            self._send(answer)

        def log_message(self, *_: Any) -> None:
            """Keep the test's output clean."""

    return Handler


@contextlib.contextmanager
def serving(endpoint: FakeEndpoint) -> Iterator[FakeEndpoint]:
    """Run the endpoint in threads of this process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(endpoint))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def stand_for_servers(endpoint: FakeEndpoint, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have the endpoint stand for every server of a plan, from now on; the list gets those that are launched.

    A server of the compressor "broken" does not start, one of "dying" hangs up after four answers.
    """
    launched: list[str] = []

    @contextlib.contextmanager
    def make_server(spec: ServerSpec, *_: Any, **__: Any) -> Iterator[FakeEndpoint]:
        if spec.compressor == "broken":
            raise ServerError("it does not start")
        launched.append(spec.label)
        endpoint.record = None if spec.compressor == STOCK else COMPRESSED
        endpoint.dies_after = len(endpoint.asked) + 4 if spec.compressor == "dying" else None
        yield endpoint

    monkeypatch.setattr(table, "make_server", make_server)
    return launched
