"""Draw scenes of coloured cells with codes, and ask the trained tiny model about them.

A scene is a set of 28-pixel cells, one visual token each, spread over one or more images or the frames of a video. A
*code* is a letter and a digit, such as K7. A keyed cell shows its key code in white and its value code in black on a
background colour; other cells are plain, or show a dot. The value of each key is the key of another cell, so that
following them walks round one loop. A page is a printed glossary: lines of white cells, each a term above its meaning,
in black. The pictures and the words are those that `tiny-qwen2_5_vl-scenes` was trained on.
"""

from __future__ import annotations

import base64
import functools
import io
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
    "white": (255, 255, 255),
}
"""The last colour is paper, which only pages have."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
CODES = tuple(letter + digit for letter in LETTERS for digit in DIGITS)
KINDS = ("get", "list", "chain", "count", "main", "read")
LOOKUP_KINDS = ("get", "list", "chain")
ARRANGEMENTS = ("coherent", "shuffled", "page")
CHAIN_HOPS = 6
LIST_ENTRIES = 4
TERMS_READ = 2
MOST_DOTS = 9

NUM_COLOURS = len(COLOURS) - 1
WHITE = NUM_COLOURS
NOTHING = -1
COLOUR, KEY, VALUE, DOT = range(4)
"""Columns of a cell: index of its colour, of its key and value code (or NOTHING), and whether it shows a dot."""

Grid = np.ndarray[Any, np.dtype[np.int16]]
"""[rows, columns, 4]."""
_HALF = CELL_PIXELS // 2
_LONGEST_SIDE = 8  # of a region, in cells
_MAIN_SHARE = 0.4  # of the regions that are drawn in one colour


@dataclass(frozen=True)
class Scene:
    """Images of cells, and what is in them.

    Attributes
    ----------
    grids : cells of each image.
    loop : key codes in the order in which each one's value is the next one's key.
    main : the colour of most cells; None where two have equally many, and on a page.
    num_dots : cells with a dot.
    is_page : whether this is a page.
    """

    grids: tuple[Grid, ...]
    loop: tuple[int, ...]
    main: str | None = None
    num_dots: int = 0
    is_page: bool = False

    @functools.cached_property
    def images(self) -> tuple[Image.Image, ...]:
        """The pictures."""
        return tuple(Image.fromarray(draw_cells(grid)) for grid in self.grids)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Questions that have an answer here."""
        if self.is_page:
            return ("read",)
        return ("get", "list", "chain", "count") + (("main",) if self.main else ())

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of all images: one per cell."""
        return sum(grid.shape[0] * grid.shape[1] for grid in self.grids)


@dataclass(frozen=True)
class Question:
    """What is asked, and the exact right answer.

    Attributes
    ----------
    answer : empty where any answer is as right as another.
    begun : words that the answer is made to begin with; `answer` is what follows them.
    max_tokens : tokens of the longest answer.
    """

    kind: str
    text: str
    answer: str
    begun: str = ""
    max_tokens: int = 64


@functools.cache
def _glyphs() -> np.ndarray[Any, np.dtype[np.float32]]:
    """[36, 2, 14, 14]: coverage of each letter and digit, by its body and by its outline."""
    font = ImageFont.load_default(size=12)
    glyphs = np.zeros((len(LETTERS + DIGITS), 2, _HALF, _HALF), np.float32)
    for i, character in enumerate(LETTERS + DIGITS):
        for layer, width in enumerate((0, 1)):
            picture = Image.new("L", (_HALF, _HALF))
            draw = ImageDraw.Draw(picture)
            draw.text((_HALF / 2, _HALF / 2), character, font=font, fill=255, anchor="mm", stroke_width=width)
            glyphs[i, layer] = np.asarray(picture, np.float32) / 255
    return glyphs


@functools.cache
def _dot() -> np.ndarray[Any, np.dtype[np.float32]]:
    picture = Image.new("L", (CELL_PIXELS, CELL_PIXELS))
    ImageDraw.Draw(picture).ellipse((6, 6, 21, 21), fill=255)
    return np.asarray(picture, np.float32) / 255


def _write(cells: np.ndarray, which: np.ndarray, codes: np.ndarray, top: int, body: float, outline: float) -> None:
    """Write one code in the upper or lower half of the cells `which`."""
    glyphs = _glyphs()
    for left, characters in ((0, codes // 10), (_HALF, len(LETTERS) + codes % 10)):
        part = (which, slice(top, top + _HALF), slice(left, left + _HALF))
        for layer, shade in ((1, outline), (0, body)):
            coverage = glyphs[characters, layer, :, :, None]
            cells[part] = cells[part] * (1 - coverage) + shade * coverage


def draw_cells(grid: Grid) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pixels [28 rows, 28 columns, 3] of a grid [rows, columns, 4]."""
    rows, columns = grid.shape[:2]
    flat = grid.reshape(-1, 4)
    palette = np.array(list(COLOURS.values()), np.float32)
    cells = np.broadcast_to(palette[flat[:, COLOUR], None, None], (len(flat), CELL_PIXELS, CELL_PIXELS, 3)).copy()
    keyed, valued, dotted = ((flat[:, column] > NOTHING).nonzero()[0] for column in (KEY, VALUE, DOT))
    on_paper = flat[keyed, COLOUR] == WHITE
    _write(cells, keyed[~on_paper], flat[keyed[~on_paper], KEY], 0, 255, 0)
    _write(cells, keyed[on_paper], flat[keyed[on_paper], KEY], 0, 0, 255)
    _write(cells, valued, flat[valued, VALUE], _HALF, 0, 255)
    coverage = _dot()[:, :, None]
    cells[dotted] = cells[dotted] * (1 - coverage) + 255 * coverage
    pixels = cells.reshape(rows, columns, CELL_PIXELS, CELL_PIXELS, 3).transpose(0, 2, 1, 3, 4)
    return pixels.reshape(rows * CELL_PIXELS, columns * CELL_PIXELS, 3).round().astype(np.uint8)


