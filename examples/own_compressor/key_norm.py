"""Keep text, then tokens whose keys have a small norm."""

from typing import Annotated

import torch
from pydantic import Field

from sglang_hybridkv.compressors import Compressor
from sglang_hybridkv.config import CompressorConfig, PoolKernel


class KeyNormConfig(CompressorConfig):
    pool_kernel: PoolKernel = 1
    late_layers: Annotated[float, Field(gt=0.0)] = Field(1.0, description="weight of the last layer, the first has 1")


class KeyNorm(Compressor):
    name = "key-norm"
    config_class = KeyNormConfig
    config: KeyNormConfig

    def score_layer(self, layer):
        """What one layer of a prompt looks like: a number for each head, and a score for each token."""
        norm = layer.k.float().norm(dim=-1).T
        return norm.mean(dim=1), 1.0 / (1.0 + norm)

    def weigh_heads(self, observation, total_head_pages):
        """Pages of a head are proportional to this."""
        num_layers, num_kv_heads = observation.statistic.shape
        layers = torch.linspace(1.0, self.config.late_layers, num_layers, device=observation.statistic.device)
        return layers[:, None].expand(num_layers, num_kv_heads)

    def rank_tokens(self, observation, plan):
        """Order in which heads keep tokens: sinks and recent window, then the highest tier, then the best score."""
        return self.order_tokens(observation, observation.is_text)
