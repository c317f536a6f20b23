"""HybridKV, re-implemented (arXiv 2604.05887): classify heads online, budget them by type, prune or retrieve."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from sglang_hybridkv.compressors.base import Compressor, HeadPlan, PromptObservation
from sglang_hybridkv.compressors.budget import head_weights, share_by_ratio
from sglang_hybridkv.compressors.token_order import TokenOrder, text_first_order
from sglang_hybridkv.config import ChunkScore, PageSize, PoolKernel, RecentWindow, RetrievalConfig

# Defaults by preset; a field that the user gives wins. "paper" is the published method, its open choices inferred.
# "tuned" is what the fields say, found on drawn scenes and on real text with a pretrained model, see docs/quality.md:
# those heads retrieve that would lose most of their worst query or hit the most chunks, a share of all that depends on
# the prompt's length alone; they are served single tokens, found by codes of all keys; static heads keep single tokens,
# too, not neighbourhoods.
_PAPER: dict[str, Any] = {
    "page_size": 16,
    "statistic": "sparsity",
    "theta": 0.9,
    "max_dynamic_heads": 1.0,
    "long_prompt_dynamic_heads": 1.0,
    "dynamic_share": 0.32,
    "static_weight": "sparsity",
    "text_share": 1.0,
    "chunk_score": "mean_max",
    "unretrieved": "drop",
    "observation_rows": 32,
    "num_sink_tokens": 4,
    "recent_window": 16,
    "pool_kernel": 5,
}
PRESETS: dict[str, dict[str, Any]] = {"paper": _PAPER, "tuned": {}}


class HybridKVConfig(RetrievalConfig):
    """Settings of HybridKV; "inferred" marks a choice that the published text does not fix."""

    per_request: ClassVar[tuple[str, ...]] = (*RetrievalConfig.per_request, "theta")

    page_size: PageSize = 8
    chunk_score: ChunkScore = "half_codes"
    recent_window: RecentWindow = 8
    pool_kernel: PoolKernel = 1
    preset: Literal["tuned", "paper"] = Field(
        "tuned", description="set of defaults: 'tuned' by measured quality, or 'paper', the method as published"
    )
    statistic: Literal[
        "sparsity", "top_mass", "hit_cv", "stability", "capture", "worst_capture", "worst_capture+hit_cv"
    ] = Field(
        "worst_capture+hit_cv",
        description="statistic S of a head, from 0 to 1; a head is static when S >= theta (inferred). Of two "
        "statistics joined by +, the heads that are among the lowest in either are dynamic. 'hit_cv' is high when all "
        "observed queries hit the same few chunks, 'stability' is what consecutive queries have in common, 'capture' "
        "is the probability that a pruned head would keep on average, and 'worst_capture' that of its worst query",
    )
    theta: Annotated[float, Field(ge=0.0, le=1.01)] = Field(
        1.01,
        description="threshold of the statistic. 0 makes every head static; a value above 1 makes as many heads "
        "dynamic as max_dynamic_heads allows",
    )
    max_dynamic_heads: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.68,
        description="largest share of the heads that are dynamic: those with the lowest statistic. The number of heads "
        "is rounded; pages and host memory are reserved for no more",
    )
    long_prompt_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] = Field(
        2048,
        description="tokens of a prompt from which on fewer heads are dynamic, so that a decode step fetches no more "
        "rows from host memory: the share falls as the length grows, to long_prompt_dynamic_heads",
    )
    long_prompt_dynamic_heads: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.34,
        description="the smallest value that the share falls to; max_dynamic_heads where that is smaller",
    )
    sparsity_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.01, description="'sparsity' counts keys below this fraction of a row's largest probability (inferred)"
    )
    mass_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.9, description="'top_mass' counts the keys that hold this share of the probability (inferred)"
    )
    capture_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1,
        description="'capture' and 'worst_capture' keep this share of the keys: first, last and most salient ones",
    )
    dynamic_share: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        None, description="share of the budget that all dynamic heads get together; null lets dynamic_ratio decide"
    )
    dynamic_ratio: Annotated[float, Field(gt=0.0, le=64.0)] = Field(
        2.0,
        description="rows that a dynamic head gets for each row of a static head, on average; the budget of each type "
        "follows the number of its heads",
    )
    static_weight: Literal["sparsity", "density", "uniform"] = Field(
        "density",
        description="weight of a static head when they share their rows: 'sparsity' is S, 'density' 1 - S, 'uniform' 1 "
        "(inferred)",
    )
    text_share: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        1.0,
        description="largest share of a static head's rows, rounded up, that text takes ahead of visual tokens"
        " (inferred)",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_the_preset(cls, values: Any) -> Any:
        preset = values.get("preset", "tuned") if isinstance(values, dict) else None
        return {**PRESETS[preset], **values} if isinstance(preset, str) and preset in PRESETS else values

    def most_dynamic_heads(self, num_heads: int, covered: int) -> int:
        """How many of the model's `num_heads` KV heads, over all layers, `covered` tokens of a prompt make dynamic."""
        if self.theta == 0:
            return 0
        # As the user wrote them, and half a head counts: 0.34 of 8 heads are 3, 0.25 of 90 are 23.
        most, least = Fraction(repr(self.max_dynamic_heads)), Fraction(repr(self.long_prompt_dynamic_heads))
        falling = most * self.long_prompt_tokens / max(covered, self.long_prompt_tokens)
        return math.floor(min(most, max(least, falling)) * num_heads + Fraction(1, 2))

    def fewest_dynamic_heads(self, num_heads: int, covered: int) -> int:
        """As many as may be, where the threshold excludes none."""
        return self.most_dynamic_heads(num_heads, covered) if self.theta > 1 else 0


