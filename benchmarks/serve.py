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


def _split(flags: list[str]) -> list[list[str]]:
    """Group a flat command line: each flag with its values."""
    groups: list[list[str]] = []
    for word in flags:
        if word.startswith("--") or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups


def merge_flags(recipe: list[str], given: list[str]) -> list[str]:
    """Return the recipe without the flags that were given, then the given ones."""
    named = {group[0].split("=")[0] for group in _split(given)}
    kept = [word for group in _split(recipe) if group[0] not in named for word in group]
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
