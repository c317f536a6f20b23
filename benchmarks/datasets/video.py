"""Questions about videos: VATEX captions, NExT-QA and Video-ChatGPT.

The question files lie in the folder, the videos anywhere below it; they are found by their names. Every question must
have its video: take records of videos that can no longer be had out of the question file.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path

from benchmarks.datasets.base import Example, Record, read_csv, read_json, read_records

SUFFIXES = {".mp4", ".mkv", ".webm", ".avi", ".mov"}
CAPTION_QUESTION = "Describe what happens in this video in one sentence."
CHOICE_FIELDS = ("a0", "a1", "a2", "a3", "a4")
CHOICE_REQUEST = "Answer with the letter of the right choice."
PHRASE_REQUEST = "Answer the question with a short phrase."
NEXTQA_FILES = ("test.csv", "val.csv")
NEXTQA_MAP = "map_vid_vidorID.json"
CHATGPT_FILES = ("generic_qa.json", "temporal_qa.json", "consistency_qa.json")


class _Videos:
    """Videos below a folder, by file name without suffix."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_stem = {path.stem: path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES}

    def find(self, record: Record, field: str, name: str) -> Path:
        """Return the video `name`, with or without folder and suffix; `field` of `record` is to blame."""
        last = Path(name).name
        video = self.by_stem.get(last) or self.by_stem.get(Path(last).stem)
        if video is None:
            legal = ", ".join(sorted(SUFFIXES))
            raise record.error(field, f"there is no video {last} ({legal}) below {self.folder}")
        return video


def _question_files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files:
        raise ValueError(f"{folder}: expected a question file named {' or '.join(names)}")
    return files


def load_vatex(folder: Path) -> Iterator[Example]:
    """Yield one caption request a record of `vatex*.json`: videoID, enCap (the captions)."""
    files = sorted(folder.glob("vatex*.json"))
    if len(files) != 1:
        raise ValueError(f"{folder}: expected one question file vatex*.json, found {len(files)}")
    videos = _Videos(folder)
    for record in read_records(files[0], read_json(files[0])):
        name = record.text("videoID")
        video = videos.find(record, "videoID", name)
        yield Example(name, (), video, CAPTION_QUESTION, record.texts("enCap"), "vatex", "cider")


def _load_nextqa(folder: Path) -> Iterator[tuple[Record, Path, str]]:
    """Yield each row with its video and its id."""
    file = _question_files(folder, NEXTQA_FILES)[0]
    map_file = folder / NEXTQA_MAP
    names = Record(map_file, 0, {"map": read_json(map_file)}).inner("map") if map_file.is_file() else None
    videos = _Videos(folder)
    for record in read_csv(file):
        video = record.text("video")
        path = videos.find(record, "video", names.text(video) if names else video)
        yield record, path, f"{video}-{record.text('qid')}"


def load_nextqa_mc(folder: Path) -> Iterator[Example]:
    """Yield the questions of NExT-QA's `test.csv` or `val.csv`: video, qid, question, a0 to a4, answer (0 to 4)."""
    for record, video, name in _load_nextqa(folder):
        choices = tuple(record.text(field) for field in CHOICE_FIELDS)
        answer = choices[record.choice("answer", len(choices))]
        lines = [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False)]
        question = "\n".join((record.text("question"), *lines, CHOICE_REQUEST))
        yield Example(name, (), video, question, (answer, *choices), "nextqa-mc", "multiple_choice")


def load_nextqa_oe(folder: Path) -> Iterator[Example]:
    """Yield the questions of NExT-OE's `test.csv` or `val.csv`: video, qid, question, answer, additional_ref_answer."""
    for record, video, name in _load_nextqa(folder):
        answers: tuple[str, ...] = (record.text("answer"),)
        if str(record.fields.get("additional_ref_answer") or "").strip():
            answers += (record.text("additional_ref_answer"),)
        question = f"{record.text('question')}\n{PHRASE_REQUEST}"
        yield Example(name, (), video, question, answers, "nextqa-oe", "rouge_l")


def load_video_chatgpt(folder: Path) -> Iterator[Example]:
    """Yield the questions of Video-ChatGPT's `*_qa.json`: video_name, Q (or Q1 and Q2), A."""
    videos = _Videos(folder)
    for file in _question_files(folder, CHATGPT_FILES):
        task = f"video-chatgpt/{file.stem.removesuffix('_qa')}"
        for record in read_records(file, read_json(file)):
            video = videos.find(record, "video_name", record.text("video_name"))
            fields = tuple(field for field in ("Q1", "Q2") if field in record.fields) or ("Q",)
            for field in fields:
                name, answers = f"{record.number}-{field}", (record.text("A"),)
                yield Example(name, (), video, record.text(field), answers, task, "rouge_l")
