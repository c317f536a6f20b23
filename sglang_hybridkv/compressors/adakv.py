"""AdaKV (arXiv 2407.11550; public code FFY0/AdaKV): within a layer, heads compete for the budget by their scores."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from sglang_hybridkv.compressors.base import Compressor, PromptObservation
from sglang_hybridkv.config import PoolKernel, PoolMode, WindowConfig


class AdaKVConfig(WindowConfig):
    """SnapKV's settings with the pooling of the public code, and the safeguard."""

    pool_kernel: PoolKernel = 7
    pool_mode: PoolMode = "max"
    safeguard: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.2, description="share of the mean budget that every head gets at least; alpha in the paper"
    )


class AdaKV(Compressor):
    """SnapKV's tokens; a head's budget is its number of places in the layer's joint top-k, and a safeguard of alpha.

    b_h = w + alpha (b - w) + (1 - alpha) c_h, where c_h counts head h's tokens among the H (b - w) best of a layer.
    Deviations: those of SnapKV; the budget's whole pages are shared over all layers at once, so a layer's sum may
    differ from its neighbour's by a few pages.
    """

    name = "adakv"
    config_class = AdaKVConfig
    config: AdaKVConfig

    @property
    def least_share(self) -> float:
        """Alpha."""
        return self.config.safeguard

    def weigh_heads(self, observation: PromptObservation, total_head_pages: int) -> torch.Tensor:
        """Rows of each head by the formula."""
        num_layers, num_kv_heads = observation.statistic.shape
        rows = total_head_pages * observation.page_size // (num_layers * num_kv_heads)
        window = min(self.config.recent_window, rows)
        free, alpha = rows - window, self.config.safeguard
        beyond = observation.salience[..., : observation.salience.shape[-1] - window]
        order = beyond.flatten(1).argsort(dim=-1, descending=True, stable=True)[:, : free * num_kv_heads]
        winners = torch.zeros_like(beyond.flatten(1)).scatter_(-1, order, 1.0)
        counts = winners.view_as(beyond).sum(-1)
        return window + alpha * free + (1.0 - alpha) * counts
