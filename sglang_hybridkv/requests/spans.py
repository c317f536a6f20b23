"""Where the images and videos of a prompt lie."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch


@dataclasses.dataclass(frozen=True)
class VisualSpan:
    """Tokens [start, end) of one image or video."""

    start: int
    end: int
    modality: str


def text_mask(spans: tuple[VisualSpan, ...], num_tokens: int, device: torch.device | str | None = None) -> torch.Tensor:
    """[num_tokens], bool: True where the token is text. Made on the `device`: a copy from the host would wait."""
    is_text = torch.ones(num_tokens, dtype=torch.bool, device=device)
    for span in spans:
        is_text[span.start : span.end] = False
    return is_text


def num_observation_rows(spans: tuple[VisualSpan, ...], prompt_len: int, wanted: int) -> int:
    """Rows to observe at the end of the prompt: at most `wanted` text tokens after the last visual one.

    A prompt that ends in a visual token has none; its last `wanted` tokens are observed instead.
    """
    text_after = prompt_len - max((span.end for span in spans), default=0)
    return min(wanted, text_after if text_after > 0 else prompt_len)


def observed_window(
    observed_rows: Literal["text", "last"], spans: tuple[VisualSpan, ...], prompt_len: int, wanted: int
) -> range:
    """Positions of the prompt whose queries are observed: its end, and a function of the prompt and `wanted` alone.

    Parameters
    ----------
    observed_rows : of the compressor.
    """
    rows = num_observation_rows(spans if observed_rows == "text" else (), prompt_len, wanted)
    return range(prompt_len - rows, prompt_len)
