"""Registry of compressors: the legal values of ``--kv-compressor`` besides ``none``."""

from sglang_hybridkv.compressors.base import Compressor, HeadPlan, PromptObservation
from sglang_hybridkv.compressors.hybridkv import HybridKV

NONE = "none"

_COMPRESSORS: dict[str, type[Compressor]] = {HybridKV.name: HybridKV}


def compressor_names() -> list[str]:
    """Names of every registered compressor, in order of registration, without ``none``."""
    return list(_COMPRESSORS)


def get_compressor(name: str) -> type[Compressor]:
    """Class of the compressor `name`; ValueError names the value and the legal ones."""
    if name not in _COMPRESSORS:
        raise ValueError(f"--kv-compressor = {name!r} is unknown; legal values: {', '.join([NONE, *_COMPRESSORS])}")
    return _COMPRESSORS[name]


__all__ = ["NONE", "Compressor", "HeadPlan", "PromptObservation", "compressor_names", "get_compressor"]
