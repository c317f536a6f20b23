"""What a compressor decides, and from what: the contract between a method and the engine."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch

from hybridkv_kernels.score_heads import score_heads, score_heads_batch
from sglang_hybridkv.compressors.budget import apportion, lift_weights
from sglang_hybridkv.compressors.token_order import TokenOrder
from sglang_hybridkv.config import CompressorConfig, RetrievalConfig
from sglang_hybridkv.requests.spans import VisualSpan


@dataclasses.dataclass(frozen=True)
class PromptLayer:
    """One layer of a prompt, right after its attention.

    Attributes
    ----------
    q : [W, H * G, D], contiguous. Queries after RoPE of the last W prompt tokens, in order; the same whatever was
        cached, and however the prompt was cut into chunks.
    k_rows, v_rows : [slots, H, D]. The layer's keys after RoPE and values in the pool; only read.
    slots : [N], int64. Token slots of the whole prompt; W <= N.
    scaling : factor of q . k before the softmax.
    is_text : [N], bool. False where the token came from an image or a video.
    layer_idx : from 0, of the layers that are compressed.
    """

    q: torch.Tensor
    k_rows: torch.Tensor
    v_rows: torch.Tensor
    slots: torch.Tensor
    scaling: float
    is_text: torch.Tensor
    layer_idx: int

    @property
    def k(self) -> torch.Tensor:
        """[N, H, D], a copy. Keys of the prompt."""
        return self.k_rows[self.slots]

    @property
    def v(self) -> torch.Tensor:
        """[N, H, D], a copy. Values of the prompt."""
        return self.v_rows[self.slots]


@dataclasses.dataclass(frozen=True)
class PromptObservation:
    """What prefill saw of one prompt; all tensors on the device of the KV pool.

    Attributes
    ----------
    statistic : [L, H] or [L, H, S], fp32. The method's number, or numbers, for each KV head, from
        `Compressor.score_layer`.
    salience : [L, H, N], fp32, not negative. The method's score of each covered token, pooled.
    is_text : [N], bool. False where the token came from an image or a video.
    num_prompt_pages : pages of the whole prompt, N / page_size; N is page-aligned.
    spans : where images and videos lie, as is_text has it, on the host.
    """

    statistic: torch.Tensor
    salience: torch.Tensor
    is_text: torch.Tensor
    num_prompt_pages: int
    spans: tuple[VisualSpan, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and KV heads."""
        return self.salience.shape[0], self.salience.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.salience.shape[-1] // self.num_prompt_pages


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


