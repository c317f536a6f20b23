"""A user can see that compression is active, what it saved, and why a request was served dense."""

from __future__ import annotations

import base64
import io

import pytest
import zmq
from PIL import Image

from benchmarks.harness import Server
from sglang_hybridkv.cli import inspect
from sglang_hybridkv.requests.plan_events import TOPIC, PlanEvent, read_message
from tests.e2e.checks import Reference, ask, assert_compressed, assert_dense, assert_nothing_lost, request_body
from tests.e2e.prompts import Vision, text

pytestmark = pytest.mark.server

SERVER_FIELDS = {
    "name",
    "model",
    "budget",
    "config",
    "page_size",
    "compressed_requests",
    "dense_requests",
    "device_kv_bytes",
    "stock_kv_bytes",
    "host_kv_bytes",
    "host_store_bytes",
    "host_store",
    "chunk_fetch_hit_rate",
    "chunk_fetch_bytes",
}
REQUEST_FIELDS = {
    "compressed",
    "reason",
    "prompt_tokens",
    "budget",
    "resident_ratio",
    "host_bytes",
    "static_heads",
    "dynamic_heads",
    "plan",
    "request_settings",
}


def test_log_says_what_is_active(tenth: Server) -> None:
    [line] = [line for line in tenth.log_text().splitlines() if "KV compression is active" in line]
    assert "hybridkv" in line
    assert "0.1" in line


def test_server_info(tenth: Server) -> None:
    answer = ask(tenth, text(7000, 700), 30)
    state = tenth.compressor_state()
    assert state.keys() >= SERVER_FIELDS
    assert (state["name"], state["budget"], state["page_size"]) == ("hybridkv", 0.1, 16)
    assert 0.0 < state["chunk_fetch_hit_rate"] <= 1.0
    assert (state["chunk_fetch_bytes"] > 0) == (state["chunk_fetch_hit_rate"] < 1.0)
    assert state["peak_device_kv_bytes"] < state["peak_stock_kv_bytes"]
    assert state["peak_host_kv_bytes"] >= answer.record["host_bytes"] > 0
    assert tenth.server_info()["page_size"] == 16


def test_bytes_are_reported_while_a_request_runs(tenth: Server) -> None:
    assert_nothing_lost(tenth)
    with tenth.stream("/generate", request_body(text(7001, 4096), 1000)) as answers:
        next(answers)
        state = tenth.compressor_state()
    host = state["host_store"]
    assert 0 < host["used_bytes"] == state["host_kv_bytes"] <= host["pinned_bytes"]
    assert host["reserved_bytes"] == 0, "nothing is in prefill"
    assert host["pinned_bytes"] <= host["limit_bytes"] == state["host_store_bytes"]
    prompt_bytes = 4096 * 2 * 16 * 32 * 4  # keys and values of 16 heads of 32 numbers in fp32
    generated_bytes = state["stock_kv_bytes"] - prompt_bytes  # more on a busy machine, and not compressed
    assert 0 < state["device_kv_bytes"] - generated_bytes <= 0.14 * prompt_bytes
    assert state["host_kv_bytes"] > 0
    assert_nothing_lost(tenth)


def test_meta_info(tenth: Server) -> None:
    answer = ask(tenth, text(7002, 4103), 20)
    assert_compressed(answer)
    record = answer.record
    assert record.keys() == REQUEST_FIELDS
    assert (record["prompt_tokens"], record["budget"]) == (4103, 0.1)
    assert 0.1 <= record["resident_ratio"] <= 0.14
    assert record["static_heads"] + record["dynamic_heads"] == 16


def test_meta_info_of_every_part_of_a_stream(tenth: Server) -> None:
    with tenth.stream("/generate", request_body(text(7003, 500), 12)) as answers:
        records = [answer["meta_info"]["kv_compressor"] for answer in answers]
    assert len(records) > 1
    for record in records:
        assert record.keys() == REQUEST_FIELDS
        assert record == records[-1]
    assert records[-1]["compressed"]


def test_meta_info_of_a_batch(tenth: Server) -> None:
    prompts = [text(7004, 400), text(7005, 30), text(7006, 600)]
    body = {**request_body(prompts[0], 8), "input_ids": [list(prompt.ids) for prompt in prompts]}
    answers = tenth.client.post("/generate", json=body).raise_for_status().json()
    records = [answer["meta_info"]["kv_compressor"] for answer in answers]
    assert [record["prompt_tokens"] for record in records] == [400, 30, 600]
    assert [record["reason"] for record in records] == [None, "prompt_too_short", None]


@pytest.mark.parametrize(
    "length, new_tokens, reason",
    [(40, 8, "prompt_too_short"), (500, 1, "no_decode"), (510, 0, "prefill_only"), (200, 8, "budget_below_floor")],
)
def test_dense_requests_are_logged_and_counted(tenth: Server, length: int, new_tokens: int, reason: str) -> None:
    before = tenth.compressor_state()
    assert_dense(ask(tenth, text(7010 + length, length), new_tokens), reason)
    after = tenth.compressor_state()
    assert after["dense_requests"][reason] == before["dense_requests"].get(reason, 0) + 1
    assert after["compressed_requests"] == before["compressed_requests"]
    assert f"is served dense, {reason}" in tenth.log_text()


