import numpy as np

from benchmarks.models.scene_samples import draw_samples, find_boxes
from benchmarks.scenes import CELL_PIXELS, CODES, KEY, VALUE, ask, draw_scene


def test_the_box_of_a_value_is_the_cell_that_tells_it():
    rng = np.random.default_rng()
    scene = draw_scene(rng, [(9, 7)])
    question = ask(rng, scene, "chain")
    verb, first, *rest = find_boxes(scene, question.answer)
    words = question.answer.split()
    assert verb == (0, 0, 7 * CELL_PIXELS, 9 * CELL_PIXELS)
    for before, word, box in zip([None, *words[1:]], words[1:], [first, *rest], strict=False):
        cell = scene.grids[0][box[1] // CELL_PIXELS, box[0] // CELL_PIXELS]
        assert box[2] - box[0] == box[3] - box[1] == CELL_PIXELS
        if before is None:
            assert cell[KEY] == CODES.index(word)
        else:
            assert (cell[KEY], cell[VALUE]) == (CODES.index(before), CODES.index(word))


def test_samples_have_a_box_a_word():
    samples = list(draw_samples(4, 0))
    assert [sample.question.split()[0] for sample in samples] == ["list", "read"] * 2
    assert all(len(sample.boxes) == len(sample.answer.split()) for sample in samples)
