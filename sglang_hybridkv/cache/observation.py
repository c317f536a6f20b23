"""Observation rows of prompts that are being prefilled: gathered from the parts of prefill, scored layer by layer."""

from __future__ import annotations

import dataclasses

import torch

from sglang_hybridkv.cache.compress import ObservedPrompt
from sglang_hybridkv.compressors.base import Compressor, PromptLayer
from sglang_hybridkv.requests.spans import VisualSpan, text_mask


@dataclasses.dataclass
class _Prompt:
    """Scores of the layers that have run on the final part of a prompt."""

    spans: tuple[VisualSpan, ...]
    compressor: Compressor
    is_text: torch.Tensor | None = None
    statistic: list[torch.Tensor] = dataclasses.field(default_factory=list)
    salience: list[torch.Tensor] = dataclasses.field(default_factory=list)
    query_rms: list[torch.Tensor] = dataclasses.field(default_factory=list)


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

    def score(
        self,
        row: int,
        q: torch.Tensor,
        k_rows: torch.Tensor,
        v_rows: torch.Tensor,
        slots: torch.Tensor,
        scaling: float,
    ) -> None:
        """Score the next layer of a prompt, of those that are compressed.

        Parameters
        ----------
        q : [W, H * G, D]. From `gather`.
        k_rows, v_rows : [slots, H, D]. The layer's keys and values in the pool.
        slots : [N], int64. Token slots of the whole prompt.
        """
        prompt, window = self._prompts[row], self._windows[row]
        assert (len(q), len(slots)) == (len(window), window.stop), f"{len(q)} queries of {window}, {len(slots)} keys"
        if prompt.is_text is None:
            prompt.is_text = text_mask(prompt.spans, window.stop, q.device)
        layer = PromptLayer(
            q.contiguous(), k_rows, v_rows, slots, scaling, prompt.is_text, layer_idx=len(prompt.statistic)
        )
        statistic, salience = prompt.compressor.score_layer(layer)
        prompt.statistic.append(statistic)
        prompt.salience.append(salience)
        by_head = q.float().unflatten(1, (k_rows.shape[1], -1))  # [W, H, G, D]
        prompt.query_rms.append(by_head.square().mean(dim=(0, 2)).sqrt())

    def finish(self, row: int) -> ObservedPrompt:
        """What was seen of a prompt whose layers have all run; the row is forgotten."""
        prompt = self._prompts.pop(row)
        del self._windows[row]
        scores = (torch.stack(layers) for layers in (prompt.statistic, prompt.salience, prompt.query_rms))
        return ObservedPrompt(prompt.spans, *scores)
