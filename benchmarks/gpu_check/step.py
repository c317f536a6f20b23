"""One decode step of all layers, captured as a CUDA graph where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.gpu_check.pool import Pool, Request

NAN = float("nan")


class DecodeStep:
    """Retrieval and attention of all layers for a batch of fixed size; inputs and outputs are tensors at fixed places.

    On a GPU `run` replays a CUDA graph, captured with a batch of padding rows; elsewhere it runs the same calls.
    """

    def __init__(self, pool: Pool, batch_size: int) -> None:
        self.pool = pool
        layers = pool.shape.num_layers
        self.q = torch.stack([pool.queries(batch_size) for _ in range(layers)])
        self.out = torch.full_like(self.q, NAN)
        self.rows = torch.zeros(batch_size, dtype=torch.int64, device=pool.device)
        self.lens = torch.ones(batch_size, dtype=torch.int64, device=pool.device)
        self.run = capture(self.launch) if pool.device.type == "cuda" else self.launch

    def launch(self) -> None:
        """Retrieve and attend in all layers, as SGLang's forward does."""
        for layer_idx, q in enumerate(self.q):
            self.pool.cache.retrieve(layer_idx, q, self.rows)
            self.attend(layer_idx, self.rows, self.lens)

    def attend_all(self, rows: torch.Tensor, lens: torch.Tensor) -> None:
        """`attend` in all layers, without retrieval."""
        for layer_idx in range(len(self.q)):
            self.attend(layer_idx, rows, lens)

    def attend(self, layer_idx: int, rows: torch.Tensor, lens: torch.Tensor) -> None:
        """Decode attention of one layer, of the batch or of other requests."""
        pool, q = self.pool, self.q[layer_idx]
        self.out[layer_idx] = pool.cache.attend(layer_idx, q, rows, pool.req_to_token, lens, pool.scaling)

    def load(self, requests: Sequence[Request]) -> None:
        """Put fresh queries of these requests into the fixed tensors; padding rows, of one token, fill them up."""
        padding = len(self.rows) - len(requests)
        self.rows.copy_(torch.tensor([request.row for request in requests] + [0] * padding))
        self.lens.copy_(torch.tensor([request.seq_len for request in requests] + [1] * padding))
        self.q.copy_(self.pool.randn(*self.q.shape))
        self.out.fill_(NAN)


def capture(launch: Callable[[], None]) -> Callable[[], None]:
    """A function that replays a CUDA graph of `launch`. It runs before the capture, as kernels compile at first use."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            launch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()

    def replay() -> None:
        graph.replay()

    return replay
