"""Who holds which compressed pages: the scheduler's one record of reservations, by request row."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch

from sglang_hybridkv.requests.geometry import PromptGeometry
from sglang_hybridkv.requests.plan_law import PlanFigures
from sglang_hybridkv.requests.spans import VisualSpan

_DIGEST_FACTOR = 0x9E3779B97F4A7C15  # odd, so that no digest of a rank is lost


@dataclasses.dataclass(frozen=True)
class Agreed:
    """What all ranks know of one compressed prompt.

    Attributes
    ----------
    num_static, num_dynamic : heads of all ranks.
    most_dynamic : dynamic heads of the rank that has the most, or would have had them; pages are kept for as many on
        all.
    digests : int64, of each rank.
    """

    num_static: int
    num_dynamic: int
    most_dynamic: int
    digests: Sequence[int]

    @property
    def digest(self) -> int:
        """64 bits that stand for the plans of all ranks; of one rank, its own."""
        return functools.reduce(lambda merged, own: (merged * _DIGEST_FACTOR + own) % 2**64, self.digests, 0)


@dataclasses.dataclass
class Reservation:
    """Pages of one request from the launch of its final prefill part to its release.

    Attributes
    ----------
    pages : [num_pages], int64. Device pages in the request's linear order. Until the commit the ledger owns them;
        afterwards the request's row owns the first `num_in_row` and the ledger the surplus.
    host_pages : [num_host_pages], int64. Owned by the ledger throughout.
    prefilled : tokens whose KV is exact, after a retraction more than the prompt; later ones are computed over
        compressed context.
    most_dynamic : heads that may be dynamic: host pages are reserved for as many.
    outcome : [2], int64, on the CPU. Static and dynamic heads; written by the forward, read at the commit.
    head_counts : [L, H], int32, on the CPU. Kept or buffer pages of each head, from the forward; see
        `head_counts_on_host`.
    digest : [], int64, on the CPU. `digest_plan` of what is kept, from the forward; read at the commit.
    figures : [5], int64, on the CPU. `PlanFigures` of the plan, from the forward; see `refusal`.
    plan : is_dynamic [L, H], bool, and `pack_bits` of what is kept, on the CPU, from the forward; only where plans are
        published.
    seconds : set by the forward; what its plan and its copies on the device took, None while that is not known.
    written : set by the forward where it writes `outcome`, `head_counts`, `digest`, `figures` and `plan` without
        waiting.
    caps_plan : whether the plan is made with no more dynamic heads than these. Otherwise it is made as if there was
        room for all of the geometry's, and a plan that has more is refused.
    failed : set by the forward when it could not compress, and by `settle` where it refused the plan. Nothing reads the
        pages then; they go back in place of the commit, and the prompt stays exact in the request's row.
    overflowed : set with `failed` where nothing is wrong but that too few host pages were reserved.
    was_read : set with `failed` where it failed on some tensor-parallel ranks only: on the others a decode step may
        have read the compressed pages before they heard of it.
    agreed : set before the commit, from `outcome` and `digest` of all ranks.
    """

    geometry: PromptGeometry
    pages: torch.Tensor
    host_pages: torch.Tensor
    prefilled: int
    spans: tuple[VisualSpan, ...]
    most_dynamic: int
    outcome: torch.Tensor
    caps_plan: bool = True
    committed: bool = False
    head_counts: torch.Tensor | None = None
    digest: torch.Tensor | None = None
    figures: torch.Tensor | None = None
    plan: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    seconds: Callable[[], float | None] = lambda: None
    written: torch.cuda.Event | None = None
    failed: bool = False
    overflowed: bool = False
    was_read: bool = False
    agreed: Agreed | None = None

    def head_counts_on_host(self) -> torch.Tensor:
        """`head_counts`, after waiting for the forward that writes them; an error before that one was launched."""
        assert self.head_counts is not None, "decoded before it was compressed"
        self._wait()
        return self.head_counts

    def refusal(self) -> str | None:
        """Why the row is dense although the forward has compressed, which is waited for: its plan was illegal.

        None where it was legal, and before there is one. Cheap once the prompt is committed: each decode step asks.
        """
        if self.figures is None or self.committed:
            return None
        return self._figures_on_host().complaint(self.geometry, self.most_dynamic)

    def overflow(self) -> int | None:
        """How many dynamic heads the plan has, where it was refused because it has too many of them, and only so.

        None otherwise, and where the compressor was told how many there may be.
        """
        if self.caps_plan or self.refusal() is None:
            return None
        figures = self._figures_on_host()
        return figures.num_dynamic if figures.complaint(self.geometry, self.planned_dynamic) is None else None

    def _figures_on_host(self) -> PlanFigures:
        assert self.figures is not None, "asked before it was compressed"
        self._wait()
        return PlanFigures(*self.figures.tolist())

    def _wait(self) -> None:
        if self.written is not None:
            self.written.synchronize()
            self.written = None

    @property
    def planned_dynamic(self) -> int:
        """Dynamic heads that the plan may be made with."""
        return self.most_dynamic if self.caps_plan else self.geometry.max_dynamic_heads

    @property
    def num_in_row(self) -> int:
        """Pages that the request's row shows after the commit; a row has no room for more than it covers."""
        return min(len(self.pages), self.geometry.num_prompt_pages)

    @property
    def unlisted_pages(self) -> torch.Tensor:
        """Pages that no row shows: all of them before the commit, the surplus afterwards."""
        return self.pages[self.num_in_row :] if self.committed else self.pages


