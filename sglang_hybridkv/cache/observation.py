"""Observation rows of prompts that are being prefilled: gathered from the parts of prefill, scored layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sglang_hybridkv.cache.compress import ObservedPrompt
from sglang_hybridkv.compressors.base import Compressor, PromptLayer
from sglang_hybridkv.requests.spans import VisualSpan, text_mask


class QueryPart(NamedTuple):
    """One layer of a part of a prompt, right after its attention.

    Attributes
    ----------
    row : the request's.
    q : [T, H * G, D]. Queries of the part.
    start : position of its first token.
    token_slots : [>= prompt], integer. Token slots of the request.
    """

    row: int
    q: torch.Tensor
    start: int
    token_slots: torch.Tensor


@dataclasses.dataclass
class _Prompt:
    """What the layers have left that have run on the final part of a prompt."""

    spans: tuple[VisualSpan, ...]
    compressor: Compressor
    is_text: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    statistic: list[torch.Tensor] = dataclasses.field(default_factory=list)
    salience: list[torch.Tensor] = dataclasses.field(default_factory=list)
    queries: list[torch.Tensor] = dataclasses.field(default_factory=list)


class PromptObserver:
    """Observed queries of each prompt by request row, and the scores they give.

    SGLang prefills a prompt in one part or several. The prompt is *watched* from its first part on and *begun* when the
    final one is about to be launched. Which queries are observed is known before the first part, so every part adds
    those that are its own, and together they are the same however the prompt is cut. A prefix hit never reaches them
    (`HybridRadixCache.match_prefix`).
    """

    def __init__(self, compressor: Compressor, num_layers: int):
        self.compressor = compressor
        self.num_layers = num_layers
        self.clear()

    def clear(self) -> None:
        """Forget all prompts."""
        self._windows: dict[int, range] = {}
        self._prompts: dict[int, _Prompt] = {}
        self._kept: dict[tuple[int, int], torch.Tensor] = {}

    def watch(self, row: int, window: range) -> None:
        """Keep the queries of positions `window` in the part that is launched next for `row`; before each part."""
        self._windows[row] = window

    def begin(self, row: int, spans: tuple[VisualSpan, ...], compressor: Compressor | None = None) -> None:
        """The part that is launched next for `row`, which is watched, is its final one.

        Parameters
        ----------
        spans : the prompt's.
        compressor : that scores it; None is the one for all.
        """
        self._prompts[row] = _Prompt(spans, compressor or self.compressor)

    def drop(self, row: int) -> None:
        """Forget `row`."""
        self._windows.pop(row, None)
        self._prompts.pop(row, None)
        for layer_idx in range(self.num_layers):
            self._kept.pop((row, layer_idx), None)

    def is_interested(self, row: int) -> bool:
        """Whether the forward has to show the queries of `row`."""
        return row in self._windows

    def is_final(self, row: int) -> bool:
        """Whether this forward computes what is left of `row`, so that its prompt can be scored."""
        return row in self._prompts

    def prompt_len(self, row: int) -> int:
        """Tokens of the watched prompt; a retracted request computes more, which nobody observes."""
        return self._windows[row].stop

    def gather(self, row: int, layer_idx: int, q: torch.Tensor, start: int) -> torch.Tensor:
        """Observed queries [<= W, H * G, D] of this part and those before it.

        Parameters
        ----------
        q : [T, H * G, D]. Queries of the part.
        start : position of its first token.
        """
        window = self._windows[row]
        rows = q[max(window.start - start, 0) : max(window.stop - start, 0)]
        kept = self._kept.pop((row, layer_idx), None)
        if kept is not None:
            rows = torch.cat((kept, rows))
        if not self.is_final(row) and len(rows):
            # A copy: the queries live in a buffer that the next forward overwrites.
            self._kept[row, layer_idx] = rows.clone()
        return rows

    def score(self, parts: Sequence[QueryPart], k_rows: torch.Tensor, v_rows: torch.Tensor, scaling: float) -> None:
        """Score the next layer of prompts, of those that are compressed; after an error none of them has been scored.

        Prompts whose compressors score alike share a call.

        Parameters
        ----------
        parts : final ones, with the queries that `gather` has given.
        k_rows, v_rows : [slots, H, D]. The layer's keys and values in the pool.
        """
        layers = self._layers(parts, k_rows, v_rows, scaling)
        scores: list[tuple[int, tuple[torch.Tensor, torch.Tensor]]] = []
        for group in self._groups(layers):
            rows = list(group)
            scored = self._prompts[rows[0]].compressor.score_layers([group[row] for row in rows])
            scores += zip(rows, scored, strict=True)
        for row, (statistic, salience) in scores:
            prompt = self._prompts[row]
            prompt.statistic.append(statistic)
            prompt.salience.append(salience)
            if prompt.compressor.config.retrieval is not None:
                prompt.queries.append(layers[row].q)

    def _layers(
        self, parts: Sequence[QueryPart], k_rows: torch.Tensor, v_rows: torch.Tensor, scaling: float
    ) -> dict[int, PromptLayer]:
        """By row. Queries are copied, as the next layer overwrites them; all prompts' lie one behind the other."""
        for part in parts:
            window, prompt = self._windows[part.row], self._prompts[part.row]
            assert len(part.q) == len(window), f"{len(part.q)} queries of {window}"
            assert len(part.token_slots) >= window.stop, f"{len(part.token_slots)} slots of {window.stop} tokens"
            if prompt.is_text is None:
                prompt.is_text = text_mask(prompt.spans, window.stop, part.q.device)
        self._take_slots([part for part in parts if self._prompts[part.row].slots is None])
        queries = torch.cat([part.q for part in parts]).split([len(part.q) for part in parts])
        layers = {}
        for part, q in zip(parts, queries, strict=True):
            prompt = self._prompts[part.row]
            assert prompt.slots is not None
            assert prompt.is_text is not None
            layer_idx = len(prompt.statistic)
            layers[part.row] = PromptLayer(q, k_rows, v_rows, prompt.slots, scaling, prompt.is_text, layer_idx)
        return layers

    def _take_slots(self, parts: Sequence[QueryPart]) -> None:
        """Token slots of prompts, int64, for all layers; one behind the other, too."""
        if parts:
            own = [part.token_slots[: self.prompt_len(part.row)] for part in parts]
            all_slots = torch.cat(own).long().split([len(slots) for slots in own])
            for part, slots in zip(parts, all_slots, strict=True):
                self._prompts[part.row].slots = slots

    def _groups(self, layers: dict[int, PromptLayer]) -> list[dict[int, PromptLayer]]:
        groups: list[dict[int, PromptLayer]] = []
        for row, layer in layers.items():
            own = self._prompts[row].compressor
            alike = (group for group in groups if self._prompts[next(iter(group))].compressor.scores_like(own))
            group = next(alike, None)
            if group is None:
                groups.append({row: layer})
            else:
                group[row] = layer
        return groups

    def finish(self, row: int) -> tuple[torch.Tensor, ObservedPrompt]:
        """Token slots [N] of a prompt whose layers have all run, and what was seen of it; the row is forgotten."""
        prompt = self._prompts.pop(row)
        del self._windows[row]
        assert prompt.slots is not None
        statistic, salience = torch.stack(prompt.statistic), torch.stack(prompt.salience)
        num_kv_heads = salience.shape[1]
        if not prompt.queries:
            return prompt.slots, ObservedPrompt(prompt.spans, statistic, salience, salience[..., :0])
        by_head = torch.stack(prompt.queries).float().unflatten(2, (num_kv_heads, -1))  # [L, W, H, G, D]
        return prompt.slots, ObservedPrompt(prompt.spans, statistic, salience, by_head.square().mean(dim=(1, 3)).sqrt())
