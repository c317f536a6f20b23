"""Pages of text as pictures: every word piece of a tokenizer is drawn into a cell of 28 pixels, one visual token each.

A page is a list of images, one a line of text: a row of cells. The pictures are those that the vision tower of
`benchmarks.models.train_reader` maps to the language model's own embeddings, so that it reads a page as it reads text.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks import texts
from benchmarks.scenes import CELL_PIXELS, image_url

PIECES_FILE = "pieces.json"
"""File of a checkpoint that reads pages: the token ids whose drawings it knows, and a digest of the drawings."""
CELLS_PER_LINE = 128
"""Each line costs two tokens that the text does not have. Lines of 199 cells brought results no closer to it."""
MOST_CELLS_PER_LINE = 199
"""The image processor of Qwen2-VL refuses pictures more than 200 times as long as high."""

NEEDLE_WORDS = (
    "The access code of the blue gate is 4711. What? Answer with the number only. "
    "red green silver golden black white purple yellow orange brown gray pink violet copper amber "
    "tower garden bridge library harbour harbor castle station market river forest museum school church temple palace "
    "north south east west first second third last one two three four five six seven eight nine ten "
    "Alice Bob Carol David Emma Frank George Helen Ivan Julia Kevin Laura Maria Nina Oscar Paul Rose Sarah Thomas "
    "London Paris Rome Berlin Madrid Vienna Tokyo Lisbon Oslo Dublin Athens Cairo Delhi Boston Chicago "
    "lives works was born likes owns password secret number key door room name city colour color animal cat dog horse"
)
_PAPER, _INK, _FAINT = 255, 0, 128
_SCREEN = np.where(np.indices((CELL_PIXELS, CELL_PIXELS)).sum(0) % 2, 64, 192)
"""A pixel is ink where its grey is below this. Of what is faint, every second pixel is."""
_MARGIN = 3  # pixels at the left edge, for the bar of pieces that follow the last one without a space
_SIZES = range(20, 6, -1)  # of the font, in pixels
_LONGEST_RUN = 8
_SIGNS = {"\n": "n", "\t": "t", " ": "_", "\u2014": "M", "\u2013": "N"}


@functools.cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def _wrap(text: str, size: int) -> list[str]:
    """Rows of a text, broken wherever the cell is full."""
    rows, width = [""], CELL_PIXELS - _MARGIN
    for character in text:
        if rows[-1] and _font(size).getlength(rows[-1] + character) > width:
            rows.append("")
        rows[-1] += character
    return rows


def _fit(text: str) -> tuple[int, list[str]]:
    """Font size and rows: the largest that fits the cell, else the smallest."""
    for size in _SIZES:
        rows = _wrap(text, size)
        if len(rows) * size <= CELL_PIXELS and (len(rows) == 1 or len(text) > 4):
            break
    return size, rows


@functools.lru_cache(100_000)
def draw_piece(text: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pixels [28, 28] of a word piece, 0 or 255: black on white, and white in the corners.

    A leading space is not drawn; a piece without one has a bar at the left edge, which ties it to the piece before.
    Other white space, and the dashes that the font does not have, are drawn as faint signs.
    """
    picture = Image.new("L", (CELL_PIXELS, CELL_PIXELS), _PAPER)
    draw = ImageDraw.Draw(picture)
    if text.startswith(" "):
        text = text[1:]
    else:
        draw.rectangle((0, 2, 1, CELL_PIXELS - 3), fill=_INK)
    size, rows = _fit(text)
    top = (CELL_PIXELS - len(rows) * size) / 2
    for row, characters in enumerate(rows):
        left = float(_MARGIN)
        for character in characters:
            ink = _FAINT if character in _SIGNS else _INK
            draw.text((left, top + size * (row + 0.5)), _SIGNS.get(character, character), ink, _font(size), anchor="lm")
            left += _font(size).getlength(character)
    pixels = np.where(np.asarray(picture) < _SCREEN, _INK, _PAPER).astype(np.uint8)
    pixels[np.ix_((0, -1), (0, -1))] = _PAPER
    return pixels


