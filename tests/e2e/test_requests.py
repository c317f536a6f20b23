"""Settings of single requests: budgets side by side on one server, on every API, and what bad ones are answered."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness import Server, parallel
from tests.e2e.checks import (
    Answer,
    Reference,
    ask,
    assert_compressed,
    assert_dense,
    assert_healthy,
    assert_same,
    flush_cache,
    request_body,
)
from tests.e2e.conftest import VL, make_server, run_servers
from tests.e2e.prompts import Prompt, Vision, text

pytestmark = pytest.mark.server

HEADER = "x-kv-compressor"
PREFIX = "sglang:kv_compressor_"
METRICS_PAGE = Path(__file__).parents[2] / "docs/metrics.md"
LIMITS = {"request_budget_min": 0.2, "request_budget_max": 0.5}
WORDS = "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 12


@pytest.fixture(scope="module")
def fresh() -> Iterator[tuple[Server, dict[str, Any]]]:
    """Budget 0.3, and limits for requests; and the server's state before anybody asked it."""
    for [server] in run_servers(make_server(VL, 0.3, LIMITS, "--enable-metrics", name="limited")):
        yield server, server.compressor_state() or {}
        assert_healthy(server)


@pytest.fixture(scope="module")
def limited(fresh: tuple[Server, dict[str, Any]]) -> Server:
    return fresh[0]


def own(**settings: Any) -> dict[str, Any]:
    return {"custom_params": {"kv_compressor": settings}}


def ask_with(server: Server, prompt: Prompt, **settings: Any) -> Answer:
    """One answer to a request that sets something itself, or nothing."""
    return ask(server, prompt, sampling_params=own(**settings) if settings else {})


@pytest.fixture(params=["text", "images"])
def prompt(request: pytest.FixtureRequest, vision: Vision) -> Prompt:
    if request.param == "text":
        return text(31000, 650)
    return text(31001, 20) + vision.images(31001, 8) + text(31002, 40)


def test_a_requests_budget_is_a_servers(tenth: Server, limited: Server, prompt: Prompt) -> None:
    default = ask_with(limited, prompt)
    asked = ask_with(tenth, prompt, budget=0.3)
    assert_compressed(default)
    assert_same(asked, default)
    differing = {"request_settings": {"budget": 0.3}}
    assert asked.record == {**default.record, **differing}
    assert default.record["request_settings"] is None
    assert ask_with(tenth, prompt).record["plan"] != default.record["plan"]


def test_together_as_alone(tenth: Server) -> None:
    """Requests that share a prefix and a batch, each with its own settings; the tree knows none of them."""
    shared = text(31010, 400)
    settings = [
        {},
        {"budget": 0.2},
        {"budget": 0.2, "theta": 0.0},
        {"budget": 1.0},
        {"enabled": False},
        {"budget": 0.5},
    ]
    jobs = [(shared + text(31011 + place, 200), given) for place, given in enumerate(settings)]
    together = parallel(lambda job: ask_with(tenth, job[0], **job[1]), jobs)
    for (prompt, given), answer in zip(jobs, together, strict=True):
        flush_cache(tenth)
        alone = ask_with(tenth, prompt, **given)
        assert_same(answer, alone)
        assert answer.record == alone.record
        assert answer.record["budget"] == given.get("budget", 0.1)
        assert (answer.record["request_settings"] or {}) == given
    plans = {answer.record["plan"] for answer in together}
    assert len(plans) == len(settings)  # five plans, and none of the dense request
    assert together[2].record["dynamic_heads"] == 0 < together[1].record["dynamic_heads"]


def test_switched_off_is_stock(tenth: Server, stock: Reference, prompt: Prompt) -> None:
    answer = ask_with(tenth, prompt, enabled=False)
    assert_dense(answer, "request_disabled")
    assert_same(answer, stock.ask(prompt))


def test_budget_one_is_stock(tenth: Server, stock: Reference, prompt: Prompt) -> None:
    answer = ask_with(tenth, prompt, budget=1.0)
    assert_compressed(answer)
    assert_same(answer, stock.ask(prompt))


def test_min_prompt_tokens_of_a_request(tenth: Server) -> None:
    prompt = text(31020, 640)
    assert_dense(ask_with(tenth, prompt, min_prompt_tokens=641), "prompt_too_short")
    assert_compressed(ask_with(tenth, prompt, min_prompt_tokens=640))


