"""Start real SGLang servers and ask them things."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import psutil

SERVER_FLAGS = "HYBRIDKV_SERVER_FLAGS"
"""Environment variable: further flags of every server that a benchmark starts on a GPU."""
READY_SECONDS = 180.0
REQUEST_SECONDS = 900.0
STOP_SECONDS = 15.0
FIRST_PORT = 10000
# Linux: the first and the last port of outgoing connections.
OUTGOING_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def detect_device() -> str:
    """Return "cuda" where torch sees a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class EngineRecipe:
    """Flags and environment that a server needs on one kind of device."""

    flags: tuple[str, ...]
    env: dict[str, str]


def engine_flags(
    device: str | None = None,
    *,
    max_total_tokens: int | None = 20000,
    max_running_requests: int | None = 8,
    chunked_prefill_size: int = 1024,
    dtype: str | None = None,
) -> EngineRecipe:
    """Return the flags and environment with which SGLang, with or without compression, runs on a device.

    Parameters
    ----------
    device : "cpu", "cuda" or None
        None asks torch.
    max_total_tokens, max_running_requests : int or None
        Size of the KV pool in tokens, and the limit of running requests. None leaves SGLang's own choice; on the CPU
        engine that means a pool of about 11 GB.
    chunked_prefill_size : int
        Tokens of one prefill chunk.
    dtype : str or None
        For example "float32"; None is the checkpoint's.
    """
    device = device or detect_device()
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {device!r}")
    # Both sides of a comparison have the same attention backend.
    flags = ["--device", device, "--attention-backend", "triton" if device == "cuda" else "torch_native"]
    flags += ["--chunked-prefill-size", str(chunked_prefill_size), "--enable-cache-report"]
    flags += ["--max-total-tokens", str(max_total_tokens)] if max_total_tokens else []
    flags += ["--max-running-requests", str(max_running_requests)] if max_running_requests else []
    flags += ["--dtype", dtype] if dtype else []
    if device == "cuda":
        # What a host lacks, for example FA3 for the images of Qwen2.5-VL: "--mm-attention-backend triton_attn".
        flags += shlex.split(os.environ.get(SERVER_FLAGS, ""))
        return EngineRecipe(tuple(flags), {})
    # Without it an idle scheduler keeps one core busy.
    flags.append("--sleep-on-idle")
    return EngineRecipe(
        tuple(flags), {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    )


def compression_flags(
    budget: float | None, config: dict[str, Any] | None = None, compressor: str = "hybridkv"
) -> list[str]:
    """Return the flags that turn compression on; none of them for budget None (a stock server)."""
    if budget is None:
        return []
    flags = ["--kv-compressor", compressor, "--kv-compressor-budget", str(budget)]
    return flags + (["--kv-compressor-config", json.dumps(config)] if config else [])


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as an exception, so that its servers are stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def free_port() -> int:
    """Return a TCP port that is free now and that the system gives to nobody who does not ask for it by number.

    A server binds its port last, tens of seconds after it was chosen. A port of the system's own choice (bind to 0)
    comes from the range of outgoing connections, so that any of them can take it in the meantime.
    """
    first_outgoing = 32768
    with contextlib.suppress(OSError):
        first_outgoing = int(OUTGOING_PORTS.read_text().split()[0])
    for port in random.SystemRandom().sample(range(FIRST_PORT, max(first_outgoing, FIRST_PORT + 1000)), 1000):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError(f"none of 1,000 ports from {FIRST_PORT} on is free")


@dataclass(frozen=True)
class ChatAnswer:
    """One streamed answer of the OpenAI endpoint. Times are seconds from sending the request."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    ttft: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decode rate: tokens after the first over the time after the first."""
        return (self.completion_tokens - 1) / max(self.seconds - self.ttft, 1e-9) if self.completion_tokens > 1 else 0.0


class ServerError(RuntimeError):
    """The server did not start, or died."""


class NotCompressed(RuntimeError):
    """The server answered without compressing, or compressed without being asked to."""


class Server:
    """A server process: started on entry, stopped with all its children on exit.

    Parameters
    ----------
    model : path or name given to --model-path.
    flags : further command-line flags, as `EngineRecipe.flags` or `compression_flags` give them.
    env : added to this process's environment.
    log_dir : folder of the log; a new temporary one by default. The log stays after exit.
    ready_seconds : limit for start-up.

    Attributes
    ----------
    asks_to_end : whether `stop` asks the processes first, for which SGLang takes seven seconds, or kills them.
    """

    asks_to_end = True

    def __init__(
        self,
        model: str | Path,
        flags: Sequence[str] = (),
        env: dict[str, str] | None = None,
        *,
        log_dir: Path | None = None,
        name: str = "server",
        ready_seconds: float = READY_SECONDS,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
        # SGLang would choose the second one among the ports of outgoing connections, too.
        self.command += ["--host", "127.0.0.1", "--port", str(self.port), "--nccl-port", str(free_port()), *flags]
        self.env = {**os.environ, **(env or {})}
        self.log = (log_dir or Path(tempfile.mkdtemp(prefix="hybridkv-server-"))) / f"{name}-{self.port}.log"
        self.ready_seconds = ready_seconds
        self.process: Any = None  # a subprocess.Popen, or the like
        # trust_env: a proxy variable must not capture requests to this machine.
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.Client(base_url=self.url, timeout=REQUEST_SECONDS, trust_env=False, limits=limits)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process and wait until it answers. Raises ServerError with the end of the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as out:
            self.process = self._launch(out)
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def _launch(self, log: IO[bytes]) -> Any:
        return subprocess.Popen(
            self.command, stdout=log, stderr=subprocess.STDOUT, env=self.env, stdin=subprocess.DEVNULL
        )

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + self.ready_seconds
        while time.monotonic() < deadline:
            if not self.alive():
                raise ServerError(f"server ended before it was ready; its log ends:\n{self.log_tail()}")
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/health", timeout=5.0).status_code == 200:
                    return
            time.sleep(0.3)
        raise ServerError(f"server not ready after {self.ready_seconds:.0f} s; its log ends:\n{self.log_tail()}")

    def alive(self) -> bool:
        """Whether the launcher process runs."""
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """End the process and its children, whatever state they are in. Safe to call twice."""
        if self.process is None:
            return
        try:
            root = psutil.Process(self.process.pid)
            family = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        for method in ("terminate", "kill") if self.asks_to_end else ("kill",):
            for process in family:
                _signal(process, method)
            _, family = psutil.wait_procs(family, timeout=STOP_SECONDS)
        self.process.wait()
        self.process = None
        self.client.close()

    def log_text(self) -> str:
        """Return everything the server has logged."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def log_tail(self, lines: int = 30) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def generate(self, **body: Any) -> dict[str, Any]:
        """POST to /generate. Greedy unless `sampling_params` says otherwise. Raises httpx.HTTPStatusError."""
        body["sampling_params"] = {"temperature": 0, **body.get("sampling_params", {})}
        response = self.client.post("/generate", json=body)
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer

    @contextlib.contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """POST, and yield the events of the streamed answer as they come; the block's end closes the connection."""
        with self.client.stream("POST", path, json=body | {"stream": True}) as response:
            if response.is_error:
                response.read()
                raise ServerError(f"{path}: HTTP {response.status_code}: {response.text[:500]}")
            lines = (line for line in response.iter_lines() if line.startswith("data: ") and line != "data: [DONE]")
            yield (json.loads(line.removeprefix("data: ")) for line in lines)

    def chat(self, messages: list[dict[str, Any]], *, max_tokens: int = 32, **body: Any) -> ChatAnswer:
        """Stream one greedy answer of /v1/chat/completions and time it."""
        body = {"model": "default", "messages": messages, "max_tokens": max_tokens, "temperature": 0, **body}
        body["stream_options"] = {"include_usage": True}
        usage: dict[str, Any] = {}
        pieces: list[str] = []
        first: float | None = None
        started = time.perf_counter()
        with self.stream("/v1/chat/completions", body) as events:
            for event in events:
                usage = event.get("usage") or usage
                piece = event["choices"][0]["delta"].get("content") if event.get("choices") else None
                if piece:
                    first = first or time.perf_counter()
                    pieces.append(piece)
        ended = time.perf_counter()
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        counts = (usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), cached)
        return ChatAnswer("".join(pieces), *counts, ttft=(first or ended) - started, seconds=ended - started)

    def server_info(self) -> dict[str, Any]:
        """GET /server_info."""
        response = self.client.get("/server_info")
        response.raise_for_status()
        info: dict[str, Any] = response.json()
        return info

    def compressor_state(self) -> dict[str, Any] | None:
        """Return the plugin's block of /server_info; None on a stock server."""
        state: dict[str, Any] | None = self.server_info()["internal_states"][0].get("kv_compressor")
        return state

    def log_maximum(self, field: str) -> int:
        """Return the largest number that the scheduler has logged after `field`; ServerError if there is none."""
        numbers = re.findall(rf"{re.escape(field)}: (\d+)", self.log_text())
        if not numbers:
            raise ServerError(f"the log {self.log} has no line with {field}; it ends:\n{self.log_tail()}")
        return max(map(int, numbers))


def _signal(process: psutil.Process, method: str) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        getattr(process, method)()


def parallel(function: Any, items: Sequence[Any]) -> list[Any]:
    """Call `function` on all items at once, one thread each; results in order."""
    with ThreadPoolExecutor(max_workers=max(len(items), 1)) as pool:
        return list(pool.map(function, items))
