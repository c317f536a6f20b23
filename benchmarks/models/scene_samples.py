"""Write drawn scenes as samples for ``hybridkv calibrate --samples-from``, for the trained tiny model.

``python -m benchmarks.models.scene_samples FOLDER`` and then ``hybridkv calibrate --samples-from FOLDER`` give the
`visual_head_scores.json` beside its checkpoint, which SparseMM needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.scenes import CELL_PIXELS, CODES, KEY, VALUE, Scene, ask, draw_scene
from sglang_hybridkv.cli.samples import Box, Sample, write_samples

LAYOUT = ((16, 16),)


def find_boxes(scene: Scene, answer: str) -> tuple[Box, ...]:
    """Place of each word of an answer in a scene of one image whose cells all differ.

    A key's box is its cell, a value's the cell of the key before it; the whole image for a word that is nowhere.
    """
    (grid,) = scene.grids
    everywhere: Box = (0, 0, grid.shape[1] * CELL_PIXELS, grid.shape[0] * CELL_PIXELS)
    boxes, before = [], None
    for word in answer.replace(",", "").split():
        code = CODES.index(word) if word in CODES else None
        is_value = (grid[..., KEY] == before) & (grid[..., VALUE] == code) if before is not None else None
        places = np.argwhere(is_value if is_value is not None and is_value.any() else grid[..., KEY] == code)
        if code is None or len(places) == 0:
            boxes.append(everywhere)
        else:
            top, left = (places[0] * CELL_PIXELS).tolist()
            boxes.append((left, top, left + CELL_PIXELS, top + CELL_PIXELS))
        before = code
    return tuple(boxes)


def draw_samples(num_samples: int, seed: int) -> Iterator[Sample]:
    """Lists of values from shuffled scenes and printed pages, in turn."""
    rng = np.random.default_rng(seed)
    for i in range(num_samples):
        scene = draw_scene(rng, LAYOUT, arrangement="page" if i % 2 else "shuffled")
        question = ask(rng, scene, "read" if i % 2 else "list")
        yield Sample(scene.images[0], question.text, question.answer, find_boxes(scene, question.answer))


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{write_samples(args.folder, draw_samples(args.samples, args.seed))} samples in {args.folder}")


if __name__ == "__main__":
    main()