def _make_loop(rng: np.random.Generator, num_keys: int) -> tuple[np.ndarray, np.ndarray]:
    keys = rng.permutation(len(CODES))[:num_keys]
    return keys, np.roll(keys, -1)


def _pick_colours(rng: np.random.Generator, size: int) -> np.ndarray:
    """One colour is more frequent than the others."""
    colours = rng.integers(0, NUM_COLOURS, size)
    colours[rng.random(size) < _MAIN_SHARE] = rng.integers(NUM_COLOURS)
    return colours


def _main_colour(cells: np.ndarray) -> str | None:
    counts = np.bincount(cells[:, COLOUR], minlength=NUM_COLOURS)
    second, first = np.sort(counts)[-2:]
    return list(COLOURS)[int(counts.argmax())] if first > second else None


def _empty_grids(layout: Sequence[tuple[int, int]]) -> list[Grid]:
    grids = [np.full((rows, columns, 4), NOTHING, np.int16) for rows, columns in layout]
    for grid in grids:
        grid[..., COLOUR] = 0
    return grids


def _cut(rng: np.random.Generator, length: int, longest: int) -> list[tuple[int, int]]:
    """Cut [0, length) into pieces of at most `longest`, at least half of it where there is room."""
    pieces, start = [], 0
    while start < length:
        end = min(length, start + int(rng.integers(max(1, longest // 2), longest + 1)))
        if length - end < max(1, longest // 2):
            end = length if length - start <= longest else start + (length - start + 1) // 2
        pieces.append((start, end))
        start = end
    return pieces


def _regions(rng: np.random.Generator, grids: list[Grid]) -> list[Grid]:
    """Views of rectangles that tile the images: bands of rows, each cut for itself."""
    num_cells = sum(grid.shape[0] * grid.shape[1] for grid in grids)
    longest = int(np.clip(num_cells**0.5 / 4, 1, _LONGEST_SIDE))
    return [
        grid[top:bottom, left:right]
        for grid in grids
        for top, bottom in _cut(rng, grid.shape[0], longest)
        for left, right in _cut(rng, grid.shape[1], longest)
    ]


def _draw_coherent(rng: np.random.Generator, layout: Sequence[tuple[int, int]]) -> Scene:
    """Objects of many cells that all look alike, as the tokens of one object do in a real picture."""
    grids = _empty_grids(layout)
    regions = _regions(rng, grids)
    for region, colour in zip(regions, _pick_colours(rng, len(regions)), strict=True):
        region[..., COLOUR] = colour
    order = rng.permutation(len(regions))
    num_keyed = max(1, min(len(CODES), int(len(regions) * rng.uniform(0.5, 0.85))))
    keys, values = _make_loop(rng, num_keyed)
    for i, key, value in zip(order, keys, values, strict=False):
        regions[i][..., KEY], regions[i][..., VALUE] = key, value
    num_dots = 0
    plain = [regions[i] for i in order[num_keyed:] if regions[i].shape[0] * regions[i].shape[1] >= MOST_DOTS]
    if plain:
        num_dots = int(rng.integers(0, MOST_DOTS + 1))
        rows, columns = np.unravel_index(np.arange(num_dots), plain[0].shape[:2])
        plain[0][rows, columns, DOT] = 1
    cells = np.concatenate([grid.reshape(-1, 4) for grid in grids])
    return Scene(tuple(grids), tuple(keys.tolist()), _main_colour(cells), num_dots)


def _draw_shuffled(rng: np.random.Generator, layout: Sequence[tuple[int, int]]) -> Scene:
    """Cells that have nothing in common with their neighbours."""
    num_cells = sum(rows * columns for rows, columns in layout)
    cells = np.full((num_cells, 4), NOTHING, np.int16)
    cells[:, COLOUR] = _pick_colours(rng, num_cells)
    num_keyed = max(1, min(len(CODES), int(num_cells * rng.uniform(0.5, 0.85))))
    places = rng.permutation(num_cells)
    keys, values = _make_loop(rng, num_keyed)
    cells[places[:num_keyed], KEY], cells[places[:num_keyed], VALUE] = keys, values
    num_dots = min(int(rng.integers(0, MOST_DOTS + 1)), num_cells - num_keyed)
    cells[places[num_keyed : num_keyed + num_dots], DOT] = 1
    grids, start = [], 0
    for rows, columns in layout:
        grids.append(cells[start : start + rows * columns].reshape(rows, columns, 4))
        start += rows * columns
    return Scene(tuple(grids), tuple(keys.tolist()), _main_colour(cells), num_dots)


def _draw_page(rng: np.random.Generator, layout: Sequence[tuple[int, int]]) -> Scene:
    """Lines of terms with a margin, in as many rows as there are codes for."""
    grids = _empty_grids(layout)
    lines = []
    for grid in grids:
        grid[..., COLOUR] = WHITE
        margin = 1 if grid.shape[1] > 2 else 0
        lines += [row[margin : grid.shape[1] - margin] for row in grid]
    wanted = max(1, int(len(lines) * rng.uniform(0.5, 0.85)))
    lines = [lines[i] for i in sorted(rng.permutation(len(lines))[:wanted].tolist())]
    printed, num_terms = [], 0
    for line in lines:
        if printed and num_terms + len(line) > len(CODES):
            break
        printed.append(line)
        num_terms += len(line)
    keys, values = _make_loop(rng, min(num_terms, len(CODES)))
    start = 0
    for line in printed:
        end = min(start + len(line), len(keys))
        line[: end - start, KEY], line[: end - start, VALUE] = keys[start:end], values[start:end]
        start = end
    return Scene(tuple(grids), tuple(keys.tolist()), is_page=True)


_DRAW = {"coherent": _draw_coherent, "shuffled": _draw_shuffled, "page": _draw_page}


def draw_scene(rng: np.random.Generator, layout: Sequence[tuple[int, int]], *, arrangement: str = "shuffled") -> Scene:
    """Draw a random scene.

    Parameters
    ----------
    rng : source of every choice; the same state draws the same scene.
    layout : (rows, columns) in cells of each image.
    arrangement : "coherent": objects of many like cells; "shuffled": every cell for itself; "page": lines of terms.
    """
    return _DRAW[arrangement](rng, layout)


def _walk(scene: Scene, start: int, hops: int) -> str:
    return " ".join(CODES[scene.loop[(start + hop) % len(scene.loop)]] for hop in range(hops + 1))


def ask(rng: np.random.Generator, scene: Scene, kind: str) -> Question:
    """Make a question about a scene.

    Parameters
    ----------
    kind : one of `scene.kinds`: "get" (the value of one key), "list" (the values of four keys, in order), "chain"
        (follow six values, each the next key), "count" (dots), "main" (the colour of most cells), "read" (the meanings
        of two terms on a page).
    """
    if kind not in scene.kinds:
        raise ValueError(f"kind: expected one of {', '.join(scene.kinds)} for this scene, got {kind!r}")
    if kind == "count":
        return Question(kind, "count", f"count is {scene.num_dots}")
    if kind == "main":
        return Question(kind, "main", f"main is {scene.main}")
    num_starts = {"list": LIST_ENTRIES, "read": TERMS_READ}.get(kind, 1)
    starts = rng.integers(0, len(scene.loop), num_starts).tolist()
    asked = " ".join(_walk(scene, start, 0) for start in starts)
    hops = CHAIN_HOPS if kind == "chain" else 1
    return Question(kind, f"{kind} {asked}", f"{kind} {', '.join(_walk(scene, start, hops) for start in starts)}")


def image_url(image: Image.Image) -> str:
    """Return a picture as a PNG data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def user_message(scene: Scene, question: Question) -> dict[str, Any]:
    """Return the OpenAI chat message: the scene's images, then the question."""
    pictures = [{"type": "image_url", "image_url": {"url": image_url(image)}} for image in scene.images]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": question.text}]}
