"""`hybridkv inspect`: a plan that was caught, kept in a file, and drawn. tests/e2e/test_proof.py asks a server."""

import base64
import dataclasses
import io
import re
import shutil
import subprocess

import msgspec
import pytest
import torch
from PIL import Image

from sglang_hybridkv.cli.inspect import Inspection, draw, grid_of, summary, write_page
from sglang_hybridkv.cli.main import main
from sglang_hybridkv.requests.plan_events import PlanEvent, pack_bits


def picture(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, format="png")
    return file.getvalue()


@pytest.fixture
def inspection():
    """Two layers of three heads over 48 tokens, of which two images of 12 and 6 take a part; one goes beyond pages."""
    is_dynamic = torch.tensor([[False, True, False], [False, False, True]])
    kept = torch.zeros(2, 3, 48, dtype=torch.bool)
    kept[:, :, -16:] = True
    kept[0, 0, 4:10] = True
    event = PlanEvent(
        time=1.0,
        rank=0,
        request_id="r",
        prompt_tokens=50,
        covered_tokens=48,
        budget=0.3,
        page_size=16,
        spans=[(4, 16, "image"), (44, 50, "image")],
        is_dynamic=is_dynamic.tolist(),
        head_pages=[[2, 1, 1], [1, 1, 1]],
        kept=pack_bits(kept).numpy().tobytes(),
        salience_kept=[[0.9, 0.2, 0.5], [0.8, 0.6, 0.1]],
        plan="0" * 16,
    )
    return Inspection(event, (picture(112, 84), picture(84, 56)), "an answer <b>", {"resident_ratio": 0.25})


@pytest.mark.parametrize(
    ("num_tokens", "width", "height", "grid"),
    [(12, 112, 84, (3, 4)), (12, 84, 112, (4, 3)), (16, 100, 100, (4, 4)), (7, 700, 90, (1, 7)), (1, 5, 500, (1, 1))],
)
def test_tokens_lie_in_the_grid_that_is_nearest_to_the_picture(num_tokens, width, height, grid):
    assert grid_of(num_tokens, width, height) == grid


def test_figures_in_words(inspection):
    found = dict(summary(inspection.event))
    assert found["heads"] == "2 of 6 are dynamic"
    assert found["pages a head"] == "1 to 2, 1.2 in the mean"
    assert found["salience"] == "70.0 % of it is kept by static heads in the mean, 50.0 % by the lowest"
    assert found["prompt"] == "50 tokens, 48 of them in whole pages"
    # Four static heads: each keeps the 4 image tokens of the last page, and one of them 6 tokens of the first image.
    assert found["images kept"] == f"{100 * (4 * 4 + 6) / (4 * 16):.1f} % of its tokens, by static heads"
    assert found["text kept"] == f"{100 * 12 / 32:.1f} % of its tokens, by static heads"


def test_layers_with_a_window_are_none_of_either_type(inspection):
    nan = float("nan")
    event = msgspec.structs.replace(inspection.event, windows=[20, 0], salience_kept=[[nan] * 3, [0.8, 0.6, 0.1]])
    found = dict(summary(event))
    assert found["heads"] == "1 of 3 are dynamic"
    assert found["pages a head"] == "1 to 1, 1.0 in the mean"
    assert found["salience"] == "70.0 % of it is kept by static heads in the mean, 60.0 % by the lowest"
    assert found["images kept"] == "25.0 % of its tokens, by static heads"
    draw(dataclasses.replace(inspection, event=event))


def test_all_is_drawn(inspection):
    heads, bar, attention, _, tokens, _, by_token, *images = draw(inspection).axes
    assert heads.get_images()[0].get_array().tolist() == inspection.event.head_pages
    assert bar.get_ylabel() == "pages"
    assert attention.get_images()[0].get_array().tolist() == torch.tensor(inspection.event.salience_kept).tolist()
    assert tokens.get_images()[0].get_array().shape == (2, 48)
    assert [len(line.get_xdata()) for line in by_token.get_lines()] == [48, 48]
    titles = [
        f"image {index}, tokens {place}: kept by {kind} heads"
        for index, place in ((1, "4 to 16"), (2, "44 to 50"))
        for kind in ("static", "dynamic")
    ]
    assert [axes.get_title() for axes in images] == titles
    static, dynamic = (axes.get_images()[1].get_alpha() for axes in images[:2])
    assert static.shape == (3, 4)
    assert static.flatten().tolist() == pytest.approx([0.0] * 6 + [0.85] * 6)  # one static head keeps the first six
    assert dynamic.flatten().tolist() == pytest.approx([0.85] * 12)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed (Debian's package chromium)")
def test_a_browser_shows_the_page(inspection, tmp_path):
    """The drawing is on the screenshot: the red of the pictures, and more than a blank page has."""
    page, shot = tmp_path / "kept.html", tmp_path / "shot.png"
    write_page(inspection, page)
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1200,2000",
    ]
    command += [f"--user-data-dir={tmp_path}/profile", f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    with Image.open(shot) as image:
        colours = image.convert("RGB").getcolors(2**24)
    reds = sum(count for count, (red, green, blue) in colours if red > 200 and green < 40 and blue < 40)
    assert reds > 5_000
    assert len(colours) > 200


def test_a_file_holds_all_of_it_and_a_page_needs_no_other(inspection, tmp_path, capsys):
    saved, page, drawing = tmp_path / "a.plan", tmp_path / "a.html", tmp_path / "a.png"
    inspection.save(saved)
    assert Inspection.load(saved) == inspection
    assert main(["inspect", "--from", str(saved), "--html", str(page), "--png", str(drawing)]) == 0
    assert f"written       {page}" in capsys.readouterr().out
    text = page.read_text()
    [inside] = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert base64.b64decode(inside)[:4] == drawing.read_bytes()[:4] == b"\x89PNG"
    assert "an answer &lt;b&gt;" in text
    assert "http" not in text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "give either --prompt or --from"),
        (["--prompt", "x", "--from", "y"], "give either --prompt or --from"),
        (["--from", "nowhere"], "--from = nowhere: No such file"),
        (["--from", __file__], "it is no file of hybridkv inspect"),
        (["--prompt", "x", "--image", "nowhere.png"], "--image = nowhere.png: cannot be read (No such"),
        (["--prompt", "@nowhere"], "--prompt = nowhere: cannot be read (No such"),
        (["--prompt", "x", "--url", "http://127.0.0.1:1"], "http://127.0.0.1:1/server_info cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(options, sentence, capsys):
    assert main(["inspect", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hybridkv inspect: ")
    assert said.count("\n") == 1
    assert sentence in said
