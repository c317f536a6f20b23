"""The full cache through the compressed path: the baseline that every method must equal at budget 1."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from sglang_hybridkv.compressors.base import Compressor, PromptLayer
from sglang_hybridkv.config import CompressorConfig


class FullConfig(CompressorConfig):
    """A budget below 1 is refused: nothing may be dropped."""

    budget: Annotated[float, Field(ge=1.0, le=1.0, description="1, every row stays")] = 1.0


class Full(Compressor):
    """Keeps every row; no scores are computed."""

    name = "full"
    config_class: ClassVar[type[CompressorConfig]] = FullConfig

    def score_layer(self, layer: PromptLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros."""
        salience = torch.zeros(layer.k_rows.shape[1], len(layer.slots), device=layer.q.device)
        return torch.zeros(len(salience), device=layer.q.device), salience
