"""SGLang's offline benchmarks with the plugin's flags, and the proof that compression ran in their result.

``hybridkv bench offline_throughput FLAGS`` runs this module in a process of its own. SGLang's own command reads its
flags before it loads plugins, so that it does not know ours.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Sequence
from typing import Any

THROUGHPUT = "offline_throughput"
NAMES = (THROUGHPUT, "one_batch_server")
# Their own loop runs the model without a scheduler, which is what ends a prefill and compresses.
WITHOUT_SCHEDULER = ("one_batch",)
_PROOF = ("compressed_requests", "dense_requests", "peak_device_kv_bytes", "peak_stock_kv_bytes", "peak_host_kv_bytes")


def fault_of(name: str) -> str | None:
    """A sentence when SGLang's benchmark of this name cannot take the flags."""
    if name in NAMES:
        return None
    known = ", ".join(NAMES)
    if not name:
        return f"say which benchmark: one of {known}"
    if name in WITHOUT_SCHEDULER:
        return f"{name} runs the model without a scheduler, so that nothing would be compressed; use one of {known}"
    if name == "serving":
        return "serving asks a server that runs already, and takes no flags of it: python -m sglang.bench_serving"
    return f"{name} is not known; use one of {known}"


def with_proof(measure: Any) -> Any:
    """`throughput_test_once` whose result says what the engine has compressed in it; nothing is added without it."""

    def measure_and_prove(*args: Any, backend: Any, **kwargs: Any) -> dict[str, Any]:
        before = _state(backend)
        result: dict[str, Any] = measure(*args, backend=backend, **kwargs)
        after = _state(backend)
        if _is_silent(backend):
            print("KV compressor: SGLang's backend runtime does not say whether anything was compressed; use engine")
        if after is not None:
            done = after["compressed_requests"] - (before or after)["compressed_requests"]
            result["kv_compressor"] = {name: after[name] for name in _PROOF} | {"compressed_in_this_run": done}
            print(f"KV compressor {after['name']}: {done} of {result['successful_requests']} requests compressed")
        return result

    return measure_and_prove


def _is_silent(backend: Any) -> bool:
    """Whether it is SGLang's `runtime`, which tells its state only to who waits for it."""
    return inspect.iscoroutinefunction(backend.get_server_info)


def _state(backend: Any) -> dict[str, Any] | None:
    """None without compression, and where it is not told."""
    if _is_silent(backend):
        return None
    state: dict[str, Any] | None = backend.get_server_info()["internal_states"][0].get("kv_compressor")
    return state


def main(words: Sequence[str]) -> int:
    """Run SGLang's benchmark `words[0]` with the flags that follow; 2 when it cannot be."""
    name = words[0] if words else ""
    fault = fault_of(name)
    if fault is not None:
        print(f"hybridkv bench: {fault}", file=sys.stderr)
        return 2
    from sglang.srt.plugins import load_plugins

    load_plugins()
    bench: Any = importlib.import_module(f"sglang.benchmark.{name}")
    if name == THROUGHPUT:
        bench.throughput_test_once = with_proof(bench.throughput_test_once)
    sys.argv = [f"hybridkv bench {name}", *words[1:]]
    bench.cli_main()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
