"""Admission charges the peak of a request: its prompt plus the pages its compressed form takes beside it."""

from __future__ import annotations

from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from sglang_hybridkv.geometry import covered_tokens


class HybridPrefillBudget(PrefillBudget):
    """PrefillBudget that is told which request is priced next; the stock signatures carry lengths only."""

    compressed_tokens = 0

    def consider(self, req) -> None:
        """Remember what the request's compressed pages take, 0 when it will be served dense."""
        self.compressed_tokens = self.allocator.compression.planned_pages(req) * self.page_size

    def check_prefill(self, *, extend_input_len, total_tokens, max_new_tokens, input_tokens, **kwargs):
        """As stock, with the larger of two peaks that never come together: beside the prompt while it is
        compressed, or (prompt evictable by then) beside what is generated. Their sum could refuse for ever
        a request that fits; a prefix hit counts as free after the commit."""
        if self.compressed_tokens:
            prefill = extend_input_len + self.compressed_tokens
            tail = input_tokens - covered_tokens(input_tokens, self.page_size)
            decode = self.compressed_tokens + tail + max_new_tokens - (input_tokens - extend_input_len)
            total_tokens = max(prefill, decode) + self.page_size
        return super().check_prefill(
            extend_input_len=extend_input_len,
            total_tokens=total_tokens,
            max_new_tokens=max_new_tokens,
            input_tokens=input_tokens,
            **kwargs,
        )

    def reserve(self, extend_input_len, max_new_tokens, *, extra_tokens=0, **kwargs):
        super().reserve(extend_input_len, max_new_tokens, extra_tokens=extra_tokens + self.compressed_tokens, **kwargs)
