"""A model that no test here compares with stock SGLang is served when its self-test passes, and only then."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.models.make_models import make_model
from tests.e2e.stepped import SteppedScheduler, Steps, make_scheduler, prompt

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def unverified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SteppedScheduler]:
    """A scheduler of tiny-qwen2 under another architecture's name; it would not start if its self-test failed."""
    stock, folder = make_model("tiny-qwen2"), tmp_path_factory.mktemp("models") / "unverified"
    folder.mkdir()
    for path in stock.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((stock / "config.json").read_text()) | {"architectures": ["UnverifiedForCausalLM"]}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    package = {"SGLANG_EXTERNAL_MODEL_PACKAGE": "tests.e2e.external_models"}
    scheduler = make_scheduler(0.1, 2048, model=folder, env=package, unverified_model=True)
    yield scheduler
    scheduler.stop()


def starts(steps: Steps) -> Iterator[None]:
    from hybridkv_patches import verify
    from sglang_hybridkv.srt import settings

    yield
    scheduler = steps.scheduler
    line, info = verify.summary(scheduler, settings.active()), steps.compression.server_info()
    return line, verify.describe_model(scheduler), info, _held(steps)


def _held(steps: Steps) -> dict[str, int]:
    return {
        "pages": steps.allocator.size - steps.allocator.available_size(),
        "tree": steps.scheduler.tree_cache.evictable_size(),
        "rows": len(steps.compression.ledger.by_row),
        "host": steps.compression.store.used_bytes(),
    }


def test_an_unverified_model_starts_says_so_and_nothing_of_the_self_test_is_left(
    unverified: SteppedScheduler,
) -> None:
    line, model, info, held = unverified.run(starts)
    assert "UnverifiedForCausalLM (not verified): self-test passed" in line
    assert (model["architecture"], model["verified"], model["self_test"]) == ("UnverifiedForCausalLM", False, "passed")
    assert 0 < model["self_test_difference"] < 1e-3, "the two paths round differently, or one of them was not taken"
    assert model["self_test_seconds"] < 2
    assert held == dict.fromkeys(held, 0)
    counts = ("compressed_requests", "peak_stock_kv_bytes", "chunk_fetch_bytes")
    assert [info[name] for name in counts] == [0, 0, 0]
    assert (info["dense_requests"], info["chunk_fetch_hit_rate"]) == ({}, None)


def keeps_keys_before_rope(steps: Steps) -> Iterator[None]:
    """The same model, but its cache holds other keys than its prefill has read."""
    from hybridkv_patches import verify
    from sglang_hybridkv.srt import settings

    model = steps.scheduler.tp_worker.model_runner.model
    for layer in model.model.layers:
        layer.self_attn.forward = types.MethodType(_forward_with_raw_keys, layer.self_attn)
    yield
    fault = verify.model_fault(steps.scheduler, settings.active())
    for layer in model.model.layers:
        del layer.self_attn.forward
    assert verify.model_fault(steps.scheduler, settings.active()) is None
    return fault, _held(steps)


def _forward_with_raw_keys(self: Any, positions: Any, hidden_states: Any, forward_batch: Any) -> Any:
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc
    from sglang.srt.model_executor.forward_context import get_attn_backend

    qkv, _ = self.qkv_proj(hidden_states)
    q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
    raw = k.clone().view(-1, self.attn.tp_k_head_num, self.attn.qk_head_dim)
    q, k = self.rotary_emb(positions, q, k)
    output, _ = self.o_proj(self.attn(q, k, v, forward_batch))
    where = KVWriteLoc(forward_batch.out_cache_loc, None)
    get_attn_backend().token_to_kv_pool.set_kv_buffer(self.attn, where, raw, v.reshape(raw.shape))
    return output


def test_a_model_that_keeps_keys_before_rope_is_refused(unverified: SteppedScheduler) -> None:
    fault, held = unverified.run(keeps_keys_before_rope)
    assert fault.startswith("--model-path of a UnverifiedForCausalLM cannot be combined with --kv-compressor hybridkv")
    assert "log-probs of the self-test differ by" in fault
    assert held == dict.fromkeys(held, 0)


def answers(steps: Steps) -> Iterator[None]:
    steps.submit("long", prompt(1, 500), 8)
    yield from steps.until(steps.all_ended)
    return steps.records["long"], len(steps.tokens["long"])


def test_it_serves_compressed_requests_afterwards(unverified: SteppedScheduler) -> None:
    record, num_tokens = unverified.run(answers)
    assert record["compressed"], record
    assert num_tokens == 8
