from types import SimpleNamespace

import pytest

from hybridkv_patches import activation, scheduler, verify
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from sglang_hybridkv.srt import settings as settings_module
from sglang_hybridkv.srt.settings import Settings


@pytest.fixture
def active(monkeypatch):
    """As in a process whose server compresses."""
    monkeypatch.setattr(settings_module, "active", lambda: Settings("hybridkv", HybridKVConfig()))


@pytest.fixture
def inactive(monkeypatch):
    monkeypatch.setattr(settings_module, "active", lambda: None)


CHECKS = {"installation": (activation, "installation_fault"), "parts": (verify, "parts_fault")}
CHECKS |= {"kernels": (verify, "kernels_fault"), "model": (verify, "model_fault")}


@pytest.mark.parametrize("lost", [*CHECKS, None])
def test_a_scheduler_starts_only_if_every_check_passes(active, monkeypatch, lost):
    for name, (module, function) in CHECKS.items():
        monkeypatch.setattr(module, function, lambda *args, name=name: f"{name} is gone" if name == lost else None)
    monkeypatch.setattr(verify, "summary", lambda *args: "fine")
    grown = []
    store = SimpleNamespace(grow=lambda: grown.append("behind"), make_all=lambda: grown.append("now"))
    compression = SimpleNamespace(store=store)
    started = SimpleNamespace(
        metrics_reporter=SimpleNamespace(current_scheduler_metrics_enabled=False),
        tree_cache=SimpleNamespace(compression=compression),
    )
    if lost is None:
        scheduler.check_start(None, started)
        monkeypatch.setenv("SGLANG_VIT_ENABLE_CUDA_GRAPH", "1")
        scheduler.check_start(None, started)
    else:
        with pytest.raises(RuntimeError, match=f"^{lost} is gone$"):
            scheduler.check_start(None, started)
    expected = ["behind", "now"] if lost is None else []
    assert grown == expected, "the host store grows behind the server unless graphs are still to be captured"


def test_without_compression_nothing_is_touched(inactive):
    scheduler.check_start(None, None)
    assert scheduler.report_ready({"status": "ready"}, None) is None
    scheduler.readmit(None, None)
    scheduler.report_state(None, None)
    assert scheduler.requeue_preempted(lambda *given: given, "scheduler", "batch") == ("scheduler", "batch")
    assert scheduler.choose_streamer(lambda owner: ("stock", owner), "scheduler") == ("stock", "scheduler")


def test_the_launcher_is_told_what_compresses(active):
    assert scheduler.report_ready({"status": "ready"}, None) == {
        "status": "ready",
        "kv_compressor": {"name": "hybridkv", "budget": 0.1, "page_size": HybridKVConfig().page_size},
    }


@pytest.mark.parametrize("freed", [False, True])
@pytest.mark.parametrize("is_full", [False, True])
def test_freed_memory_reopens_admission_once(active, freed, is_full):
    ledger, batch = SimpleNamespace(freed_memory=freed), SimpleNamespace(batch_is_full=is_full)
    tree = SimpleNamespace(compression=SimpleNamespace(ledger=ledger))
    scheduler.readmit(SimpleNamespace(tree_cache=tree), batch)
    assert batch.batch_is_full == (is_full and not freed)
    assert not ledger.freed_memory
    batch.batch_is_full = True
    scheduler.readmit(SimpleNamespace(tree_cache=tree), batch)
    assert batch.batch_is_full
