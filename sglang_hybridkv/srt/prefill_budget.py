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

    def peak(self, extend_input_len: int, max_new_tokens: int) -> int:
        """Tokens' worth of pages that the considered request takes at most, beside its prefix hit.

        A compressed one has two peaks that never come together: beside all that is prefilled while the prompt is
        compressed, or beside the dense tail and what is generated when the prompt, with its prefix hit, is evictable.
        Their sum could refuse for ever a request that fits.
        """
        covered = 0 if self.geometry is None else self.geometry.covered
        most = max(extend_input_len, extend_input_len - covered + max_new_tokens)
        return self.compressed_tokens + self.ceil_paged_tokens(most)

    def demand(self, extend_input_len: int, max_new_tokens: int) -> int:
        """Tokens that have to be free or evictable for the considered request to be admitted.

        Beside others that is a page more than its peak, as in stock: their estimates do not count that answers end
        within a page. A request that is alone is not asked for it, or the longest that SGLang accepts would wait for
        ever.
        """
        return self.peak(extend_input_len, max_new_tokens) + (self.page_size if self.total_offset else 0)

    def check_prefill(self, *, extend_input_len, total_tokens, max_new_tokens, **kwargs):
        """As stock, which wants more than `total_tokens`."""
        total_tokens = self.demand(extend_input_len, max_new_tokens) - 1
        return super().check_prefill(
            extend_input_len=extend_input_len, total_tokens=total_tokens, max_new_tokens=max_new_tokens, **kwargs
        )

    def reserve(self, extend_input_len, max_new_tokens, *, extra_tokens=0, **kwargs):
        super().reserve(extend_input_len, max_new_tokens, extra_tokens=extra_tokens + self.compressed_tokens, **kwargs)
