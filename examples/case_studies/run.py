"""Two case studies: what changed between two pictures, and one moment of a video; which answers survive, and why.

``python examples/case_studies/run.py --out FOLDER`` starts stock SGLang and then, one after another, a server for each
compressor at one budget. It asks each the same questions and writes ``answers.jsonl``, ``README.md`` with a table, and
a picture for each study: what the heads of each method kept. The tiny model of this repository answers, on a CPU.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import scenes
from benchmarks.harness import Server, compression_flags, end_on_sigterm, engine_flags, free_port
from benchmarks.provenance import run_metadata
from sglang_hybridkv.cli import inspect

MODEL = Path(__file__).parents[2] / "benchmarks" / "models" / "tiny-qwen2_5_vl-scenes"
METHODS = ("hybridkv", "snapkv", "look-m", "madakv", "sparsemm")
STOCK = "stock"
FRAME_MS = 500  # SGLang's processor takes two frames a second
MOST_DRAWN = 4  # pictures or moments of a study


@dataclass(frozen=True)
class Study:
    """Pictures or a video, and questions with their right answers.

    Attributes
    ----------
    pictures : PNG files, or the moments of the video.
    content : what goes before the question, as the chat API has it.
    drawn : which of the pictures are drawn beside what was kept of them.
    asked : which picture shows the object that the questions begin with, and its first and last row and column there.
    """

    name: str
    title: str
    pictures: tuple[bytes, ...]
    content: tuple[dict[str, Any], ...]
    questions: tuple[tuple[str, str], ...]
    drawn: tuple[int, ...]
    asked: tuple[int, tuple[int, int, int, int]]


def png(grid: scenes.Grid) -> bytes:
    """The file of a drawn grid."""
    file = io.BytesIO()
    Image.fromarray(scenes.draw_cells(grid)).save(file, "PNG")
    return file.getvalue()


def walk(grids: Sequence[scenes.Grid], key: int, hops: int) -> list[str]:
    """Codes that one reads on the way from `key`: itself, its value, the value of that, and so on."""
    cells = np.concatenate([grid.reshape(-1, 4) for grid in grids])
    keyed = cells[cells[:, scenes.KEY] > scenes.NOTHING]
    values = {int(key): int(value) for key, value in keyed[:, [scenes.KEY, scenes.VALUE]]}
    codes = [key]
    for _ in range(hops):
        codes.append(values[codes[-1]])
    return [scenes.CODES[code] for code in codes]


def asked_from(grids: Sequence[scenes.Grid], key: int) -> tuple[tuple[str, str], ...]:
    """A look-up of `key`, and six from there on, each with the code just written."""
    get, chain = walk(grids, key, 1), walk(grids, key, scenes.CHAIN_HOPS)
    return ((f"get {get[0]}", f"get {' '.join(get)}"), (f"chain {chain[0]}", f"chain {' '.join(chain)}"))


def box(grid: scenes.Grid, key: int) -> tuple[int, int, int, int]:
    """First and last row, first and last column of the object with `key`."""
    rows, columns = (grid[..., scenes.KEY] == key).nonzero()
    return int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())


def difference(rng: np.random.Generator) -> Study:
    """Two pictures that are alike but for one object, whose code is another one in the second picture."""
    scene = scenes.draw_scene(rng, [(24, 24)], arrangement="coherent")
    before = scene.grids[0]
    changed = int(scene.loop[len(scene.loop) // 2])
    unused = int(next(code for code in rng.permutation(len(scenes.CODES)) if code not in scene.loop))
    after = before.copy()
    after[before[..., scenes.KEY] == changed, scenes.KEY] = unused
    pictures = (png(before), png(after))
    content = inspect.with_pictures("", pictures)[:-1]
    questions, title = asked_from((before, after), unused), "One object has another code in the second picture"
    return Study("difference", title, pictures, tuple(content), questions, (0, 1), (1, box(after, unused)))


def moment(rng: np.random.Generator) -> Study:
    """A video whose frames are scenes of their own; the questions begin at an object of one frame."""
    scene = scenes.draw_scene(rng, [(14, 14)] * 5, arrangement="coherent")
    place = 3
    here = scene.grids[place][..., scenes.KEY]
    key = int(rng.choice(np.unique(here[here > scenes.NOTHING])))
    frames = [Image.fromarray(scenes.draw_cells(grid)) for grid in scene.grids]
    shown = []
    for frame in frames:  # a visual token covers two frames, so that each moment is shown for two
        again = frame.copy()
        again.putpixel((0, 0), (0, 0, 0))  # or the GIF would have one frame of twice the time
        shown += [frame, again]
    file = io.BytesIO()
    shown[0].save(file, "GIF", save_all=True, append_images=shown[1:], duration=FRAME_MS, loop=0)
    content = (
        {"type": "video_url", "video_url": {"url": "data:video/gif;base64," + inspect.as_text(file.getvalue())}},
    )
    pictures = tuple(png(grid) for grid in scene.grids)
    title, asked = f"An object of moment {place + 1} of five", (place, box(scene.grids[place], key))
    return Study("moment", title, pictures, content, asked_from(scene.grids, key), (0, 2, 3), asked)


STUDIES = (difference, moment)
EXPLANATION = """\
Two studies with the tiny model of this repository, on scenes of coloured objects with codes: what changed between two
pictures, and one moment of a video. `get` asks for the code that stands below another one. `chain` goes on from there,
six times, so that attention moves while the answer is written. Every method has a budget of {budget:g}; a wrong answer
stands as it was given. One prompt of each kind says nothing about how often a method is right:
[quality.md](../../docs/quality.md) has figures.

