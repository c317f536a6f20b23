"""Which server answers: compressor, budget and settings, and how it is started."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import scenes, texts
from benchmarks.harness import Server, compression_flags, detect_device, engine_flags
from benchmarks.quality import cases
from sglang_hybridkv.compressors import compressor_names

STOCK = "stock"
FULL = "full"
HYBRIDKV = "hybridkv"
MIN_PROMPT_TOKENS = 64
READY_SECONDS = 900.0
"""Limit of a start. A table runs for hours, maybe beside other work, so a slow start must not leave a server out."""
CALIBRATION_FILE = "visual_head_scores.json"
REQUEST_TOKENS = 8192
"""Tokens of the KV pool on the CPU for each request that runs at once: those it takes, and those that stay for the
next question."""
SOURCES = ("sglang_hybridkv", "hybridkv_kernels", "hybridkv_patches")
SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".inc", ".cu", ".cuh"}
SAMPLED_BYTES = 1 << 20


@dataclass(frozen=True)
class ServerSpec:
    """One column of the table: a server with its settings.

    Attributes
    ----------
    compressor : a name of --kv-compressor, or "stock".
    budget : share of the KV rows; None for stock.
    config : settings other than the defaults.
    variant : name of these settings in an ablation; empty for the defaults.
    inputs : digest of a file that the settings do not hold, a calibration.
    """

    compressor: str
    budget: float | None = None
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    variant: str = ""
    inputs: str = ""

    @property
    def slug(self) -> str:
        """Name of the file with its answers; a function of everything that can change them."""
        parts = [self.compressor] + ([] if self.budget is None else [f"{self.budget:g}"])
        if self.config:
            parts.append(hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:8])
        return "-".join(parts + ([self.inputs] if self.inputs else []))

    @property
    def label(self) -> str:
        """The spec in words."""
        words = [self.compressor] + ([] if self.budget is None else [f"{self.budget:g}"])
        return " ".join(words + ([f"({self.variant})"] if self.variant else []))


def check_compressors(names: Sequence[str]) -> None:
    """Raise ValueError when a name is neither stock nor registered."""
    legal = [STOCK, *compressor_names()]
    for name in names:
        if name not in legal:
            raise ValueError(f"--compressors: {name!r} is unknown; legal: {', '.join(legal)}")


def launch_config(spec: ServerSpec, calibration: Path | None) -> dict[str, Any]:
    """Return the settings that the server is started with: what prompts this short need is filled in.

    Parameters
    ----------
    calibration : file of visual-head scores for `sparsemm`.
    """
    config = {"min_prompt_tokens": MIN_PROMPT_TOKENS, **spec.config}
    if spec.compressor == "sparsemm" and "calibration" not in config:
        config["calibration"] = str(calibration)
    return config


def with_calibration(spec: ServerSpec, calibration: Path) -> ServerSpec:
    """Return the spec with a digest of the calibration if it needs one; ValueError when that is not there."""
    if spec.compressor != "sparsemm" or "calibration" in spec.config:
        return spec
    if not calibration.is_file():
        raise ValueError(
            f"--calibration: {calibration} is not a file, and sparsemm needs one; "
            "`hybridkv calibrate` makes it, or leave sparsemm out with --compressors"
        )
    return dataclasses.replace(spec, inputs=hashlib.sha256(calibration.read_bytes()).hexdigest()[:8])


def make_server(
    spec: ServerSpec,
    model: Path,
    config: dict[str, Any],
    *,
    dtype: str | None,
    log_dir: Path,
    concurrency: int,
    request_tokens: int = REQUEST_TOKENS,
) -> Server:
    """Return the server of a spec, not yet started."""
    on_cpu = detect_device() == "cpu"
    recipe = engine_flags(
        # There are running requests with their compressed pages, and scenes whose questions are still to come.
        max_total_tokens=request_tokens * concurrency if on_cpu else None,
        max_running_requests=concurrency,
        # A scene is prefilled in one piece: its first token is then computed in one batch.
        chunked_prefill_size=4096,
        dtype=dtype,
    )
    flags = [*recipe.flags, "--enable-custom-logit-processor"]
    flags += compression_flags(spec.budget, config, spec.compressor)
    return Server(model, flags, recipe.env, log_dir=log_dir, name=spec.slug, ready_seconds=READY_SECONDS)


def add_file(digest: Any, path: Path) -> None:
    """Update a digest with a file's name, its size and both of its ends, which are all of it where it is small."""
    size = path.stat().st_size
    digest.update(f"{path.name} {size}\n".encode())
    with path.open("rb") as stream:
        digest.update(stream.read(SAMPLED_BYTES))
        stream.seek(max(0, size - SAMPLED_BYTES))
        digest.update(stream.read(SAMPLED_BYTES))


def model_fingerprint(model: Path) -> str:
    """Return a digest of a checkpoint: its small files, and size and both ends of each weight file."""
    if not (model / "config.json").is_file():
        raise ValueError(f"--model-path: {model} has no config.json; expected the folder of a checkpoint")
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.json")) + sorted(model.glob("*.safetensors")):
        # The calibration belongs to a compressor, and result files are no part of the model.
        if path.name == CALIBRATION_FILE:
            continue
        add_file(digest, path)
    return digest.hexdigest()[:12]


def code_fingerprint() -> str:
    """Return a digest of the sources that can change an answer."""
    digest = hashlib.sha256()
    for name in SOURCES:
        found = importlib.util.find_spec(name)
        assert found is not None, f"{name} is not installed"
        root = Path(found.origin or "").parent
        for path in sorted(root.rglob("*")):
            if path.suffix in SOURCE_SUFFIXES:
                digest.update(f"{name}/{path.relative_to(root)}\n".encode() + path.read_bytes())
    for module in (scenes, texts, cases):
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()[:12]
