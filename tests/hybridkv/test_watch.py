"""`hybridkv watch`: a server's figures in words, and one sentence where there are none."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from sglang_hybridkv.cli.main import main
from sglang_hybridkv.cli.watch import Snapshot, as_table, rows

STATE = {
    "name": "hybridkv",
    "budget": 0.1,
    "kernels": "cpu (avx512)",
    "model": {"architecture": "Qwen2ForCausalLM", "verified": True},
    "compressed_requests": 1200,
    "dense_requests": {"too_short": 3, "aborted": 1},
    "device_kv_bytes": 2**20,
    "stock_kv_bytes": 8 * 2**20,
    "host_kv_bytes": 2**19,
    "peak_device_kv_bytes": 0,
    "peak_stock_kv_bytes": 0,
    "peak_host_kv_bytes": 0,
    "host_store": {"limit_bytes": 2**22, "pinned_bytes": 2**20, "used_bytes": 2**19, "reserved_bytes": 2**18},
    "chunk_fetch_hit_rate": 0.875,
    "chunk_fetch_bytes": 3 * 2**20,
    "ranks": [{"requests": 2, "free_tokens": 4096, "used_host_tokens": 8}],
}


@pytest.fixture
def serve():
    """A server that answers every GET with a status and a body; yields a function that starts it."""
    servers = []

    def start(status, body):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_what_is_shown():
    found = dict(rows(Snapshot(10.0, STATE)))
    assert found["server"] == "hybridkv, budget 0.1, Qwen2ForCausalLM (verified), cpu (avx512)"
    assert found["compressed"] == "1,200 requests"
    assert found["dense"] == "aborted 1, too_short 3"
    assert found["running"] == "2 compressed requests"
    assert found["now"] == "1.0 MiB on the device (12.5 %), stock 8.0 MiB, host 0.5 MiB"
    assert found["at the peak"] == "0.0 MiB on the device, stock 0.0 MiB, host 0.0 MiB"
    assert found["host store"] == "at most 4.0 MiB, 1.0 MiB pinned, 0.5 MiB used, 0.2 MiB reserved"
    assert found["retrieval"] == "87.5 % were on the device, 3.0 MiB fetched"
    assert "free tokens" not in found


def test_rates_and_ranks():
    later = Snapshot(14.0, STATE | {"compressed_requests": 1206, "ranks": STATE["ranks"] * 2})
    found = dict(rows(later, Snapshot(10.0, STATE)))
    assert found["compressed"] == "1,206 requests, 1.5 a second"
    assert found["free tokens"] == "4,096, 4,096 on the ranks"
    assert as_table(later, Snapshot(10.0, STATE)).row_count == len(found)


def test_nothing_decoded_and_no_host_store():
    nothing = dict.fromkeys(STATE["host_store"], 0)
    state = STATE | {"chunk_fetch_hit_rate": None, "host_store": nothing, "dense_requests": {}}
    found = dict(rows(Snapshot(0.0, state)))
    assert (found["retrieval"], found["dense"]) == ("nothing yet", "none")
    assert found["host store"] == "at most 0.0 MiB, 0.0 MiB pinned, 0.0 MiB used, 0.0 MiB reserved"


def test_once_prints_a_running_server(serve, capsys):
    url = serve(200, json.dumps({"internal_states": [{"kv_compressor": STATE}]}).encode())
    assert main(["watch", "--once", "--url", url]) == 0
    assert "compressed    1,200 requests" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (200, b'{"internal_states": [{}]}', "does not compress; start it with --kv-compressor"),
        (200, b"no json", "cannot be read: Expecting value"),
        (401, b"", "answers with HTTP 401"),
    ],
)
def test_a_server_without_figures_is_one_sentence(serve, capsys, status, body, sentence):
    assert main(["watch", "--once", "--url", serve(status, body)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hybridkv watch: ")
    assert said.count("\n") == 1
    assert sentence in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--url", "127.0.0.1:1"], "--url = '127.0.0.1:1': expected an address such as http://127.0.0.1:30000"),
        (["--url", "http://127.0.0.1:1"], "http://127.0.0.1:1/server_info cannot be read: [Errno 111]"),
        (["--interval", "0"], "--interval = 0: expected a number of seconds above 0"),
    ],
)
def test_bad_input_is_one_sentence(capsys, options, sentence):
    assert main(["watch", "--once", *options]) == 2
    assert sentence in capsys.readouterr().err
