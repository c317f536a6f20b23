"""Draw scenes of coloured cells with letters, and ask the trained tiny model about them.

A scene is a set of 28-pixel cells spread over one or more images. A keyed cell has a background colour, a white key
letter and a black value letter; a blank cell only a colour. In one colour the value of each key is the key of another
cell, so that following them walks round a loop. The pictures and the words are those `tiny-qwen2_5_vl-scenes` was
trained on.
"""

from __future__ import annotations

import base64
import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL_PIXELS = 28
"""Side of a cell: one visual token of Qwen2.5-VL."""

COLOURS = {
    "red": (220, 30, 30),
    "blue": (40, 70, 230),
    "green": (30, 170, 50),
    "yellow": (245, 225, 40),
    "purple": (140, 40, 180),
    "orange": (250, 140, 20),
    "cyan": (40, 220, 230),
    "pink": (255, 150, 200),
    "brown": (120, 70, 30),
    "gray": (128, 128, 128),
    "lime": (170, 250, 60),
    "navy": (15, 15, 90),
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
KINDS = ("get", "chain", "list", "main")
CHAIN_HOPS = 6
LIST_ENTRIES = 4
BLANK_SHARE_OF_ONE_COLOUR = 0.6

Cell = tuple[str, str, str]
"""Colour, key letter, value letter; both letters empty in a blank cell."""


@dataclass(frozen=True)
class Scene:
    """Images of cells, and what is in them.

    Attributes
    ----------
    images : one picture per (rows, columns) of the layout.
    loops : for each colour that has keyed cells, its letters in the order in which each letter leads to the next.
    main : the colour of most cells; None where two colours have equally many.
    """

    images: tuple[Image.Image, ...]
    loops: dict[str, str]
    main: str | None

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of all images: one per cell."""
        return sum(image.width * image.height for image in self.images) // CELL_PIXELS**2


@dataclass(frozen=True)
class Question:
    """What is asked, and the exact right answer."""

    kind: str
    text: str
    answer: str


@functools.cache
def _font() -> Any:
    return ImageFont.load_default(size=13)


@functools.lru_cache(maxsize=20000)
def _draw_cell(cell: Cell) -> np.ndarray[Any, np.dtype[np.uint8]]:
    colour, key, value = cell
    picture = Image.new("RGB", (CELL_PIXELS, CELL_PIXELS), COLOURS[colour])
    if key:
        draw = ImageDraw.Draw(picture)
        draw.text((7, 7), key, font=_font(), fill=(255, 255, 255), anchor="mm", stroke_width=1, stroke_fill=(0, 0, 0))
        draw.text(
            (20, 20), value, font=_font(), fill=(0, 0, 0), anchor="mm", stroke_width=1, stroke_fill=(255, 255, 255)
        )
    return np.asarray(picture)


def _keyed_cells(rng: np.random.Generator, num_keyed: int, shortest_loop: int) -> tuple[dict[str, str], list[Cell]]:
    fewest = max(1, math.ceil(num_keyed / len(LETTERS)))
    most = max(fewest, min(len(COLOURS), num_keyed // shortest_loop))
    num_loops = int(rng.integers(fewest, most + 1))
    names = list(COLOURS)
    colours = [names[i] for i in rng.permutation(len(names))[:num_loops]]
    loops: dict[str, str] = {}
    cells: list[Cell] = []
    for i, colour in enumerate(colours):
        length = num_keyed // num_loops + (i < num_keyed % num_loops)
        loop = "".join(LETTERS[j] for j in rng.permutation(len(LETTERS))[:length])
        loops[colour] = loop
        cells += [(colour, loop[j], loop[(j + 1) % length]) for j in range(length)]
    return loops, cells


def _blank_cells(rng: np.random.Generator, num_blank: int) -> list[Cell]:
    names = list(COLOURS)
    dominant = names[int(rng.integers(len(names)))]
    is_dominant = rng.random(num_blank) < BLANK_SHARE_OF_ONE_COLOUR
    others = rng.integers(0, len(names), num_blank)
    return [(dominant if same else names[other], "", "") for same, other in zip(is_dominant, others, strict=True)]


def _main_colour(cells: Sequence[Cell]) -> str | None:
    counts = dict.fromkeys(COLOURS, 0)
    for colour, _, _ in cells:
        counts[colour] += 1
    first, second = sorted(counts.values(), reverse=True)[:2]
    return max(counts, key=lambda colour: counts[colour]) if first > second else None


def _arrange(rng: np.random.Generator, cells: list[Cell], arrangement: str) -> list[Cell]:
    shuffled = [cells[i] for i in rng.permutation(len(cells))]
    if arrangement == "shuffled":
        return shuffled
    if arrangement != "regions":
        raise ValueError(f"arrangement: expected 'shuffled' or 'regions', got {arrangement!r}")
    names = list(COLOURS)
    place = {names[i]: rank for rank, i in enumerate(rng.permutation(len(names)))}
    return sorted(shuffled, key=lambda cell: place[cell[0]])


def draw_scene(
    rng: np.random.Generator,
    layout: Sequence[tuple[int, int]],
    *,
    num_keyed: int | None = None,
    arrangement: str = "shuffled",
) -> Scene:
    """Draw a random scene.

    Parameters
    ----------
    rng : source of every choice; the same state draws the same scene.
    layout : (rows, columns) in cells of each image.
    num_keyed : cells that carry letters; by default half to 85 % of all, as in training; never more than 12 x 26.
    arrangement : "shuffled", or "regions": the cells of one colour lie together, as in a real picture.
    """
    if not layout or any(rows < 1 or columns < 1 for rows, columns in layout):
        raise ValueError(f"layout: expected (rows, columns) of at least 1 for each image, got {layout!r}")
    num_cells = sum(rows * columns for rows, columns in layout)
    if num_keyed is None:
        num_keyed = int(num_cells * rng.uniform(0.5, 0.85))
    num_keyed = min(num_keyed, num_cells, len(COLOURS) * len(LETTERS))
    loops, keyed = _keyed_cells(rng, num_keyed, 3 if num_cells < 100 else 6)
    cells = keyed + _blank_cells(rng, num_cells - num_keyed)
    placed = iter(_arrange(rng, cells, arrangement))
    images = []
    for rows, columns in layout:
        grid = [np.concatenate([_draw_cell(next(placed)) for _ in range(columns)], axis=1) for _ in range(rows)]
        images.append(Image.fromarray(np.concatenate(grid, axis=0)))
    return Scene(tuple(images), loops, _main_colour(cells))


def _pick(rng: np.random.Generator, scene: Scene) -> tuple[str, int]:
    colour = list(scene.loops)[int(rng.integers(len(scene.loops)))]
    return colour, int(rng.integers(len(scene.loops[colour])))


def _walk(scene: Scene, colour: str, start: int, hops: int) -> str:
    loop = scene.loops[colour]
    return " ".join([colour, *(loop[(start + hop) % len(loop)] for hop in range(hops + 1))])


def ask(rng: np.random.Generator, scene: Scene, kind: str) -> Question:
    """Make a question about a scene.

    Parameters
    ----------
    kind : "get" (the value of one key), "chain" (follow six values, each the next key), "list" (the values of four
        keys, in order) or "main" (the colour of most cells; becomes "get" where there is none).
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "main":
        if scene.main is not None:
            return Question("main", "main", f"main is {scene.main}")
        kind = "get"
    if kind == "list":
        picks = [_pick(rng, scene) for _ in range(LIST_ENTRIES)]
        asked = ", ".join(_walk(scene, colour, start, 0) for colour, start in picks)
        return Question(kind, f"list {asked}", ", ".join(_walk(scene, colour, start, 1) for colour, start in picks))
    colour, start = _pick(rng, scene)
    hops = CHAIN_HOPS if kind == "chain" else 1
    return Question(kind, f"{kind} {_walk(scene, colour, start, 0)}", _walk(scene, colour, start, hops))


def image_url(image: Image.Image) -> str:
    """Return a picture as a PNG data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def user_message(scene: Scene, question: Question) -> dict[str, Any]:
    """Return the OpenAI chat message: the scene's images, then the question."""
    pictures = [{"type": "image_url", "image_url": {"url": image_url(image)}} for image in scene.images]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": question.text}]}
