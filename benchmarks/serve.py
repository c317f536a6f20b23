"""Serve a model with compression, on the GPU if there is one, else on the CPU engine.

``python -m benchmarks.serve --model-path MODEL [any sglang flag]`` becomes ``python -m sglang.launch_server`` with the
flags that the device needs. A flag given here wins over the same flag of the recipe.
"""

from __future__ import annotations

import os
import shlex
import sys

from benchmarks.harness import compression_flags, detect_device, engine_flags

DEFAULT_BUDGET = 0.1
USAGE = "usage: python -m benchmarks.serve --model-path MODEL [any flag of python -m sglang.launch_server]"


def merge_flags(recipe: list[str], given: list[str]) -> list[str]:
    """Return the recipe without the flags that were given, and their values, then the given ones."""
    named = {word.split("=")[0] for word in given if word.startswith("--")}
    kept, is_kept = [], True
    for word in recipe:
        is_kept = word not in named if word.startswith("--") else is_kept
        kept += [word] if is_kept else []
    return kept + given


def build_command(given: list[str], device: str) -> tuple[list[str], dict[str, str]]:
    """Return the server's command line and the environment variables to add."""
    # On a GPU SGLang sizes the KV pool itself; on the CPU engine it would take about 11 GB.
    on_cpu = device == "cpu"
    recipe = engine_flags(
        device,
        max_total_tokens=65536 if on_cpu else None,
        max_running_requests=64 if on_cpu else None,
        chunked_prefill_size=2048 if on_cpu else 8192,
    )
    flags = merge_flags([*recipe.flags, *compression_flags(DEFAULT_BUDGET)], given)
    return [sys.executable, "-m", "sglang.launch_server", *flags], recipe.env


def main() -> None:
    """Print the command, then become it."""
    given = sys.argv[1:]
    if not any(word.split("=")[0] in ("--model-path", "--model") for word in given):
        sys.exit(USAGE)
    command, env = build_command(given, detect_device())
    print(shlex.join([*(f"{name}={value}" for name, value in env.items()), *command]), flush=True)
    os.execve(command[0], command, {**os.environ, **env})


if __name__ == "__main__":
    main()