def best_places(statistics: torch.Tensor) -> torch.Tensor:
    """[L, H], int64: how many heads are below a head in that of its statistics [L, H, S] where the fewest are.

    Ties go to the earlier head, NaN comes last. No host sync.
    """
    by_statistic = statistics.flatten(0, 1).T  # [S, E]
    order = by_statistic.argsort(dim=1, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).amin(dim=0).view(statistics.shape[:2])


def lowest(statistic: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the `count` lowest of numbers [L, H]; ties go to the earlier head, NaN comes last. No host sync.

    With one observed query (a prompt with one text token after its last image) some statistics are 0 for all heads:
    then the heads of the first layers are taken.
    """
    order = statistic.flatten().argsort(stable=True)
    mask = torch.zeros(statistic.numel(), dtype=torch.bool, device=statistic.device)
    mask[order[:count]] = True
    return mask.view_as(statistic)


class HybridKV(Compressor):
    """Static heads (statistic >= theta) keep a text-first pruned set, dynamic heads retrieve chunks."""

    name = "hybridkv"
    config_class = HybridKVConfig
    observed_rows = "text"
    config: HybridKVConfig

    def score_settings(self) -> dict[str, Any]:
        """The configured statistic [H], or two [H, 2]; salience is the mean probability."""
        config = self.config
        return {
            "statistic": config.statistic,
            "sparsity_fraction": config.sparsity_fraction,
            "mass_fraction": config.mass_fraction,
            "capture_fraction": config.capture_fraction,
            "num_sinks": config.num_sink_tokens,
            "num_recent": config.recent_window,
            "chunk_size": config.page_size,
        }

    def plan(self, observation: PromptObservation, total_head_pages: int, *, most_dynamic: int) -> HeadPlan:
        """Types by threshold, budgets by type and weight; no host sync."""
        config = self.config
        statistics = observation.statistic.view(*observation.statistic.shape[:2], -1)
        statistic = statistics[..., 0]
        covered = len(observation.is_text)
        most = min(most_dynamic, config.most_dynamic_heads(statistic.numel(), covered))
        is_dynamic = lowest(best_places(statistics), most) & (
            statistics.nan_to_num(nan=float("inf")).amin(dim=-1) < config.theta
        )
        share = config.dynamic_share
        if share is None:
            share = share_by_ratio(is_dynamic, config.dynamic_ratio)
        weights = head_weights(statistic.flatten(), is_dynamic.flatten(), share, config.static_weight)
        return HeadPlan(is_dynamic, self.share_pages(observation, weights, total_head_pages))

    def rank_tokens(self, observation: PromptObservation, plan: HeadPlan) -> TokenOrder:
        """Text first, then salient visual tokens."""
        return text_first_order(
            observation.salience,
            observation.is_text,
            plan.num_head_pages * observation.page_size,
            num_sink_tokens=self.config.num_sink_tokens,
            recent_window=self.config.recent_window,
            text_share=self.config.text_share,
            least_kept=min(self.config.min_head_pages, observation.num_prompt_pages) * observation.page_size,
        )
