"""Admission charges the peak of a request: its prompt plus the pages its compressed form takes beside it."""

from __future__ import annotations

from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from sglang_hybridkv.requests.geometry import PromptGeometry
from sglang_hybridkv.srt.protocols import Request


class HybridPrefillBudget(PrefillBudget):
    """PrefillBudget that is told which request is priced next; the stock signatures carry lengths only."""

    geometry: PromptGeometry | None = None

    def consider(self, req: Request) -> None:
        """Remember what the request's compressed form takes; None when it will be served dense."""
        self.geometry = self.allocator.compression.planned(req)

    @property
    def compressed_tokens(self) -> int:
        """Tokens' worth of pages that the considered request is compressed to."""
        return 0 if self.geometry is None else self.geometry.num_pages * self.page_size

    def check_prefill(self, *, extend_input_len, total_tokens, max_new_tokens, **kwargs):
        """As stock, with the larger of two peaks that never come together: beside all that is prefilled while the
        prompt is compressed, or beside the dense tail and what is generated when the prompt, with its prefix hit,
        is evictable. Their sum could refuse for ever a request that fits."""
        if self.geometry is not None:
            decode = extend_input_len - self.geometry.covered + max_new_tokens
            total_tokens = self.compressed_tokens + max(extend_input_len, decode) + self.page_size
        return super().check_prefill(
            extend_input_len=extend_input_len, total_tokens=total_tokens, max_new_tokens=max_new_tokens, **kwargs
        )

    def reserve(self, extend_input_len, max_new_tokens, *, extra_tokens=0, **kwargs):
        super().reserve(extend_input_len, max_new_tokens, extra_tokens=extra_tokens + self.compressed_tokens, **kwargs)
