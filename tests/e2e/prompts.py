"""Prompts for the tiny models: token ids, and images and videos as data URLs."""

from __future__ import annotations

import base64
import functools
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.bench_memory import random_prompt

IMAGE_SIDE = 224
IMAGE_TOKENS = 64  # of such an image: 16 x 16 patches, merged 2 x 2


@dataclass(frozen=True)
class Prompt:
    """Token ids with one placeholder for each image or video."""

    ids: tuple[int, ...]
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    words: str | None = None  # in place of the ids, which are then what SGLang tokenizes itself

    def __add__(self, other: Prompt) -> Prompt:
        return Prompt(self.ids + other.ids, self.images + other.images, self.videos + other.videos)

    def body(self) -> dict[str, Any]:
        """Its part of a /generate request."""
        body: dict[str, Any] = {"input_ids": list(self.ids)} if self.words is None else {"text": self.words}
        if self.images:
            body["image_data"] = list(self.images)
        if self.videos:
            body["video_data"] = list(self.videos)
        return body


def text(seed: int, num_tokens: int) -> Prompt:
    """Random tokens."""
    return Prompt(tuple(random_prompt(seed, num_tokens)))


def picture(seed: int, height: int = IMAGE_SIDE, width: int = IMAGE_SIDE) -> Image.Image:
    """Random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def image_url(seed: int, height: int = IMAGE_SIDE, width: int = IMAGE_SIDE) -> str:
    """PNG of random pixels as a data URL."""
    return _data_url("image/png", picture(seed, height, width), format="PNG")


def video_url(seed: int, num_frames: int, height: int = 112, width: int = 112) -> str:
    """Animated GIF of random frames, four a second, as a data URL."""
    first, *rest = [picture(1000 * seed + i, height, width) for i in range(num_frames)]
    return _data_url("video/gif", first, format="GIF", save_all=True, append_images=rest, duration=250, loop=0)


def _data_url(kind: str, image: Image.Image, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


class Vision:
    """Prompts with images and videos for one checkpoint, of Qwen, GLM or InternVL."""

    def __init__(self, model: Path):
        self.model = model
        self.config = json.loads((model / "config.json").read_text())
        self._marks = "vision" if "vision_start_token_id" in self.config else "image"
        self.reads_text = self.config["model_type"] == "internvl_chat"
        if self.reads_text:
            self.config["image_token_id"] = -1

    def image(self, seed: int, height: int = IMAGE_SIDE, width: int = IMAGE_SIDE) -> Prompt:
        """One image between its two marks: IMAGE_TOKENS + 2 tokens at the default size."""
        return Prompt(self._marked("image"), images=(image_url(seed, height, width),))

    def video(self, seed: int, num_frames: int) -> Prompt:
        """One video between its two marks."""
        return Prompt(self._marked("video"), videos=(video_url(seed, num_frames),))

    def in_words(self, prompt: Prompt) -> Prompt:
        """The same with whole words in place of its text, which become the same tokens when they are read again.

        GLM's processor in SGLang tokenizes what it has decoded, and needs as many tokens as before. InternVL's takes
        images with text only.
        """
        marks = {value for name, value in self.config.items() if name.endswith("_token_id")}
        ids = tuple(one if one in marks else list(self.words)[one % len(self.words)] for one in prompt.ids)
        words = "".join(self.words.get(one, "<image>") for one in ids) if self.reads_text else None
        return Prompt(ids, prompt.images, prompt.videos, words)

    @functools.cached_property
    def words(self) -> dict[int, str]:
        """Tokens that are a space and a word."""
        pieces = json.loads((self.model / "tokenizer.json").read_text())["model"]["vocab"]
        return {i: f" {piece[1:]}" for piece, i in pieces.items() if re.fullmatch("\u0120[a-z]{2,}", piece)}

    def images(self, seed: int, count: int) -> Prompt:
        """Several images in a row."""
        return sum((self.image(seed + i) for i in range(count)), Prompt(()))

    def _marked(self, kind: str) -> tuple[int, ...]:
        if self.reads_text:
            return (self.config[f"{kind}_token_id"],)
        return tuple(self.config[f"{name}_token_id"] for name in (f"{self._marks}_start", kind, f"{self._marks}_end"))