```
.venv/bin/python examples/case_studies/run.py --out examples/case_studies
```

In the pictures below, a frame is around the object that is asked for. The other columns show what the heads of a method
kept when the prompt of `get` was read, the brighter the more heads. Dynamic heads have the rest in host memory, and
fetch from there what a later word needs."""


def ask(server: Server, method: str, study: Study, question: str) -> inspect.Inspection | str:
    """The answer of stock, or the plan of a compressing server with its answer."""
    content = [*study.content, {"type": "text", "text": question}]
    if method == STOCK:
        return server.chat([{"role": "user", "content": content}], max_tokens=64).text
    return inspect.ask(server.url, content, study.pictures, max_tokens=64)


def draw(study: Study, found: dict[str, inspect.Inspection], path: Path) -> None:
    """A row for each picture, a column for it and for each method and type of heads; darker is kept by fewer heads."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = [
        (method, kind, inspection)
        for method, inspection in found.items()
        for kind in (False, True)
        if kind in np.unique(inspection.event.is_dynamic)
    ]
    figure = Figure(figsize=(2.4 * (1 + len(columns)), 2.7 * len(study.drawn)), layout="constrained")
    panels = figure.subplots(len(study.drawn), 1 + len(columns), squeeze=False)
    for row, index in enumerate(study.drawn):
        with Image.open(io.BytesIO(study.pictures[index])) as picture:
            panels[row, 0].imshow(picture)
        panels[row, 0].set_axis_off()
        panels[row, 0].set_title(f"{index + 1}", fontsize=10)
        if index == study.asked[0]:
            top, bottom, left, right = (scenes.CELL_PIXELS * place for place in study.asked[1])
            size = right - left + scenes.CELL_PIXELS, bottom - top + scenes.CELL_PIXELS
            panels[row, 0].add_patch(Rectangle((left, top), *size, fill=False, edgecolor="magenta", linewidth=3))
    for column, (method, kind, inspection) in enumerate(columns, start=1):
        kept, is_dynamic = inspection.event.kept_tokens().float(), torch.tensor(inspection.event.is_dynamic)
        spans = [(start, end) for start, end, _ in inspection.event.spans]
        if len(spans) == 1:  # a video: one span over all of its moments
            [(start, end)] = spans
            length = (end - start) // len(study.pictures)
            spans = [(start + i * length, start + (i + 1) * length) for i in range(len(study.pictures))]
        for row, index in enumerate(study.drawn):
            start, end = spans[index]
            of_picture = kept[is_dynamic == kind][:, start : min(end, kept.shape[-1])]
            inspect.draw_picture(panels[row, column], study.pictures[index], of_picture, end - start)
            if row == 0:
                panels[row, column].set_title(f"{method}\n{'dynamic' if kind else 'static'} heads", fontsize=10)
    figure.savefig(path, dpi=100)


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a line for each study and question, a column for each method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    yield "| study | question | right answer | " + " | ".join(methods) + " |"
    yield "|---" * (3 + len(methods)) + "|"
    for study, question in dict.fromkeys((row["study"], row["question"]) for row in rows):
        of_question = {row["method"]: row for row in rows if (row["study"], row["question"]) == (study, question)}
        said = ["right" if of_question[method]["right"] else f"`{of_question[method]['said']}`" for method in methods]
        yield f"| {study} | `{question}` | `{of_question[STOCK]['answer']}` | " + " | ".join(said) + " |"
    share = [[row["resident_ratio"] for row in rows if row["method"] == method] for method in methods]
    yield "| memory held, of stock's | | | " + " | ".join(f"{100 * np.mean(values):.1f} %" for values in share) + " |"


