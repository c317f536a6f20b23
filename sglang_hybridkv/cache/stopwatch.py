"""How long the forward takes for something, without waiting for it."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Starts when it is made. On CUDA it measures the current stream, on a CPU this thread."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._start, self._end = self._now(), None

    def stop(self) -> None:
        """What was launched, or done, since it was made is what it measures."""
        self._end = self._now()

    def seconds(self) -> float | None:
        """The time; None before the end, which on CUDA is when the device has got there."""
        if self._end is None:
            return None
        if not self._is_cuda:
            return self._end - self._start
        return self._start.elapsed_time(self._end) / 1000 if self._end.query() else None

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