def apis(model: str) -> dict[str, dict[str, Any]]:
    """Path and body of a request of every API."""
    messages = [{"role": "user", "content": WORDS}]
    return {
        "/generate": {"text": WORDS, "sampling_params": {"max_new_tokens": 4}},
        "/v1/completions": {"model": model, "prompt": WORDS, "max_tokens": 4},
        "/v1/chat/completions": {"model": model, "messages": messages, "max_tokens": 4},
        "/v1/responses": {"model": model, "input": WORDS, "max_output_tokens": 4, "store": False},
        "/v1/messages": {"model": model, "messages": messages, "max_tokens": 4},
    }


PATHS = tuple(apis(""))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", PATHS)
def test_every_api_takes_settings_and_gives_the_record(limited: Server, path: str, stream: bool) -> None:
    model = limited.client.get("/v1/models").json()["data"][0]["id"]
    body = {**apis(model)[path], **own(budget=0.4), "stream": stream}
    headers = {"accept": "text/event-stream"} if stream else {}
    answer = limited.client.post(path, json=body, headers=headers).raise_for_status()
    proofs = [answer.headers.get(HEADER)]
    if stream:
        proofs.append(answer.text.strip().splitlines()[-1].removeprefix(f": {HEADER} "))
    if path == "/v1/responses":
        *_, final = (line for line in answer.text.splitlines() if line.startswith("data: {") or not stream)
        event = json.loads(final.removeprefix("data: "))
        proofs.append((event["response"] if stream else event)["metadata"]["kv_compressor"])
        proofs = proofs[1:] if stream else proofs  # its first event leaves before anything is known
    if path in ("/v1/completions", "/v1/chat/completions") and not stream:
        proofs.append(json.dumps(answer.json()["metadata"]["kv_compressor"]))
    for proof in proofs:
        record = json.loads(proof)
        assert record["compressed"]
        assert (record["budget"], record["request_settings"]) == (0.4, {"budget": 0.4})


@pytest.mark.parametrize("path", PATHS)
def test_every_api_takes_settings_in_a_header(limited: Server, path: str) -> None:
    model = limited.client.get("/v1/models").json()["data"][0]["id"]
    for given, status in ((0.4, 200), (0.9, 400)):
        headers = {HEADER: json.dumps({"budget": given})}
        answer = limited.client.post(path, json=apis(model)[path], headers=headers)
        assert answer.status_code == status
        assert status == 400 or json.loads(answer.headers[HEADER])["request_settings"] == {"budget": given}


def test_a_header_for_all_prompts_and_settings_of_one_are_refused(limited: Server) -> None:
    body = {"text": [WORDS, WORDS], "sampling_params": [own(budget=0.3), {}]}
    answer = limited.client.post("/generate", json=body, headers={HEADER: '{"budget": 0.4}'})
    assert answer.status_code == 400
    assert "give one of them" in answer.text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", PATHS)
def test_every_api_answers_a_bad_setting_with_status_400(limited: Server, path: str, stream: bool) -> None:
    response = limited.client.post(path, json={**apis("")[path], **own(budget=0.9), "stream": stream})
    assert response.status_code == 400
    legal = "a number above 0 and at most 1, on this server at least 0.2 and at most 0.5"
    assert f"custom_params.kv_compressor.budget = 0.9 is not allowed; legal: {legal}" in response.text
    assert "error" in response.json() or response.json()["object"] == "error"


