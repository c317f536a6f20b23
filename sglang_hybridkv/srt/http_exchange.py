"""Settings and proof on every HTTP API, whatever fields its protocol model has: an ASGI layer next to the routes.

SGLang hands `custom_params` on from some APIs and drops it in others, and most of its answers have no place for a
record. Here a request's settings are read and checked before its API sees it, and its record goes out in a header.
"""

from __future__ import annotations

import collections
import contextvars
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import aclosing
from typing import Any

from sglang_hybridkv.config import CompressorConfig, load_json, unique_keys
from sglang_hybridkv.requests.settings import KEY, NAME, read_settings
from sglang_hybridkv.requests.stats import META_INFO_KEY

HEADER = "x-kv-compressor"  # of a request its settings, of an answer its record
# SGLang's router hands on headers that begin like this one, and drops the other.
ROUTED_HEADER = "x-request-id-kv-compressor"
_MOST_RECORDS = 16  # of one header: a client's limit for all of them may be 16 KiB
_MARK = f'"{KEY}"'.encode()
_ESCAPE = rb"\u00"
_EVENTS = b"text/event-stream"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_current: contextvars.ContextVar[HttpExchange | None] = contextvars.ContextVar("hybridkv_exchange", default=None)


class HttpExchange:
    """One HTTP request and its answers.

    Attributes
    ----------
    given : what the request has under `KEY` of the custom_params in its body, or in a header; None without.
    is_in_header : whether it was a header.
    records : of its answers, by their index.
    """

    def __init__(self, given: dict[str, Any] | None = None):
        self.given = given
        self.is_in_header = False
        self.records: dict[int, dict[str, Any]] = {}

    async def noting(self, answers: AsyncGenerator[Any, None]) -> AsyncIterator[Any]:
        """The same answers of SGLang's tokenizer manager; their records are kept."""
        async with aclosing(answers):
            async for answer in answers:
                for place, one in enumerate(answer if isinstance(answer, list) else [answer]):
                    if META_INFO_KEY in one.get("meta_info", {}):
                        self.records[one.get("index", place)] = one["meta_info"][META_INFO_KEY]
                yield answer

    @property
    def record(self) -> Any:
        """The record of a single answer, a list of the first ones of several, or None."""
        records = [self.records[index] for index in sorted(self.records)][:_MOST_RECORDS]
        return records[0] if len(records) == 1 else records or None


def current_exchange() -> HttpExchange | None:
    """The exchange in whose context this code runs; None outside of an HTTP request."""
    return _current.get()


class ExchangeMiddleware:
    """Reads settings and refuses bad ones, and sends records.

    Parameters
    ----------
    app : the routes, which see the same request as without this layer.
    read_config : the server's, as it is now.
    refuse : makes the answer of status 400, an ASGI app, to a request (scope) out of a sentence.
    """

    def __init__(
        self, app: Any, read_config: Callable[[], CompressorConfig], refuse: Callable[[Any, str], Awaitable[Any]]
    ):
        self.app, self.read_config, self.refuse = app, read_config, refuse

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            await self.app(scope, receive, send)
            return
        exchange = HttpExchange()
        try:
            exchange.given = settings_in_headers(scope["headers"], self.read_config())
            exchange.is_in_header = exchange.given is not None
        except ValueError as error:
            await (await self.refuse(scope, str(error)))(scope, receive, send)
            return
        if b"json" in dict(scope["headers"]).get(b"content-type", b"json"):  # without the header, a body is JSON, too
            body, receive = await _buffer(receive)
            try:
                given = settings_in_body(body, self.read_config())
                if given is not None and exchange.given is not None:
                    raise ValueError(f"{NAME} is given beside the header {HEADER}; give one of them")
                exchange.given = exchange.given if given is None else given
            except ValueError as error:
                await (await self.refuse(scope, str(error)))(scope, receive, send)
                return
        reads_events = _EVENTS in dict(scope["headers"]).get(b"accept", b"")
        token = _current.set(exchange)
        try:
            await self.app(scope, receive, _Sender(exchange, send, reads_events))
        finally:
            _current.reset(token)


