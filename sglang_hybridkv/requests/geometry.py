"""Page counts of a compressed prompt: a function of its length, the budget and the model only.

Tensor-parallel ranks must reserve the same number of pages, and the CPU reserves before the forward has seen
anything, so nothing here may depend on scores.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction


@dataclasses.dataclass(frozen=True)
class PromptGeometry:
    """Sizes of one compressed prompt, in the units their names say.

    Attributes
    ----------
    covered : tokens of the page-aligned prompt; the rest stays dense.
    num_prompt_pages : pages of the covered prompt.
    total_head_pages : head pages that hold rows, of all layers and KV heads.
    summary_pages_per_head : head pages that hold the chunk summaries of one dynamic head.
    max_dynamic_heads : heads that may be dynamic.
    num_pages : device pages to reserve; enough for the budget plus the summaries of these heads.
    num_host_pages : host pages in the worst case, where every head that may be dynamic turns out so.
    window_head_pages : those of total_head_pages whose heads attend to their last tokens only.
    """

    covered: int
    num_prompt_pages: int
    total_head_pages: int
    summary_pages_per_head: int
    max_dynamic_heads: int
    num_pages: int
    num_host_pages: int
    window_head_pages: int = 0

    @property
    def budget_head_pages(self) -> int:
        """The budget B in head pages, of the heads that are compressed."""
        return self.total_head_pages - self.window_head_pages

    def pages_used(self, num_dynamic_heads: int, head_pages_per_page: int) -> int:
        """Device pages that hold something once the number of dynamic heads is known."""
        head_pages = self.total_head_pages + num_dynamic_heads * self.summary_pages_per_head
        return -(-head_pages // head_pages_per_page)

    def host_pages_used(self, num_dynamic_heads: int, head_pages_per_page: int) -> int:
        """Host pages that hold something once the number of dynamic heads is known."""
        return -(-num_dynamic_heads * self.num_prompt_pages // head_pages_per_page)


def covered_tokens(prompt_len: int, page_size: int) -> int:
    """Page-aligned part of a prompt of `prompt_len` tokens."""
    return prompt_len // page_size * page_size


def window_pages(window: int, num_prompt_pages: int, page_size: int) -> int:
    """Pages, the last ones of a prompt, in which a decode step finds all that it attends to."""
    return min(num_prompt_pages, -(-window // page_size))


def prompt_geometry(
    prompt_len: int,
    budget: float,
    *,
    page_size: int,
    head_pages_per_page: int,
    summary_vectors: int,
    max_dynamic_heads: int | None = None,
    head_windows: tuple[int, ...] = (),
) -> PromptGeometry:
    """Sizes of a prompt of `prompt_len` tokens at `budget` in (0, 1], rounded down to whole head pages.

    `head_windows` has the window of each KV head that attends to its last tokens only. The budget is a share of what
    the others hold.

    `summary_vectors` of a dynamic head describe the page-aligned prompt; a head page of K and its twin of V together
    hold 2 P of them. Without summaries no head can be dynamic, and nothing goes to the host; with them, every head
    unless `max_dynamic_heads` says how many.
    """
    num_prompt_pages = prompt_len // page_size
    # The budget as the user wrote it: 0.29 * 100 pages are 29, not 28.999999999999996.
    in_windows = sum(window_pages(window, num_prompt_pages, page_size) for window in head_windows)
    num_heads = head_pages_per_page - len(head_windows)
    total = math.floor(Fraction(repr(budget)) * num_prompt_pages * num_heads) + in_windows
    summary_pages = -(-summary_vectors // (2 * page_size))
    most = num_heads if max_dynamic_heads is None else max_dynamic_heads
    most = most if summary_vectors else 0
    return PromptGeometry(
        covered=num_prompt_pages * page_size,
        num_prompt_pages=num_prompt_pages,
        total_head_pages=total,
        summary_pages_per_head=summary_pages,
        max_dynamic_heads=most,
        num_pages=-(-(total + most * summary_pages) // head_pages_per_page),
        num_host_pages=-(-most * num_prompt_pages // head_pages_per_page),
        window_head_pages=in_windows,
    )
