"""What an operator has: settings that change in a running server, the board, and SGLang's own benchmarks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness import Server, compression_flags, engine_flags, free_port, parallel
from benchmarks.models.make_models import make_model
from tests.e2e.checks import (
    ask,
    assert_compressed,
    assert_dense,
    assert_healthy,
    assert_same,
    flush_cache,
    read_answer,
    request_body,
)
from tests.e2e.conftest import VL, make_server, run_servers
from tests.e2e.prompts import text

pytestmark = pytest.mark.server

PATH = "/kv_compressor/settings"
KEY = {"authorization": "Bearer of-the-operator"}
AT_START = {
    "budget": 0.1,
    "min_prompt_tokens": 64,
    "theta": 0.6,
    "request_override": True,
    "request_budget_min": None,
    "request_budget_max": None,
}


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    flags = ("--enable-metrics", "--admin-api-key", "of-the-operator")
    for [server] in run_servers(make_server(VL, 0.1, None, *flags, name="operated", server_class=Server)):
        server.client.headers.update(KEY)
        yield server
        assert_healthy(server)


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """As it was started, before and afterwards."""
    assert shown(running) == AT_START
    yield running
    change(running, **AT_START)


def shown(server: Server) -> dict[str, Any]:
    answer = server.client.get(PATH).raise_for_status().json()
    assert answer["name"] == "hybridkv"
    return answer["settings"]


def change(server: Server, **settings: Any) -> None:
    answer = server.client.put(PATH, json=settings).raise_for_status().json()
    assert answer["settings"].items() >= settings.items()
    assert answer["settings"] == shown(server)


def test_a_changed_default_is_what_a_request_gets(server: Server, tenth: Server) -> None:
    """The same plan and answer as of a request that asks for it; a request that asks for more keeps that."""
    prompt = text(41000, 640)
    before = ask(server, prompt)
    change(server, budget=0.3, theta=0.0)
    changed, asked = ask(server, prompt), ask(tenth, prompt, sampling_params=own(budget=0.3, theta=0.0))
    assert_compressed(changed, both_types=False)
    assert_same(changed, asked)
    assert changed.record == {**asked.record, "request_settings": None}
    assert changed.record["plan"] != before.record["plan"]
    assert ask(server, prompt, sampling_params=own(budget=0.5)).record["dynamic_heads"] == 0
    change(server, min_prompt_tokens=641)
    assert_dense(ask(server, prompt), "prompt_too_short")
    change(server, **AT_START)
    again = ask(server, prompt)
    assert_same(again, before)
    assert again.record == before.record


def own(**settings: Any) -> dict[str, Any]:
    return {"custom_params": {"kv_compressor": settings}}


def test_what_runs_keeps_its_plan(server: Server) -> None:
    """One request decodes and another is between two parts of its prefill while settings change back and forth."""
    alone = [ask(server, text(seed, length), 200) for seed, length in ((41010, 640), (41011, 4000))]
    flush_cache(server)
    with server.stream("/generate", request_body(text(41010, 640), 200)) as first:
        next(first)
        second = server.client.build_request("POST", "/generate", json=request_body(text(41011, 4000), 200))

        def change_often() -> None:
            for budget in (0.2, 0.9, 0.5) * 5:
                change(server, budget=budget)

        answer, _ = parallel(lambda call: call(), [lambda: server.client.send(second), change_often])
        *_, last = first
    streamed = read_answer(last)
    assert_same(streamed, alone[0])
    assert streamed.record == alone[0].record
    # It began before, between or after the changes, and has a plan of one of them.
    record = answer.raise_for_status().json()["meta_info"]["kv_compressor"]
    assert record["budget"] in (0.1, 0.2, 0.9, 0.5)
    if record["budget"] == 0.1:
        assert record == alone[1].record
    change(server, budget=record["budget"])
    assert ask(server, text(41011, 4000), 200).record == record


def test_limits_hold_from_then_on(server: Server) -> None:
    prompt = text(41020, 640)
    change(server, request_budget_max=0.4)
    body = request_body(prompt, 4, sampling_params=own(budget=0.5))
    refused = server.client.post("/generate", json=body)
    assert refused.status_code == 400
    assert (
        "budget = 0.5 is not allowed; legal: a number above 0 and at most 1, on this server at most 0.4" in refused.text
    )
    assert ask(server, prompt, sampling_params=own(budget=0.4)).record["budget"] == 0.4
    change(server, request_override=False, request_budget_max=None)
    refused = server.client.post("/generate", json=request_body(prompt, 4, sampling_params=own(budget=0.4)))
    assert "this server has request_override = false" in refused.text


def test_info_metrics_and_log_show_it(server: Server) -> None:
    change(server, budget=0.25, request_budget_min=0.125)
    state = server.compressor_state()
    assert (state["budget"], state["config"]["budget"], state["config"]["request_budget_min"]) == (0.25, 0.25, 0.125)
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    [family] = [family for family in families if family.name == "sglang:kv_compressor_setting"]
    values = {sample.labels["name"]: sample.value for sample in family.samples}
    assert values.keys() == AT_START.keys()
    assert (values["budget"], values["request_budget_min"], values["request_override"]) == (0.25, 0.125, 1)
    assert "changed budget from 0.1 to 0.25, request_budget_min from None to 0.125" in server.log_text()


@pytest.mark.parametrize(
    "body, complaint",
    [
        ('{"budget": 2}', "settings.budget = 2 is not allowed; legal: a number above 0 and at most 1"),
        ('{"budget": NaN}', "settings.budget = nan is not allowed"),
        ('{"budget": "20%"}', "20 % is written 0.2"),
        ('{"budget": true}', "settings.budget = true is not allowed"),
        ('{"budget": null}', "settings.budget = null is not allowed"),
        ('{"budget": 0.2, "budget": 0.3}', "settings gives 'budget' twice; give it once"),
        ('{"budget": 0.2, "theta": -1}', "settings.theta = -1 is not allowed"),
        ('{"bugdet": 0.2}', "settings has no field 'bugdet' (did you mean 'budget'?); what may be changed is budget"),
        ('{"page_size": 32}', "settings.page_size is set when the server starts; what may be changed is budget"),
        ('{"request_budget_min": 0.5, "request_budget_max": 0.2}', "request_budget_min = 0.5 is not allowed with"),
        ('{"request_override": 1}', "settings.request_override = 1 is not allowed; legal: true or false"),
        ("{}", "settings must be an object"),
        ("[0.2]", "settings must be an object"),
        ("null", "settings must be an object"),
        ("", "the body is not valid JSON"),
        ("budget=0.2", "the body is not valid JSON"),
        pytest.param('{"budget": %s}' % ("9" * 4200), "the body has 4212 bytes; legal: at most 4096", id="long"),
        pytest.param("[" * 4000, "the body is nested too deeply", id="nested"),
        pytest.param(b'{"budget\xff": 1}', "the body is not valid JSON: it is not UTF-8", id="latin"),
    ],
)
def test_bad_settings_change_nothing(server: Server, body: str | bytes, complaint: str) -> None:
    headers = {"content-type": "application/json"}
    response = server.client.put(PATH, content=body, headers=headers)
    assert response.status_code == 400
    assert complaint in response.json()["message"]
    assert shown(server) == AT_START


@pytest.mark.parametrize("headers", [{"authorization": ""}, {"authorization": "Bearer of-a-user"}])
def test_without_the_key(server: Server, headers: dict[str, str]) -> None:
    asked = [server.client.get(PATH, headers=headers), server.client.put(PATH, json={"budget": 0.2}, headers=headers)]
    assert [response.status_code for response in asked] == [401, 401]
    assert shown(server) == AT_START


def test_a_server_without_an_admin_key_refuses(tenth: Server) -> None:
    for response in (tenth.client.get(PATH), tenth.client.put(PATH, json={"budget": 0.2})):
        assert response.status_code == 400
        assert "needs an admin key, and this server runs without --admin-api-key" in response.json()["message"]


def test_sglang_s_own_route_for_settings_is_no_way_around(server: Server) -> None:
    message = {"server_args": {'kv_compressor {"budget": 0.5}': 0}}
    response = server.client.post("/set_internal_state", json=message)
    assert response.status_code == 400
    assert f"changed by PUT {PATH}" in response.json()["message"]
    for own_message in ({"pp_max_micro_batch_size": 4}, {"no_such_setting": 1}):
        answer = server.client.post("/set_internal_state", json={"server_args": own_message}).raise_for_status()
        assert answer.json() == ["no_such_setting" not in own_message]
    assert shown(server) == AT_START


MONITORING = Path(__file__).parents[2] / "examples" / "monitoring"
BOARD = MONITORING / "grafana" / "dashboards" / "kv-compressor.json"


@pytest.fixture
def prometheus(running: Server, tmp_path: Path) -> Iterator[httpx.Client]:
    """A real one, with the configuration of the examples but for address and pace; it scrapes `running`."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("Prometheus is not installed (Debian's package prometheus)")
    config = (MONITORING / "prometheus.yml").read_text()
    for theirs, ours in (("sglang:30000", running.url.removeprefix("http://")), ("interval: 5s", "interval: 1s")):
        assert theirs in config
        config = config.replace(theirs, ours)
    (tmp_path / "prometheus.yml").write_text(config)
    shutil.copy(MONITORING / "rules.yml", tmp_path)
    url = f"127.0.0.1:{free_port()}"
    flags = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([program, *flags, f"--web.listen-address={url}"], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{url}/api/v1") as client:
            yield client
    finally:
        process.terminate()
        process.wait(timeout=30)


def query(prometheus: httpx.Client, expression: str) -> list[dict[str, Any]]:
    response = prometheus.get("/query", params={"query": expression})
    assert response.status_code == 200, (expression, response.text)
    return response.json()["data"]["result"]


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after a minute"
        time.sleep(0.5)


def test_every_panel_of_the_board_shows_something(running: Server, prometheus: httpx.Client) -> None:
    """After two requests that are compressed and one that is not, with the ratios that the server itself tells."""

    def is_up() -> bool:
        try:
            return [sample["value"][1] for sample in query(prometheus, "up")] == ["1"]
        except httpx.TransportError:
            return False

    wait_for(is_up, "scrape")
    flush_cache(running)
    answers = [ask(running, text(seed, 640), 30) for seed in (41030, 41031)]
    assert_dense(ask(running, text(41032, 30)), "prompt_too_short")
    compressed, dense = (
        f'{{__name__=~"sglang[:_]kv_compressor_requests_total", outcome="{outcome}"}}'
        for outcome in ("compressed", "dense")
    )
    totals = (f"sum({compressed}) >= {len(answers)}", f"sum({dense}) >= 1")
    wait_for(lambda: all(query(prometheus, total) for total in totals), "scrape after the requests")
    # A rate wants two samples of a counter that has changed between them.
    ask(running, text(41033, 640), 30)
    ask(running, text(41034, 30))
    others = (f'{{__name__=~"sglang[:_]kv_compressor_{name}_total"}}' for name in ("heads", "chunks_hit"))
    rates = [f"sum(rate({series}[1m])) > 0" for series in (compressed, dense, *others)]
    wait_for(lambda: all(query(prometheus, rate) for rate in rates), "rate")

    names = {"$__rate_interval": "1m", "$model": ".*", "$instance": running.url.removeprefix("http://")}
    panels = json.loads(BOARD.read_text())["panels"]
    shown = {}
    for panel in panels:
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in names.items():
                expression = expression.replace(name, value)
            values = query(prometheus, expression)
            assert values, (panel["title"], expression)
            shown[panel["title"], target["refId"]] = {
                re.sub(
                    r"{{(\w+)}}", lambda label, of=value["metric"]: of.get(label[1], ""), target["legendFormat"]
                ): float(value["value"][1])
                for value in values
            }
    assert shown["Requests by outcome", "A"].keys() >= {"compressed ", "dense prompt_too_short"}
    [share] = shown["Share of requests that are compressed", "A"].values()
    assert 0 < share < 1
    [hits] = shown["Chunks that were on the device", "A"].values()
    assert 0 < hits <= 1
    [limit] = shown["Host memory of dynamic heads", "B"].values()
    assert limit == (running.compressor_state() or {})["host_store_bytes"]
    assert {name.split()[0] for name in shown["Settings", "A"]} == AT_START.keys()
    rules = prometheus.get("/rules").json()["data"]["groups"][0]["rules"]
    assert len(rules) == 4
    assert all(rule["health"] in ("ok", "unknown") for rule in rules), rules
    for rule in rules:
        query(prometheus, rule["query"])
    for reason in ("compressor_failed", "host_store_full"):  # or the first one would raise no alert
        [series] = query(prometheus, f'{{__name__=~"sglang[:_]kv_compressor_requests_total", reason="{reason}"}}')
        assert series["value"][1] == "0"


@pytest.fixture
def router(tenth: Server, tmp_path: Path) -> Iterator[httpx.Client]:
    """SGLang's, before one server."""
    ports = [str(free_port()), str(free_port())]
    command = [sys.executable, "-m", "sglang_router.launch_router", "--worker-urls", tenth.url, "--port", ports[0]]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--prometheus-port", ports[1]], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{ports[0]}", timeout=60) as client:

            def is_ready() -> bool:
                try:
                    return client.get("/readiness").is_success
                except httpx.TransportError:
                    return False

            wait_for(is_ready, "worker")
            yield client
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_settings_and_records_pass_sglang_s_router(router: httpx.Client) -> None:
    """In headers, whatever the API; docs/replicas.md says which APIs drop custom_params there."""
    words = "a b c d e f g h " * 60
    bodies: dict[str, dict[str, Any]] = {
        "/generate": {"text": words, "sampling_params": {"max_new_tokens": 4}},
        "/v1/completions": {"model": "default", "prompt": words, "max_tokens": 4},
        "/v1/chat/completions": {"model": "default", "messages": [{"role": "user", "content": words}], "max_tokens": 4},
    }
    for path, body in bodies.items():
        headers = {"x-request-id-kv-compressor": '{"budget": 0.4}'}
        answer = router.post(path, json=body, headers=headers).raise_for_status()
        assert json.loads(answer.headers["x-kv-compressor"])["request_settings"] == {"budget": 0.4}
        refused = router.post(path, json=body, headers={"x-request-id-kv-compressor": '{"budget": 4}'})
        assert refused.status_code == 400
        assert "x-kv-compressor.budget = 4 is not allowed" in refused.text
    dropped = {}
    for path, body in bodies.items():
        answer = router.post(path, json={**body, **own(budget=0.4)}).raise_for_status()
        dropped[path] = json.loads(answer.headers["x-kv-compressor"])["request_settings"] is None
    assert dropped == {"/generate": True, "/v1/completions": False, "/v1/chat/completions": True}


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sglang_hybridkv.cli.main", "bench", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def random_prompts(folder: Path) -> list[str]:
    """Flags of SGLang's benchmarks: five prompts of 900 tokens, of words in a file; they would download some."""
    file = folder / "conversations.json"
    file.write_text(json.dumps([{"conversations": [{"value": "a b c d e"}, {"value": "f g h i j"}]}] * 20))
    sizes = {"random-input-len": 900, "random-output-len": 12, "random-range-ratio": 1, "num-prompts": 5}
    flags = ["--dataset-name", "random", "--dataset-path", str(file)]
    return flags + [word for name, value in sizes.items() for word in (f"--{name}", str(value))]


def test_sglang_s_benchmark_of_servers_asks_ours(tenth: Server, tmp_path: Path) -> None:
    before = (tenth.compressor_state() or {})["compressed_requests"]
    model = tenth.server_info()["model_path"]
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", tenth.url]
    command += ["--model", model, *random_prompts(tmp_path), "--output-file", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert (row["completed"], row["total_output_tokens"]) == (5, 60)
    assert (tenth.compressor_state() or {})["compressed_requests"] >= before + 5


def test_sglang_s_offline_benchmark_takes_our_flags_and_shows_the_proof(tmp_path: Path) -> None:
    sizes = ["--skip-warmup", *random_prompts(tmp_path)]
    recipe = engine_flags("cpu", dtype="float32")
    flags = ("--model-path", str(make_model("tiny-qwen2")), *recipe.flags, *compression_flags(0.2), *sizes)
    with mock.patch.dict(os.environ, recipe.env):
        done = bench("offline_throughput", *flags, "--result-filename", str(tmp_path / "rows.jsonl"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "KV compressor hybridkv: 5 of 5 requests compressed" in done.stdout
    [row] = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["total_output_tokens"] == 60
    assert row["kv_compressor"]["compressed_in_this_run"] == 5
    assert 0.15 < row["kv_compressor"]["peak_device_kv_bytes"] / row["kv_compressor"]["peak_stock_kv_bytes"] < 0.35


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("one_batch", "one_batch runs the model without a scheduler, so that nothing would be compressed"),
        (
            "serving",
            "serving asks a server that runs already, and takes no flags of it: python -m sglang.bench_serving",
        ),
        ("throughput", "throughput is not known; use one of offline_throughput, one_batch_server"),
    ],
)
def test_a_benchmark_that_cannot_take_our_flags_says_so(name: str, sentence: str) -> None:
    done = bench(name, "--kv-compressor", "hybridkv")
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
