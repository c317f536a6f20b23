"""SGLang's paged allocator, with admission that knows of compressed pages."""

from __future__ import annotations

from typing import Any

import torch

from sglang_hybridkv.srt.cpu_engine import CpuPagedAllocator
from sglang_hybridkv.srt.prefill_budget import HybridPrefillBudget


class HybridAllocator(CpuPagedAllocator):
    """Pages for tokens and for compressed prompts from one free list.

    Attributes
    ----------
    compression : the `Compression` that plans with these pages; set by who builds both. Tree and budget reach it here.
    """

    compression: Any = None

    def alloc_pages(self, num_pages: int) -> torch.Tensor | None:
        """[num_pages], int64 page ids, or None when that many are not free."""
        slots = self.alloc(num_pages * self.page_size)
        return None if slots is None else slots[:: self.page_size] // self.page_size

    def clear(self):
        super().clear()
        if self.compression is not None:
            self.compression.clear()

    def max_new_tokens_for_memory(self, input_tokens, max_new_tokens, *, token_capacity, **kwargs):
        """As stock with pages of one token, whatever their size: a prompt and its answer may fill the last page."""
        return max(0, min(max_new_tokens, token_capacity - input_tokens - 2))

    def create_prefill_budget(self, tree_cache, *, num_mixed_decode_tokens=0):
        return HybridPrefillBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)
