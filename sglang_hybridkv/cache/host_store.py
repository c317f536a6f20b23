"""Full rows of dynamic heads in host memory: a limit that it grows to, own free list, own integrity check."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator

import torch

from hybridkv_kernels.host_pages import HostPages
from sglang_hybridkv.cache.host_segments import SegmentMaker, allocate_segment, pages_of_segment

logger = logging.getLogger(__name__)

_FIRST_BYTES = 1 << 30  # pinned in 0.7 s
_FIRST_SHARE = 4


class HostStore:
    """Host pages of L * H head pages each, whose records hold the key and the value of a token.

    What may be taken is told by the limit, and never by how far the store has grown: who takes more than there is waits
    for it. So a request is served alike by a server that has just started and by one that runs for long.

    Parameters
    ----------
    num_pages : host pages; 0 is legal and means that nothing ever fits.
    head_pages_per_page : L * H of the model.
    page_size, head_dim : P and D.
    dtype : of the KV pool.
    device : of the KV pool; beside a CUDA device memory is page-locked, so that it reads it directly.
    host_dtype : how rows are stored, see `HostPages`.

    Raises
    ------
    RuntimeError
        The system would never give as much memory; here, where nothing is made yet, only beside a CPU pool.

    Attributes
    ----------
    num_pages : the limit. It falls, once, where the system gives no more memory.
    pages : the head pages that there are; host page p owns those from p * L * H to (p + 1) * L * H - 1. On a CPU the
        operating system backs them on first use.
    least_of_ranks : the least of a number over all tensor-parallel ranks, which call it at the same point: they take
        and give back alike, and so may take only what all of them have.
    """

    def __init__(
        self,
        num_pages: int,
        head_pages_per_page: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        host_dtype: str = "same",
    ):
        device = torch.device(device)
        empty = HostPages.empty(0, page_size, head_dim, dtype, host_dtype, "cpu")
        self.page_bytes = head_pages_per_page * page_size * empty.record_bytes
        self.num_pages, self._per_page = num_pages, head_pages_per_page
        if device.type != "cuda":
            # Nothing is backed before its first use, but the system refuses what it could never back.
            with self._said_in_one_sentence():
                torch.empty(num_pages * self.page_bytes, dtype=torch.uint8, device="cpu")
        segment_pages, allocate = pages_of_segment(num_pages, self.page_bytes), allocate_segment

        def make(pages: int) -> torch.Tensor:
            return allocate(empty.segment_shape(pages * head_pages_per_page), device)

        self._maker = SegmentMaker(num_pages, segment_pages, self.page_bytes, make)
        sizes = (page_size, head_dim, dtype, host_dtype, device, segment_pages * head_pages_per_page)
        self.pages = HostPages.empty(num_pages * head_pages_per_page, *sizes)
        self.least_of_ranks: Callable[[int], int] = int
        self._num_agreed = 0
        self.clear()
        # Also when the process ends: a thread that is pinning then would have it abort.
        weakref.finalize(self, self._maker.stop)

    def make_first(self) -> None:
        """Make what a server starts with: a quarter of the limit, and not much more than 1 GiB.

        RuntimeError when there is not as much memory.
        """
        self._make(min(_FIRST_BYTES // self.page_bytes, -(-self.num_pages // _FIRST_SHARE)))

    def make_all(self) -> None:
        """Make everything, here and now; RuntimeError when there is not as much memory."""
        self._make(self.num_pages)

    def _make(self, num_pages: int) -> None:
        with self._said_in_one_sentence():
            self._maker.make(num_pages)
        self._show()
        self._num_agreed = self._num_shown

    @contextlib.contextmanager
    def _said_in_one_sentence(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"host_store_bytes: {self.num_pages * self.page_bytes:,} bytes of host memory cannot be had, "
                "page-locked where the pool is on a GPU; a smaller host_store_bytes, or a machine with more, helps"
            ) from error

    def clear(self) -> None:
        """Make every page free."""
        self.free_pages = torch.arange(self._num_shown, device="cpu")

    def grow(self) -> None:
        """Begin to make what is not there, in the background, unless somebody who waited for it has begun already.

        Not while a CUDA graph is captured: a thread that pins memory would break the capture.
        """
        self._maker.start()

    def finish_growing(self) -> None:
        """Wait for what `grow` has begun, before a CUDA graph is captured in a server that runs."""
        self._maker.finish()

    def available(self) -> int:
        """Pages that may be taken."""
        return self.num_pages - self._num_taken

    def alloc(self, num_pages: int) -> torch.Tensor | None:
        """[num_pages], int64 page ids, owned by the caller until `free`; None when that many are not available.

        Waits where they are, but have not been made yet. All ranks call this alike.
        """
        wanted = self._num_taken + num_pages
        if self._num_agreed < wanted <= self.num_pages:
            self._num_agreed = self.least_of_ranks(self._maker.wait(wanted))
            self._show()
            if self._num_agreed < wanted:
                self._lower_limit()
        if num_pages > self.available():
            return None
        taken, self.free_pages = self.free_pages[:num_pages], self.free_pages[num_pages:]
        return taken

    def free(self, pages: torch.Tensor) -> None:
        """Give pages back; each exactly once.

        The device may still read or write them: what frees them knows nothing of that, and need not. Their contents
        are touched by kernels alone. `retrieve_chunks` reads them on the forward's stream, or beside it within a step
        (`QueryPrefetch.beside`). `offload_rows` writes them on a side stream (`CacheMemory.side`), after all that
        the forward's stream has launched, so after the last read before; and each forward joins that stream before
        its first launch, so that all its reads come after the write. On the host nothing reads or writes a page's
        contents beside a CUDA pool.
        """
        self.free_pages = torch.cat((pages, self.free_pages))

    def used_bytes(self) -> int:
        """Bytes of the pages that are taken."""
        return self._num_taken * self.page_bytes

    def made_bytes(self) -> int:
        """Bytes of the pages that there are on this rank, taken or not; page-locked beside a CUDA pool."""
        return self._maker.num_made * self.page_bytes

    def limit_bytes(self) -> int:
        """What this rank may grow to, as far as it knows: less than its share of the limit after a fault of its own."""
        reachable = self.num_pages if self._maker.fault is None else min(self.num_pages, self._maker.num_made)
        return reachable * self.page_bytes

    def check_integrity(self, held: list[torch.Tensor]) -> None:
        """AssertionError unless free pages and those in `held` are each page of the store exactly once."""
        ids = torch.cat([self.free_pages, *held]).sort().values
        assert torch.equal(ids, torch.arange(self._num_shown, device="cpu")), "host pages lost or held twice"
        assert self._num_agreed <= self._num_shown, "ranks agreed on host pages that are not there"

    @property
    def _num_shown(self) -> int:
        """Host pages that the device has been told of."""
        return self.pages.num_pages // self._per_page

    @property
    def _num_taken(self) -> int:
        return self._num_shown - len(self.free_pages)

    def _show(self) -> None:
        """Tell the device of the segments that were made, in the order of the stream, and then give out their pages."""
        before = self._num_shown
        for segment in self._maker.take():
            self.pages.add(segment)
        new = torch.arange(before, self._num_shown, device="cpu")
        self.free_pages = torch.cat((self.free_pages, new))

    def _lower_limit(self) -> None:
        self.num_pages = self._num_agreed
        if self._maker.fault is None:  # which has been logged
            logger.error(
                "host_store_bytes: another tensor-parallel rank has no more than %s bytes of host memory, which are "
                "the limit of this one, too",
                f"{self.num_pages * self.page_bytes:,}",
            )
