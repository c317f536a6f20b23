"""What the kernels must have done, in higher precision: the judge of the checks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, cast
from unittest import mock

import torch

from benchmarks.gpu_check.pool import NAN, Pool
from hybridkv_kernels.decode_attn import naive as decode_naive
from hybridkv_kernels.head_pages import HeadPageViews
from hybridkv_kernels.retrieve_chunks.naive import chunk_places, score_row
from hybridkv_kernels.select_chunks import forced_chunks
from sglang_hybridkv.cache.retrieval import forced_chunk_counts

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Largest error as a share of the largest number of a request's output: the second product's inputs are rounded, and
the output."""
SCORE_TOLERANCE = 1e-4
"""Scores closer than this share of the largest may change places: both sides sum in fp32, in another order."""


class Mismatch(Exception):
    """A kernel did something else than its reference."""


def expect(condition: bool, what: str) -> None:
    """Mismatch with `what` unless the condition holds."""
    if not condition:
        raise Mismatch(what)


def expect_close(what: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float:
    """The largest error of a row [i, ...], as a share of the row's largest number; Mismatch when it is above
    `tolerance` or a number is missing."""
    expect(bool(got.isfinite().all()), f"{what}: {int((~got.isfinite()).sum())} outputs are not finite")
    if not got.numel():
        return 0.0
    wide = expected.double().flatten(1)
    error = float(((got.double().flatten(1) - wide).abs().amax(1) / wide.abs().amax(1)).nan_to_num(0.0).max())
    expect(error <= tolerance, f"{what}: largest relative error {error:.2e}, tolerance {tolerance:.0e}")
    return error


def expect_equal(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Mismatch unless both are the same bit by bit; NaN equals NaN."""
    same = (got == expected) | ((got != got) & (expected != expected))
    expect(bool(same.all()), f"{what}: {int((~same).sum())} of {same.numel()} elements differ")


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fresh memory of floating-point type is NaN, so that an output that nobody wrote is seen."""

    def poisoned(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor: torch.Tensor = make(*args, **kwargs)
            return tensor.fill_(NAN) if tensor.is_floating_point() else tensor

        return made

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield


class _Wide:
    """A tensor whose parts are fp64 when they are read; a copy of a large pool would not fit."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, places: Any) -> torch.Tensor:
        return self.tensor[places].double()

    def new_zeros(self, *sizes: int) -> torch.Tensor:
        return self.tensor.new_zeros(sizes, dtype=torch.float64)


class _WideViews:
    """A pool's `HeadPageViews` as the naive decode reads them, in fp64."""

    def __init__(self, views: HeadPageViews) -> None:
        self.held_chunks = views.held_chunks
        self.k_pages, self.v_pages = _Wide(views.k_pages), _Wide(views.v_pages)
        self._layer_rows = views.layer_rows

    def layer_rows(self, layer_idx: int) -> tuple[_Wide, _Wide]:
        keys, values = self._layer_rows(layer_idx)
        return _Wide(keys), _Wide(values)


def check_attention(
    pool: Pool, layer_idx: int, q: torch.Tensor, rows: list[int], out: torch.Tensor, lens: torch.Tensor | None = None
) -> float:
    """Largest relative error of the decode attention `out` beside the naive kernel in fp64, over the pool as it is now.

    `lens` are the lengths that were attended to, the requests' own by default.
    """
    places = torch.tensor(rows, device=pool.device)
    expected = decode_naive.decode_attn(
        q.double(),
        cast(HeadPageViews, _WideViews(pool.views)),
        pool.table,
        layer_idx,
        places,
        pool.req_to_token,
        pool.lens(rows) if lens is None else lens,
        pool.scaling,
        pool.compressor.estimate,
    )
    return expect_close("decode_attn", out, expected, TOLERANCE[pool.shape.dtype])


@dataclasses.dataclass(frozen=True)
class PoolState:
    """What retrieval may change, before it did."""

    keys: torch.Tensor
    values: torch.Tensor
    held_chunks: torch.Tensor
    counters: torch.Tensor

    @staticmethod
    def of(pool: Pool) -> PoolState:
        """A copy."""
        parts = (pool.keys, pool.values, pool.views.held_chunks, pool.counters)
        return PoolState(*(part.clone() for part in parts))


def check_retrieval(pool: Pool, before: PoolState, q_of_layer: Mapping[int, torch.Tensor], rows: list[int]) -> None:
    """Mismatch unless the dynamic heads of `rows` hold the best chunks for the queries that each layer retrieved
    with since `before`, and nothing else has changed."""
    counted, touched = [0, 0], [torch.empty(0, dtype=torch.int64, device=pool.device)]
    for layer_idx, q in q_of_layer.items():
        for i, row in enumerate(rows):
            for numbers, pages in _check_heads(pool, before, layer_idx, q[i], row):
                counted = [a + b for a, b in zip(counted, numbers, strict=True)]
                touched.append(pages)
    others = torch.ones(len(before.held_chunks), dtype=torch.bool, device=pool.device)
    others[torch.cat(touched)] = False
    by_page, residency = pool.views.k_pages.shape, pool.views.held_chunks
    for name, now, then in (("keys", pool.keys, before.keys), ("values", pool.values, before.values)):
        expect_equal(f"{name} of other pages", now.view(by_page)[others], then.view(by_page)[others])
    expect_equal("residency of other pages", residency[others], before.held_chunks[others])
    got = (pool.counters - before.counters).tolist()
    expect(got == counted, f"retrieve_chunks: counted {got}, expected {counted}")


def _check_heads(
    pool: Pool, before: PoolState, layer_idx: int, q: torch.Tensor, row: int
) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
    """For each dynamic head: how many chunks were chosen by score and how many of them were there, and its pages."""
    table, views, config = pool.table, pool.views, pool.config
    heads = table.is_dynamic[row, layer_idx].nonzero().squeeze(1)
    if not len(heads):
        return
    num_pages, in_page = int(table.num_chunks[row]), pool.shape.page_size // config.tokens_per_chunk
    num_chunks, by_chunk = num_pages * in_page, (-1, config.tokens_per_chunk, q.shape[-1])
    page_counts = table.num_head_pages[row, layer_idx, heads].to(torch.int64)
    counts = page_counts * in_page
    queries = q.view(pool.shape.num_kv_heads, -1, q.shape[-1])[heads]
    how = (config.chunk_score, config.tokens_per_chunk, config.estimates)
    scores = score_row(queries, views, table, row, layer_idx, heads, *how, dtype=torch.float64)
    forced = forced_chunks(num_chunks, counts, *forced_chunk_counts(config))
    buffers = table.buffer_page_ids(row, layer_idx, heads, page_counts)
    hosts = chunk_places(table.host_chunk_ids(row, layer_idx, heads, num_pages), in_page)
    # [chunk, tokens of it, D]: keys and values of the pool and of the host store.
    chunks, host_chunks = (
        [pages.view(by_chunk) for pages in (owner.k_pages, owner.v_pages)] for owner in (views, pool.store)
    )
    for place in range(len(heads)):
        what = f"retrieve_chunks, row {row}, layer {layer_idx}, KV head {int(heads[place])}"
        pages = buffers[place, : page_counts[place]]
        held, held_before = (which.held_chunks[pages].flatten().long() for which in (views, before))
        mask = torch.zeros(num_chunks, dtype=torch.bool, device=q.device)
        mask[held] = True
        expect(int(mask.sum()) == len(held), f"{what}: a chunk is held twice")
        expect(bool(mask[forced[place]].all()), f"{what}: a sink or recent chunk is missing")
        by_score = mask & ~forced[place]
        expect_best(what, scores[place], by_score, ~mask)
        slots, source = chunk_places(pages[None], in_page)[0], hosts[place, held].to(pool.store.k_pages.device)
        for name, mine, theirs in zip(("keys", "values"), chunks, host_chunks, strict=True):
            expect_equal(f"{what}, {name}", mine[slots], theirs[source].to(q.device))
        num_chosen = int(by_score.sum())
        num_moved = int((~torch.isin(held, held_before)).sum())
        yield (num_chosen, num_chosen - num_moved), pages


def expect_best(what: str, scores: torch.Tensor, chosen: torch.Tensor, absent: torch.Tensor) -> None:
    """Mismatch when one of the `absent` has a larger score than one of the `chosen`, beyond rounding; masks [C]."""
    if chosen.any() and absent.any():
        excess = float(scores[absent].max() - scores[chosen].min())
        slack = SCORE_TOLERANCE * float(scores.abs().max())
        expect(excess <= slack, f"{what}: a chunk was left out whose score is {excess:.1e} better")
