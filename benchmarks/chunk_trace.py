"""A replay that counts chunks: which ones each decode step chooses, which it fetches, and which it waits for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from benchmarks.replay import Held, Prompt, Replay, ReplayedModel
from hybridkv_kernels.host_pages import round_rows, widen_rows


@dataclasses.dataclass
class Traffic:
    """Counts of a decode, [T] each: sums over layers and dynamic heads, one number a step.

    Attributes
    ----------
    chosen : chunks that the steps' queries choose, as the engine counts them: without sinks and the recent window.
    fetched : those of them that were not on the device.
    waited : those of the fetched that attention waits for; all of them without prefetch.
    corrected, layers : layers in which the request waits for its own retrieval, of how many with dynamic heads.
    """

    chosen: torch.Tensor
    fetched: torch.Tensor
    waited: torch.Tensor
    corrected: torch.Tensor
    layers: torch.Tensor

    @classmethod
    def empty(cls, num_steps: int) -> Traffic:
        """Nothing yet."""
        return cls(*(torch.zeros(num_steps, dtype=torch.int64) for _ in dataclasses.fields(cls)))

    def add(self, chosen: torch.Tensor, first: torch.Tensor, forced: torch.Tensor, waits: torch.Tensor) -> None:
        """Count one layer: chunks [E, T, C] that its dynamic heads attend to, those they begin with [E, C], those that
        are always there [E, C], and whether attention waits [T]."""
        chosen, first = chosen & ~forced.unsqueeze(1), first & ~forced
        before = torch.cat((first.unsqueeze(1), chosen[:, :-1]), dim=1)
        fetched = (chosen & ~before).sum(dim=(0, 2))
        self.chosen += chosen.sum(dim=(0, 2))
        self.fetched += fetched
        self.waited += fetched * waits
        self.corrected += waits
        self.layers += 1


class TracedReplay(Replay):
    """A replay of one setting that counts its traffic, and with prefetch attends to what the previous query chose.

    All tokens go through one `step`. `whole` is the prompt before its rows in host memory were rounded: the codes of
    keys are made of that.
    """

    def __init__(self, model: ReplayedModel | None, prompt: Prompt, held: Held, *, prefetch: bool, whole: Prompt):
        super().__init__(model, prompt, [held])
        self.prefetch, self.traffic = prefetch, Traffic.empty(0)
        source = Replay(None, whole, [held])
        layers = held.is_dynamic.any(dim=1).nonzero().flatten().tolist()
        self._summaries = {(layer_idx, 0): source._chunk_summaries(layer_idx, 0) for layer_idx in layers}

    def waits(self, layer_idx: int, grouped: torch.Tensor) -> torch.Tensor:
        """[T], bool: steps in which the layer attends after its own retrieval; queries [1, H, G, T, D]."""
        held = self.held[0]
        if not self.prefetch:
            return torch.ones(grouped.shape[3], dtype=torch.bool)
        kv_heads = held.is_dynamic[layer_idx].nonzero().flatten().tolist()
        members, similarity = [(0, kv_head) for kv_head in kv_heads], held.config.prefetch_similarity
        return self._have_moved(layer_idx, members, grouped[0, kv_heads], similarity, keep=False)[0]

    def _retrieve(
        self, layer_idx: int, grouped: torch.Tensor, *, keep: bool = False
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        held, num_steps = self.held[0], grouped.shape[3]
        if not self.length and not len(self.traffic.chosen):
            self.traffic = Traffic.empty(num_steps)
        kv_heads = held.is_dynamic[layer_idx].nonzero().flatten().tolist()
        first = [self._resident_chunks(layer_idx, 0, kv_head) for kv_head in kv_heads]
        for settings, members, unseen in super()._retrieve(layer_idx, grouped, keep=keep):
            waits = self.waits(layer_idx, grouped)
            chosen = ~unseen[:, 0, :, : held.covered : held.config.tokens_per_chunk]
            counts = held.num_pages[layer_idx, members] * (held.config.page_size // held.config.tokens_per_chunk)
            forced = held.config.retrieval.forced_chunks(chosen.shape[2], counts)
            self.traffic.add(chosen, torch.stack(first), forced, waits)
            stale = torch.cat((unseen[:, :, :1], unseen[:, :, :-1]), dim=2)
            yield settings, members, torch.where(waits[:, None], unseen, stale)


def rounded(prompt: Prompt, is_dynamic: torch.Tensor) -> Prompt:
    """The prompt with the rows of dynamic heads as a host store of int8 gives them back."""

    def round_trip(rows: torch.Tensor) -> torch.Tensor:
        return torch.where(is_dynamic[:, None, :, None], widen_rows(*round_rows(rows), rows.dtype), rows)

    return dataclasses.replace(prompt, k=round_trip(prompt.k), v=round_trip(prompt.v))
