"""Streams of /generate that can be left early."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.harness import Server


@contextmanager
def stream(server: Server, body: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
    """Yield the answers of a streaming request as they come; the client disconnects at the end of the block."""
    with server.client.stream("POST", "/generate", json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        yield (
            json.loads(line.removeprefix("data: "))
            for line in response.iter_lines()
            if line.startswith("data: ") and line != "data: [DONE]"
        )
