"""Triton twin of `score_heads`, for several prompts at once: as many launches whatever their number.

1. Log-sum-exp of each query, by shares of the keys, and 2. of all shares. 3. Probabilities of each row, averaged over
the group, their totals over the rows, and the salience. 4. "hit_cv": the chunks that each row hits. 5. "capture" and
"worst_capture": the keys that each row keeps, and 6. each query's probability on them. 7. These statistics.

The other statistics are those of `naive`, in torch, prompt by prompt. None of it waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton

from hybridkv_kernels import gpu
from hybridkv_kernels.score_heads import naive
from hybridkv_kernels.score_heads.triton_attention import (
    NUM_FIELDS,
    captured_kernel,
    lse_kernel,
    probability_kernel,
    row_kernel,
)
from hybridkv_kernels.score_heads.triton_statistics import hit_kernel, keep_kernel, statistic_kernel
from hybridkv_kernels.transfer import to_device

_TARGET_PROGRAMS = 512  # of one prompt, that share its keys
_MOST_SCRATCH_BYTES = 256 * 2**20
_OF_KERNELS = ("hit_cv", *naive.OF_QUERIES)

Prompt = tuple[torch.Tensor, torch.Tensor | None]


def score_heads_batch(
    prompts: list[Prompt],
    k: torch.Tensor,
    scaling: float,
    statistic: str,
    sparsity_fraction: float,
    mass_fraction: float,
    chunk_size: int,
    capture_fraction: float,
    num_sinks: int = 0,
    num_recent: int = 0,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Arguments and results as the public function's.

    No sync. A broken key makes the salience of its head NaN, as in `naive`; for the statistics NaN counts as 0.
    Scratch: H * W * N fp32, two times for "capture" and "worst_capture", of as many prompts as 256 MiB have room for.
    """
    k, names, results = k.contiguous(), statistic.split("+"), []
    for group in _groups(prompts, k, names):
        passes = _Passes(group, k, scaling, chunk_size, capture_fraction)
        lse = passes.row_lse()
        salience = passes.probabilities(lse)
        values = passes.statistics(lse, names, num_sinks, num_recent)
        for i, own in enumerate(salience):
            for column, name in enumerate(names):
                if name not in _OF_KERNELS:
                    probs = passes.probs_of(i)
                    causal = naive.causal_mask(probs.shape[1], probs.shape[2], k.device)
                    arguments = (sparsity_fraction, mass_fraction, chunk_size)
                    values[i, :, column] = naive.row_statistic(name, probs, causal, *arguments)
            results.append((values[i] if len(names) > 1 else values[i, :, 0], own))
    return results


def _groups(prompts: list[Prompt], k: torch.Tensor, names: list[str]) -> Iterator[list[Prompt]]:
    """The prompts in order, as many at once as scratch has room for, and always one."""
    group: list[Prompt] = []
    taken = 0
    for prompt in prompts:
        wanted = _weight_bytes(names) * k.shape[1] * len(prompt[0]) * _num_tokens(prompt, k)
        if group and taken + wanted > _MOST_SCRATCH_BYTES:
            yield group
            group, taken = [], 0
        group.append(prompt)
        taken += wanted
    if group:
        yield group


def _weight_bytes(names: list[str]) -> int:
    return 8 if set(names) & set(naive.OF_QUERIES) else 4


def _num_tokens(prompt: Prompt, k: torch.Tensor) -> int:
    return len(k if prompt[1] is None else prompt[1])


