"""Expected Attention (arXiv 2510.00636; public code NVIDIA/kvpress): keep what queries like these would attend to."""

from __future__ import annotations

import torch

from sglang_hybridkv.compressors.base import Compressor, PromptLayer
from sglang_hybridkv.config import CompressorConfig, ObservationRows, PoolKernel


class ExpectedAttentionConfig(CompressorConfig):
    """As many queries as the engine keeps, and no pooling."""

    observation_rows: ObservationRows = 256
    pool_kernel: PoolKernel = 1


class ExpectedAttention(Compressor):
    """Salience is the mean of exp(q . k) over a Gaussian of queries, normalised, times the norm of the value.

    softmax(mu . k s + k' Sigma k s^2 / 2) with mean mu and covariance Sigma of each query head, averaged over the
    group. Deviations: kvpress takes mu and Sigma of all prompt tokens before RoPE and rotates them over the next 512
    positions; the engine keeps only the last W queries, already rotated, so mu and Sigma are theirs. The method is
    therefore less query-agnostic here where the question is longer than W or follows the image at once. Sinks are
    left out of the softmax, as there; budgets are equal, in whole pages, and the recent window is always kept.
    """

    name = "expected-attention"
    config_class = ExpectedAttentionConfig

    def score_layer(self, layer: PromptLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """Statistic 0, and the expected attention of each token. Cost: H G N D^2 operations, H G N fp32 of scratch."""
        num_rows, _, head_dim = layer.q.shape
        k_HND = layer.k.float().transpose(0, 1)
        q_HGWD = layer.q.float().view(num_rows, len(k_HND), -1, head_dim).permute(1, 2, 0, 3)
        mean = q_HGWD.mean(dim=2, keepdim=True)
        centred = q_HGWD - mean
        covariance = centred.transpose(-1, -2) @ centred / num_rows
        k_H1ND = k_HND.unsqueeze(1)
        spread = ((k_H1ND @ covariance) * k_H1ND).sum(-1)
        logits = (k_H1ND @ mean.transpose(-1, -2)).squeeze(-1) * layer.scaling + spread * (layer.scaling**2 / 2)
        num_sinks = min(self.config.num_sink_tokens, len(layer.slots) - 1)
        logits[..., :num_sinks] = float("-inf")
        expected = logits.softmax(dim=-1).mean(dim=1) * layer.v.float().norm(dim=-1).transpose(0, 1)
        return torch.zeros_like(expected[:, 0]), expected