class _Sender:
    """Holds the head of an answer until its first part: by then most records are known.

    A stream of events ends with a comment, for a client that says it reads events: others, SGLang's own benchmark of
    servers among them, take each line for JSON.
    """

    def __init__(self, exchange: HttpExchange, send: Send, reads_events: bool):
        self.exchange, self.send, self.reads_events = exchange, send, reads_events
        self.head: Message | None = None
        self.is_event_stream = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            content_type = dict(message.get("headers", ())).get(b"content-type", b"")
            self.head, self.is_event_stream = message, content_type.startswith(_EVENTS)
            return
        record = self.exchange.record
        words = b"" if record is None else json.dumps(record, separators=(",", ":")).encode()
        if self.head is not None:
            headers = [*self.head.get("headers", ()), *([(HEADER.encode(), words)] if words else [])]
            await self.send({**self.head, "headers": headers})
            self.head = None
        if words and self.is_event_stream and self.reads_events and not message.get("more_body", False):
            comment = b": " + HEADER.encode() + b" " + words + b"\n\n"
            message = {**message, "body": bytes(message.get("body", b"")) + comment}
        await self.send(message)


async def _buffer(receive: Receive) -> tuple[bytes, Receive]:
    """The whole body, and a `receive` that begins with it."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            break  # the client has gone
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            message = {"type": "http.request", "body": b"".join(parts), "more_body": False}
            break
    pending = [message]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return message.get("body", b""), replay


def settings_in_headers(headers: Iterable[tuple[bytes, bytes]], config: CompressorConfig) -> dict[str, Any] | None:
    """What the header `HEADER` or `ROUTED_HEADER` gives, a JSON object; None without them.

    They are for what stands between client and server and drops fields of the body that it does not know. ValueError,
    one sentence, if it is bad.
    """
    found = [value for name, value in headers if name in (HEADER.encode(), ROUTED_HEADER.encode())]
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(
            f"the headers {HEADER} and {ROUTED_HEADER} are given {len(found)} times; give one of them once"
        )
    try:
        given = load_json(found[0], unique_keys)
    except RecursionError:
        raise ValueError(f"the header {HEADER} is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(
            f'the header {HEADER} is not valid JSON; expected an object such as {{"budget": 0.2}}'
        ) from None
    except ValueError as error:
        raise ValueError(f"the header {HEADER} {error}; give it once") from None
    read_settings(given, config, HEADER)
    return dict(given)


def settings_in_body(body: bytes, config: CompressorConfig) -> dict[str, Any] | None:
    """What a JSON body gives in custom_params, its own or of sampling_params; ValueError, one sentence, if it is bad.

    A body that is no JSON is the API's to answer.
    """
    # The parse of many images costs milliseconds. A client may write the letters of the key as escapes.
    if _MARK not in body and _ESCAPE not in body:
        return None
    try:
        values = load_json(body, _Object)
    except ValueError:
        return None
    except RecursionError:
        if _MARK not in body:
            return None
        # SGLang's own reader may go deeper, and several APIs would drop what was not read here.
        raise ValueError(f"{NAME} cannot be read: the body is nested too deeply") from None
    values = _object(values)
    if KEY in values or KEY in _object(values.get("extra_body")):
        raise ValueError(f"{KEY} belongs into custom_params: {NAME}")
    sampling = values.get("sampling_params")
    many = sampling if isinstance(sampling, list) else [sampling]
    inner = [_object(_object(one).get("custom_params")) for one in many]
    outer = _object(values.get("custom_params"))
    if KEY in outer and any(KEY in one for one in inner):
        raise ValueError(f"{NAME} is given twice, at the top of the body and in sampling_params; give it once")
    for one in (outer, *inner):
        if KEY in one:
            for name in (*one.twice, *_object(one[KEY]).twice):
                raise ValueError(f"{NAME} gives {name!r} twice; give it once")
            read_settings(one[KEY], config)
    # Most APIs drop sampling_params; of a list each prompt of a batch takes its own.
    given: dict[str, Any] | None = outer.get(KEY, None if isinstance(sampling, list) else inner[0].get(KEY))
    return given


class _Object(dict):
    """A JSON object, and the keys that its text gives more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        counts = collections.Counter(name for name, _ in pairs) if len(self) < len(pairs) else {}
        self.twice = [name for name, count in counts.items() if count > 1]


def _object(value: Any) -> _Object:
    return value if isinstance(value, _Object) else _Object([])
