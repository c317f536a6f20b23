import base64
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from benchmarks.scenes import (
    ARRANGEMENTS,
    CELL_PIXELS,
    CODES,
    COLOUR,
    COLOURS,
    DOT,
    KEY,
    KINDS,
    VALUE,
    ask,
    draw_cells,
    draw_scene,
    user_message,
)

LAYOUTS = ([(1, 1)], [(3, 4)], [(20, 24)], [(7, 5), (9, 2)], [(12, 12)] * 3)
everywhere = pytest.mark.parametrize("arrangement", ARRANGEMENTS)
any_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def shown(scene):
    """{key: value} as the cells show them; fails when a key has two values."""
    values = {}
    for cell in np.concatenate([grid.reshape(-1, 4) for grid in scene.grids]).tolist():
        if cell[KEY] >= 0:
            assert values.setdefault(CODES[cell[KEY]], CODES[cell[VALUE]]) == CODES[cell[VALUE]]
    return values


@everywhere
@any_layout
def test_every_answer_can_be_read_off_the_cells(rng, arrangement, layout):
    scene = draw_scene(rng, layout, arrangement=arrangement)
    cells = np.concatenate([grid.reshape(-1, 4) for grid in scene.grids])
    values = shown(scene)
    assert [grid.shape[:2] for grid in scene.grids] == layout
    assert scene.num_visual_tokens == len(cells)
    for kind in scene.kinds:
        question = ask(rng, scene, kind)
        verb, _, rest = question.answer.partition(" ")
        assert verb == kind == question.kind
        if kind == "count":
            assert rest == f"is {(cells[:, DOT] == 1).sum()}"
        elif kind == "main":
            counts = np.bincount(cells[:, COLOUR])
            assert rest == f"is {list(COLOURS)[counts.argmax()]}"
            assert (counts == counts.max()).sum() == 1
        else:
            asked = question.text.split()[1:]
            walks = [walk.split() for walk in rest.split(", ")]
            assert [walk[0] for walk in walks] == asked
            assert all(values[a] == b for walk in walks for a, b in itertools.pairwise(walk))


def test_every_kind_is_asked_somewhere(rng):
    kinds = {kind for a in ARRANGEMENTS for kind in draw_scene(rng, [(20, 20)], arrangement=a).kinds}
    assert kinds | {"main"} == set(KINDS)


@everywhere
def test_the_same_state_draws_the_same_scene(arrangement):
    first, second = (draw_scene(np.random.default_rng(7), [(9, 11)], arrangement=arrangement) for _ in range(2))
    assert np.array_equal(first.grids[0], second.grids[0])
    assert first.images[0].tobytes() == second.images[0].tobytes()


def test_objects_are_coherent_and_shuffled_cells_are_not(rng):
    def like_neighbour(arrangement):
        grid = draw_scene(rng, [(40, 40)], arrangement=arrangement).grids[0]
        return (grid[:, 1:] == grid[:, :-1]).all(axis=-1).mean()

    assert like_neighbour("coherent") > 0.7
    assert like_neighbour("shuffled") < 0.3


def test_cells_that_differ_look_different(rng):
    scene = draw_scene(rng, [(10, 10)])
    pixels = draw_cells(scene.grids[0])
    cells = pixels.reshape(10, CELL_PIXELS, 10, CELL_PIXELS, 3).transpose(0, 2, 1, 3, 4).reshape(100, -1)
    distinct = {tuple(cell) for cell in scene.grids[0].reshape(100, 4).tolist()}
    assert len({cell.tobytes() for cell in cells}) == len(distinct)


def test_message_carries_the_pictures_and_the_question(rng):
    scene = draw_scene(rng, [(3, 4), (5, 2)])
    question = ask(rng, scene, "get")
    *pictures, text = user_message(scene, question)["content"]
    assert text == {"type": "text", "text": question.text}
    for picture, image in zip(pictures, scene.images, strict=True):
        header, data = picture["image_url"]["url"].split(",")
        assert header == "data:image/png;base64"
        assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(data))), image)


def test_a_question_without_an_answer_is_refused(rng):
    with pytest.raises(ValueError, match="kind: expected one of read for this scene, got 'get'"):
        ask(rng, draw_scene(rng, [(5, 5)], arrangement="page"), "get")
