"""What a plan has to keep to, told on the device, where a prompt is compressed, and again on the host, in words."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from sglang_hybridkv.requests.geometry import PromptGeometry


@dataclasses.dataclass(frozen=True)
class PlanFigures:
    """All that the law asks of a plan: integers, or scalar tensors of integers.

    Attributes
    ----------
    num_pages, least, most : head pages of all heads together, and of the heads with the fewest and the most of them.
    num_dynamic : heads.
    num_misfits : heads that keep fewer or more tokens than their pages hold.
    """

    num_pages: Any
    least: Any
    most: Any
    num_dynamic: Any
    num_misfits: Any

    def is_legal(self, geometry: PromptGeometry, most_dynamic: int) -> Any:
        """Whether pages of other requests stay unwritten, and no row stays unwritten that a decode step reads."""
        return self._fits_the_budget(geometry) & (self.num_dynamic <= most_dynamic) & (self.num_misfits == 0)

    def complaint(self, geometry: PromptGeometry, most_dynamic: int) -> str | None:
        """What is illegal, of figures on the host; None where nothing is."""
        if not self._fits_the_budget(geometry):
            return (
                f"num_head_pages = {self.least} to {self.most}, {self.num_pages} in all; legal: 1 to "
                f"{geometry.num_prompt_pages} a head, at most {geometry.budget_head_pages} in all"
            )
        if self.num_dynamic > most_dynamic:
            return f"is_dynamic = {self.num_dynamic} heads; legal: at most {most_dynamic}"
        return None if self.is_legal(geometry, most_dynamic) else "rank_tokens must name each token once a head"

    def stack(self) -> torch.Tensor:
        """[5], int64. The figures, in order."""
        return torch.stack([getattr(self, field.name) for field in dataclasses.fields(self)])

    def _fits_the_budget(self, geometry: PromptGeometry) -> Any:
        is_within = self.num_pages <= geometry.budget_head_pages
        return is_within & (self.least >= 1) & (self.most <= geometry.num_prompt_pages)