@pytest.mark.parametrize(
    "given, complaint",
    [
        ('{"bugdet": 0.3}', "has no field 'bugdet' (did you mean 'budget'?); a request may set enabled, budget, "),
        ('{"chunk_size": 1}', "chunk_size is set for the whole server only"),
        ('{"budget": NaN}', "budget = nan is not allowed"),
        ('{"budget": true}', "budget = true is not allowed"),
        ('{"budget": "30%"}', "30 % is written 0.3"),
        ('{"budget": 0.3, "budget": 0.4}', "gives 'budget' twice"),
        ('{"budget": {"a": [1]}}', "budget = {'a': [1]} is not allowed"),
        ('{"enabled": 0}', "enabled = 0 is not allowed; legal: true or false"),
        ('{"enabled": false, "budget": 0.3}', "budget would change nothing with enabled = false"),
        ("null", "must be an object"),
        ("[0.3]", "must be an object"),
        (r'{"\ud800\u0000": 1}', r"has no field '\ud800\x00'; "),
        pytest.param('{"budget": %s}' % ("9" * 5000), "budget = inf is not allowed", id="5,000 digits"),
        pytest.param('{"budget": "%s"}' % ("9" * 2**20), "999... is not allowed", id="a megabyte"),
        pytest.param('{"%s": 0.3}' % ("x" * 2**20), "xxx...; a request may set", id="a megabyte of name"),
        pytest.param('{"budget": %s}' % ("[" * 5000 + "]" * 5000), "is nested too deeply", id="nested"),
    ],
)
def test_bad_settings_disturb_nobody(limited: Server, given: str, complaint: str) -> None:
    """A good request runs beside the bad one, and its answer is what it always is."""
    prompt = text(31030, 640)
    good = ask(limited, prompt)
    body = f'{{"text": "a b", "sampling_params": {{"custom_params": {{"kv_compressor": {given}}}}}}}'
    headers = {"content-type": "application/json"}
    again, bad = parallel(
        lambda call: call(),
        [lambda: ask(limited, prompt), lambda: limited.client.post("/generate", content=body, headers=headers)],
    )
    assert bad.status_code == 400
    assert complaint in bad.json()["message"]
    assert_same(again, good)


@pytest.mark.parametrize("given", [["kv_compressor"], "kv_compressor", 5, {"kv_compressors": {"a": {"b": [1]}}}])
def test_custom_parameters_that_name_no_settings_are_sglang_s(limited: Server, given: Any) -> None:
    """SGLang takes any JSON value there."""
    answer = ask(limited, text(31035, 640), 2, sampling_params={"custom_params": given})
    assert answer.record["request_settings"] is None


SCORED = {"query": "a", "items": ["b"], "label_token_ids": [5], "model": "default"}


@pytest.mark.parametrize(
    "path, body, field",
    [
        ("/generate", {"input_embeds": [[0.5]]}, "input_embeds"),
        ("/generate", {"text": "a", "sampling_params": {"beam_width": 2}}, "beam_width"),
        ("/v1/score", {**SCORED, "score_extraction_token": "b"}, "score_extraction_token"),
    ],
)
def test_what_is_not_served_is_refused_without_a_hint_to_refused_flags(limited, path, body, field) -> None:
    response = limited.client.post(path, json=body)
    assert response.status_code == 400
    assert f"{field} is not served with --kv-compressor hybridkv; " in response.text
    assert "disable" not in response.text
    limited.client.post("/v1/score", json=SCORED).raise_for_status()


@pytest.mark.parametrize("where", ["kv_compressor", "extra_body"])
def test_settings_in_a_wrong_place_are_not_ignored(limited: Server, where: str) -> None:
    settings = {"kv_compressor": {"budget": 0.4}}
    body = {**apis("")["/v1/chat/completions"], **(settings if where == "kv_compressor" else {where: settings})}
    response = limited.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "belongs into custom_params" in response.text


def test_a_batch_with_settings_of_its_own_each(limited: Server) -> None:
    prompts = [text(31040, 600), text(31041, 600)]
    params = [{"max_new_tokens": 4, **own(budget=budget)} for budget in (0.2, 0.5)]
    body = {**request_body(prompts[0], 4), "input_ids": [list(prompt.ids) for prompt in prompts]}
    response = limited.client.post("/generate", json={**body, "sampling_params": params})
    budgets = [answer["meta_info"]["kv_compressor"]["budget"] for answer in response.raise_for_status().json()]
    assert budgets == [record["budget"] for record in json.loads(response.headers[HEADER])] == [0.2, 0.5]


def test_a_frontend_program(limited: Server) -> None:
    import sglang as sgl

    from sglang_hybridkv.srt.frontend import RuntimeEndpoint

    @sgl.function
    def program(s):
        s += WORDS
        s += sgl.gen("answer", max_tokens=4)

    def run(settings: dict[str, Any] | None) -> Any:
        return program.run(backend=RuntimeEndpoint(limited.url, kv_compressor=settings))

    budgets = [run(given).get_meta_info("answer")["kv_compressor"]["budget"] for given in (None, {"budget": 0.4})]
    assert budgets == [0.3, 0.4]
    with pytest.warns(UserWarning, match="Error in stream_executor"):
        error = run({"budget": 0.9}).error()
    assert "budget = 0.9 is not allowed" in str(error)


