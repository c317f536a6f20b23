"""Compressed or dense: decided from lengths alone, before a request is admitted."""

from __future__ import annotations

import dataclasses
import enum

from sglang_hybridkv.config import CompressorConfig
from sglang_hybridkv.requests.geometry import PromptGeometry, covered_tokens, prompt_geometry


class DenseReason(str, enum.Enum):
    """Why a request is served without compression; the values are part of the HTTP answer."""

    # As enum.StrEnum, which Python 3.10 does not have.
    __str__ = str.__str__

    PROMPT_TOO_SHORT = "prompt_too_short"
    NO_DECODE = "no_decode"
    PREFILL_ONLY = "prefill_only"
    ABORTED = "aborted"
    BUDGET_BELOW_FLOOR = "budget_below_floor"
    SAVES_NOTHING = "saves_nothing"
    POOL_TOO_SMALL = "pool_too_small"
    NO_FREE_PAGES = "no_free_pages"
    HOST_STORE_FULL = "host_store_full"
    COMPRESSOR_FAILED = "compressor_failed"
    NOT_PREFILLED = "not_prefilled"
    REQUEST_DISABLED = "request_disabled"


EXPLANATIONS = {
    DenseReason.PROMPT_TOO_SHORT: "the prompt has fewer than min_prompt_tokens tokens",
    DenseReason.NO_DECODE: "one token is generated, so nothing would read the compressed cache",
    DenseReason.PREFILL_ONLY: "no token is generated; SGLang itself asks so for the common prompt of n > 1 samples",
    DenseReason.ABORTED: "the request was aborted before its compressed cache was read",
    DenseReason.BUDGET_BELOW_FLOOR: "the budget is below min_head_pages pages for every head",
    DenseReason.SAVES_NOTHING: "budget and chunk summaries together take as many pages as the prompt",
    DenseReason.POOL_TOO_SMALL: "its compressed pages never fit the pool beside its prompt or its answer",
    DenseReason.NO_FREE_PAGES: "the pool has no free pages beside the prompt, even after eviction",
    DenseReason.HOST_STORE_FULL: "the host store has no room for its rows; raise host_store_bytes",
    DenseReason.COMPRESSOR_FAILED: "an error came up while its prompt was compressed; the log has it",
    DenseReason.NOT_PREFILLED: "the request ended before its prompt was processed",
    DenseReason.REQUEST_DISABLED: "the request asked for it, with enabled = false in custom_params.kv_compressor",
}


@dataclasses.dataclass(frozen=True)
class PoolShape:
    """What admission has to know of the KV pool.

    Attributes
    ----------
    head_windows : of each KV head that attends to its last tokens only, how many; the others are compressed.
    """

    page_size: int
    head_pages_per_page: int
    num_tokens: int
    head_windows: tuple[int, ...] = ()

    @property
    def num_compressed_heads(self) -> int:
        """KV heads of all layers that attend to the whole context."""
        return self.head_pages_per_page - len(self.head_windows)


def decide(
    prompt_len: int, max_new_tokens: int, config: CompressorConfig, pool: PoolShape, *, num_generated: int = 0
) -> PromptGeometry | DenseReason:
    """Geometry of the compressed prompt, or why the request is served dense.

    Parameters
    ----------
    prompt_len : tokens of the prompt, all that is ever compressed.
    max_new_tokens : tokens that may still be generated.
    num_generated : tokens that a retracted request has generated already; prefill computes them, too, and they stay
        in the dense tail.

    Notes
    -----
    A request whose peak never fits the pool must go dense here: admission would wait for ever. Budget 1.0 is the
    proof mode: it never goes dense because it saves nothing.
    """
    if prompt_len < max(config.min_prompt_tokens, pool.page_size):
        return DenseReason.PROMPT_TOO_SHORT
    if max_new_tokens <= 0:
        return DenseReason.PREFILL_ONLY
    if max_new_tokens == 1:
        return DenseReason.NO_DECODE
    covered = covered_tokens(prompt_len, pool.page_size)
    geometry = prompt_geometry(
        prompt_len,
        config.budget,
        page_size=pool.page_size,
        head_pages_per_page=pool.head_pages_per_page,
        summary_vectors=config.summary_vectors(covered),
        max_dynamic_heads=config.most_dynamic_heads(pool.num_compressed_heads, covered),
        head_windows=pool.head_windows,
    )
    floor = min(config.min_head_pages, geometry.num_prompt_pages)
    if geometry.budget_head_pages < floor * pool.num_compressed_heads:
        return DenseReason.BUDGET_BELOW_FLOOR
    if config.budget < 1.0 and geometry.num_pages >= geometry.num_prompt_pages:
        return DenseReason.SAVES_NOTHING
    beside = num_generated + max(prompt_len, prompt_len - geometry.covered + max_new_tokens)
    slack = 2 * pool.page_size
    if beside + geometry.num_pages * pool.page_size + slack >= pool.num_tokens:
        return DenseReason.POOL_TOO_SMALL
    return geometry
