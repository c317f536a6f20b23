"""One traced prompt in a pool of its own, compressed and decoded as the engine does it."""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks.traced_model import Trace
from hybridkv_kernels.decode_attn import decode_attn
from hybridkv_kernels.head_pages import HeadPageLayout, HeadPageTable, HeadPageViews
from sglang_hybridkv.cache.compress import compress_prompt
from sglang_hybridkv.cache.host_store import HostStore
from sglang_hybridkv.cache.retrieval import retrieve
from sglang_hybridkv.compressors import Compressor, PromptLayer, get_compressor
from sglang_hybridkv.config import RetrievalConfig, parse_config
from sglang_hybridkv.requests.admission import EXPLANATIONS, DenseReason, PoolShape, decide
from sglang_hybridkv.requests.geometry import PromptGeometry
from sglang_hybridkv.requests.ledger import Reservation
from sglang_hybridkv.requests.spans import observed_window, text_mask

ROW = 1


def make_compressor(name: str, config: str | None, budget: float) -> Compressor:
    """Build a compressor from the values of SGLang's flags."""
    compressor = get_compressor(name)
    return compressor(parse_config(config, compressor.config_class, budget=budget))


def observe(
    trace: Trace, compressor: Compressor, views: HeadPageViews, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the compressor sees of the prompt, as the engine shows it: statistic [L, H] and salience [L, H, N]."""
    end = trace.prompt_len
    window = observed_window(compressor.observed_rows, trace.spans, end, compressor.config.observation_rows)
    scores = [
        compressor.score_layer(
            PromptLayer(
                trace.q[layer_idx, window.start : window.stop].contiguous(),
                *views.layer_rows(layer_idx),
                slots,
                trace.scaling,
                text_mask(trace.spans, end),
                layer_idx,
            )
        )
        for layer_idx in range(len(trace.q))
    ]
    statistic, salience = (torch.stack(parts) for parts in zip(*scores, strict=True))
    return statistic, salience


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
        compressor.bind(num_layers, num_kv_heads)
        layout = HeadPageLayout(num_layers, num_kv_heads, 1 + num_dense + geometry.num_pages, page_size)
        views = _make_views(layout, head_dim, trace.k.dtype)
        self.views = views.with_chunks(config.tokens_per_chunk) if isinstance(config, RetrievalConfig) else views
        slots = page_size + torch.arange(length)
        for layer_idx in range(num_layers):
            k_rows, v_rows = self.views.layer_rows(layer_idx)
            k_rows[slots], v_rows[slots] = trace.k[layer_idx], trace.v[layer_idx]
        self.table = HeadPageTable(ROW + 1, geometry.num_pages, geometry.num_host_pages, layout, "cpu")
        self.store = HostStore(geometry.num_host_pages, heads, page_size, head_dim, trace.k.dtype, pin=False)
        self.covered = geometry.covered
        self.order = self._compress(geometry, slots[: trace.prompt_len])
        # The prompt's own rows are gone, as in the engine: only head pages, host rows and the dense tail are left.
        for pages in (self.views.k_pages, self.views.v_pages):
            by_page = pages.unflatten(0, (num_layers, -1, num_kv_heads))
            by_page[:, : 1 + geometry.num_chunks] = float("nan")
        self.req_to_token = torch.zeros(ROW + 1, length, dtype=torch.int32)
        self.req_to_token[ROW, self.covered :] = slots[self.covered :].to(torch.int32)
        self.counters = torch.zeros(2, dtype=torch.int64)

    def _compress(self, geometry: PromptGeometry, slots: torch.Tensor) -> torch.Tensor:
        """Do what the engine does at the end of prefill; returns the order in which static heads keep tokens."""
        trace, compressor = self.trace, self.compressor
        statistic, salience = observe(trace, compressor, self.views, slots)
        layout = self.views.layout
        host_pages = self.store.alloc(geometry.num_host_pages)
        assert host_pages is not None
        reservation = Reservation(
            geometry=geometry,
            pages=torch.arange(layout.pages_per_layer - geometry.num_pages, layout.pages_per_layer),
            host_pages=host_pages,
            prefilled=trace.prompt_len,
            spans=trace.spans,
            retrieval=compressor.retrieves,
            outcome=torch.zeros(2, dtype=torch.int64),
        )
        self.table.bind(ROW, reservation.pages, host_pages, geometry.covered)
        orders, rank_tokens = [], compressor.rank_tokens

        def listen(*args: Any) -> torch.Tensor:
            orders.append(rank_tokens(*args))
            return orders[-1]

        compressor.rank_tokens = listen  # type: ignore[method-assign]
        try:
            compress_prompt(
                self.views,
                self.table,
                self.store,
                compressor,
                reservation,
                ROW,
                slots[: geometry.covered],
                statistic,
                salience,
            )
        finally:
            del compressor.rank_tokens
        return orders[0]

    def decode(self, layer_idx: int, position: int) -> torch.Tensor:
        """[H * G, D]: retrieval and attention of the query at `position`, as the engine runs them."""
        q, rows, config = self.trace.q[layer_idx, position][None], torch.tensor([ROW]), self.compressor.config
        if isinstance(config, RetrievalConfig):
            retrieve(q, self.views, self.table, self.store, self.counters, layer_idx, rows, config)
        lens = torch.tensor([position + 1])
        arguments = (q, self.views, self.table, layer_idx, rows, self.req_to_token, lens)
        return decode_attn(*arguments, scaling=self.trace.scaling, estimate=self.compressor.estimate)[0]

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


def _make_views(layout: HeadPageLayout, head_dim: int, dtype: torch.dtype) -> HeadPageViews:
    num_head_pages = layout.pages_per_layer * layout.head_pages_per_page
    k, v = (torch.full((num_head_pages * layout.page_size, head_dim), float("nan"), dtype=dtype) for _ in range(2))
    by_page = (num_head_pages, layout.page_size, head_dim)
    return HeadPageViews(
        layout, k, v, k.view(by_page), v.view(by_page), torch.zeros(num_head_pages, 1, dtype=torch.int32)
    )
