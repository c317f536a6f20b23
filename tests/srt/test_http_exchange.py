"""The layer next to the routes, with an app of a few lines behind it."""

import asyncio
import json

import pytest

pytest.importorskip("sglang")

from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from sglang_hybridkv.srt.http_exchange import HEADER, ExchangeMiddleware, current_exchange, settings_in_body

CONFIG = HybridKVConfig(request_budget_max=0.5)
JSON_TYPE = [(b"content-type", b"application/json")]


def settings(**given):
    return {"custom_params": {"kv_compressor": given}}


class Client:
    """One request: what the app sees of it, and what goes out."""

    def __init__(self, app, body=b"{}", *, headers=JSON_TYPE, method="POST", parts=1):
        size = max(1, -(-len(body) // parts))
        pieces = [body[at : at + size] for at in range(0, len(body), size)] or [b""]
        self.incoming = [
            {"type": "http.request", "body": piece, "more_body": place < len(pieces) - 1}
            for place, piece in enumerate(pieces)
        ]
        self.sent, self.seen, self.app = [], [], app
        scope = {"type": "http", "method": method, "path": "/", "headers": headers}
        asyncio.run(ExchangeMiddleware(self.route, lambda: CONFIG, self.refuse)(scope, self.receive, self.send))

    async def receive(self):
        return self.incoming.pop(0) if self.incoming else {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    async def route(self, scope, receive, send):
        while True:
            self.seen.append(await receive())
            if self.seen[-1]["type"] == "http.disconnect" or not self.seen[-1]["more_body"]:
                break
        await self.app(current_exchange(), receive, send)

    async def refuse(self, scope, sentence):
        async def answer(scope, receive, send):
            await send({"type": "refused", "sentence": sentence})

        return answer

    @property
    def header(self):
        [head] = [message for message in self.sent if message["type"] == "http.response.start"]
        return [value for name, value in head["headers"] if name == HEADER.encode()]


async def answer(exchange, receive, send, *, kind=b"application/json", records=({"budget": 0.2},)):
    async def answers():
        yield [{"meta_info": {"kv_compressor": record}} for record in records]

    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    async for _ in exchange.noting(answers()):
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
    await send({"type": "http.response.body", "body": b"last"})


@pytest.mark.parametrize("parts", [1, 3])
def test_the_app_sees_the_same_body_and_the_client_that_leaves(parts):
    body = json.dumps({"prompt": "p", **settings(budget=0.2)}).encode()

    async def app(exchange, receive, send):
        assert exchange.given == {"budget": 0.2}
        assert (await receive())["type"] == "http.disconnect"

    client = Client(app, body, parts=parts)
    assert b"".join(message["body"] for message in client.seen) == body


def test_a_client_that_leaves_amid_its_body():
    class Leaver(Client):
        async def receive(self):
            return {"type": "http.disconnect"}

    async def app(exchange, receive, send):
        pass

    assert [message["type"] for message in Leaver(app).seen] == ["http.disconnect"]


def test_the_record_of_a_whole_answer_is_in_the_head():
    client = Client(answer)
    assert [json.loads(value) for value in client.header] == [{"budget": 0.2}]
    assert [message.get("body") for message in client.sent[1:]] == [b"first", b"last"]


@pytest.mark.parametrize(
    ("accept", "comment"),
    [
        (b"text/event-stream", b': x-kv-compressor {"budget":0.2}\n\n'),
        (b"application/json, text/event-stream;q=0.9", b': x-kv-compressor {"budget":0.2}\n\n'),
        (b"*/*", b""),  # SGLang's benchmark takes each line for JSON
        (None, b""),
    ],
)
def test_a_stream_ends_with_the_record_as_a_comment_for_those_who_read_events(accept, comment):
    async def app(exchange, receive, send):
        await answer(exchange, receive, send, kind=b"text/event-stream; charset=utf-8")

    client = Client(app, headers=[*JSON_TYPE, *([(b"accept", accept)] if accept else [])])
    assert [json.loads(value) for value in client.header] == [{"budget": 0.2}]
    assert client.sent[-1]["body"] == b"last" + comment


@pytest.mark.parametrize(("num_records", "listed"), [(0, None), (2, 2), (16, 16), (17, 16)])
def test_several_records_are_a_list_that_headers_have_room_for(num_records, listed):
    async def app(exchange, receive, send):
        await answer(exchange, receive, send, records=[{"place": place} for place in range(num_records)])

    header = Client(app).header
    assert (len(json.loads(header[0])) if header else None) == listed


def test_what_has_no_body_to_read_passes_by():
    async def app(exchange, receive, send):
        assert exchange is None or exchange.given is None
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b""})

    for options in ({"method": "GET"}, {"headers": []}, {"body": b"\xff{"}, {"body": b"[" * 100_000}):
        assert len(Client(app, **options).sent) == 2


@pytest.mark.parametrize("name", [b"x-kv-compressor", b"x-request-id-kv-compressor"])
@pytest.mark.parametrize("body", [b"{}", b'{"custom_params": {"other": 1}}', b"\xff no JSON"])
def test_a_header_says_the_same_as_a_body(body, name):
    async def app(exchange, receive, send):
        assert exchange.given == {"budget": 0.2}

    assert Client(app, body, headers=[*JSON_TYPE, (name, b'{"budget": 0.2}')]).sent == []


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (
            [b'{"budget": 0.9}'],
            "x-kv-compressor.budget = 0.9 is not allowed; legal: a number above 0 and at most 1, on",
        ),
        ([b'{"bugdet": 0.2}'], "x-kv-compressor has no field 'bugdet' (did you mean 'budget'?)"),
        ([b'{"budget": 0.2, "budget": 0.3}'], "the header x-kv-compressor gives 'budget' twice; give it once"),
        ([b"0.2"], 'x-kv-compressor must be an object such as {"budget": 0.2}, got a number'),
        ([b"budget=0.2"], "the header x-kv-compressor is not valid JSON"),
        ([b'{"budget\xff": 1}'], "the header x-kv-compressor is not valid JSON"),
        ([b""], "the header x-kv-compressor is not valid JSON"),
        ([b"[" * 60_000], "the header x-kv-compressor is nested too deeply"),
        (
            [b'{"budget": 0.2}', b'{"budget": 0.2}'],
            "x-request-id-kv-compressor are given 2 times; give one of them once",
        ),
    ],
)
def test_a_bad_header_never_reaches_the_app(values, complaint):
    client = Client(None, headers=[*JSON_TYPE, *((b"x-kv-compressor", value) for value in values)])
    [refusal] = client.sent
    assert complaint in refusal["sentence"]
    assert client.seen == []


