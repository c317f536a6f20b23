"""Processes that begin where SGLang is imported already: a test with many models would mostly wait for imports.

A server has three processes, and each imports SGLang for ten seconds of a core. Here one process imports it once and
is forked for each server, whose other processes are forks, too; without threads in it nothing is shared but memory.
All else is that of `python -m sglang.launch_server`, with the same arguments, environment and log. What processes of
their own start-up do is for the tests that use `benchmarks.harness.Server` itself.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import psutil

from benchmarks.harness import Server, ServerError

_MODULES = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
)
_PACKAGES = ("sglang.srt.models", "sglang.srt.multimodal.processors")  # SGLang imports all of them, as far as it can
CPU_RANKS = "SGLANG_CPU_OMP_THREADS_BIND"  # SGLang's CPU engine wants the cores of each rank: "0|1"
_READ_BY_EACH_SERVER = (CPU_RANKS,)  # and not when SGLang is imported
_ONE_AT_A_TIME = threading.Lock()
_PRELOADED: dict[frozenset[tuple[str, str]], subprocess.Popen[str]] = {}
_STOP_SECONDS = 20.0
_ROOT = Path(__file__).parents[2]


class PreloadedServer(Server):
    """A `Server` that is forked from a process with SGLang imported; that process lives as long as this one."""

    asks_to_end = False

    def _launch(self, log: IO[bytes]) -> ForkedProcess:
        argv = self.command[self.command.index("--model-path") :]
        return fork(self.env, self.log, "tests.e2e.preloaded:_serve", argv)


class ForkedProcess:
    """What `Server` needs of a process that is no child of this one."""

    def __init__(self, pid: int):
        self.pid = pid
        self._process = psutil.Process(pid)

    def poll(self) -> int | None:
        """None while it runs; it leaves no exit status."""
        is_there = self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE
        return None if is_there else 0

    def kill(self) -> None:
        """End it at once; safe to call when it has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process.kill()

    def wait(self) -> int:
        """Until it has ended."""
        self._process.wait(_STOP_SECONDS)
        return 0


def fork(env: Mapping[str, str], log: Path, function: str, *args: object) -> ForkedProcess:
    """A process that calls `function`, named as in entry points, with JSON's `args`; what it prints goes to `log`.

    It is a fork of one that has imported SGLang under `env`, which lives as long as this process.
    """
    # PYTEST_CURRENT_TEST would make an environment, and a process that imports SGLang, of every test.
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST_")}
    late = {name: env.pop(name) for name in _READ_BY_EACH_SERVER if name in env}
    with _ONE_AT_A_TIME:  # servers that start at once share the process, and its answers come in order
        process = _preloaded(env)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([str(log), late, function, args]) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    if not answer:
        raise ServerError("the process that imports SGLang for others has ended")
    return ForkedProcess(int(answer))


def _preloaded(env: Mapping[str, str]) -> subprocess.Popen[str]:
    key = frozenset(env.items())
    if key not in _PRELOADED:
        command = [sys.executable, "-m", "tests.e2e.preloaded"]
        _PRELOADED[key] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=_ROOT, text=True
        )
    return _PRELOADED[key]


def _call(log: str, env: dict[str, str], function: str, args: list[object]) -> None:
    """In a fork: become what was asked for."""
    os.environ.update(env)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for path, flags, targets in ((os.devnull, os.O_RDONLY, (0,)), (log, os.O_WRONLY | os.O_APPEND, (1, 2))):
        descriptor = os.open(path, flags)
        for target in targets:
            os.dup2(descriptor, target)
    status = 1
    try:
        pkgutil.resolve_name(function)(*args)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve(argv: list[str]) -> None:
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *args, **kwargs: None  # SGLang asks for "spawn"
    sys.argv = ["sglang.launch_server", *argv]
    runpy.run_module("sglang.launch_server", run_name="__main__")


def main() -> None:
    """Import SGLang, then fork a process for each line of the standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # imports may print
    for name in _MODULES:
        importlib.import_module(name)
    for name in _PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(name).__path__, f"{name}."):
            with contextlib.suppress(Exception):
                importlib.import_module(module.name)
    gc.freeze()  # or the collector copies what forks share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            answers.close()
            _call(*json.loads(line))
        print(pid, file=answers, flush=True)


if __name__ == "__main__":
    main()
