"""What the symbols that the ledger names look like in each supported release of SGLang, read from its wheel.

``python -m tests.patches.signatures sglang-0.5.23-*.whl`` writes what `TABLE` has of that release. Nothing is imported
from the wheel, so that one environment can check all releases.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from hybridkv_patches import ledger

TABLE = Path(__file__).with_suffix(".json")
TARGETS = sorted(entry.target for modules in ledger.stages().values() for module in modules for entry in module.ENTRIES)
ATTRIBUTE = "an attribute"

Read = Callable[[str], str | None]


def read_table() -> dict[str, dict[str, str]]:
    """Release to the look of each target."""
    table: dict[str, dict[str, str]] = json.loads(TABLE.read_text())
    return table


def look_of(read: Read, targets: Iterable[str]) -> dict[str, str]:
    """Parameters of each target that is a function, `ATTRIBUTE` for one that is not; a missing one has no entry.

    `read` takes the path of a file in the wheel and gives its text, None where there is none.
    """
    looks = {target: _look(read, target) for target in targets}
    return {target: look for target, look in looks.items() if look is not None}


def as_signature(look: str) -> inspect.Signature:
    """Of a function, from its look."""
    return inspect.signature(eval(f"lambda {look}: None"))


def reader_of_folder(site_packages: Path) -> Read:
    """For an installed SGLang."""

    def read(name: str) -> str | None:
        file = site_packages / name
        return file.read_text() if file.is_file() else None

    return read


def reader_of_wheel(archive: zipfile.ZipFile) -> Read:
    """For one that is not installed."""
    names = set(archive.namelist())
    return lambda name: archive.read(name).decode() if name in names else None


def _look(read: Read, target: str) -> str | None:
    names = target.split(".")
    for length in range(len(names) - 1, 0, -1):
        path = "/".join(names[:length])
        text = read(f"{path}.py") or read(f"{path}/__init__.py")
        if text is not None:
            return _look_in(_parse(text), names[length:])
    return None


@lru_cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def _look_in(module: ast.Module, names: list[str]) -> str | None:
    owner: ast.AST | None = None
    found: ast.AST | None = module
    for name in names:
        owner, found = found, next((node for node in _members(found) if name in _names_of(node)), None)
    if found is None and isinstance(owner, ast.ClassDef):
        return _look_of_unwritten(owner, names[-1])
    if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
        return _bare(found.args)
    return None if found is None else ATTRIBUTE


def _look_of_unwritten(owner: ast.ClassDef, name: str) -> str | None:
    """Of the ``__init__`` that a dataclass is given, or of what methods assign to ``self``."""
    if name == "__init__":
        fields = [node for node in owner.body if isinstance(node, ast.AnnAssign)]
        return ", ".join(["self", *(ast.unparse(one.target) + ("=..." if one.value else "") for one in fields)])
    assigned = (node for node in ast.walk(owner) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    return ATTRIBUTE if any(ast.unparse(node) == f"self.{name}" for node in assigned) else None


def _members(owner: ast.AST | None) -> Iterator[ast.stmt]:
    """Statements of a module or class, those inside of ``if`` and ``try`` too."""
    for node in getattr(owner, "body", []):
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _members(node)


def _names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    return [node.name] if hasattr(node, "name") else []


def _bare(args: ast.arguments) -> str:
    """Without annotations, and with ``...`` for each default."""
    for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg):
        if arg is not None:
            arg.annotation = None
    args.defaults = [ast.Constant(...) for _ in args.defaults]
    args.kw_defaults = [None if default is None else ast.Constant(...) for default in args.kw_defaults]
    return ast.unparse(args)


def main(wheels: list[str]) -> None:
    """Write the table anew with what the wheels have."""
    table = read_table() if TABLE.exists() else {}
    for wheel in wheels:
        release = Path(wheel).name.split("-")[1]
        with zipfile.ZipFile(wheel) as archive:
            table[release] = look_of(reader_of_wheel(archive), TARGETS)
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
