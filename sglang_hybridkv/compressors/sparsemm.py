"""SparseMM (arXiv 2506.05344; public code CR400AF-A/SparseMM): heads that look at images, found offline, keep more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from hybridkv_kernels.transfer import to_device
from sglang_hybridkv.compressors.base import Compressor, PromptObservation
from sglang_hybridkv.compressors.calibration import load_calibration
from sglang_hybridkv.config import PoolKernel, PoolMode, WindowConfig


class SparseMMConfig(WindowConfig):
    """SnapKV's settings with the pooling of the public code, the scores' file, and the uniform share."""

    pool_kernel: PoolKernel = 7
    pool_mode: PoolMode = "max"
    calibration: str = Field(description="path of the model's visual-head scores, which `hybridkv calibrate` writes")
    uniform_share: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.1, description="share of the budget beyond the window that all heads get alike; rho in the paper"
    )


class SparseMM(Compressor):
    """SnapKV's tokens; a head's budget follows its visual-head score s_h, calibrated on rendered text.

    b_h = w + rho (b - w) + s_h / sum(s) (1 - rho) (b - w) L H. The scores are those of KV heads, the sum over the
    query group, as in the public code. Deviations: those of SnapKV, and whole pages.
    """

    name = "sparsemm"
    config_class = SparseMMConfig
    config: SparseMMConfig

    def bind(self, num_layers: int, num_kv_heads: int, fingerprint: str | None = None) -> None:
        """Read the scores; ValueError when they are missing, damaged or another model's."""
        calibration = load_calibration(self.config.calibration, num_layers, num_kv_heads, fingerprint)
        self.scores = torch.tensor(calibration.scores, dtype=torch.float64)

    def take_heads(self, heads: range) -> None:
        """Keep the scores of these heads; each rank shares its own budget by them."""
        self.scores = self.scores[:, heads.start : heads.stop]

    def take_layers(self, layers: Sequence[int]) -> None:
        """Keep the scores of these layers."""
        self.scores = self.scores[list(layers)]

    @property
    def least_share(self) -> float:
        """Rho."""
        return self.config.uniform_share

    def weigh_heads(self, observation: PromptObservation, total_head_pages: int) -> torch.Tensor:
        """Rows of each head by the formula."""
        if self.scores.device != observation.statistic.device:
            self.scores = to_device(self.scores, observation.statistic.device)
        num_heads = self.scores.numel()
        rows = total_head_pages * observation.page_size / num_heads
        window = min(self.config.recent_window, rows)
        free, rho = rows - window, self.config.uniform_share
        share = self.scores / self.scores.sum()
        return window + rho * free + share * (1.0 - rho) * free * num_heads
