"""TGV-KV (arXiv 2606.03075; public code Danielement321/TGV-KV): text decides which visual tokens stay."""

from __future__ import annotations

import torch

from hybridkv_kernels.score_heads.naive import observed_attention
from sglang_hybridkv.compressors.base import Compressor, HeadPlan, PromptLayer, PromptObservation
from sglang_hybridkv.compressors.token_order import TokenOrder
from sglang_hybridkv.config import CompressorConfig, PoolKernel, RecentWindow


class TGVKVConfig(CompressorConfig):
    """No pooling, four sinks and the last token, as in the public code."""

    pool_kernel: PoolKernel = 1
    recent_window: RecentWindow = 1


class TGVKV(Compressor):
    """Layer budgets by attention from text to images, text before images, images by text-weighted attention.

    A text row weighs what the rows that can see it pay to it on average; a visual token scores the rows' attention
    to it, so weighted. All heads of a layer keep the same tokens. Deviations: rows are the last `observation_rows`
    text tokens after the images instead of all of them; tokens before the images are text only where they are text
    (the public code expects one image); text beyond the budget is dropped by its own score; a prompt without images
    has equal layers.
    """

    name = "tgv-kv"
    config_class = TGVKVConfig
    observed_rows = "text"

    def score_layer(self, layer: PromptLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """Mass from text to images, and the score of each token; equal for all heads. Scratch: H W N fp32."""
        probs, causal = observed_attention(layer.q, layer.k, layer.scaling)
        attention, num_rows = probs.mean(dim=0), len(layer.q)
        among_rows = attention[:, -num_rows:]
        row_weights = among_rows.sum(dim=0) / causal[:, -num_rows:].sum(dim=0)
        visual = row_weights @ attention
        salience = torch.where(layer.is_text, attention.sum(dim=0), visual)
        mass = attention.masked_fill(layer.is_text, 0.0).sum()
        num_kv_heads = layer.k_rows.shape[1]
        return mass.expand(num_kv_heads), salience.expand(num_kv_heads, -1)

    def weigh_heads(self, observation: PromptObservation, total_head_pages: int) -> torch.Tensor:
        """Mass from text to images of the head's layer."""
        return observation.statistic

    def rank_tokens(self, observation: PromptObservation, plan: HeadPlan) -> TokenOrder:
        """Text ahead of images."""
        return self.order_tokens(observation, observation.is_text)
