"""Full rows of dynamic heads in host memory: fixed size, own free list, own integrity check."""

from __future__ import annotations

import torch

from hybridkv_kernels.host_pages import HostPages, record_bytes


class HostStore:
    """Host pages of L * H head pages each, whose records hold the key and the value of a token.

    Parameters
    ----------
    num_pages : host pages; 0 is legal and means that nothing ever fits.
    head_pages_per_page : L * H of the model.
    page_size, head_dim : P and D.
    dtype : of the KV pool.
    host_dtype : how rows are stored, see `HostPages`.
    pin : page-locked memory, so that a CUDA device reads it directly.

    Raises
    ------
    RuntimeError
        There is not as much memory.

    Attributes
    ----------
    pages : num_pages * L * H head pages. Host page p owns those from p * L * H to (p + 1) * L * H - 1. On a CPU the
        operating system backs them on first use.
    """

    def __init__(
        self,
        num_pages: int,
        head_pages_per_page: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
        pin: bool,
        host_dtype: str = "same",
    ):
        num_head_pages = num_pages * head_pages_per_page
        try:
            self.pages = HostPages.empty(num_head_pages, page_size, head_dim, dtype, host_dtype, pin)
        except RuntimeError as error:
            num_bytes = num_head_pages * page_size * record_bytes(head_dim, dtype.itemsize, host_dtype)
            raise RuntimeError(
                f"host_store_bytes: {num_bytes:,} bytes of host memory cannot be had, page-locked where the pool is "
                "on a GPU; a smaller host_store_bytes, or a machine with more of it, helps"
            ) from error
        self.num_pages = num_pages
        self.page_bytes = head_pages_per_page * page_size * self.pages.record_bytes
        self.clear()

    def clear(self) -> None:
        """Make every page free."""
        self.free_pages = torch.arange(self.num_pages, dtype=torch.int64)

    def available(self) -> int:
        """Free pages."""
        return len(self.free_pages)

    def alloc(self, num_pages: int) -> torch.Tensor | None:
        """[num_pages], int64 page ids, owned by the caller until `free`; None when that many are not free."""
        if num_pages > len(self.free_pages):
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
        return (self.num_pages - len(self.free_pages)) * self.page_bytes

    def check_integrity(self, held: list[torch.Tensor]) -> None:
        """AssertionError unless free pages and those in `held` are each page of the store exactly once."""
        ids = torch.cat([self.free_pages, *held]).sort().values
        assert torch.equal(ids, torch.arange(self.num_pages)), "host pages lost or held twice"
