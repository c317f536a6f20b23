"""Images down to one cell of 28 x 28 pixels, which is one token, in any number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.harness import Server
from tests.builders import LAWS
from tests.e2e.checks import Reference, ask, assert_compressed, assert_nothing_lost, assert_same
from tests.e2e.conftest import make_server, run_servers
from tests.e2e.prompts import Vision, text

pytestmark = pytest.mark.server

CELL = 28  # pixels
SIDES = st.sampled_from([1, CELL - 1, CELL, CELL + 15, 2 * CELL, 4 * CELL])


@pytest.fixture(scope="module")
def one_cell(vl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Reference]]:
    """A compressing and a stock server whose image processor enlarges to one cell, not to four as published ones."""
    folder = tmp_path_factory.mktemp("one-cell") / vl_model.name
    shutil.copytree(vl_model, folder)
    file = folder / "preprocessor_config.json"
    config = json.loads(file.read_text())
    config["min_pixels"] = config["size"]["shortest_edge"] = CELL**2
    file.write_text(json.dumps(config))
    for ours, stock in run_servers(make_server(folder, 0.1, name="ours"), make_server(folder, name="stock")):
        yield ours, Reference(stock)
        assert_nothing_lost(ours)


def test_one_cell_is_one_token(one_cell: tuple[Server, Reference], vision: Vision) -> None:
    _, stock = one_cell
    assert stock.ask(text(1, 70) + vision.image(1, CELL, CELL)).meta["prompt_tokens"] == 70 + 3


@settings(LAWS, max_examples=15)
@given(
    st.lists(st.tuples(st.integers(0, 9), SIDES, SIDES), min_size=1, max_size=12), st.sampled_from([0, 1, 31, 32, 33])
)
def test_images_of_any_size(
    one_cell: tuple[Server, Reference], vision: Vision, images: list[tuple[int, int, int]], length: int
) -> None:
    """Between a few tokens of text or none: at budget 1 stock's answer, and one plan, cached or not."""
    ours, stock = one_cell
    prompt = text(2, 64)
    for place, (between, height, width) in enumerate(images):
        prompt = prompt + text(place, between) + vision.image(place, height, width)
    prompt = prompt + text(3, length)
    exact = ask(ours, prompt, sampling_params={"custom_params": {"kv_compressor": {"budget": 1.0}}})
    assert_compressed(exact, both_types=False)
    assert_same(exact, stock.ask(prompt))
    cold, cached = [ask(ours, prompt, **({"extra_key": key} if key else {})) for key in (str(prompt.images), "")]
    assert cold.record["plan"] == cached.record["plan"]
    assert cold.ids == cached.ids
