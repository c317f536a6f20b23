"""Where a result row comes from: commit, machine and versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import detect_device

REPOSITORY = Path(__file__).resolve().parents[1]


def _cpu_name() -> str:
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }
    if detect_device() == "cuda":
        import torch

        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def run_metadata() -> dict[str, Any]:
    """Return commit, machine and versions: the part of a result row that says where it comes from."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("sglang-hybridkv", "sglang", "torch", "transformers", "triton", "flashinfer-python"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {"commit": _commit(), "machine": _machine(), "versions": versions}
