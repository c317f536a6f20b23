"""Random tokens, the floor that every method has to beat."""

from __future__ import annotations

import zlib
from typing import Annotated

import torch
from pydantic import Field

from hybridkv_kernels.transfer import to_device
from sglang_hybridkv.compressors.base import HeadPlan, PromptObservation, Unscored
from sglang_hybridkv.compressors.token_order import TokenOrder
from sglang_hybridkv.config import CompressorConfig
from sglang_hybridkv.requests.spans import text_mask


class RandomConfig(CompressorConfig):
    """The engine's settings and a seed."""

    seed: Annotated[
        int, Field(ge=0, lt=2**31, description="seed of the random choice; another seed keeps other tokens")
    ] = 0


class Random(Unscored):
    """Each head keeps sinks, the recent window and random tokens, as many as every other head.

    The draw depends on the seed and on where the prompt's text and images lie, not on scores: a rerun, also one in
    another batch, keeps the same tokens.
    """

    name = "random"
    config_class = RandomConfig
    config: RandomConfig

    def rank_tokens(self, observation: PromptObservation, plan: HeadPlan) -> TokenOrder:
        """Forced tokens first, then a permutation of its own for each head."""
        is_text = text_mask(observation.spans, len(observation.is_text), "cpu")
        generator = torch.Generator().manual_seed(zlib.crc32(is_text.numpy().tobytes(), self.config.seed))
        draw = torch.rand(observation.salience.shape, generator=generator, device="cpu")
        draw = to_device(draw, observation.salience.device)
        config = self.config
        return TokenOrder(draw, None, config.num_sink_tokens, config.recent_window)
