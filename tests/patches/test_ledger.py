import importlib
import pkgutil
from pathlib import Path

import hybridkv_patches
from hybridkv_patches import ledger

ROOT = Path(__file__).parents[2]
ENTRIES = [entry for modules in ledger.stages().values() for module in modules for entry in module.ENTRIES]


def test_the_page_is_current():
    assert (ROOT / "docs" / "patches.md").read_text() == ledger.markdown(), f"run `{ledger.COMMAND}`"


def test_every_entry_of_every_module_is_in_the_ledger():
    names = [f"hybridkv_patches.{module.name}" for module in pkgutil.iter_modules(hybridkv_patches.__path__)]
    modules = [importlib.import_module(name) for name in names]
    of_modules = [entry for module in modules for entry in getattr(module, "ENTRIES", ())]
    assert sorted(entry.target for entry in of_modules) == sorted(entry.target for entry in ENTRIES)


def test_every_entry_says_why_and_until_and_has_a_symbol_of_its_own():
    assert all(entry.why and entry.until for entry in ENTRIES)
    assert len({entry.target for entry in ENTRIES}) == len(ENTRIES)


def test_entries_on_one_class_stand_in_one_module():
    modules_of = {}
    for modules in ledger.stages().values():
        for module in modules:
            for entry in module.ENTRIES:
                modules_of.setdefault(entry.target.rpartition(".")[0], set()).add(module.__name__)
    assert {owner: names for owner, names in modules_of.items() if len(names) > 1} == {}
