"""Memory of the host store, made in segments one after the other: some at start-up, the others in the background.

Pinning takes 0.71 s a GiB, measured on the host of an H200, so that a server does not wait for all of it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 1 << 28
_FEWEST_SEGMENTS = 8  # of a store that is smaller than so many of these
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_CONTAINER_MEMORY = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Files of version 2 and of version 1, which a container sees as its own: its limit, what it uses, and of that the
contents of files, which the system drops when somebody wants the memory."""
_LONGEST_GOODBYE = 10.0  # seconds; a segment takes 0.2


def available_host_bytes() -> int:
    """Memory that this process may still take: of the machine, or of the container that it runs in."""
    free = psutil.virtual_memory().available
    for limit, used, statistics, droppable in _CONTAINER_MEMORY:
        with contextlib.suppress(OSError, ValueError):  # no such control group, or no limit ("max")
            left = int((_CONTROL_GROUPS / limit).read_text()) - int((_CONTROL_GROUPS / used).read_text())
            free = min(free, left + _statistic(_CONTROL_GROUPS / statistics, droppable))
    return max(free, 0)


def _statistic(path: Path, name: str) -> int:
    """A number of a file that has a name and a number in each line; 0 where there is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.split()[0] == name)


def pages_of_segment(num_pages: int, page_bytes: int) -> int:
    """How many of `num_pages` host pages a segment has: torch rounds what is pinned up to a power of two of bytes."""
    smallest_power = 1 << max(0, (num_pages * page_bytes // _FEWEST_SEGMENTS).bit_length() - 1)
    return max(1, min(SEGMENT_BYTES, smallest_power) // page_bytes)


def allocate_segment(shape: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """[*shape], uint8, that nobody has written; page-locked beside a CUDA `device`.

    Elsewhere the system backs it on first use. RuntimeError where there is not as much memory: beyond what is there,
    page-locking has the system end the process, without a word.
    """
    if device.type != "cuda":
        return torch.empty(shape, dtype=torch.uint8, device="cpu")
    num_bytes = shape[0] * shape[1] * shape[2]
    free = available_host_bytes()
    if 1 << (num_bytes - 1).bit_length() > free:
        raise RuntimeError(f"this machine, or the container, has {free:,} bytes left")
    with torch.cuda.device(device):
        return torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=True)


class SegmentMaker:
    """Makes segments in order. One thread takes and waits for them, another one of ours may make them meanwhile.

    Parameters
    ----------
    num_pages, segment_pages : host pages of all segments, and of one; the last one may have fewer.
    page_bytes : of a host page.
    allocate : a segment of so many host pages; an error of any kind means that there is no more memory.

    Attributes
    ----------
    num_made : host pages of the segments that were made.
    fault : why there will be no more than these although `num_pages` is larger; None while nothing went wrong.
    """

    def __init__(
        self, num_pages: int, segment_pages: int, page_bytes: int, allocate: Callable[[int], torch.Tensor]
    ) -> None:
        self._num_pages, self._segment_pages, self._page_bytes = num_pages, segment_pages, page_bytes
        self._allocate = allocate
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_stopped = False
        self._untaken: list[torch.Tensor] = []
        self.num_made = 0
        self.fault: str | None = None

    def make(self, num_pages: int) -> None:
        """Make segments until there are `num_pages` host pages, here and now; an error is the caller's."""
        while self.num_made < min(num_pages, self._num_pages):
            self._make_one()

    def start(self) -> None:
        """Make all others in the background, unless that was begun before."""
        if self._thread is None and self.num_made < self._num_pages:
            # A daemon: nobody waits for memory that nobody wants any more.
            self._thread = threading.Thread(target=self._make_others, name="host-store", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Come back when nothing is being made, because all is there, or there will be no more."""
        if self._thread is not None:
            self.wait(self._num_pages)

    def wait(self, num_pages: int) -> int:
        """Host pages that there are, once there are `num_pages`, or it is known that there will not be as many."""
        self.start()
        with self._changed:
            self._changed.wait_for(lambda: self.num_made >= min(num_pages, self._num_pages) or self._is_over)
            return self.num_made

    def take(self) -> list[torch.Tensor]:
        """Segments that were made since the last call, in order."""
        with self._changed:
            taken, self._untaken = self._untaken, []
            return taken

    def stop(self) -> None:
        """Make no more; comes back when none is being made."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_LONGEST_GOODBYE)

    @property
    def _is_over(self) -> bool:
        return self._is_stopped or self.fault is not None

    def _make_others(self) -> None:
        try:
            while self.num_made < self._num_pages and not self._is_over:
                self._make_one()
        except Exception as error:
            fault = str(error).partition("\n")[0]
            asked, there = (f"{count * self._page_bytes:,}" for count in (self._num_pages, self.num_made))
            logger.error(
                "host_store_bytes: %s bytes of host memory were asked for on this rank, and the system gives no more "
                "than %s, which are the limit now: %s",
                asked,
                there,
                fault,
            )
            with self._changed:
                self.fault = fault
                self._changed.notify_all()

    def _make_one(self) -> None:
        num_pages = min(self._segment_pages, self._num_pages - self.num_made)
        segment = self._allocate(num_pages)
        with self._changed:
            self._untaken.append(segment)
            self.num_made += num_pages
            self._changed.notify_all()