class _Passes:
    """The launches over a group of prompts; `triton_attention.py` says how their scratch lies in memory."""

    def __init__(
        self, prompts: list[Prompt], k: torch.Tensor, scaling: float, chunk_size: int, capture_fraction: float
    ):
        q = _joined([q for q, _ in prompts])
        self.k, self.scaling, self.chunk_size = k, scaling, chunk_size
        self.num_kv_heads, head_dim = k.shape[1:]
        self.group_size = q.shape[1] // self.num_kv_heads
        self.constants = score_constants(q.dtype, head_dim, self.group_size, self.num_kv_heads)
        self.lens = [(len(q), _num_tokens((q, slots), k)) for q, slots in prompts]
        self.num_all_rows, self.num_all_tokens = (sum(column) for column in zip(*self.lens, strict=True))
        slots = self._all_slots([slots for _, slots in prompts])
        self.constants["HAS_SLOTS"] = slots is not None
        self.records = to_device(self._records(capture_fraction), k.device)
        self.inputs = (q, k, k if slots is None else slots, self.records)
        splits = max(self._num_splits(*lens) for lens in self.lens)
        self.partial = self._empty(splits, self.num_all_rows, self.num_kv_heads, self.constants["GP"])
        self.probs = self._empty(self.num_kv_heads * sum(rows * tokens for rows, tokens in self.lens))
        self.totals = self._empty(self.num_kv_heads * self.num_all_tokens, dtype=torch.float64)
        self.counts = self._empty(self.num_kv_heads * sum(map(self._num_chunks, self.lens)), dtype=torch.int32)

    def row_lse(self) -> torch.Tensor:
        """[rows, H, GP], fp32: log-sum-exp of each query."""
        lse = self._empty(*self.partial.shape[1:])
        row_kernel[self._grid(self._shares)](
            *self.inputs, self.partial, self.num_all_rows, self.scaling, **self.constants
        )
        tile = 64
        lse_kernel[self._grid(lambda rows, _: triton.cdiv(rows * self.constants["GP"], tile))](
            self.records,
            self.partial,
            lse,
            self.num_all_rows,
            H=self.num_kv_heads,
            GP=self.constants["GP"],
            BQ=tile,
            BS=32,
        )
        return lse

    def probabilities(self, lse: torch.Tensor) -> list[torch.Tensor]:
        """Salience [H, N] of each prompt; also fills `probs` and `totals`, and sets `counts` to 0."""
        salience = self._empty(self.num_kv_heads * self.num_all_tokens)
        probability_kernel[self._grid(lambda _, tokens: triton.cdiv(tokens, self.constants["BN"]))](
            *self.inputs,
            lse,
            self.probs,
            self.totals,
            salience,
            self.counts,
            self.scaling,
            CHUNK=self.chunk_size,
            **self.constants,
            num_warps=8,
        )
        parts = salience.split([self.num_kv_heads * tokens for _, tokens in self.lens])
        return [part.view(self.num_kv_heads, -1) for part in parts]

    def statistics(self, lse: torch.Tensor, names: list[str], num_sinks: int, num_recent: int) -> torch.Tensor:
        """[prompts, H, S]; columns of statistics that have no kernel are left as they are."""
        out = self._empty(len(self.lens), self.num_kv_heads, len(names))
        columns = {name: names.index(name) if name in names else -1 for name in _OF_KERNELS}
        if columns["hit_cv"] >= 0:
            self._count_hits()
        if _weight_bytes(names) > 4:
            self._capture(lse, num_sinks, num_recent)
        if max(columns.values()) >= 0:
            statistic_kernel[self._grid(lambda *_: 1)](
                self.records,
                self.partial,
                self.counts,
                out,
                self.num_all_rows,
                len(names),
                H=self.num_kv_heads,
                G=self.group_size,
                GP=self.constants["GP"],
                CHUNK=self.chunk_size,
                HIT_CV=columns["hit_cv"],
                CAPTURE=columns["capture"],
                WORST=columns["worst_capture"],
                BQ=128,
                BS=16,
                BLOCK=1024,
            )
        return out

    def probs_of(self, prompt: int) -> torch.Tensor:
        """[H, W, N], fp32: probabilities of a prompt, averaged over the group; NaN is 0."""
        parts = self.probs.split([self.num_kv_heads * rows * tokens for rows, tokens in self.lens])
        return parts[prompt].view(self.num_kv_heads, *self.lens[prompt])

    def _count_hits(self) -> None:
        padded = triton.next_power_of_2(self.chunk_size)
        hit_kernel[self._grid(lambda rows, _: rows)](
            self.records,
            self.probs.view(torch.int32),
            self.counts,
            H=self.num_kv_heads,
            CHUNK=self.chunk_size,
            BC=max(1, 2048 // padded),
            BT=padded,
            BLOCK=4096,
            num_warps=8,
        )

    def _capture(self, lse: torch.Tensor, num_sinks: int, num_recent: int) -> None:
        """Leaves in `partial` what each query keeps, in place of its log-sum-exp."""
        kept = torch.empty_like(self.probs, dtype=torch.int32)
        keep_kernel[self._grid(lambda rows, _: rows)](
            self.records,
            self.probs.view(torch.int32),
            self.totals,
            kept,
            num_sinks,
            num_recent,
            H=self.num_kv_heads,
            BLOCK=2048,
            num_warps=8,
        )
        stages = 1 if self.k.dtype == torch.float32 else 2  # with more it takes more than 128 registers
        arguments = (*self.inputs, lse, kept, self.partial, self.num_all_rows, self.scaling)
        captured_kernel[self._grid(self._shares)](*arguments, **self.constants, num_warps=8, num_stages=stages)

    def _records(self, capture_fraction: float) -> torch.Tensor:
        """[prompts, NUM_FIELDS], int64: what the kernels know of each prompt, on the host."""
        records, starts = [], [0, 0, 0, 0]
        for rows, tokens in self.lens:
            ranks = (*naive.hit_ranks(tokens), naive.num_captured(tokens, capture_fraction))
            records.append([rows, tokens, self._num_splits(rows, tokens), *starts, *ranks])
            own = (rows, tokens, rows * tokens, self._num_chunks((rows, tokens)))
            starts = [start + size for start, size in zip(starts, own, strict=True)]
        assert len(records[0]) == NUM_FIELDS.value
        return torch.tensor(records, dtype=torch.int64, device="cpu")

    def _all_slots(self, slots: list[torch.Tensor | None]) -> torch.Tensor | None:
        if all(own is None for own in slots):
            return None
        return _joined([torch.arange(len(self.k), device=self.k.device) if own is None else own for own in slots])

    def _num_splits(self, rows: int, tokens: int) -> int:
        """Programs that share the keys of a tile of rows."""
        tiles = triton.cdiv(tokens, self.constants["BN"])
        return max(1, min(tiles, _TARGET_PROGRAMS // (self.num_kv_heads * triton.cdiv(rows, self.constants["BW"]))))

    def _shares(self, rows: int, tokens: int) -> int:
        return self._num_splits(rows, tokens) * triton.cdiv(rows, self.constants["BW"])

    def _num_chunks(self, lens: tuple[int, int]) -> int:
        return triton.cdiv(lens[1], self.chunk_size)

    def _grid(self, programs) -> tuple[int, int, int]:
        """`programs(rows, tokens)` of each head of the prompt that has the most."""
        return max(programs(*lens) for lens in self.lens), self.num_kv_heads, len(self.lens)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.k.device)


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The rows of all tensors: a view where they lie in memory one behind the other, as the engine has them."""
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        is_next = tensor.data_ptr() == end and tensor.is_contiguous()
        if not is_next or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(tensors)
        end += tensor.nbytes
    shape = (sum(map(len, tensors)), *first.shape[1:])
    return first.as_strided(shape, first.new_empty(0, *first.shape[1:]).stride())


def score_constants(dtype: torch.dtype, head_dim: int, group: int, num_kv_heads: int) -> dict[str, Any]:
    """Constants of the kernels over the keys: tiles of BW rows of GP >= G queries, by BN keys."""
    padded = triton.next_power_of_2(group)
    tile = 32 if dtype == torch.float32 else 64
    return {
        "H": num_kv_heads,
        "D": head_dim,
        "G": group,
        "GP": padded,
        "BW": min(32, tile // padded),
        "BN": tile,
        "BD": triton.next_power_of_2(head_dim),
        "INTERPRETED": gpu.is_interpreted(),
    }
