"""Registry of compressors: the legal values of ``--kv-compressor`` besides ``none``.

Others come from the entry-point group ``sglang_hybridkv.compressors`` of installed distributions, see
docs/compressors.md. They are imported when they are asked for, and not before.
"""

from __future__ import annotations

import importlib.metadata

from sglang_hybridkv.compressors.adakv import AdaKV
from sglang_hybridkv.compressors.base import Compressor, HeadPlan, PromptLayer, PromptObservation
from sglang_hybridkv.compressors.expected_attention import ExpectedAttention
from sglang_hybridkv.compressors.full import Full
from sglang_hybridkv.compressors.hybridkv import HybridKV
from sglang_hybridkv.compressors.look_m import LookM
from sglang_hybridkv.compressors.madakv import MadaKV
from sglang_hybridkv.compressors.pyramidkv import PyramidKV
from sglang_hybridkv.compressors.quest import Quest
from sglang_hybridkv.compressors.random_tokens import Random
from sglang_hybridkv.compressors.snapkv import SnapKV
from sglang_hybridkv.compressors.sparsemm import SparseMM
from sglang_hybridkv.compressors.tgv_kv import TGVKV
from sglang_hybridkv.config import CompressorConfig

NONE = "none"
ENTRY_POINT_GROUP = "sglang_hybridkv.compressors"

_CLASSES = (
    HybridKV,
    SnapKV,
    LookM,
    MadaKV,
    SparseMM,
    Quest,
    TGVKV,
    AdaKV,
    PyramidKV,
    ExpectedAttention,
    Random,
    Full,
)
BUILT_IN: dict[str, type[Compressor]] = {compressor.name: compressor for compressor in _CLASSES}


def compressor_names() -> list[str]:
    """Names of every compressor, built in or installed beside us, without ``none``."""
    return list(dict.fromkeys([*BUILT_IN, *sorted(point.name for point in _entry_points())]))


def get_compressor(name: str) -> type[Compressor]:
    """Class of the compressor `name`; ValueError in one sentence when it is unknown, ambiguous or does not load."""
    points = [point for point in _entry_points() if point.name == name]
    owners = [*(["sglang-hybridkv"] if name in BUILT_IN else []), *map(_distribution, points)]
    if len(owners) > 1:
        raise ValueError(f"--kv-compressor = {name!r} is ambiguous: {' and '.join(owners)} bring one; uninstall others")
    if name in BUILT_IN:
        return BUILT_IN[name]
    if not points:
        raise ValueError(
            f"--kv-compressor = {name!r} is unknown; legal values: {', '.join([NONE, *compressor_names()])}"
        )
    return _load(points[0])


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    return list(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))


def _load(point: importlib.metadata.EntryPoint) -> type[Compressor]:
    origin = f"--kv-compressor = {point.name!r} of the installed distribution {_distribution(point)}"
    try:
        loaded = point.load()
    except Exception as error:
        raise ValueError(f"{origin} cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Compressor)):
        raise ValueError(f"{origin} is no subclass of sglang_hybridkv.compressors.Compressor: {point.value}")
    if getattr(loaded, "name", None) != point.name or not issubclass(loaded.config_class, CompressorConfig):
        raise ValueError(f"{origin} must have that name, and a config_class that is a CompressorConfig: {point.value}")
    return loaded


def _distribution(point: importlib.metadata.EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


__all__ = [
    "BUILT_IN",
    "ENTRY_POINT_GROUP",
    "NONE",
    "Compressor",
    "HeadPlan",
    "PromptLayer",
    "PromptObservation",
    "compressor_names",
    "get_compressor",
]
