"""One decode step of all layers, captured as a CUDA graph where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu_check.pool import Pool

NAN = float("nan")


class DecodeStep:
    """Retrieval and attention of all layers for a batch of fixed size, from and to tensors that stay where they are.

    On a GPU `run` replays a CUDA graph, captured with a batch of padding rows; elsewhere it runs the same calls.
    """

    def __init__(self, pool: Pool, batch_size: int) -> None:
        self.pool = pool
        layers = pool.shape.num_layers
        self.q = torch.stack([pool.queries(batch_size) for _ in range(layers)])
        self.out = torch.full_like(self.q, NAN)
        self.rows = torch.zeros(batch_size, dtype=torch.int64, device=pool.device)
        self.lens = torch.ones(batch_size, dtype=torch.int64, device=pool.device)
        self.run = capture(self.launch) if pool.device == "cuda" else self.launch

    def launch(self) -> None:
        """What SGLang's forward does of it."""
        for layer_idx, q in enumerate(self.q):
            self.pool.retrieve(layer_idx, q, self.rows)
            self.out[layer_idx] = self.pool.attend(layer_idx, q, self.rows, self.lens)

    def load(self, rows: list[int]) -> None:
        """Put fresh queries of these requests into the fixed tensors."""
        self.rows.copy_(torch.tensor(rows))
        self.lens.copy_(self.pool.lens(rows))
        self.q.copy_(self.pool.randn(*self.q.shape))
        self.out.fill_(NAN)


def capture(launch: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of `launch`, as a function that replays it; warmed up before, as kernels compile at first use."""
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
