"""HybridKV with head types that a request sets: timings of random weights, whose statistics mean nothing, need them.

Only servers of this benchmark know it: `environment` describes it to them as an installed distribution.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from sglang_hybridkv.compressors import ENTRY_POINT_GROUP
from sglang_hybridkv.compressors.base import HeadPlan, PromptObservation
from sglang_hybridkv.compressors.budget import head_weights, share_by_ratio
from sglang_hybridkv.compressors.hybridkv import HybridKV, HybridKVConfig

NAME = "fixed-heads"
ROOT = Path(__file__).resolve().parents[2]


class FixedHeadsConfig(HybridKVConfig):
    """Settings of HybridKV, and how many heads are dynamic."""

    per_request: ClassVar[tuple[str, ...]] = (*HybridKVConfig.per_request, "dynamic_heads")

    dynamic_heads: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.25, description="share of the KV heads of each layer, its first ones, that are dynamic"
    )

    def most_dynamic_heads(self, num_heads: int, covered: int) -> int:
        """All that `dynamic_heads` says, rounded up, whatever the length."""
        return math.ceil(self.dynamic_heads * num_heads)


class FixedHeads(HybridKV):
    """The first heads of each layer are dynamic; of either type all heads have the same budget."""

    name = NAME
    config_class = FixedHeadsConfig
    config: FixedHeadsConfig

    def plan(self, observation: PromptObservation, total_head_pages: int, *, most_dynamic: int) -> HeadPlan:
        """Types by place, budgets by type."""
        num_layers, num_kv_heads = observation.shape
        num_dynamic = min(int(self.config.dynamic_heads * num_kv_heads), most_dynamic // num_layers)
        places = torch.arange(num_kv_heads, device=observation.salience.device)
        is_dynamic = (places < num_dynamic).repeat(num_layers, 1)
        share = share_by_ratio(is_dynamic, self.config.dynamic_ratio)
        nothing = torch.zeros(is_dynamic.numel(), device=is_dynamic.device)
        weights = head_weights(nothing, is_dynamic.flatten(), share, "uniform")
        return HeadPlan(is_dynamic, self.share_pages(observation, weights, total_head_pages))


def environment(folder: Path) -> dict[str, str]:
    """Environment of a server that is to know the compressor; `folder` gets its description, as pip would write it."""
    described = folder / "hybridkv_gpu_check-0.dist-info"
    described.mkdir(parents=True, exist_ok=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: hybridkv-gpu-check\nVersion: 0\n")
    target = f"{FixedHeads.__module__}:{FixedHeads.__name__}"
    (described / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{NAME} = {target}\n")
    found = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(found)}