@pytest.mark.parametrize(
    "field, value",
    [("bootstrap_host", "2.2.2.2"), ("bootstrap_room", 7), ("input_embeds", [[0.5] * 128] * 40), ("beam_width", 2)],
)
def test_what_is_not_served_is_refused_by_name_and_the_server_lives(tenth: Server, field: str, value: object) -> None:
    """Two of these would end it: a prompt of several parts that is kept out of the radix tree loses its pages."""
    body = request_body(text(7050, 1200), 8) | ({} if field == "beam_width" else {field: value})
    if field == "input_embeds":
        del body["input_ids"]
    if field == "beam_width":
        body["sampling_params"][field] = value
    response = tenth.client.post("/generate", json=body)
    assert response.status_code == 400
    assert f"{field} is not served with --kv-compressor hybridkv; " in response.text
    assert "--disable-radix-cache" not in response.text
    assert_nothing_lost(tenth)


def test_the_prompt_that_sglang_caches_for_several_samples_is_no_answer(tenth: Server) -> None:
    before = tenth.compressor_state()
    body = request_body(text(7060, 500), 8, sampling_params={"n": 2})
    answers = tenth.client.post("/generate", json=body).raise_for_status().json()
    assert all(answer["meta_info"]["kv_compressor"]["compressed"] for answer in answers)
    after = tenth.compressor_state()
    assert after["compressed_requests"] == before["compressed_requests"] + 2
    counted = {
        reason: count - before["dense_requests"].get(reason, 0) for reason, count in after["dense_requests"].items()
    }
    assert {reason: count for reason, count in counted.items() if count} == {}


def test_without_the_flag_the_server_is_stock(stock: Reference) -> None:
    server = stock.server
    info = server.server_info()
    assert info["page_size"] == 1
    assert server.compressor_state() is None
    assert "kv_compressor" not in ask(server, text(7040, 600), 8).meta
    assert "compression" not in server.log_text().lower()


def test_plans_are_published_as_they_are_made(tenth: Server, vision: Vision) -> None:
    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.setsockopt(zmq.SUBSCRIBE, TOPIC)
    socket.connect(tenth.compressor_state()["config"]["events"])
    for seed in range(7900, 7930):  # until the server knows of the subscriber
        ask(tenth, text(seed, 700), 2)
        if socket.poll(100):
            break
    prompt = text(7931, 30) + vision.images(79, 3) + text(7932, 600)
    record = ask(tenth, prompt, 4, rid="asked for its plan").record
    event: PlanEvent | None = None
    while socket.poll(2000):
        _, event = read_message(socket.recv_multipart())
    socket.close()
    assert event is not None
    assert (event.request_id, event.plan) == ("asked for its plan", record["plan"])
    assert (event.prompt_tokens, event.budget, event.page_size) == (record["prompt_tokens"], 0.1, 16)
    is_dynamic = [one for layer in event.is_dynamic for one in layer]
    assert (is_dynamic.count(False), is_dynamic.count(True)) == (record["static_heads"], record["dynamic_heads"])
    kept = event.kept_tokens()
    assert kept.shape == (4, 4, event.covered_tokens)
    assert kept.sum(-1).tolist() == [[16 * pages for pages in layer] for layer in event.head_pages]
    assert len(event.spans) == 3
    assert all(kind == "image" and 30 <= start < end <= event.prompt_tokens - 600 for start, end, kind in event.spans)
    tail = kept[:, :, -16:]
    assert tail[~kept.new_tensor(event.is_dynamic)].all(), "static heads keep the end of the prompt"


def test_a_prompt_is_asked_and_its_plan_is_caught(tenth: Server, vision: Vision) -> None:
    pictures = [base64.b64decode(one.partition(",")[2]) for one in vision.images(80, 2).images]
    found = inspect.ask(tenth.url, inspect.with_pictures("What is new here? " * 120, pictures), pictures, max_tokens=4)
    event = found.event
    assert [kind for *_, kind in event.spans] == ["image", "image"]
    for (start, end, _), picture in zip(event.spans, pictures, strict=True):
        with Image.open(io.BytesIO(picture)) as image:
            rows, columns = inspect.grid_of(end - start, *image.size)
            assert (28 * columns, 28 * rows) == image.size
    with pytest.raises(ValueError, match="served dense, prompt_too_short"):
        inspect.ask(tenth.url, "What?", max_tokens=4)


def test_a_server_that_publishes_no_plans_says_how_to(stock: Reference) -> None:
    with pytest.raises(ValueError, match="does not compress; start it with --kv-compressor"):
        inspect.ask(stock.server.url, "What?")
