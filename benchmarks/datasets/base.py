"""One question about images or a video, and records of data files that say what is wrong with them."""

from __future__ import annotations

import base64
import csv
import json
import mimetypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKER = re.compile(r"\{image#(\d+)\}")


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes
    ----------
    id : unique within its task.
    images : in the order in which they are numbered.
    video : None where there is none.
    question : `{image#2}` stands where the second image belongs; images that it does not name come first.
    answers : right answers as the metric wants them; see `benchmarks.metrics.References`.
    task : the data set it comes from.
    metric : a key of `benchmarks.metrics.METRICS`.
    """

    id: str
    images: tuple[Path, ...]
    video: Path | None
    question: str
    answers: tuple[str, ...]
    task: str
    metric: str


def data_url(path: Path) -> str:
    """Return a file as a data URL."""
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def chat_message(example: Example) -> dict[str, Any]:
    """Return the OpenAI chat message of a question. Reads its files: make it when it is sent."""
    pieces = MARKER.split(example.question)
    named = {int(number) for number in pieces[1::2]}
    content = [_image_part(image) for number, image in enumerate(example.images, 1) if number not in named]
    if example.video is not None:
        content.append({"type": "video_url", "video_url": {"url": data_url(example.video)}})
    for i, piece in enumerate(pieces):
        if i % 2:
            content.append(_image_part(example.images[int(piece) - 1]))
        elif piece:
            content.append({"type": "text", "text": piece})
    return {"role": "user", "content": content}


def _image_part(path: Path) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(path)}}


@dataclass(frozen=True)
class Record:
    """Fields of one record of a data file. Each reader raises ValueError that names file, record and field."""

    file: Path
    number: int | str
    fields: dict[str, Any]

    def error(self, field: str, reason: str) -> ValueError:
        """Make the error that blames `field`."""
        return ValueError(f"{self.file}, record {self.number}: {field} = {self.fields.get(field)!r}; {reason}")

    def text(self, field: str) -> str:
        """Return a field that is text or a number, as text."""
        value = self.fields.get(field)
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            raise self.error(field, "expected text")
        return str(value).strip()

    def texts(self, field: str) -> tuple[str, ...]:
        """Return a list of texts, at least one."""
        value = self.fields.get(field)
        if not isinstance(value, list) or not value or not all(isinstance(v, str | int | float) for v in value):
            raise self.error(field, "expected a list of texts")
        return tuple(str(text).strip() for text in value)

    def choice(self, field: str, count: int) -> int:
        """Return a whole number from 0 to count - 1."""
        text = str(self.fields.get(field)).strip()
        if not text.isdecimal() or int(text) >= count:
            raise self.error(field, f"expected a number from 0 to {count - 1}")
        return int(text)

    def inner(self, field: str) -> Record:
        """Return an object inside of this record."""
        value = self.fields.get(field)
        if not isinstance(value, dict):
            raise self.error(field, "expected an object")
        return Record(self.file, self.number, value)


def read_json(file: Path) -> Any:
    """Read a JSON file; ValueError names it."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as JSON ({error})") from None


def read_records(file: Path, value: Any) -> Iterator[Record]:
    """Yield the records of a list that came from `file`, numbered from 0."""
    if not isinstance(value, list):
        raise ValueError(f"{file}: expected a list of records, got {type(value).__name__}")
    for number, fields in enumerate(value):
        if not isinstance(fields, dict):
            raise ValueError(f"{file}, record {number}: expected an object, got {fields!r}")
        yield Record(file, number, fields)


def read_csv(file: Path) -> Iterator[Record]:
    """Yield the rows of a CSV file with a header, numbered from 0."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: cannot be read as CSV ({error})") from None
    yield from (Record(file, number, dict(row)) for number, row in enumerate(rows))
