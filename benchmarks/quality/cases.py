"""What is asked: scenes, tasks and the messages of each question, drawn from a seed."""

from __future__ import annotations

import zlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.scenes import ARRANGEMENTS, KINDS, Question, Scene, ask, draw_scene, image_url

CONTEXTS = {400: ((20, 20),), 1600: ((40, 40),), 2400: ((40, 30), (40, 30))}
"""Visual tokens: (rows, columns) of each image."""

SECOND_TASKS = ("second_new", "second_turn", "second_in_place")
"""The second question about the same images: in a new request, in a later turn of the conversation, and in place, that
is inside the request that was compressed for the first one. The last is what a compressor without an exact prefix
would do: the server is made to write the first answer and the second question into its own compressed cache."""

TASKS = (*KINDS, *SECOND_TASKS)
SECOND_KINDS = (("get", "list"), ("read", "read"))
"""First and second question; the first pair whose kinds a scene has."""

END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True)
class Cell:
    """Prompts of one kind of scene.

    Attributes
    ----------
    scene : arrangement, one of ARRANGEMENTS.
    context : visual tokens, one of CONTEXTS.
    n : scenes; each task is asked once a scene.
    tasks : those that the scene has no answer for are left out.
    """

    scene: str
    context: int
    n: int
    tasks: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.scene not in ARRANGEMENTS:
            raise ValueError(f"scene: expected one of {', '.join(ARRANGEMENTS)}, got {self.scene!r}")
        if self.context not in CONTEXTS:
            raise ValueError(f"context: expected one of {', '.join(map(str, CONTEXTS))}, got {self.context}")
        if self.n < 1:
            raise ValueError(f"n: expected at least 1, got {self.n}")
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")


@dataclass(frozen=True)
class Exchange:
    """One scored question, and what goes before it.

    Attributes
    ----------
    key : "scene/context/index/task"; the same for every server.
    first : messages of a request that is sent before and not scored; None without.
    messages : those of the scored request.
    question : scored.
    forced : text that the server is made to write before its answer; None without.
    """

    key: str
    first: list[dict[str, Any]] | None
    messages: list[dict[str, Any]]
    question: Question
    forced: str | None = None


def _generator(seed: int, *parts: object) -> np.random.Generator:
    # Not hash(): it differs from process to process.
    return np.random.default_rng([seed, zlib.crc32(repr(parts).encode())])


def exchange_key(cell: Cell, index: int, task: str) -> str:
    """Return the key of one question."""
    return f"{cell.scene}/{cell.context}/{index}/{task}"


def _second_kinds(scene: Scene) -> tuple[str, str] | None:
    return next((pair for pair in SECOND_KINDS if set(pair) <= set(scene.kinds)), None)


def scene_tasks(scene: Scene, tasks: tuple[str, ...]) -> list[str]:
    """Return the tasks that a scene has an answer for."""
    second = _second_kinds(scene) is not None
    return [task for task in tasks if task in scene.kinds or (task in SECOND_TASKS and second)]


def draw_case(seed: int, cell: Cell, index: int) -> Scene:
    """Draw scene number `index` of a cell; it does not depend on the tasks."""
    rng = _generator(seed, cell.scene, cell.context, index)
    return draw_scene(rng, CONTEXTS[cell.context], arrangement=cell.scene)


def _turn(content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


def make_exchange(seed: int, cell: Cell, index: int, scene: Scene, task: str, pictures: list[Any]) -> Exchange:
    """Make one question about a scene of `draw_case`.

    Parameters
    ----------
    pictures : the scene's images as parts of a message.
    """

    def opening(question: Question) -> list[dict[str, Any]]:
        return [_turn([*pictures, {"type": "text", "text": question.text}])]

    key = exchange_key(cell, index, task)
    if task in scene.kinds:
        question = ask(_generator(seed, cell.scene, cell.context, index, task), scene, task)
        return Exchange(key, None, opening(question), question)
    kinds = _second_kinds(scene)
    if task not in SECOND_TASKS or kinds is None:
        raise ValueError(f"task: a {cell.scene} scene has no answer for {task!r}")
    # The same two questions for all three tasks, whose only difference is then where the second one is asked.
    rng = _generator(seed, cell.scene, cell.context, index, "second")
    first, second = (ask(rng, scene, kind) for kind in kinds)
    if task == "second_new":
        return Exchange(key, opening(first), opening(second), second)
    if task == "second_turn":
        turns = [*opening(first), _turn(first.answer, "assistant"), _turn(second.text)]
        return Exchange(key, opening(first), turns, second)
    forced = f"{first.answer}{END_OF_TURN}\n<|im_start|>user\n{second.text}{END_OF_TURN}\n<|im_start|>assistant\n"
    return Exchange(key, None, opening(first), second, forced)


def make_exchanges(seed: int, cell: Cell, index: int, skip: Container[str]) -> Iterator[Exchange]:
    """Yield the questions about one scene whose keys are not in `skip`."""
    scene = draw_case(seed, cell, index)
    tasks = [task for task in scene_tasks(scene, cell.tasks) if exchange_key(cell, index, task) not in skip]
    # Once for all of them: pictures of this size take longer to encode than to ask about.
    pictures = [{"type": "image_url", "image_url": {"url": image_url(image)}} for image in scene.images if tasks]
    for task in tasks:
        yield make_exchange(seed, cell, index, scene, task, pictures)


def words_right(said: str, question: Question) -> float:
    """Return the share of the answer's words, counted without those the question already has, that are in place."""
    given = set(question.text.replace(",", " ").split())
    asked = question.answer.replace(",", " ").split()
    words = said.replace(",", " ").split()
    scored = [i for i, word in enumerate(asked) if word not in given] or range(len(asked))
    return sum(i < len(words) and words[i] == asked[i] for i in scored) / len(scored)