def test_both_headers_are_one_too_many():
    headers = [(name, b'{"budget": 0.2}') for name in (b"x-kv-compressor", b"x-request-id-kv-compressor")]
    [refusal] = Client(None, headers=[*JSON_TYPE, *headers]).sent
    assert "x-kv-compressor and x-request-id-kv-compressor are given 2 times" in refusal["sentence"]


def test_a_header_and_a_body_are_one_too_many():
    header = (b"x-kv-compressor", b'{"budget": 0.2}')
    [refusal] = Client(None, json.dumps(settings(budget=0.2)).encode(), headers=[*JSON_TYPE, header]).sent
    assert "is given beside the header x-kv-compressor; give one of them" in refusal["sentence"]


@pytest.mark.parametrize("headers", [JSON_TYPE, []])
def test_a_bad_setting_never_reaches_the_app(headers):
    body = json.dumps(settings(budget=0.9)).encode()
    client = Client(None, body, headers=headers)
    [refusal] = client.sent
    assert "budget = 0.9 is not allowed; legal: a number above 0 and at most 1, on this server at most 0.5" in str(
        refusal
    )
    assert client.seen == []


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"kv_compressor": {}}, "kv_compressor belongs into custom_params"),
        ({"extra_body": {"kv_compressor": {}}}, "kv_compressor belongs into custom_params"),
        ({"sampling_params": settings(budget=2)}, "budget = 2 is not allowed"),
        ({"sampling_params": [settings(budget=0.2), settings(bugdet=2)]}, "has no field 'bugdet'"),
        ({"sampling_params": settings(budget=0.2), **settings(budget=0.2)}, "is given twice, at the top"),
        ('{"custom_params": {"kv_compressor": {"budget": 0.1, "budget": 0.2}}}', "gives 'budget' twice"),
        ('{"custom_params": {"kv_compressor": {}, "kv_compressor": {}}}', "gives 'kv_compressor' twice"),
        ('{"custom_params": {"kv_compressor": {"budget": Infinity}}}', "budget = inf is not allowed"),
        (r'{"custom_params": {"\u006bv_compressor": {"budget": 2}}}', "budget = 2 is not allowed"),
    ],
)
def test_no_setting_is_ignored_in_silence(body, complaint):
    with pytest.raises(ValueError, match=complaint):
        settings_in_body((body if isinstance(body, str) else json.dumps(body)).encode(), CONFIG)


@pytest.mark.parametrize(
    "body", [{"text": '"kv_compressor"'}, {"text": "kv_compressor"}, ["kv_compressor"], "kv_compressor", {}]
)
def test_the_word_in_a_prompt_is_no_setting(body):
    assert settings_in_body(json.dumps(body).encode(), CONFIG) is None


@pytest.mark.parametrize("body", [settings(budget=0.2), {"sampling_params": settings(budget=0.2)}])
def test_settings_are_found_in_both_places(body):
    assert settings_in_body(json.dumps(body).encode(), CONFIG) == {"budget": 0.2}
    batch = {"sampling_params": [settings(budget=0.2), settings(budget=0.3)]}
    assert settings_in_body(json.dumps(batch).encode(), CONFIG) is None  # /generate hands each on itself
