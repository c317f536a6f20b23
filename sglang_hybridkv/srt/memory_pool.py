"""All layers of K (and of V) in one tensor: stock per-layer views and the head-page view over the same memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from hybridkv_kernels.head_pages import HeadPageLayout, HeadPageViews

if TYPE_CHECKING:
    from sglang_hybridkv.srt.compression import Compression


class HybridTokenToKVPool(MHATokenToKVPool):
    """MHATokenToKVPool whose layers share one allocation.

    Attributes
    ----------
    k_buffer, v_buffer : per layer [slots, H, D], as stock; slots = size + page_size.
    views : the same memory by head pages, and the residency map for chunks of one page, until
        `Compression` puts the one of its chunk size in place.
    compression : set once the allocator exists; the attention backend reaches it through the pool.
    """

    compression: Compression | None = None

    def _create_buffers_normal(self):
        slots = self.size + self.page_size
        if self.kv_cache_layout != "nhd" or slots % self.page_size or self.head_dim != self.v_head_dim:
            raise ValueError(
                "KV compressor: head pages need the NHD layout, whole pages and equal head sizes of K and V, got "
                f"layout {self.kv_cache_layout}, {slots} slots of page size {self.page_size}, "
                f"head sizes {self.head_dim} and {self.v_head_dim}"
            )
        layout = HeadPageLayout(self.layer_num, self.head_num, slots // self.page_size, self.page_size)
        shape = (self.layer_num, slots, self.head_num, self.head_dim)
        keys = torch.zeros(shape, dtype=self.store_dtype, device=self.device)
        values = torch.zeros(shape, dtype=self.store_dtype, device=self.device)
        self.k_buffer, self.v_buffer = list(keys.unbind(0)), list(values.unbind(0))
        num_head_pages = layout.num_layers * layout.pages_per_layer * layout.num_kv_heads
        self.views = HeadPageViews(
            layout=layout,
            k_flat=keys.view(-1, self.head_dim),
            v_flat=values.view(-1, self.head_dim),
            k_pages=keys.view(-1, self.page_size, self.head_dim),
            v_pages=values.view(-1, self.page_size, self.head_dim),
            held_chunks=torch.zeros(num_head_pages, 1, dtype=torch.int32, device=self.device),
        )

    @property
    def page_bytes(self) -> int:
        """Device bytes of one page, K and V of all layers."""
        return 2 * self.views.layout.head_pages_per_page * self.page_size * self.head_dim * self.store_dtype.itemsize
