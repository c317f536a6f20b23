"""MileBench (arXiv 2404.18532): several images a question, multiple choice or open.

Layout of FreedomIntelligence/MileBench, one folder a data set::

    <folder>/<name>/<name>.json    meta_data.task_instruction, meta_data.question_type, data[]
    <folder>/<name>/images/...

The prompt is that of the benchmark's own generate.py, without its truncation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.datasets.base import Example, Record, read_json, read_records
from benchmarks.metrics import normalise_choice

PAPER_SETS = (
    "CLEVR-Change",
    "Spot-the-Diff",
    "DocVQA",
    "SlideVQA",
    "WebQA",
    "WikiVQA",
    "MMCoQA",
    "MultiModalQA",
)
"""Sets that the HybridKV paper uses. Its CL-CH, STD and MM-QA are the first, second and last."""

PLACEHOLDER = re.compile(r"\{(?:image|table)#(\d+)\}")
METRICS = {"open-ended": "rouge_l", "multi-choice": "multiple_choice"}
LOOSE_SETS = ("MMCoQA", "NeedleInAHaystack")
"""The set whose answers are right when the reference occurs anywhere in them."""
UNLETTERED_SET = "GPR1200"
"""The set whose choices are more than the alphabet has letters. They stand without letters."""


def load_set(folder: Path, name: str) -> Iterator[Example]:
    """Yield the questions of one data set."""
    file = folder / name / f"{name}.json"
    core = Record(file, "(whole file)", {"core": read_json(file)}).inner("core")
    meta = core.inner("meta_data")
    instructions = meta.texts("task_instruction")
    question_type = meta.text("question_type")
    if question_type not in METRICS:
        raise meta.error("question_type", f"expected one of {', '.join(METRICS)}")
    metric = "contains" if any(loose in name for loose in LOOSE_SETS) else METRICS[question_type]
    for record in read_records(file, core.fields.get("data")):
        yield _example(record, name, instructions, metric)


def _example(record: Record, name: str, instructions: tuple[str, ...], metric: str) -> Example:
    task = record.inner("task_instance")
    images = tuple(record.file.parent / "images" / path for path in task.texts("images_path"))
    for image in images:
        if not image.is_file():
            raise task.error("images_path", f"{image} is not there")
    instruction = instructions[record.choice("task_instruction_id", len(instructions))]
    context = _number_images(task, task.text("context"), len(images))
    answers: tuple[str, ...] = (record.text("response"),)
    if "choice_list" in task.fields:
        choices = task.texts("choice_list")
        context += _choice_text(choices, lettered=name != UNLETTERED_SET)
        if metric == "multiple_choice":
            answers += choices
    if metric == "multiple_choice" and normalise_choice(answers[0]) not in map(normalise_choice, answers[1:]):
        raise record.error("response", "expected one of task_instance.choice_list")
    question = f"{instruction}\n{context}"
    return Example(record.text("sample_id"), images, None, question, answers, f"milebench/{name}", metric)


def _number_images(task: Record, context: str, num_images: int) -> str:
    """Turn placeholders into `{image#i}`.

    MileBench takes the images in the order of the placeholders. Where an image is named twice, the numbers of the
    placeholders count instead.
    """
    numbers = [int(number) for number in PLACEHOLDER.findall(context)]
    if len(numbers) == num_images:
        in_order = iter(range(1, num_images + 1))
        return PLACEHOLDER.sub(lambda _: f"{{image#{next(in_order)}}}", context)
    if not all(1 <= number <= num_images for number in numbers):
        raise task.error("context", f"expected images from 1 to {num_images}, as many as images_path has")
    return PLACEHOLDER.sub(lambda match: f"{{image#{match[1]}}}", context)


def _choice_text(choices: tuple[str, ...], lettered: bool) -> str:
    lines = [f"{chr(ord('A') + i)}. {choice}" if lettered else choice for i, choice in enumerate(choices)]
    return "\n".join(("\nChoice list: ", *lines, "Your answer is: "))
