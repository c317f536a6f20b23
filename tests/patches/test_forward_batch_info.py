from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from hybridkv_patches import forward_batch_info
from sglang_hybridkv.srt import settings
from sglang_hybridkv.srt.backends import make_hybrid


def note(mode, rows):
    """What the hook leaves of a batch of these rows."""
    backend, noted = make_hybrid(AttentionBackend()), []
    backend.note_rows = noted.extend
    runner = SimpleNamespace(attn_backend=backend)
    batch = SimpleNamespace(forward_mode=mode, req_pool_indices_cpu=torch.tensor(rows))
    assert (
        forward_batch_info.note_rows("the batch", type, batch, runner, return_hidden_states_before_norm=False) is None
    )
    return noted


@pytest.mark.parametrize(
    ("active", "mode", "noted"),
    [("settings", ForwardMode.DECODE, [4, 2]), ("settings", ForwardMode.EXTEND, []), (None, ForwardMode.DECODE, [])],
)
def test_rows_of_decode_batches_of_a_compressing_server_are_noted_and_no_others(monkeypatch, active, mode, noted):
    monkeypatch.setattr(settings, "active", lambda: active)
    assert note(mode, [4, 2]) == noted
