"""Pages of random words in random sizes and colours: the samples that any vision model with OCR can read.

SparseMM calibrates on SynthDoG pages, which have to be downloaded. Here words are drawn from a short list and from
random letters and digits, so that a model has to look: it cannot guess the next word from the ones before.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from sglang_hybridkv.cli.samples import Box, Sample

QUESTION = "Read all the text in this image."
PAGE_SIDES = (448, 560, 672, 784)
"""Pixels; multiples of 28, so that Qwen2.5-VL does not resize a page."""
FONT_SIZES = (20, 26, 34)
MARGIN = 16
CODE_SHARE = 0.3
CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
VOCABULARY = (
    "anchor autumn balance basket beacon bottle branch bridge butter candle canyon carbon castle cedar chapter "
    "circle cotton copper corner cricket dancer desert dinner dragon eagle echo engine fabric falcon feather fiddle "
    "forest garden ginger glacier granite hammer harbor hazel hollow honey island jacket jungle kettle ladder "
    "lantern lemon marble meadow mirror mountain needle nickel ocean orchard oyster paper pebble pepper pillow "
    "planet pocket prairie puzzle quarry rabbit raven ribbon river saddle salmon silver spider spring summit sunset "
    "thunder timber tunnel turtle valley velvet village violin walnut window winter wisdom yellow zebra"
)
WORDS = tuple(VOCABULARY.split())


def _draw_word(rng: random.Random) -> str:
    if rng.random() < CODE_SHARE:
        return "".join(rng.choice(CODE_LETTERS) for _ in range(rng.randint(4, 7)))
    word = rng.choice(WORDS)
    return word.capitalize() if rng.random() < 0.3 else word


def draw_page(rng: random.Random) -> Sample:
    """Draw one page, filled with words line by line; the same state of `rng` draws the same page."""
    width, height = rng.choice(PAGE_SIDES), rng.choice(PAGE_SIDES)
    paper = tuple(rng.randint(215, 255) for _ in range(3))
    ink = tuple(rng.randint(0, 80) for _ in range(3))
    size = rng.choice(FONT_SIZES)
    font = ImageFont.load_default(size=size)
    image = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(image)
    words: list[str] = []
    boxes: list[Box] = []
    line_height, space = size * 1.6, size * 0.5
    top = float(MARGIN)
    while top + line_height <= height - MARGIN:
        left = float(MARGIN)
        while True:
            word = _draw_word(rng)
            x0, y0, x1, y1 = draw.textbbox((left, top), word, font=font)
            if x1 > width - MARGIN:
                break
            draw.text((left, top), word, font=font, fill=ink)
            words.append(word)
            boxes.append((x0, y0, x1, y1))
            left = x1 + space
        top += line_height
    return Sample(image, QUESTION, " ".join(words), tuple(boxes))


@dataclass(frozen=True)
class RenderedPages:
    """A list of `num_samples` pages. Page i depends on (seed, i) only."""

    num_samples: int
    seed: int = 0

    @property
    def identity(self) -> str:
        return f"pages of seed {self.seed}"

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, sample_idx: int) -> Sample:
        return draw_page(random.Random(f"{self.seed} {sample_idx}"))
