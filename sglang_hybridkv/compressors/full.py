"""The full cache through the compressed path: the baseline that every method must equal at budget 1."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sglang_hybridkv.compressors.base import Unscored
from sglang_hybridkv.config import CompressorConfig


class FullConfig(CompressorConfig):
    """A budget below 1 is refused: nothing may be dropped."""

    budget: Annotated[float, Field(ge=1.0, le=1.0, description="1, every row stays")] = 1.0


class Full(Unscored):
    """Keeps every row; no scores are computed."""

    name = "full"
    config_class = FullConfig