class Ledger:
    """Reservations by request row, and whether a commit freed memory since the scheduler last looked."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.by_row: dict[int, Reservation] = {}
        self.freed_memory = False

    def open(self, row: int, reservation: Reservation) -> None:
        """Record a new reservation; a row holds one at a time."""
        assert row not in self.by_row, f"row {row} already holds a reservation"
        self.by_row[row] = reservation

    def get(self, row: int | None) -> Reservation | None:
        """Reservation of `row`, or None."""
        return None if row is None else self.by_row.get(row)

    def commit(self, row: int, num_pages: int, num_host_pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The row takes its pages over; returns the device and host pages that turned out unused."""
        reservation = self.by_row[row]
        assert not reservation.committed, f"row {row} is committed twice"
        unused = reservation.pages[num_pages:]
        unused_host = reservation.host_pages[num_host_pages:]
        reservation.pages = reservation.pages[:num_pages]
        reservation.host_pages = reservation.host_pages[:num_host_pages]
        reservation.committed = self.freed_memory = True
        return unused, unused_host

    def close(self, row: int | None) -> Reservation | None:
        """Forget the row's reservation; the caller frees its unlisted and its host pages."""
        return None if row is None else self.by_row.pop(row, None)

    def unlisted_tokens(self) -> int:
        """Tokens' worth of pages taken from the allocator that no row shows; the leak check has to be told."""
        return sum(len(r.unlisted_pages) for r in self.by_row.values()) * self.page_size

    def check_integrity(self) -> None:
        """AssertionError when two requests hold the same device or host page, or one does not hold what it reserved."""
        for name in ("pages", "host_pages"):
            held = [getattr(r, name) for r in self.by_row.values()]
            ids = torch.cat(held) if held else torch.empty(0)
            assert len(ids.unique()) == len(ids), f"{name} held twice"
        for row, reservation in self.by_row.items():
            geometry = reservation.geometry
            assert len(reservation.pages) <= geometry.num_pages, f"row {row} holds more pages than it reserved"
            assert len(reservation.host_pages) <= geometry.num_host_pages, f"row {row} holds too many host pages"
            spare = geometry.summary_pages_per_head if reservation.committed else 0
            assert len(reservation.pages) >= geometry.num_pages - spare, f"row {row} lost pages"
