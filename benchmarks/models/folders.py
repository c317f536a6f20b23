"""Folders that are made once, and never seen half made."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

STAMP = "made_by.json"


def is_made(folder: Path, stamp: Mapping[str, str]) -> bool:
    """Whether the folder is there and was made by what the stamp says."""
    try:
        found = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return False
    return bool(found == dict(stamp))


def make_once(folder: Path, stamp: Mapping[str, str], build: Callable[[Path], None]) -> Path:
    """Make a folder unless it is there already, and return it.

    Parameters
    ----------
    folder : appears in one rename, so processes may call this at the same time.
    stamp : what the content depends on; a folder with another stamp is made anew.
    build : writes the content into the empty folder that it is given.
    """
    if is_made(folder, stamp):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        build(scratch)
        (scratch / STAMP).write_text(json.dumps(dict(stamp)))
        scratch.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / STAMP).is_file():  # else another process made it meanwhile
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
