from types import SimpleNamespace

import pytest

from hybridkv_patches import weight_updater
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from sglang_hybridkv.srt import settings
from sglang_hybridkv.srt.settings import Settings


@pytest.mark.parametrize("compresses", [False, True])
@pytest.mark.parametrize("captures", [False, True])
def test_the_host_store_is_complete_before_graphs_are_captured_again(captures, compresses, monkeypatch):
    """And nobody waits for it where none are."""
    waited = []
    store = SimpleNamespace(finish_growing=lambda: waited.append(True))
    pool = SimpleNamespace(cache=SimpleNamespace(memory=SimpleNamespace(store=store)))
    updater = SimpleNamespace(get_model_runner=lambda: SimpleNamespace(token_to_kv_pool=pool))
    monkeypatch.setattr(settings, "active", lambda: Settings("hybridkv", HybridKVConfig()) if compresses else None)
    assert weight_updater.finish_growing(updater, "path", "auto", recapture_cuda_graph=captures) is None
    assert bool(waited) == (captures and compresses)
