"""One captured decode step, replayed while requests come, go and grow: every replay beside the reference."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_check.pool import NAN, Pool, Shape, make_config
from benchmarks.gpu_check.reference import PoolState, check_attention, check_retrieval, expect
from hybridkv_kernels import dispatch
from sglang_hybridkv.config import ChunkScore

BATCH_SIZE, NUM_ROWS, NUM_PAGES, PROMPT_PAGES = 6, 9, 320, 24

Row = dict[str, Any]


class DecodeStep:
    """Retrieval and attention of all layers for a batch of fixed size, from and to tensors that stay where they are.

    On a GPU `run` replays a CUDA graph, captured with a batch of padding rows; elsewhere it runs the same calls.
    """

    def __init__(self, pool: Pool, batch_size: int) -> None:
        self.pool, self.batch_size = pool, batch_size
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

    def load(self, rows: list[int]) -> list[int]:
        """Put fresh queries of these requests into the fixed tensors; returns the batch with its padding rows."""
        padded = rows + [0] * (self.batch_size - len(rows))
        self.rows.copy_(torch.tensor(padded))
        self.lens.copy_(self.pool.lens(padded))
        self.q.copy_(self.pool.randn(*self.q.shape))
        self.out.fill_(NAN)
        return padded


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


class Traffic:
    """Requests that come, go, grow and are compressed, so that no two batches are composed alike."""

    def __init__(self, pool: Pool, seed: int) -> None:
        self.pool, self.random = pool, random.Random(seed)
        self.compressed: list[int] = []
        self.dense: list[int] = []

    def next_batch(self, size: int) -> list[int]:
        """Rows of the next step, at most `size`, in any order, each one token longer."""
        page_size = self.pool.shape.page_size
        running = self.compressed + self.dense
        if len(running) > 3:
            gone = self.random.choice(running)
            self.pool.remove(gone)
            (self.compressed if gone in self.compressed else self.dense).remove(gone)
        for _ in range(2):
            if len(self.compressed) + len(self.dense) == NUM_ROWS:
                break
            row = self.pool.add(self.random.randint(4 * page_size, PROMPT_PAGES * page_size))
            if self.random.random() < 0.75:
                self.pool.compress(row, self.random.randint(0, self.pool.shape.num_kv_heads))
                self.compressed.append(row)
            else:
                self.dense.append(row)
        running = self.compressed + self.dense
        rows = self.random.sample(running, self.random.randint(1, min(size, len(running))))
        for row in rows:
            self.pool.append_token(row)
        return rows


def check_shape(shape: Shape, device: str, seed: int, num_steps: int, chunk_score: ChunkScore = "mean_max") -> Row:
    """Replay `num_steps` batches; Mismatch at the first wrong one, else the row."""
    generator = torch.Generator(device).manual_seed(seed)
    pool = Pool(
        shape,
        make_config(shape, 0.3, 0.5, chunk_score=chunk_score),
        num_pages=NUM_PAGES,
        num_host_pages=(NUM_ROWS + 1) * PROMPT_PAGES,
        max_context=(PROMPT_PAGES + 2) * shape.page_size + num_steps,
        num_rows=NUM_ROWS,
        device=device,
        generator=generator,
    )
    step, traffic, compositions, worst = DecodeStep(pool, BATCH_SIZE), Traffic(pool, seed), set(), 0.0
    for _ in range(num_steps):
        rows = step.load(traffic.next_batch(BATCH_SIZE))
        compositions.add(tuple(rows))
        before = PoolState.of(pool)
        step.run()
        check_retrieval(pool, before, dict(enumerate(step.q)), rows)
        for layer_idx in range(shape.num_layers):
            worst = max(worst, check_attention(pool, layer_idx, step.q[layer_idx], rows, step.out[layer_idx]))
    expect(len(compositions) > num_steps // 2, "the batches were composed alike")
    kernels = dispatch.describe(device, shape.dtype, shape.head_dim, shape.group_size)
    row = {"captured": device == "cuda", "shape": str(shape), "kernels": kernels, "steps": num_steps, "ok": True}
    row |= {"chunk_score": chunk_score}
    return row | {"batch_size": BATCH_SIZE, "max_error": float(f"{worst:.3g}"), "seed": seed}