class Compressor:
    """One method. What a subclass leaves alone is SnapKV: observe, equal budgets, forced tokens, then top salience.

    The engine makes one object per server and calls, in this order: `bind` at start-up; for each prompt and layer
    `score_layer`, through `score_layers`; then `plan` and `rank_tokens` once, and `merge` layer by layer where
    `merges`. None of the latter may wait for the device: no number, condition or shape is taken from a tensor.

    Attributes
    ----------
    name : value of ``--kv-compressor``.
    config_class : fields of ``--kv-compressor-config``. A subclass of `RetrievalConfig` lets heads be dynamic.
    observed_rows : queries that `score_layer` sees: the last "text" after the last visual token, or the "last" ones
        whatever they are; at most observation_rows. They depend on the prompt alone: a prefix hit stops before them.
    merges : whether `merge` changes kept rows.
    may_retrieve : whether heads may be dynamic; follows from config_class. Without it the engine reserves neither host
        pages nor summary pages, and a request holds exactly its budget.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[CompressorConfig]] = CompressorConfig
    observed_rows: ClassVar[Literal["text", "last"]] = "last"
    merges: ClassVar[bool] = False
    may_retrieve: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.may_retrieve = issubclass(cls.config_class, RetrievalConfig)

    def __init__(self, config: CompressorConfig):
        self.config = config

    def with_config(self, config: CompressorConfig) -> Compressor:
        """The same, bound as it is, with the settings of one request; `per_request` of its config_class may differ."""
        twin = copy.copy(self)
        twin.config = config
        return twin

    def bind(self, num_layers: int, num_kv_heads: int, fingerprint: str | None = None) -> None:
        """Meet the model, in the launcher and in the scheduler; ValueError in one sentence when it does not fit.

        `fingerprint` is the SHA-256 of the model's config.json; None in the scheduler, and where it is not in a folder.
        """

    def take_heads(self, heads: range) -> None:
        """Of the KV heads that `bind` was told of, this process has these; it sees no others afterwards."""

    def take_layers(self, layers: Sequence[int]) -> None:
        """Of the layers that `bind` was told of, these are compressed; it sees no others afterwards."""

    def score_layer(self, layer: PromptLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """Look at one layer of a prompt, right after its attention.

        Returns
        -------
        statistic [H], or [H, S] of a method that wants several, and salience [H, N], fp32, on q's device; salience is
        not negative.
        """
        return score_heads(layer.q, layer.k_rows, layer.slots, scaling=layer.scaling, **self.score_settings())

    def score_layers(self, layers: Sequence[PromptLayer]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`score_layer` of several prompts whose prefill ends together, all of one layer; in shared launches if it can.

        A prompt's scores must not depend on the others.
        """
        if not self._scores_by_settings():
            return [self.score_layer(layer) for layer in layers]
        prompts = [(layer.q, layer.slots) for layer in layers]
        return score_heads_batch(prompts, layers[0].k_rows, scaling=layers[0].scaling, **self.score_settings())

    def score_settings(self) -> dict[str, Any]:
        """Settings of `score_heads`, for methods that leave `score_layer` alone."""
        return {"chunk_size": self.config.page_size}

    def scores_like(self, other: Compressor) -> bool:
        """Whether `score_layers` of either may look at a prompt of the other; requests bring settings of their own."""
        if self is other:
            return True
        is_settled = self._scores_by_settings() and type(self).score_layers is Compressor.score_layers
        return is_settled and type(self) is type(other) and self.score_settings() == other.score_settings()

    def _scores_by_settings(self) -> bool:
        return type(self).score_layer is Compressor.score_layer

    def plan(self, observation: PromptObservation, total_head_pages: int, *, most_dynamic: int) -> HeadPlan:
        """Type and pages of every head, of which at most `most_dynamic` are dynamic."""
        is_dynamic = torch.zeros(observation.shape, dtype=torch.bool, device=observation.salience.device)
        weights = lift_weights(self.weigh_heads(observation, total_head_pages).flatten())
        return HeadPlan(is_dynamic, self.share_pages(observation, weights, total_head_pages))

    def weigh_heads(self, observation: PromptObservation, total_head_pages: int) -> torch.Tensor:
        """[L, H], not negative: what each head's pages are proportional to, between floor and whole prompt."""
        return torch.ones(observation.shape, device=observation.salience.device)

    @property
    def least_share(self) -> float:
        """Share of the mean budget that no head falls below, in [0, 1]; min_head_pages holds beside it."""
        return 0.0

    def share_pages(self, observation: PromptObservation, weights: torch.Tensor, total_head_pages: int) -> torch.Tensor:
        """[L, H], int64: exactly `total_head_pages` by positive `weights` [L * H], with the least pages a head."""
        least_pages = int(self.least_share * total_head_pages / len(weights))
        floor = min(max(self.config.min_head_pages, least_pages), observation.num_prompt_pages)
        return apportion(weights, total_head_pages, floor, observation.num_prompt_pages).view(observation.shape)

    def rank_tokens(self, observation: PromptObservation, plan: HeadPlan) -> TokenOrder | torch.Tensor:
        """The order in which heads keep tokens; the first num_head_pages * P of each head are kept.

        A method that sorts them itself returns [L, H, N], int64: the tokens of each head, the ones to keep first.
        """
        return self.order_tokens(observation)

    def order_tokens(self, observation: PromptObservation, tier: torch.Tensor | None = None) -> TokenOrder:
        """Sinks and recent window, then tier by tier the most salient; see `TokenOrder`."""
        return TokenOrder(observation.salience, tier, self.config.num_sink_tokens, self.config.recent_window)

    def merge(
        self, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor, is_text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What kept rows of one layer become, called where `merges`; where none is evicted, they stay as they are.

        Parameters
        ----------
        keys, values : [H, N, D], the layer's own rows; must not be changed in place.
        kept : [H, N], bool. is_text : [N], bool.

        Returns
        -------
        [H, N, D] twice, dtype of keys; rows that are not kept are ignored.
        """
        return keys, values


class Unscored(Compressor):
    """What methods share that look at no attention: statistic and salience are zeros, and cost nothing."""

    def take_layers(self, layers: Sequence[int]) -> None:
        """Of the layers that `bind` was told of, these are compressed; it sees no others afterwards."""

    def score_layer(self, layer: PromptLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros."""
        salience = torch.zeros(layer.k_rows.shape[1], len(layer.slots), device=layer.q.device)
        return torch.zeros(len(salience), device=layer.q.device), salience
