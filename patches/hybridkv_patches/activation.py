"""What this process has been asked to install, and the proof that all of it is in place."""

from __future__ import annotations

from collections.abc import Iterable

from hybridkv_patches import hook
from hybridkv_patches.entry import ProcessEntry, fault_of
from sglang_hybridkv.srt import sglang_versions

_asked_for: list[ProcessEntry] = []


def install(entries: Iterable[ProcessEntry]) -> None:
    """Install `entries`; from now on `installation_fault` answers for them."""
    for entry in entries:
        _asked_for.append(entry)  # first: an installation that raises is missing, too
        entry.install()
    hook.apply()


def installation_fault() -> str | None:
    """Sentence that names what was to be installed and is not in place; None when all is."""
    return fault_of(_asked_for)


def startup_fault() -> str | None:
    """Sentence that says why this process cannot start a compressing server; None when it can."""
    return version_fault() or installation_fault()


def version_fault() -> str | None:
    """Sentence that names the installed and the supported SGLang versions; None when they agree."""
    from sglang.version import __version__ as installed

    if sglang_versions.is_supported(installed):
        return None
    return f"--kv-compressor does not support SGLang {installed}; install a version {sglang_versions.SUPPORTED}"
