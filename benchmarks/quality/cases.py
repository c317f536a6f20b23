"""What is asked: scenes or texts, tasks and the messages of each question, drawn from a seed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import texts
from benchmarks.scenes import ARRANGEMENTS, KINDS, Question, Scene, ask, draw_scene, image_url
from benchmarks.texts import DEVELOPMENT, LENGTHS, SPLITS, Text, ask_text, draw_text

TEXT = "text"
SCENES = (*ARRANGEMENTS, TEXT)
CONTEXTS = {400: ((20, 20),), 1600: ((40, 40),), 2400: ((40, 30), (40, 30))}
"""(rows, columns) of each image, by the number of visual tokens. Texts have LENGTHS instead."""

SECOND_TASKS = ("second_new", "second_turn", "second_in_place")
"""The second question about the same images or text: in a new request, in a later turn of the conversation, and in
place, that is inside the request that was compressed for the first one. The last is what a compressor without an exact
prefix would do: the server is made to write the first answer and the second question into its own compressed cache."""

TASKS = (*KINDS, *texts.KINDS, *SECOND_TASKS)
SECOND_KINDS = (("get", "list"), ("read", "read"), ("price", "needle"))
"""Kinds of the first and the second question. The first pair counts whose kinds a scene has."""

END_OF_TURN = "<|im_end|>"

DrawText = Callable[[str], list[dict[str, Any]]]
"""A function that shows a text as pictures, parts of a message."""


@dataclass(frozen=True)
class Cell:
    """Prompts of one kind of scene.

    Attributes
    ----------
    scene : arrangement of a drawn scene, or "text".
    context : visual tokens of a drawn scene, one of CONTEXTS; tokens of a text, one of LENGTHS.
    n : scenes; each task is asked once a scene.
    tasks : what is asked; tasks that the scene has no answer for are left out.
    split : half of the prose and the words of a text.
    """

    scene: str
    context: int
    n: int
    tasks: tuple[str, ...]
    split: str = DEVELOPMENT

    def __post_init__(self) -> None:
        if self.scene not in SCENES:
            raise ValueError(f"scene: expected one of {', '.join(SCENES)}, got {self.scene!r}")
        if self.context not in contexts_of(self.scene):
            legal = ", ".join(map(str, contexts_of(self.scene)))
            raise ValueError(f"context: expected one of {legal} for {self.scene}, got {self.context}")
        if self.n < 1:
            raise ValueError(f"n: expected at least 1, got {self.n}")
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
        if self.split not in SPLITS or (self.split != DEVELOPMENT and self.scene != TEXT):
            raise ValueError(
                f"split: expected one of {', '.join(SPLITS)}, the second only of texts, got {self.split!r}"
            )

    @property
    def name(self) -> str:
        """Scene and, of a text that is not for development, its split."""
        return self.scene if self.split == DEVELOPMENT else f"{self.scene}-{self.split}"


def contexts_of(scene: str) -> tuple[int, ...]:
    """Return the contexts that a scene can have."""
    return LENGTHS if scene == TEXT else tuple(CONTEXTS)


@dataclass(frozen=True)
class Exchange:
    """One scored question, and what goes before it.

    Attributes
    ----------
    key : "scene/context/index/task"; the same for every server.
    first : messages of a request that is sent before and not scored; None without.
    messages : messages of the scored request. When the last one is the assistant's, it is what the answer begins with:
        the server goes on from there (`continue_final_message`).
    question : scored.
    forced : text that the server is made to write before its answer; None without.
    """

    key: str
    first: list[dict[str, Any]] | None
    messages: list[dict[str, Any]]
    question: Question
    forced: str | None = None


def _generator(seed: int, *parts: object) -> np.random.Generator:
    # hash() would differ from process to process.
    return np.random.default_rng([seed, zlib.crc32(repr(parts).encode())])


def exchange_key(cell: Cell, index: int, task: str) -> str:
    """Return the key of one question."""
    return f"{cell.name}/{cell.context}/{index}/{task}"


def _second_kinds(scene: Scene | Text) -> tuple[str, str] | None:
    return next((pair for pair in SECOND_KINDS if set(pair) <= set(scene.kinds)), None)


def scene_tasks(scene: Scene | Text, tasks: tuple[str, ...]) -> list[str]:
    """Return the tasks that a scene has an answer for."""
    second = _second_kinds(scene) is not None
    return [task for task in tasks if task in scene.kinds or (task in SECOND_TASKS and second)]


def draw_case(seed: int, cell: Cell, index: int) -> Scene | Text:
    """Draw scene or text number `index` of a cell; it does not depend on the tasks."""
    rng = _generator(seed, cell.name, cell.context, index)
    if cell.scene == TEXT:
        return draw_text(rng, cell.context, split=cell.split)
    return draw_scene(rng, CONTEXTS[cell.context], arrangement=cell.scene)


def _turn(content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


def _beginning(question: Question) -> list[dict[str, Any]]:
    return [_turn(question.begun, "assistant")] if question.begun else []


def _whole(question: Question) -> str:
    """The beginning of the answer, and what follows it."""
    return f"{question.begun} {question.answer}".strip()


def _ask(rng: np.random.Generator, scene: Scene | Text, kind: str) -> Question:
    return ask_text(rng, scene, kind) if isinstance(scene, Text) else ask(rng, scene, kind)


def make_exchange(seed: int, cell: Cell, index: int, scene: Scene | Text, task: str, pictures: list[Any]) -> Exchange:
    """Make one question about a scene or text of `draw_case`.

    Parameters
    ----------
    pictures : the scene's images as parts of a message; of a text, its pages, or none to write it out.
    """

    def opening(question: Question) -> list[dict[str, Any]]:
        if isinstance(scene, Text):
            # The text comes first, so that questions about it share a prefix. The content is a string, since templates
            # of text models know no parts.
            written = f"{scene.body}\n\n{question.text}"
            shown = [*pictures, {"type": "text", "text": f"\n{question.text}"}]
            return [_turn(shown if pictures else written), *_beginning(question)]
        return [_turn([*pictures, {"type": "text", "text": question.text}])]

    key = exchange_key(cell, index, task)
    if task in scene.kinds:
        question = _ask(_generator(seed, cell.name, cell.context, index, task), scene, task)
        return Exchange(key, None, opening(question), question)
    kinds = _second_kinds(scene)
    if task not in SECOND_TASKS or kinds is None:
        raise ValueError(f"task: a {cell.scene} scene has no answer for {task!r}")
    # All three tasks have the same two questions: they only differ in where the second one is asked.
    rng = _generator(seed, cell.name, cell.context, index, "second")
    first, second = (_ask(rng, scene, kind) for kind in kinds)
    if task == "second_new":
        return Exchange(key, opening(first), opening(second), second)
    if task == "second_turn":
        turns = [*opening(first)[:1], _turn(_whole(first), "assistant"), _turn(second.text), *_beginning(second)]
        return Exchange(key, opening(first), turns, second)
    forced = f"{_whole(first)}{END_OF_TURN}\n<|im_start|>user\n{second.text}{END_OF_TURN}\n<|im_start|>assistant\n"
    forced += second.begun
    return Exchange(key, None, opening(first)[:1], second, forced)


def make_exchanges(
    seed: int, cell: Cell, index: int, skip: Container[str], draw: DrawText | None = None
) -> Iterator[Exchange]:
    """Yield the questions about one scene or text whose keys are not in `skip`; `draw` shows a text as pictures."""
    scene = draw_case(seed, cell, index)
    tasks = [task for task in scene_tasks(scene, cell.tasks) if exchange_key(cell, index, task) not in skip]
    # The pictures are encoded once for all questions: this takes longer than asking about them.
    pictures: list[dict[str, Any]] = []
    if tasks and isinstance(scene, Scene):
        pictures = [{"type": "image_url", "image_url": {"url": image_url(image)}} for image in scene.images]
    elif tasks and isinstance(scene, Text) and draw is not None:
        pictures = draw(scene.body)
    for task in tasks:
        yield make_exchange(seed, cell, index, scene, task, pictures)


def is_right(question: Question, said: str) -> bool | None:
    """Whether an answer is right; None where there is no right one."""
    return texts.is_right(question, said) if question.kind in texts.KINDS else said.strip() == question.answer


def words_right(said: str, question: Question) -> float | None:
    """Return the share of the answer's words, counted without those the question already has, that are in place.

    None where there is no right answer.
    """
    if not question.answer:
        return None
    given = set(f"{question.text} {question.begun}".replace(",", " ").split())
    asked = question.answer.replace(",", " ").split()
    words = said.replace(",", " ").split()
    scored = [i for i, word in enumerate(asked) if word not in given] or range(len(asked))
    return sum(i < len(words) and words[i] == asked[i] for i in scored) / len(scored)
