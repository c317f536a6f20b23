"""What a compressor decides, and from what: the contract between a method and the engine."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

import torch

from sglang_hybridkv.config import CompressorConfig


@dataclasses.dataclass(frozen=True)
class PromptObservation:
    """What prefill saw of one prompt; all tensors on the device of the KV pool.

    Attributes
    ----------
    statistic : [L, H], fp32. Text-centric statistic of each KV head in [0, 1].
    salience : [L, H, N], fp32. Mean attention of the observation rows on each covered token, pooled.
    is_text : [N], bool. False where the token came from an image or a video.
    num_pages : pages of the whole prompt, N / page_size; N is page-aligned.
    """

    statistic: torch.Tensor
    salience: torch.Tensor
    is_text: torch.Tensor
    num_pages: int


@dataclasses.dataclass(frozen=True)
class HeadPlan:
    """A compressor's decision for one prompt.

    Attributes
    ----------
    is_dynamic : [L, H], bool. Dynamic heads keep all rows in the host store and retrieve chunks.
    num_head_pages : [L, H], int64. Device pages of each head, in [floor, num_pages]; sums to the budget or less.
    """

    is_dynamic: torch.Tensor
    num_head_pages: torch.Tensor


class Compressor(ABC):
    """One method: budgets per head, and the order in which static heads keep tokens."""

    name: str

    def __init__(self, config: CompressorConfig):
        self.config = config

    @abstractmethod
    def plan(self, observation: PromptObservation, total_head_pages: int, *, retrieval: bool) -> HeadPlan:
        """Type and pages of every head; without `retrieval` no head may be dynamic."""

    @abstractmethod
    def rank_tokens(self, observation: PromptObservation, plan: HeadPlan) -> torch.Tensor:
        """[L, H, N], int64: tokens of each head, the ones to keep first; its first num_head_pages * P are kept."""
