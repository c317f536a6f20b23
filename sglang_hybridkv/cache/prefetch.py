"""Retrieval off the critical path: this step's query fetches the next step's chunks, beside the layers that follow."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hybridkv_kernels.head_pages import HeadPageLayout, HeadPageTable
from sglang_hybridkv.cache.side_stream import SideStream


class QueryPrefetch:
    """Which requests of a layer attend to what their previous query retrieved, and the previous queries.

    Consecutive queries of a head are mostly alike, so attention need not wait for the retrieval of its own query. Where
    they are not alike, it does. Source: speculative retrieval and its correction, FreeKV (arXiv 2505.13109).
    Deviations: a request is corrected as a whole when any of its dynamic heads has moved, and alike means the cosine
    of the mean queries of a group rather than the mean of their cosines, for which G times as many would be kept.

    Parameters
    ----------
    similarity : cosine below which a request is corrected.
    num_rows : of the table.
    head_dim, dtype : of the queries.

    Attributes
    ----------
    previous : [L, R, H, D]. Mean query of each group in the step before. A row that has not decoded yet has zeros,
        which are similar to no query.
    counters : [2], int64. Requests with dynamic heads, and those of them that were corrected, counted a layer and step.
    """

    def __init__(
        self,
        similarity: float,
        num_rows: int,
        layout: HeadPageLayout,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        self.similarity = similarity
        shape = (layout.num_layers, num_rows, layout.num_kv_heads, head_dim)
        self.previous = torch.zeros(shape, dtype=dtype, device=device)
        self.counters = torch.zeros(2, dtype=torch.int64, device=device)
        self._side = SideStream(device)

    def forget(self, row: int) -> None:
        """Another request takes `row`."""
        self.previous[:, row] = 0

    def split(
        self, q: torch.Tensor, table: HeadPageTable, layer_idx: int, req_rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [B] to retrieve before this layer attends and rows [B] to retrieve afterwards; 0, padding, elsewhere.

        Parameters
        ----------
        q : [B, H * G, D]. Queries of the new tokens; their group means are kept for the next step.
        req_rows : [B], integer.

        Notes
        -----
        No host sync, fixed shapes: capturable. Cost: the queries, and H * D elements a request, read and written.
        """
        rows = req_rows.to(torch.int64)
        mean = q.reshape(len(q), self.previous.shape[2], -1, q.shape[2]).float().mean(2)
        before = self.previous[layer_idx, rows].float()
        is_dynamic = table.is_dynamic[rows, layer_idx]
        alike = torch.nn.functional.cosine_similarity(mean, before, dim=-1)
        moved = ((alike < self.similarity) & is_dynamic).any(-1)
        self.previous[layer_idx, rows] = mean.to(self.previous.dtype)
        self.counters += torch.stack((is_dynamic.any(-1).sum(), moved.sum()))
        return torch.where(moved, rows, 0), torch.where(moved, 0, rows)

    def beside(self, retrieve: Callable[[], None], *used: torch.Tensor, is_last: bool) -> None:
        """Run `retrieve`, which reads `used`, beside what follows on this stream, and on the last layer wait for all.

        Nothing that follows reads what it writes before the next step.
        """
        self._side.run(retrieve, *used)
        if is_last:
            self._side.join()

    def correction_rate(self) -> float | None:
        """Share of requests that waited for their own retrieval; None before any decoded. Waits for the device."""
        seen, corrected = self.counters.tolist()
        return corrected / seen if seen else None
