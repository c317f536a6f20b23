"""PyramidKV (arXiv 2406.02069; public code Zefan-Cai/KVCache-Factory, NVIDIA/kvpress): lower layers keep more."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from sglang_hybridkv.compressors.base import Compressor, PromptObservation
from sglang_hybridkv.config import WindowConfig


class PyramidKVConfig(WindowConfig):
    """SnapKV's settings and the slope."""

    beta: Annotated[float, Field(ge=1.0, le=1000.0)] = Field(
        20.0,
        description="beyond the window, the last layer keeps 1/beta of the mean and the first layer what that leaves",
    )


class PyramidKV(Compressor):
    """SnapKV's tokens, with budgets that fall linearly from the first layer to the last.

    Beyond the window w of b rows a head, the last layer has (b - w) / beta, the first 2 (b - w) minus that.
    Deviations: those of SnapKV; where the first layer's share exceeds the prompt, `apportion` hands the rest to the
    other layers in proportion, while the public code lowers the slope.
    """

    name = "pyramidkv"
    config_class = PyramidKVConfig
    config: PyramidKVConfig

    def weigh_heads(self, observation: PromptObservation, total_head_pages: int) -> torch.Tensor:
        """Rows of each layer by the formula, the same for all its heads."""
        num_layers, num_kv_heads = observation.statistic.shape
        rows = total_head_pages * observation.page_size / (num_layers * num_kv_heads)
        window = min(self.config.recent_window, rows)
        last = (rows - window) / self.config.beta
        layers = torch.linspace(2 * (rows - window) - last, last, num_layers, device=observation.statistic.device)
        return (layers + window)[:, None].expand(num_layers, num_kv_heads)