def test_what_the_server_asks_itself_counts_for_no_user(fresh: tuple[Server, dict[str, Any]]) -> None:
    """It warms up before it is ready, and prefills a prompt once more for several samples."""
    server, state = fresh
    assert (state["compressed_requests"], state["dense_requests"]) == (0, {})
    before = server.compressor_state()
    body = request_body(text(31050, 600), 4, sampling_params={"n": 2})
    server.client.post("/generate", json=body).raise_for_status()
    after = server.compressor_state()
    assert after["dense_requests"] == before["dense_requests"]
    assert after["compressed_requests"] == before["compressed_requests"] + 2


def metrics(server: Server) -> dict[str, float]:
    """Values of our metrics by name and our labels; SGLang's labels are on all of them."""
    values = {}
    for family in text_string_to_metric_families(server.client.get("/metrics").raise_for_status().text):
        for sample in family.samples:
            if sample.name.startswith(PREFIX):
                assert sample.labels.keys() >= {"model_name", "tp_rank"}
                own = ".".join(
                    sample.labels[name] for name in ("outcome", "reason", "type", "le") if name in sample.labels
                )
                values[f"{sample.name.removeprefix(PREFIX)} {own}".strip().strip(".")] = sample.value
    return values


def test_metrics_say_what_records_and_server_info_say(limited: Server, tenth: Server) -> None:
    flush_cache(limited)
    before = metrics(limited)
    answer = ask(limited, text(31060, 650), 30)
    ask_with(limited, text(31061, 640), enabled=False)
    flush_cache(limited)
    after, state = metrics(limited), limited.compressor_state()
    gained = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    record = answer.record
    assert gained.pop("requests_total compressed") == gained.pop("requests_total dense.request_disabled") == 1
    assert gained.pop("resident_ratio_sum") == pytest.approx(record["resident_ratio"])
    assert gained.pop("heads_total static") == record["static_heads"]
    assert gained.pop("heads_total dynamic") == record["dynamic_heads"]
    assert gained.pop("compress_seconds_count") == gained.pop("resident_ratio_count") == 1
    assert 0 < gained.pop("compress_seconds_sum") < 5
    hit_rate = after["chunks_hit_total"] / after["chunks_chosen_total"]
    assert (hit_rate, after["chunk_fetch_bytes_total"]) == (state["chunk_fetch_hit_rate"], state["chunk_fetch_bytes"])
    assert gained.pop("chunks_chosen_total") >= gained.pop("chunks_hit_total", 0) > 0
    gained.pop("chunk_fetch_bytes_total", None)
    assert all("_bucket" in name for name in gained), gained
    documented = METRICS_PAGE.read_text()
    names = {re.sub("_(bucket|sum|count)$", "", name.split()[0]) for name in after}
    assert not {name for name in names if f"`{name}`" not in documented}
    assert after["host_limit_bytes"] == state["host_store_bytes"]
    assert after["device_limit_bytes"] == 10000 // 16 * 2 * 16 * 16 * 32 * 4  # pool, K and V, rows, heads, dim, fp32
    assert tenth.client.get("/metrics").status_code == 404


def test_metrics_and_log_of_what_runs(limited: Server) -> None:
    flush_cache(limited)
    idle = metrics(limited)
    names = ("device_bytes", "stock_bytes", "host_bytes", "running_requests", "requests_beyond_stock")
    assert [idle[name] for name in names] == [0] * 5
    with limited.stream("/generate", request_body(text(31070, 4096), 400)) as answers:
        next(answers)
        running = metrics(limited)
        for place, _ in enumerate(answers):
            if place > 60:
                break
    assert running["running_requests"] == 1
    assert 0 < running["device_bytes"] < 0.4 * running["stock_bytes"]
    assert running["host_bytes"] > 0
    saved = [int(number) for number in re.findall(r"#compressed-req: 1, tokens saved: (\d+)", limited.log_text())]
    assert max(saved) == pytest.approx(0.66 * 4096, rel=0.05)
