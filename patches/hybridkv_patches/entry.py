"""What the ledger says of one change to SGLang, whatever its kind, and the sentence about those that are missing."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One change to one SGLang symbol.

    Attributes
    ----------
    target : dotted name of the symbol.
    kind : how it is changed, in a word or two.
    why : reason that no public interface of SGLang does.
    until : what has to change for this entry to go.
    """

    target: str
    kind: str
    why: str
    until: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessEntry(LedgerEntry, abc.ABC):
    """A change that a process makes once. What it puts in place must do nothing when compression is off."""

    @abc.abstractmethod
    def install(self) -> None:
        """Make the change, or leave it with SGLang for `activation.install` to have it made.

        It may fail without a word, as SGLang's own registry does: see `is_installed`.
        """

    @abc.abstractmethod
    def is_installed(self) -> bool:
        """Whether the change is in place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectEntry(LedgerEntry):
    """A change to one object of SGLang's, which ours makes when it takes that object over.

    Attributes
    ----------
    is_installed_on : whether the object that took over has made the change, or needs none.
    """

    kind: str = "attribute of one object"
    is_installed_on: Callable[[Any], bool]


def fault_of(entries: Iterable[ProcessEntry]) -> str | None:
    """Sentence that names the entries that are not in place; None when all are."""
    return missing_sentence(entry.target for entry in entries if not entry.is_installed())


def missing_sentence(targets: Iterable[str]) -> str | None:
    """Sentence that names the missing `targets`; None when there are none."""
    names = ", ".join(sorted(set(targets)))
    if not names:
        return None
    return (
        f"--kv-compressor cannot work: SGLang did not take the hook on {names} (is another plugin's hook there? "
        "SGLANG_PLUGINS=hybridkv loads this plugin alone)"
    )
