"""A compressing server's own figures, again and again: ``hybridkv watch``."""

from __future__ import annotations

import dataclasses
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_SECONDS = 10.0  # that an answer may take
_STATE = "kv_compressor"


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """`/server_info` at one moment, in seconds of a monotonic clock."""

    seconds: float
    state: dict[str, Any]

    @property
    def num_compressed(self) -> int:
        return int(self.state["compressed_requests"])


def read(url: str, api_key: str | None = None) -> Snapshot:
    """Ask a server; ValueError in one sentence when there is none, or none that compresses."""
    place = f"{url.rstrip('/')}/server_info"
    if urllib.parse.urlparse(place).scheme not in ("http", "https"):
        raise ValueError(f"--url = {url!r}: expected an address such as http://127.0.0.1:30000")
    request = urllib.request.Request(place, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            info = json.load(response)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{place} answers with HTTP {error.code}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{place} cannot be read: {getattr(error, 'reason', error)}") from None
    states = info.get("internal_states") or [{}]
    if states[0].get(_STATE) is None:
        raise ValueError(f"the server at {url} does not compress; start it with --kv-compressor")
    return Snapshot(time.monotonic(), states[0][_STATE])


def rows(now: Snapshot, before: Snapshot | None = None) -> Iterator[tuple[str, str]]:
    """What to show: name and value. Rates are those since `before`."""
    state = now.state
    model = state["model"]
    proof = "verified" if model["verified"] else "not verified"
    yield (
        "server",
        f"{state['name']}, budget {state['budget']:g}, {model['architecture']} ({proof}), {state['kernels']}",
    )
    rate = ""
    if before is not None and now.seconds > before.seconds:
        rate = f", {(now.num_compressed - before.num_compressed) / (now.seconds - before.seconds):.1f} a second"
    yield "compressed", f"{now.num_compressed:,} requests{rate}"
    dense = ", ".join(f"{reason} {count:,}" for reason, count in sorted(state["dense_requests"].items()))
    yield "dense", dense or "none"
    running = state["ranks"][0]["requests"]
    yield "running", f"{running} compressed requests"
    for name, prefix in (("now", ""), ("at the peak", "peak_")):
        device, stock, host = (state[f"{prefix}{kind}_kv_bytes"] for kind in ("device", "stock", "host"))
        share = f" ({100 * device / stock:.1f} %)" if stock else ""
        yield name, f"{_mib(device)} on the device{share}, stock {_mib(stock)}, host {_mib(host)}"
    limit, *parts = (state["host_store"][f"{name}_bytes"] for name in ("limit", "pinned", "used", "reserved"))
    pinned, used, reserved = map(_mib, parts)
    yield "host store", f"at most {_mib(limit)}, {pinned} pinned, {used} used, {reserved} reserved"
    hits = state["chunk_fetch_hit_rate"]
    fetched = _mib(state["chunk_fetch_bytes"])
    yield "retrieval", "nothing yet" if hits is None else f"{100 * hits:.1f} % were on the device, {fetched} fetched"
    if len(state["ranks"]) > 1:
        free = ", ".join(f"{rank['free_tokens']:,}" for rank in state["ranks"])
        yield "free tokens", f"{free} on the ranks"


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def as_table(now: Snapshot, before: Snapshot | None = None) -> Table:
    """`rows` for a terminal."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in rows(now, before):
        table.add_row(f"[bold]{name}[/]", value)
    return table


def watch(url: str, api_key: str | None, interval: float) -> None:
    """Redraw every `interval` seconds until Ctrl-C; a server that goes away is said, and looked for again."""
    from rich.live import Live
    from rich.text import Text

    before = read(url, api_key)
    with Live(as_table(before), auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            try:
                now = read(url, api_key)
            except ValueError as error:
                live.update(Text(str(error)), refresh=True)
                continue
            live.update(as_table(now, before), refresh=True)
            before = now
