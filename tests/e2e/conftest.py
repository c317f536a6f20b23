"""Real servers for the tests of this folder: few, shared, strict about lost memory, fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_memory, harness
from benchmarks.harness import Server, compression_flags, engine_flags, free_port, parallel
from benchmarks.models.make_models import make_model
from benchmarks.quality import servers as quality_servers
from tests.e2e.checks import Reference, assert_healthy
from tests.e2e.preloaded import PreloadedServer
from tests.e2e.prompts import Vision

VL = "tiny-qwen2_5_vl"
POOL_TOKENS = 10000
CHUNK_TOKENS = 512
OBSERVED_ROWS = 32  # observation_rows, which a prefix hit leaves to compute
# Half of the heads of the tiny models are static and half dynamic at this threshold.
CONFIG = {"min_prompt_tokens": 64, "preset": "paper", "theta": 0.6}
STRICT_ENV = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}


def make_server(
    model: str | Path,
    budget: float | None = None,
    config: dict[str, Any] | None = None,
    *flags: str,
    env: dict[str, str] | None = None,
    name: str = "stock",
    server_class: type[Server] = PreloadedServer,
    **sizes: int,
) -> Server:
    """A server that is not started yet; stock without a budget.

    `model` is the name of a tiny one or a folder, `sizes` are of SGLang's pool and prefill. `server_class` is `Server`
    where the start itself, or the end, is what a test is about.
    """
    sizes = {"max_total_tokens": POOL_TOKENS, "chunked_prefill_size": CHUNK_TOKENS} | sizes
    recipe = engine_flags("cpu", dtype="float32", **sizes)
    compression = compression_flags(budget, {**CONFIG, **(config or {})})
    env = {**recipe.env, **STRICT_ENV, **(env or {})}
    folder = make_model(model) if isinstance(model, str) else model
    return server_class(folder, [*recipe.flags, *compression, *flags], env, name=name)


@pytest.fixture
def preloaded_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of benchmarks and examples that run in this process are forks, too."""
    for module in (harness, bench_memory, quality_servers):
        monkeypatch.setattr(module, "Server", PreloadedServer)
    for name, value in STRICT_ENV.items():
        monkeypatch.setenv(name, value)


def run_servers(*servers: Server) -> Iterator[list[Server]]:
    """Start servers at once, and in the end stop them at once."""
    try:
        parallel(lambda server: server.start(), servers)
        yield list(servers)
    finally:
        parallel(lambda server: server.stop(), servers)


@pytest.fixture(scope="session")
def vision(vl_model: Path) -> Vision:
    """Prompts with images for the model of `stock` and `tenth`."""
    return Vision(vl_model)


@pytest.fixture(scope="session")
def session_servers() -> Iterator[list[Server]]:
    """The two servers that several modules ask, alive until the end."""
    events = {"events": f"tcp://127.0.0.1:{free_port()}"}
    yield from run_servers(make_server(VL, name="stock"), make_server(VL, 0.1, events, name="tenth"))


@pytest.fixture(scope="session")
def stock(session_servers: list[Server]) -> Iterator[Reference]:
    """SGLang without the plugin's flags; what every answer is compared with."""
    yield Reference(session_servers[0])
    assert_healthy(session_servers[0])


@pytest.fixture(scope="session")
def tenth(session_servers: list[Server]) -> Iterator[Server]:
    """Compression at budget 0.1, overlap scheduler on."""
    yield session_servers[1]
    assert_healthy(session_servers[1])
