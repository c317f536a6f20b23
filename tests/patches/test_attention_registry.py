from types import SimpleNamespace

import pytest
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from hybridkv_patches import attention_registry
from hybridkv_patches.entry import fault_of
from sglang_hybridkv.srt import refusals, settings
from sglang_hybridkv.srt.attention_backend import HybridAttnMixin

SUPPORTED = sorted({name for names in refusals.ATTENTION_BACKENDS.values() for name in names})
[ENTRY] = attention_registry.ENTRIES


class StockBackend(AttentionBackend):
    def __init__(self, runner):
        self.runner = runner


@pytest.fixture
def registry(monkeypatch):
    """SGLang's, with a factory of the test's for each backend, and restored afterwards."""
    for name in list(ATTENTION_BACKENDS):
        monkeypatch.setitem(ATTENTION_BACKENDS, name, lambda runner: StockBackend(runner))
    return ATTENTION_BACKENDS


@pytest.mark.parametrize("active, draft", [(False, False), (False, True), (True, False), (True, True)])
def test_every_name_builds_its_backend_which_is_ours_where_it_compresses(registry, monkeypatch, active, draft):
    monkeypatch.setattr(settings, "active", lambda: "settings" if active else None)
    names = list(registry)
    for _ in range(2):
        ENTRY.install()
    assert list(registry) == names
    runner = SimpleNamespace(is_draft_worker=draft)
    for factory in registry.values():
        backend = factory(runner)
        assert isinstance(backend, StockBackend)
        assert backend.runner is runner
        assert type(backend).__mro__.count(HybridAttnMixin) == (active and not draft)
        assert type(backend).__name__ == ("HybridStockBackend" if active and not draft else "StockBackend")


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_factory_that_is_stock_again_is_missed(registry, name):
    ENTRY.install()
    assert fault_of([ENTRY]) is None
    registry[name] = StockBackend
    assert "attention_registry.ATTENTION_BACKENDS (" in fault_of([ENTRY])
