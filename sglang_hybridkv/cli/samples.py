"""Pictures of text with a known place for every word: what ``hybridkv calibrate`` looks at.

A folder of samples holds `samples.jsonl`, one object a line, and the pictures it names::

    {"image": "images/000000.png", "question": "Read the text.", "answer": "red fox", "boxes": [[4, 4, 60, 30], ...]}

`boxes` has one [left, top, right, bottom] in pixels for each word of `answer`, split at white space.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL import Image

SAMPLES_FILE = "samples.jsonl"

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of the picture; right and bottom are exclusive."""


@dataclass(frozen=True)
class Sample:
    """One picture, a question about it, and where each word of the answer stands.

    Attributes
    ----------
    boxes : one for each of ``answer.split()``.
    """

    image: Image.Image
    question: str
    answer: str
    boxes: tuple[Box, ...]


class SampleSource(Protocol):
    """A fixed list of samples; `identity` differs when the samples do."""

    @property
    def identity(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, sample_idx: int) -> Sample: ...


def _check_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r}; expected text")
    return value


def _check_boxes(value: Any, num_words: int) -> tuple[Box, ...]:
    if not isinstance(value, list) or len(value) != num_words:
        got = f"{len(value)} boxes" if isinstance(value, list) else repr(value)
        raise ValueError(f"{got}; expected a list of {num_words}, one for each word of answer")
    return tuple(_check_box(box) for box in value)


def _check_box(box: Any) -> Box:
    legal = (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(edge, int | float) and math.isfinite(edge) for edge in box)
        and 0 <= box[0] < box[2]
        and 0 <= box[1] < box[3]
    )
    if not legal:
        raise ValueError(f"{box!r}; expected [left, top, right, bottom] with 0 <= left < right and 0 <= top < bottom")
    left, top, right, bottom = box
    return (left, top, right, bottom)


@dataclass(frozen=True)
class _Record:
    line: int
    image: Path
    question: str
    answer: str
    boxes: tuple[Box, ...]


class FolderSamples:
    """Samples of a folder, in the order of its `samples.jsonl`. Records are checked at once, pictures when opened.

    Parameters
    ----------
    num_samples : the first so many; None takes all.

    Raises
    ------
    ValueError
        A record is corrupt or there are too few; the message names file, line and field.
    """

    def __init__(self, folder: Path, num_samples: int | None = None) -> None:
        self._file = folder / SAMPLES_FILE
        try:
            text = self._file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--samples-from = {folder}: {self._file} cannot be read ({error})") from None
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        self._records = [self._parse(number, line) for number, line in lines]
        if num_samples is not None and num_samples > len(self._records):
            raise ValueError(f"--samples = {num_samples}: {self._file} has {len(self._records)} samples")
        if num_samples is not None:
            self._records = self._records[:num_samples]
        if not self._records:
            raise ValueError(f"--samples-from = {folder}: {self._file} has no sample")
        self.identity = f"folder {hashlib.sha256(text.encode()).hexdigest()}"

    def _parse(self, line: int, text: str) -> _Record:
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self._file}, line {line}: not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{self._file}, line {line}: expected an object, got {fields!r}")

        def read(field: str, check: Callable[[Any], Any]) -> Any:
            try:
                return check(fields.get(field))
            except ValueError as error:
                raise ValueError(f"{self._file}, line {line}: {field} = {error}") from None

        answer = read("answer", _check_text)
        image = self._file.parent / read("image", _check_text)
        if not image.is_file():
            raise ValueError(f"{self._file}, line {line}: image = {fields['image']!r}; there is no such file")
        boxes = read("boxes", lambda value: _check_boxes(value, len(answer.split())))
        return _Record(line, image, read("question", _check_text), answer, boxes)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, sample_idx: int) -> Sample:
        from PIL import Image, UnidentifiedImageError

        record = self._records[sample_idx]
        try:
            with Image.open(record.image) as picture:
                image = picture.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{self._file}, line {record.line}: image cannot be read ({error})") from None
        for box in record.boxes:
            if box[2] > image.width or box[3] > image.height:
                size = f"{image.width} x {image.height}"
                raise ValueError(f"{self._file}, line {record.line}: boxes = {list(box)} lies outside of {size} pixels")
        return Sample(image, record.question, record.answer, record.boxes)


def write_samples(folder: Path, samples: Iterable[Sample]) -> int:
    """Write samples to `folder` for ``--samples-from``; returns how many. The folder must not hold samples yet."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    num_samples = 0
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context((folder / SAMPLES_FILE).open("x", encoding="utf-8"))
        except FileExistsError:
            raise ValueError(f"folder = {folder}: {SAMPLES_FILE} is there already; choose an empty folder") from None
        for sample in samples:
            name = f"images/{num_samples:06d}.png"
            sample.image.save(folder / name)
            record = {"image": name, "question": sample.question, "answer": sample.answer, "boxes": sample.boxes}
            file.write(json.dumps(record) + "\n")
            num_samples += 1
    return num_samples
