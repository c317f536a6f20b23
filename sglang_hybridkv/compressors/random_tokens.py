"""Random tokens, the floor that every method has to beat."""

from __future__ import annotations

import zlib
from typing import Annotated

import torch
from pydantic import Field

from sglang_hybridkv.compressors.base import HeadPlan, PromptObservation, Unscored
from sglang_hybridkv.compressors.token_order import tiered_order
from sglang_hybridkv.config import CompressorConfig


class RandomConfig(CompressorConfig):
    """The engine's settings and a seed."""

    seed: Annotated[
        int, Field(ge=0, lt=2**31, description="seed of the random choice; another seed keeps other tokens")
    ] = 0


class Random(Unscored):
    """Each head keeps sinks, the recent window and random tokens, as many as every other head.

    The draw depends on the seed and on where the prompt's text and images lie, not on scores: a rerun, also one in
    another batch, keeps the same tokens. Hashing the layout costs one host sync a prompt.
    """

    name = "random"
    config_class = RandomConfig
    config: RandomConfig

    def rank_tokens(self, observation: PromptObservation, plan: HeadPlan) -> torch.Tensor:
        """Forced tokens first, then a permutation of its own for each head."""
        layout = bytes(observation.is_text.cpu().to(torch.uint8).tolist())
        generator = torch.Generator().manual_seed(zlib.crc32(layout, self.config.seed))
        draw = torch.rand(observation.salience.shape, generator=generator).to(observation.salience.device)
        config = self.config
        return tiered_order(draw, 0, num_sink_tokens=config.num_sink_tokens, recent_window=config.recent_window)