def asked_texts() -> Iterator[str]:
    """Everything that a text of the quality bench can hold: the sentences of both halves, and facts with every word."""
    for split in texts.SPLITS:
        sentences = itertools.chain.from_iterable(texts.passages(split))
        for part in itertools.chain(texts.every_fact(split), sentences):
            # A sentence stands at the start of a paragraph, and after another sentence.
            yield f"\n\n{part} {part}\n\n"


def sources() -> Iterator[str]:
    """Texts like those of the quality bench: Debian's licences, where the machine has them, and Python's manual."""
    from pydoc_data import topics

    yield " ".join([NEEDLE_WORDS] * 100)
    for path in sorted(texts.LICENSES.glob("*")):
        if not path.is_symlink():
            yield path.read_text(errors="replace")
    yield from topics.topics.values()


def squeeze(text: str) -> str:
    """Running text: each run of white space becomes one space."""
    return re.sub(r"\s+", " ", text).strip()


def piece_text(tokenizer: Any, piece: int) -> str:
    """What a word piece stands for, its leading space included."""
    return str(tokenizer.decode([piece], clean_up_tokenization_spaces=False))


def drawings_digest(tokenizer: Any, pieces: Sequence[int]) -> str:
    """Tells whether a sample of the pieces looks as it did when the checkpoint was made."""
    sample = (draw_piece(piece_text(tokenizer, piece)).tobytes() for piece in pieces[:: max(1, len(pieces) // 256)])
    return hashlib.sha256(b"".join(sample)).hexdigest()


def _is_drawable(text: str) -> bool:
    """Whether it has no part of a character, no control character, and no long run of one sign, hard to count."""
    is_long_run = len(text) > _LONGEST_RUN and len(set(text.strip())) < 2
    return "\ufffd" not in text and text.replace("\n", "").isprintable() and not is_long_run


def choose_pieces(tokenizer: Any, count: int) -> list[int]:
    """Ids of the word pieces to be drawn, sorted.

    All printable ASCII characters come first, so that any ASCII text can be spelled, then all pieces of
    `asked_texts()`, then the most frequent ones of `sources()`, then those that the tokenizer learned first. Pieces
    that look like one taken before are left out, as are special tokens and parts of characters.
    """

    def pieces_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    first = [pieces_of(character)[0] for character in characters]
    first += sorted({piece for text in asked_texts() for piece in pieces_of(text)})
    counts: collections.Counter[int] = collections.Counter()
    for text in sources():
        counts.update(pieces_of(squeeze(text)))
    frequent = [piece for piece, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    special = set(tokenizer.added_tokens_decoder)
    drawings: dict[bytes, int] = {}
    for piece in [*first, *frequent, *range(len(tokenizer))]:
        if len(drawings) == count:
            break
        text = piece_text(tokenizer, piece)
        if piece not in special and _is_drawable(text):
            drawings.setdefault(draw_piece(text).tobytes(), piece)
    return sorted(drawings.values())


@dataclass(frozen=True)
class PageWriter:
    """Draws pages for one checkpoint.

    Attributes
    ----------
    tokenizer : the checkpoint's; a fast one of the byte-pair kind.
    pieces : ids of the word pieces that the checkpoint's vision tower reads.
    """

    tokenizer: Any
    pieces: frozenset[int]

    @classmethod
    def load(cls, folder: Path) -> PageWriter:
        """Make it for a checkpoint of `benchmarks.models.train_reader`.

        Raises
        ------
        ValueError
            The folder has no such checkpoint, or this Pillow draws other pictures than those it was made for.
        """
        from transformers import AutoTokenizer

        if not (folder / PIECES_FILE).is_file():
            raise ValueError(f"folder: expected a checkpoint with a {PIECES_FILE}, got {str(folder)!r}")
        made = json.loads((folder / PIECES_FILE).read_text())
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if drawings_digest(tokenizer, made["pieces"]) != made["drawings"]:
            raise ValueError(f"folder: {str(folder)!r} was made for other drawings, by another Pillow; make it anew")
        return cls(tokenizer, frozenset(made["pieces"]))

    @functools.cached_property
    def _halves(self) -> dict[str, tuple[str, str]]:
        """The two parts that the tokenizer merges into each piece."""
        merges = json.loads(self.tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        pairs = (tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges)
        return {left + right: (left, right) for left, right in pairs}

    def _spell_piece(self, token: str) -> Iterator[int]:
        piece = self.tokenizer.convert_tokens_to_ids(token)
        if piece in self.pieces:
            yield piece
        elif token in self._halves:
            for half in self._halves[token]:
                yield from self._spell_piece(half)
        else:
            raise ValueError(f"text: no drawing for the piece {token!r}; printable ASCII can always be drawn")

    def spell(self, text: str) -> list[int]:
        """Token ids of a text; pieces without a drawing are spelled in the parts that the tokenizer made them of."""
        tokens = self.tokenizer.tokenize(text, split_special_tokens=True)  # their names are text like any other
        return [piece for token in tokens for piece in self._spell_piece(token)]

    def _rank_break(self, before: int, after: int) -> int:
        """How well a line ends between two pieces: 2 after a sentence, 1 before a word, 0 inside of one."""
        left, right = piece_text(self.tokenizer, before), piece_text(self.tokenizer, after)
        if left.endswith("\n") or (left.endswith((".", ";")) and right.startswith(" ")):
            return 2
        return int(right[:1].isspace())

    def break_lines(self, pieces: Sequence[int], cells_per_line: int = CELLS_PER_LINE) -> list[list[int]]:
        """Cut a text into lines, after a sentence where the line has one, else before a word.

        The tokens around a picture disturb the language model least there, and words and numbers stay whole.
        """
        if not 1 <= cells_per_line <= MOST_CELLS_PER_LINE:
            raise ValueError(f"cells_per_line: expected 1 to {MOST_CELLS_PER_LINE}, got {cells_per_line}")
        lines, start = [], 0
        while start < len(pieces):
            end = min(start + cells_per_line, len(pieces))
            if end < len(pieces):
                places = range(start + 1, end + 1)
                end = max(places, key=lambda place: (self._rank_break(*pieces[place - 1 : place + 1]), place))
            lines.append(list(pieces[start:end]))
            start = end
        return lines

    def draw_lines(self, text: str, cells_per_line: int = CELLS_PER_LINE) -> list[Image.Image]:
        """Pictures of a text, one a line, each 28 pixels high and 28 wide for each piece.

        Raises
        ------
        ValueError
            A character of the text cannot be drawn, or a line would be too long for the image processor.
        """
        return [
            Image.fromarray(np.hstack([draw_piece(piece_text(self.tokenizer, piece)) for piece in line])).convert("RGB")
            for line in self.break_lines(self.spell(text), cells_per_line)
        ]

    def draw_parts(self, text: str, cells_per_line: int = CELLS_PER_LINE) -> list[dict[str, Any]]:
        """Return the pictures of a text as parts of an OpenAI chat message.

        A text that cannot be drawn as it is loses its accents, and all that is not ASCII then.
        """
        try:
            lines = self.draw_lines(text, cells_per_line)
        except ValueError:
            plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
            lines = self.draw_lines(plain, cells_per_line)
        return [{"type": "image_url", "image_url": {"url": image_url(line)}} for line in lines]

    def user_message(self, page: str, question: str, cells_per_line: int = CELLS_PER_LINE) -> dict[str, Any]:
        """Return the OpenAI chat message: the page as pictures, then the question as text."""
        pictures = self.draw_parts(page, cells_per_line)
        return {"role": "user", "content": [*pictures, {"type": "text", "text": f"\n{question}"}]}
