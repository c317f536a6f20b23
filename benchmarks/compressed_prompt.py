"""One traced prompt in a pool of its own, compressed and decoded as the engine does it."""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks.traced_model import Trace
from sglang_hybridkv.cache.compressed_cache import CompressedCache
from sglang_hybridkv.compressors import Compressor, get_compressor
from sglang_hybridkv.config import parse_config
from sglang_hybridkv.requests.admission import EXPLANATIONS, DenseReason, PoolShape, decide
from sglang_hybridkv.requests.geometry import PromptGeometry
from sglang_hybridkv.requests.ledger import Reservation
from sglang_hybridkv.requests.spans import observed_window

ROW = 1


def make_compressor(name: str, config: str | None, budget: float) -> Compressor:
    """Build a compressor from the values of SGLang's flags."""
    compressor = get_compressor(name)
    return compressor(parse_config(config, compressor.config_class, budget=budget))


class CompressedPrompt:
    """The trace's keys and values in a pool of their own, with the prompt compressed; ValueError if it stays dense."""

    def __init__(self, trace: Trace, compressor: Compressor):
        self.trace, self.compressor, config = trace, compressor, compressor.config
        num_layers, length, num_kv_heads, head_dim = trace.k.shape
        page_size, heads = config.page_size, num_layers * num_kv_heads
        shape = PoolShape(page_size, heads, sys.maxsize)
        geometry = decide(trace.prompt_len, length - trace.prompt_len + 1, config, shape)
        if isinstance(geometry, DenseReason):
            raise ValueError(f"a prompt of {trace.prompt_len} tokens is served dense: {EXPLANATIONS[geometry]}")
        num_dense = -(-length // page_size)
        # Page 0 is padding; the request's own pages come last.
        num_pages = 1 + num_dense + geometry.num_pages
        shape = (num_layers, num_pages * page_size, num_kv_heads, head_dim)
        keys, values = (torch.full(shape, float("nan"), dtype=trace.k.dtype) for _ in range(2))
        slots = page_size + torch.arange(length)
        keys[:, slots], values[:, slots] = trace.k, trace.v
        compressor.bind(num_layers, num_kv_heads)
        self.cache = CompressedCache.create(
            keys,
            values,
            compressor,
            num_rows=ROW + 1,
            max_prompt_tokens=trace.prompt_len,
            num_host_pages=geometry.num_host_pages,
        )
        self.table, self.views = self.cache.memory.table, self.cache.memory.views
        self.covered = geometry.covered
        self.order = self._compress(geometry, num_pages, slots[: trace.prompt_len])
        # The prompt's own rows are gone, as in the engine: only head pages, host rows and the dense tail are left.
        own = slice(0, (1 + geometry.num_prompt_pages) * page_size)
        keys[:, own] = values[:, own] = float("nan")
        self.req_to_token = torch.zeros(ROW + 1, length, dtype=torch.int32)
        self.req_to_token[ROW, self.covered :] = slots[self.covered :].to(torch.int32)

    def _compress(self, geometry: PromptGeometry, num_pages: int, slots: torch.Tensor) -> torch.Tensor:
        """Do what the engine does at the end of prefill; returns the order in which static heads keep tokens."""
        trace, compressor, cache = self.trace, self.compressor, self.cache
        host_pages = cache.memory.store.alloc(geometry.num_host_pages)
        assert host_pages is not None
        reservation = Reservation(
            geometry=geometry,
            pages=torch.arange(num_pages - geometry.num_pages, num_pages),
            host_pages=host_pages,
            prefilled=trace.prompt_len,
            spans=trace.spans,
            may_retrieve=compressor.may_retrieve,
            outcome=torch.zeros(2, dtype=torch.int64),
        )
        window = observed_window(
            compressor.observed_rows, trace.spans, trace.prompt_len, compressor.config.observation_rows
        )
        cache.observer.watch(ROW, window)
        cache.bind(ROW, reservation)
        orders, rank_tokens = [], compressor.rank_tokens

        def listen(*args: Any) -> torch.Tensor:
            orders.append(rank_tokens(*args))
            return orders[-1]

        compressor.rank_tokens = listen  # type: ignore[method-assign]
        try:
            for layer_idx, q in enumerate(trace.q):
                cache.observe(ROW, layer_idx, q[: trace.prompt_len], 0, slots, trace.scaling)
        finally:
            del compressor.rank_tokens
        return orders[0]

    def decode(self, layer_idx: int, position: int) -> torch.Tensor:
        """[H * G, D]: retrieval and attention of the query at `position`, as the engine runs them."""
        q, rows, lens = self.trace.q[layer_idx, position][None], torch.tensor([ROW]), torch.tensor([position + 1])
        self.cache.retrieve(layer_idx, q, rows)
        return self.cache.attend(layer_idx, q, rows, self.req_to_token, lens, self.trace.scaling)[0]

    def resident(self, layer_idx: int) -> torch.Tensor:
        """[H, covered], bool: prompt tokens whose rows are on the device now."""
        page_size, num_pages = self.compressor.config.page_size, self.table.num_head_pages[ROW, layer_idx].long()
        mask = torch.zeros(len(num_pages), self.covered, dtype=torch.bool)
        for head, order in enumerate(self.order[layer_idx]):
            if self.table.is_dynamic[ROW, layer_idx, head]:
                pages = self.table.buffer_page_ids(ROW, layer_idx, torch.tensor([head]), num_pages[head : head + 1])
                chunks = self.views.held_chunks[pages[0]].flatten().long()
                mask[head].view(-1, self.compressor.config.tokens_per_chunk)[chunks] = True
            else:
                mask[head, order[: num_pages[head] * page_size]] = True
        return mask
