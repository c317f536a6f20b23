"""What a compressing server would meet on this machine, without starting one.

``hybridkv doctor [FLAGS OF THE SERVER]`` runs this module in a process of its own, which does what a launcher does up
to the point where it would start its processes. Exit status 1 when something is at fault.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

from hybridkv_patches import activation
from sglang_hybridkv.srt import sglang_versions

_GROUP, _NAME = "sglang.srt.plugins", "hybridkv"
_PACKAGES = ("sglang-hybridkv", "torch", "triton", "flashinfer-python", "transformers")
_SERVER_ERROR = "sglang: error: "


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report; `fault` is a sentence when a server could not start like this."""

    name: str
    found: str
    fault: str | None = None

    def __str__(self) -> str:
        line = f"{'ok' if self.fault is None else 'FAULT':5}  {self.name:12}  {self.found}"
        return line if self.fault is None else f"{line}\n{'':21}{self.fault}"


def examine(flags: Sequence[str]) -> Iterator[Finding]:
    """The machine, and what a server with these `flags` would be; without flags the machine only."""
    yield Finding("python", f"{sys.version.split()[0]} at {sys.executable}")
    yield Finding("sglang", f"{_version('sglang')}, supported are {sglang_versions.SUPPORTED}", _sglang_fault())
    yield Finding("packages", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    yield _plugin()
    yield _device()
    if flags:
        yield from _server(flags)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "is not installed"


def _sglang_fault() -> str | None:
    if _version("sglang") == "is not installed":
        return f"install a version {sglang_versions.SUPPORTED} of SGLang"
    return activation.version_fault()


def _plugin() -> Finding:
    """Whether SGLang finds the entry point, is allowed to load it, and has what it installs first."""
    points = [point for point in metadata.entry_points(group=_GROUP) if point.name == _NAME]
    if len(points) != 1:
        return Finding("plugin", f"{len(points)} entry points {_NAME!r}", "install sglang-hybridkv, and only once")
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed and _NAME not in [one.strip() for one in allowed.split(",")]:
        return Finding("plugin", "not loaded", f"SGLANG_PLUGINS = {allowed!r} leaves it out; add {_NAME}")
    if _sglang_fault() is None:
        from sglang.srt.plugins import load_plugins

        load_plugins()
    return Finding("plugin", f"{points[0].value}, with its changes to SGLang's flags", activation.startup_fault())


def _device() -> Finding:
    import torch

    from hybridkv_kernels import cpu

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        found = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, {gib:.0f} GiB"
        return Finding("device", found, None if major >= 8 else "compute capability 8.0 or later is needed")
    engine = "on" if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" else "off (SGLANG_USE_CPU_ENGINE=1 turns it on)"
    obstacle = cpu.obstacle("cpu", torch.float32, 64, 1)
    kernels = f"kernels {cpu.instruction_set()}" if obstacle is None else f"naive kernels ({obstacle})"
    return Finding(
        "device", f"no GPU that torch {torch.__version__} can use; SGLang's CPU engine is {engine}; {kernels}"
    )


def _server(flags: Sequence[str]) -> Iterator[Finding]:
    """SGLang's own resolution of the flags, with our refusals in it."""
    from sglang.srt import runtime_context
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import prepare_server_args

    from sglang_hybridkv.srt.settings import settings_of

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            server_args = prepare_server_args(list(flags))
            runtime_context.publish(server_args, role="tokenizer")
    except SystemExit:
        lines = [line for line in said.getvalue().splitlines() if _SERVER_ERROR in line or ": error: " in line]
        sentence = lines[-1].partition("error: ")[2] if lines else said.getvalue().strip()
        yield Finding("server", "would not start", sentence or "SGLang ended without a word")
        return
    except Exception as error:
        yield Finding("server", "would not start", f"{type(error).__name__}: {error}")
        return
    settings = settings_of(server_args)
    if settings is None:
        yield Finding("server", "starts without compression", "add --kv-compressor hybridkv")
        return
    yield from _model(resolving_view(server_args), server_args, settings)


def _model(view: Any, server_args: Any, settings: Any) -> Iterator[Finding]:
    import torch
    from sglang.srt.arg_groups.model_override_base import model_config_of

    from hybridkv_kernels import dispatch
    from sglang_hybridkv.srt import refusals

    config = model_config_of(server_args)
    [architecture, *_] = config.hf_config.architectures
    proof = "verified" if architecture in refusals.ARCHITECTURES else "not verified, the self-test decides"
    heads = config.get_total_num_kv_heads()
    group = config.num_attention_heads // heads
    shape = f"{config.num_hidden_layers} layers of {heads} KV heads of {config.head_dim}, {group} queries each"
    yield Finding("model", f"{architecture}, {proof}: {shape}")
    device = "cuda" if view.device == "cuda" and torch.cuda.is_available() else "cpu"
    backends = {view.prefill_attention_backend or view.attention_backend} | {
        view.decode_attention_backend or view.attention_backend
    }
    kernels = dispatch.describe(device, config.dtype, config.head_dim, group)
    yield Finding("server", f"--device {view.device}, attention {' and '.join(sorted(backends))}, kernels {kernels}")
    fields = settings.config
    yield Finding(
        "compression",
        f"{settings.name}, budget {fields.budget:g}, pages of {fields.page_size} tokens, prompts from "
        f"{fields.min_prompt_tokens} tokens",
    )


def main(flags: Sequence[str]) -> int:
    """Print the report."""
    findings = []
    for finding in examine(flags):
        print(finding, flush=True)
        findings.append(finding)
    faults = sum(finding.fault is not None for finding in findings)
    if not faults and not flags:
        print(
            "Give the flags of a server to see what it would be: hybridkv doctor --model-path ... --kv-compressor ..."
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
