"""Tensor-parallel ranks: each has KV heads of its own, and all have to schedule alike.

Every rank runs a scheduler that sees the same requests in the same order. What these decide by - free pages, whether a
prompt was compressed - depends on the heads of a rank, so that the ranks agree on it at each commit.
"""

from __future__ import annotations

from typing import Any

import torch


class Ranks:
    """The ranks that share one model.

    Parameters
    ----------
    group : gloo process group of the scheduler processes; None for a single one.

    Attributes
    ----------
    size, index : number of ranks, and which one this is.
    """

    def __init__(self, group: Any = None):
        self._group = group
        self.size = 1 if group is None else torch.distributed.get_world_size(group)
        self.index = 0 if group is None else torch.distributed.get_rank(group)

    def gather(self, *values: int) -> torch.Tensor:
        """[size, len(values)], int64: the values of all ranks, which have to call this at the same point."""
        own = torch.tensor([values], dtype=torch.int64)
        if self.size == 1:
            return own
        gathered = own.new_empty(self.size, len(values))
        torch.distributed.all_gather_into_tensor(gathered, own, group=self._group)
        return gathered

    def heads(self, num_total: int, num_own: int) -> range:
        """Which of a model's `num_total` KV heads the `num_own` of this rank are; ranks beyond them share heads."""
        first = self.index * num_own if num_total >= self.size else self.index * num_total // self.size
        return range(first, first + num_own)


def tensor_parallel_ranks() -> Ranks:
    """Those of this process's SGLang server."""
    from sglang.srt.distributed import get_tp_group

    group = get_tp_group()
    return Ranks(group.cpu_group if group.world_size > 1 else None)
