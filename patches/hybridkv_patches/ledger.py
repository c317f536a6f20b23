"""The ledger of all changes to SGLang, as a page: ``python -m hybridkv_patches.ledger > docs/patches.md``."""

from __future__ import annotations

from types import ModuleType

from hybridkv_patches import engine, flashinfer_backend, full_component, resolution_hooks, runtime_context, server_args
from hybridkv_patches.entry import LedgerEntry

COMMAND = "python -m hybridkv_patches.ledger > docs/patches.md"

_HEAD = f"""# Changes to SGLang

The plugin changes SGLang while it runs, and no file of it. This page lists every change with the reason for it and what
has to happen before it can go. It is written by `{COMMAND}`.
"""
_COLUMNS = ("SGLang symbol", "Kind", "Module", "Why", "Until")


def stages() -> dict[str, tuple[ModuleType, ...]]:
    """Modules whose `ENTRIES` make up the ledger, by a sentence that says when they are installed."""
    return {
        "Every process that loads the plugin makes these changes. They do nothing until somebody asks for "
        "compression.": (
            server_args,
            resolution_hooks,
            runtime_context,
            engine,
        ),
        "A process whose configuration asks for compression makes these, too. It ends with a sentence that names what "
        "is missing unless every change of both tables is in place.": runtime_context.server_modules(),
        "These are made on objects of SGLang's that a compressing scheduler builds. It looks for them before it "
        "reports that it is ready.": (flashinfer_backend, full_component),
    }


def markdown() -> str:
    """The text of docs/patches.md."""
    return _HEAD + "".join(f"\n{sentence}\n\n{_table(modules)}" for sentence, modules in stages().items())


def _table(modules: tuple[ModuleType, ...]) -> str:
    rows = [_row(module, entry) for module in modules for entry in module.ENTRIES]
    return "".join(f"| {' | '.join(row)} |\n" for row in (_COLUMNS, ("---",) * len(_COLUMNS), *rows))


def _row(module: ModuleType, entry: LedgerEntry) -> tuple[str, ...]:
    return f"`{entry.target}`", entry.kind, f"`{module.__name__.rpartition('.')[2]}`", entry.why, entry.until


if __name__ == "__main__":
    print(markdown(), end="")
