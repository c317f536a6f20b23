"""Work beside the forward: a second stream on CUDA, nothing of the kind on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch


class SideStream:
    """What runs here comes after all that the forward's stream has launched, and beside what it launches next."""

    def __init__(self, device: torch.device | str):
        self._stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        self._is_pending = False

    def run(self, work: Callable[[], None], *used: torch.Tensor) -> None:
        """Launch `work`, which reads `used`, tensors that may be freed before it has run. On a CPU it runs at once."""
        if self._stream is None:
            work()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        for tensor in used:
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            work()
        self._is_pending = True

    def join(self) -> None:
        """What the forward's stream launches from here on waits for all that runs here; the host does not."""
        if self._stream is not None and self._is_pending:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._is_pending = False
