"""Observation rows of prompts that are being prefilled: kept across chunks, scored layer by layer."""

from __future__ import annotations

import dataclasses

import torch

from sglang_hybridkv.compressors import Compressor, PromptLayer
from sglang_hybridkv.ledger import Reservation
from sglang_hybridkv.spans import num_observation_rows, text_mask


@dataclasses.dataclass
class _Prompt:
    """Scores of the layers that have run on a prompt's final chunk."""

    reservation: Reservation
    is_text: torch.Tensor
    statistic: list[torch.Tensor] = dataclasses.field(default_factory=list)
    salience: list[torch.Tensor] = dataclasses.field(default_factory=list)


class PromptObserver:
    """Last queries of each prompt by request row, and the scores they give.

    A prompt is *watched* while earlier chunks run and *begun* when its final chunk is about to be launched.
    """

    def __init__(self, compressor: Compressor, num_layers: int):
        self.compressor = compressor
        self.num_layers = num_layers
        self.clear()

    def clear(self) -> None:
        """Forget all prompts."""
        self._watched: set[int] = set()
        self._prompts: dict[int, _Prompt] = {}
        self._tails: dict[tuple[int, int], tuple[int, torch.Tensor]] = {}

    def watch(self, row: int) -> None:
        """Keep the last queries of the chunk that is launched next for `row`."""
        self._watched.add(row)

    def begin(self, row: int, reservation: Reservation) -> None:
        """The chunk that is launched next for `row` is its final one."""
        self._watched.discard(row)
        self._prompts[row] = _Prompt(reservation, text_mask(reservation.spans, reservation.prefilled))

    def drop(self, row: int | None) -> None:
        """Forget `row`; None, a request without a row, is legal."""
        if row is None:
            return
        self._watched.discard(row)
        self._prompts.pop(row, None)
        for layer_idx in range(self.num_layers):
            self._tails.pop((row, layer_idx), None)

    def is_interested(self, row: int) -> bool:
        """Whether the forward has to show the queries of `row`."""
        return row in self._watched or row in self._prompts

    def is_final(self, row: int) -> bool:
        """Whether this forward computes the end of the prompt of `row`."""
        return row in self._prompts

    def keep_tail(self, row: int, layer_idx: int, q: torch.Tensor, start: int) -> torch.Tensor:
        """Queries [<= W, H * G, D] up to the end of this chunk, from it and, where it is short, the one before.

        Parameters
        ----------
        q : [T, H * G, D]. Queries of the chunk.
        start : position of its first token. A gap to the kept rows (a prefix hit in between) drops them.
        """
        wanted = self.compressor.config.observation_rows
        tail = q[-wanted:]
        end, kept = self._tails.pop((row, layer_idx), (None, None))
        if kept is not None and end == start and len(tail) < wanted:
            tail = torch.cat((kept[len(tail) - wanted :], tail))
        if row in self._watched:
            self._tails[row, layer_idx] = (start + len(q), tail.clone())
        return tail

    def score(
        self,
        row: int,
        tail: torch.Tensor,
        k_rows: torch.Tensor,
        v_rows: torch.Tensor,
        slots: torch.Tensor,
        scaling: float,
    ) -> bool:
        """Score one layer of a prompt; True when it was the last.

        Parameters
        ----------
        tail : [<= W, H * G, D]. From `keep_tail`.
        k_rows, v_rows : [slots, H, D]. The layer's keys and values in the pool.
        slots : [N], int64. Token slots of the whole prompt.
        """
        prompt, compressor = self._prompts[row], self.compressor
        if compressor.observed_rows == "text":
            rows = num_observation_rows(prompt.reservation.spans, len(slots), compressor.config.observation_rows)
            tail = tail[-rows:]
        prompt.is_text = prompt.is_text.to(tail.device)
        layer = PromptLayer(
            tail.contiguous(), k_rows, v_rows, slots, scaling, prompt.is_text, layer_idx=len(prompt.statistic)
        )
        statistic, salience = compressor.score_layer(layer)
        prompt.statistic.append(statistic)
        prompt.salience.append(salience)
        return len(prompt.statistic) == self.num_layers

    def finish(self, row: int) -> tuple[Reservation, torch.Tensor, torch.Tensor]:
        """Reservation, statistic [L, H] and salience [L, H, N] of a prompt whose layers have all run."""
        prompt = self._prompts.pop(row)
        return prompt.reservation, torch.stack(prompt.statistic), torch.stack(prompt.salience)
