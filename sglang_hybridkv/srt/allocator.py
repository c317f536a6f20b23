"""SGLang's paged allocator, also where Triton cannot run, with admission that knows of compressed pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator, alloc_extend_naive
from sglang.srt.utils import get_num_new_pages

from sglang_hybridkv.srt.prefill_budget import HybridPrefillBudget

if TYPE_CHECKING:
    from sglang_hybridkv.srt.compression import Compression


class HybridAllocator(PagedTokenToKVPoolAllocator):
    """Pages for tokens and for compressed prompts from one free list.

    On a CPU `alloc_extend` and `alloc_decode` run SGLang's naive version: its Triton kernels need a GPU.
    """

    compression: Compression | None = None
    free_pages: torch.Tensor

    def alloc_pages(self, num_pages: int) -> torch.Tensor | None:
        """[num_pages], int64 page ids, or None when that many are not free."""
        slots = self.alloc(num_pages * self.page_size)
        return None if slots is None else slots[:: self.page_size] // self.page_size

    def alloc_extend(
        self, prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens, num_new_pages=None
    ):
        if torch.device(self.device).type != "cpu":
            return super().alloc_extend(
                prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens, num_new_pages
            )
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        if not self._have(num_new_pages):
            return None
        out = torch.empty(extend_num_tokens, dtype=torch.int64)
        alloc_extend_naive(prefix_lens, seq_lens, last_loc, self.free_pages, out, self.page_size, self.device)
        self.free_pages = self.free_pages[num_new_pages:]
        return out

    def alloc_decode(self, seq_lens, seq_lens_cpu, last_loc):
        if torch.device(self.device).type != "cpu":
            return super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)
        opens_page = (seq_lens_cpu - 1) % self.page_size == 0
        num_new_pages = int(opens_page.sum())
        if not self._have(num_new_pages):
            return None
        out = last_loc.to(torch.int64) + 1
        out[opens_page] = self.free_pages[:num_new_pages] * self.page_size
        self.free_pages = self.free_pages[num_new_pages:]
        return out

    def clear(self):
        super().clear()
        if self.compression is not None:
            self.compression.clear()

    def create_prefill_budget(self, tree_cache, *, num_mixed_decode_tokens=0):
        return HybridPrefillBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    def _have(self, num_pages: int) -> bool:
        if num_pages > len(self.free_pages):
            self.merge_and_sort_free()
        return num_pages <= len(self.free_pages)