def main() -> int:
    """Run the studies."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=style)
    parser.add_argument("--out", type=Path, default=Path("case-studies"), metavar="FOLDER", help="made if need be")
    parser.add_argument("--budget", type=float, default=0.1, help="of every method")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="beside stock")
    parser.add_argument("--seed", type=int, default=3, help="of the scenes")
    args = parser.parse_args()
    end_on_sigterm()
    args.out.mkdir(parents=True, exist_ok=True)
    studies = [make(np.random.default_rng([args.seed, place])) for place, make in enumerate(STUDIES)]
    found: dict[str, dict[str, inspect.Inspection]] = {study.name: {} for study in studies}
    recipe = engine_flags(max_total_tokens=8192)
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        for method in progress.track([STOCK, *args.methods], description="case studies"):
            config: dict[str, Any] = {"events": f"tcp://127.0.0.1:{free_port()}"}
            if method == "sparsemm":
                config["calibration"] = str(MODEL / "visual_head_scores.json")
            flags = [] if method == STOCK else compression_flags(args.budget, config, method)
            with Server(MODEL, [*recipe.flags, *flags], recipe.env, name=f"case-{method}") as server:
                for study in studies:
                    for question, answer in study.questions:
                        got = ask(server, method, study, question)
                        said = got if isinstance(got, str) else got.answer
                        if isinstance(got, inspect.Inspection):
                            found[study.name].setdefault(method, got)
                        ratio = 1.0 if isinstance(got, str) else got.record["resident_ratio"]
                        row = {"study": study.name, "question": question, "answer": answer, "method": method}
                        row |= {"said": said.strip(), "right": said.strip() == answer, "resident_ratio": ratio}
                        rows.append({**row, "budget": None if method == STOCK else args.budget})
    about = {"seed": args.seed, "model": MODEL.name, **run_metadata()}
    (args.out / "answers.jsonl").write_text("".join(json.dumps(row | about) + "\n" for row in rows))
    lines = ["# Case studies", "", EXPLANATION.format(budget=args.budget), "", *table(rows), ""]
    for study in studies:
        draw(study, found[study.name], args.out / f"{study.name}.png")
        lines += [f"## {study.title}", "", f"![pictures, and what was kept of them]({study.name}.png)", ""]
    (args.out / "README.md").write_text("\n".join(lines))
    print(f"written: {args.out / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
