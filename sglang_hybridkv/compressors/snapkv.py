"""SnapKV (arXiv 2404.14469; public code FasterDecoding/SnapKV): equal budgets, top salience of the last window."""

from __future__ import annotations

from sglang_hybridkv.compressors.base import Compressor
from sglang_hybridkv.config import WindowConfig


class SnapKV(Compressor):
    """Each head keeps the last window and the tokens that the window's queries attend to most.

    Scores are softmax over the whole prompt, mean over the window and the query group, average pooling of width 5.
    Deviations: the window is the end of the page-aligned prompt (what follows stays dense); budgets are a share of
    the prompt in whole pages instead of a fixed number of tokens; one score for the heads of a group, as its
    grouped-query ports have it; pooling sees the window's own tokens and counts real neighbours only at the ends.
    """

    name = "snapkv"
    config_class = WindowConfig
