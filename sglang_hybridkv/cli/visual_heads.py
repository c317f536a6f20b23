"""Score attention heads by how well they look at the word that they help to write (SparseMM, arXiv 2506.05344).

For each token of a text that stands in a picture, a query head scores 1 / (visual tokens in the token's box) when the
key it attends to most lies in that box. Sums over the tokens of a picture are averaged over the pictures, and over the
query heads of each KV head.

Deviations from the public code (visual_head/qwen_visual_head.py of CR400AF-A/SparseMM): the text is teacher-forced
instead of generated, so each token's word is known and words that occur twice count too; a box takes the visual tokens
that it overlaps, and no further row or column where it ends at a token's edge; the top key is taken over the visual
tokens, as the paper defines it, or over all keys (``top_of="all"``), as its code does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_hybridkv.cli.samples import Box


@dataclass(frozen=True)
class VisualGrid:
    """Visual tokens of one picture, row by row.

    Attributes
    ----------
    width, height : size in pixels in which boxes are given; the model may see the picture resized.
    """

    rows: int
    columns: int
    width: int
    height: int

    def tokens_in(self, box: Box) -> list[int]:
        """Indices of the visual tokens that `box` overlaps; at least one."""
        rows = _overlapped(box[1], box[3], self.height, self.rows)
        columns = _overlapped(box[0], box[2], self.width, self.columns)
        return [row * self.columns + column for row in rows for column in columns]


def _overlapped(low: float, high: float, extent: int, count: int) -> range:
    first = min(math.floor(low * count / extent), count - 1)
    return range(first, max(first + 1, min(math.ceil(high * count / extent), count)))


def words_of_tokens(answer: str, offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """Index of the word of ``answer.split()`` that each token belongs to.

    Parameters
    ----------
    offsets : first and last character (exclusive) of each token, as fast tokenizers give them.

    Returns
    -------
    list of int or None
        None for a token of white space only, and for one that reaches over two words.
    """
    word_of_character: dict[int, int] = {}
    for word_idx, word in enumerate(re.finditer(r"\S+", answer)):
        word_of_character.update(dict.fromkeys(range(*word.span()), word_idx))
    words = []
    for first, last in offsets:
        found = {word_of_character[i] for i in range(first, last) if i in word_of_character}
        words.append(found.pop() if len(found) == 1 else None)
    return words


def score_hits(
    top_LHT: torch.Tensor, words: Sequence[int | None], boxes: Sequence[Box], grid: VisualGrid
) -> torch.Tensor:
    """Sum the hits of each query head over the tokens of one answer.

    Parameters
    ----------
    top_LHT : [layers, query heads, tokens], int64. Visual token that the head attends to most where it predicts the
        token; -1 where its top key is no visual token.
    words : for each token its word, or None when it does not count.
    boxes : for each word its place in the picture.

    Returns
    -------
    torch.Tensor
        [layers, query heads], fp64.
    """
    scores = torch.zeros(top_LHT.shape[:2], dtype=torch.float64)
    for token_idx, word_idx in enumerate(words):
        if word_idx is None:
            continue
        inside = torch.tensor(grid.tokens_in(boxes[word_idx]))
        scores += torch.isin(top_LHT[:, :, token_idx], inside).double() / len(inside)
    return scores
