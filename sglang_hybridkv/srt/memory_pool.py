"""All layers of K (and of V) in one tensor, so that a page can be read as head pages of all layers."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_hybridkv.cache.compressed_cache import CompressedCache


class HybridTokenToKVPool(MHATokenToKVPool):
    """MHATokenToKVPool whose layers share one allocation.

    Attributes
    ----------
    k_buffer, v_buffer : per layer [slots, H, D], as stock; slots = size + page_size.
    keys, values : the same memory, [L, slots, H, D].
    windows : of each layer, as in `HeadPageLayout`; set by who builds pool and allocator.
    cache : what the forward holds of compressed prompts; set by who builds pool and allocator, once both exist. The
        attention backend reaches it through the pool.
    """

    keys: torch.Tensor
    values: torch.Tensor
    cache: CompressedCache
    windows: tuple[int, ...] = ()

    def _create_buffers_normal(self):
        slots = self.size + self.page_size
        if self.kv_cache_layout != "nhd" or slots % self.page_size or self.head_dim != self.v_head_dim:
            raise ValueError(
                "KV compressor: head pages need the NHD layout, whole pages and equal head sizes of K and V, got "
                f"layout {self.kv_cache_layout}, {slots} slots of page size {self.page_size}, "
                f"head sizes {self.head_dim} and {self.v_head_dim}"
            )
        shape = (self.layer_num, slots, self.head_num, self.head_dim)
        self.keys = torch.zeros(shape, dtype=self.store_dtype, device=self.device)
        self.values = torch.zeros(shape, dtype=self.store_dtype, device=self.device)
        self.k_buffer, self.v_buffer = list(self.keys.unbind(0)), list(self.values.unbind(0))

    @property
    def page_bytes(self) -> int:
        """Device bytes of one page, K and V of all layers."""
        return 2 * self.layer_num * self.head_num * self.page_size * self.head_dim * self.store_dtype.itemsize

    @property
    def pool_bytes(self) -> int:
        """Device bytes of all pages."""
        return self.page_bytes * (self.keys.shape[1] // self.page_size)
