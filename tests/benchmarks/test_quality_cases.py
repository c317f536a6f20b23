"""What is asked depends on the seed and the scene's number, and on nothing else."""

from __future__ import annotations

import pytest

from benchmarks.quality.cases import (
    CONTEXTS,
    SECOND_TASKS,
    TASKS,
    Cell,
    draw_case,
    make_exchanges,
    scene_tasks,
    words_right,
)
from benchmarks.scenes import ARRANGEMENTS, Question


@pytest.mark.parametrize("scene", ARRANGEMENTS)
def test_questions_are_the_same_whatever_else_is_asked(scene: str) -> None:
    cell = Cell(scene, 400, 1, TASKS)
    together = {exchange.key: exchange for exchange in make_exchanges(3, cell, 0, ())}
    assert together
    for key, exchange in together.items():
        alone = Cell(scene, 400, 5, (key.rsplit("/", 1)[1],))
        assert list(make_exchanges(3, alone, 0, ())) == [exchange]
        assert exchange not in make_exchanges(4, alone, 0, ())
        assert exchange not in make_exchanges(3, alone, 1, ())


@pytest.mark.parametrize("scene", ARRANGEMENTS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_context_has_the_visual_tokens_that_name_it(scene: str, context: int) -> None:
    drawn = draw_case(0, Cell(scene, context, 1, TASKS), 0)
    assert drawn.num_visual_tokens == context
    assert set(SECOND_TASKS) < set(scene_tasks(drawn, TASKS))


@pytest.mark.parametrize("scene", ARRANGEMENTS)
def test_the_second_question_is_the_same_wherever_it_is_asked(scene: str) -> None:
    exchanges = list(make_exchanges(1, Cell(scene, 400, 1, SECOND_TASKS), 0, ()))
    new, turn, in_place = exchanges
    assert new.question == turn.question == in_place.question
    assert new.first == turn.first == in_place.messages == turn.messages[:1]
    assert new.messages[0]["content"][:-1] == turn.messages[0]["content"][:-1]
    assert turn.messages[1]["role"] == "assistant"
    first, second = turn.messages[1]["content"], turn.messages[2]["content"]
    assert in_place.forced.startswith(first + "<|im_end|>")
    assert f"user\n{second}<|im_end|>" in in_place.forced
    assert second == new.question.text


@pytest.mark.parametrize(
    ("said", "share"),
    [("list A1 B2, C3 D4", 1.0), ("list A1 B2, C3 X9", 0.5), ("list A1", 0.0), ("", 0.0), ("list A1 B2 C3 D4 E5", 1.0)],
)
def test_partial_credit_leaves_out_what_the_question_says(said: str, share: float) -> None:
    assert words_right(said, Question("list", "list A1 C3", "list A1 B2, C3 D4")) == share
