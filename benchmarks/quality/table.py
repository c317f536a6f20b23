"""Run a plan: start each server, ask it, print its rows; what fails is told at the end, what was answered is kept."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.harness import NotCompressed, ServerError
from benchmarks.quality.cases import Cell
from benchmarks.quality.client import BadAnswer, Client, Unreachable
from benchmarks.quality.data import Questions
from benchmarks.quality.presets import Plan
from benchmarks.quality.rows import Row, kept_share, lookup_share, make_rows
from benchmarks.quality.runs import RunSettings, ask_cells, plan_keys
from benchmarks.quality.servers import HYBRIDKV, STOCK, ServerSpec, launch_config, make_server
from benchmarks.quality.store import AnswerFile, Answers, read_answers
from benchmarks.scenes import LOOKUP_KINDS

SMOKE_MARGIN = 0.03
SMOKE_LEAST = 0.5
"""Stock must get this share of the answers right, or a comparison with it says nothing."""
TEXT_LEAST = 0.3
"""The same share of questions about texts. It is lower, as the models of real weights that fit two cores are weak."""
TEXT_KEPT = 0.8
"""Share of stock's right answers about texts that has to stay right."""

Results = list[tuple[ServerSpec, Answers]]


@contextlib.contextmanager
def _serve(settings: RunSettings, spec: ServerSpec) -> Iterator[Client]:
    """Yield a client of the spec's server, which is stopped afterwards unless the user started it."""
    with contextlib.ExitStack() as stack:
        url = settings.base_url
        if url is None:
            assert settings.model is not None, "a run has a model or a server"
            how = {"dtype": settings.dtype, "log_dir": settings.out / "logs", "concurrency": settings.concurrency}
            config = launch_config(spec, settings.calibration)
            server = make_server(spec, settings.model, config, request_tokens=settings.request_tokens, **how)
            url = stack.enter_context(server).url
        yield stack.enter_context(contextlib.closing(Client(url, settings.served_model)))


def _ask_spec(
    settings: RunSettings,
    spec: ServerSpec,
    cells: Sequence[Questions],
    stock: Answers,
    advance: Callable[[], None],
    skip: Callable[[int], None],
) -> Answers:
    """Ask a server what its file does not have; it is not started when nothing is left to ask."""
    keys = plan_keys(settings.seed, cells)
    with AnswerFile(settings.out, spec) as file:
        num_kept = sum(key in file.answers for key in keys)
        skip(num_kept)
        if num_kept < len(keys):
            with _serve(settings, spec) as client:
                ask_cells(settings, cells, client, file, advance=advance, stock=stock)
        return {key: file.answers[key] for key in keys}


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # rich would move lines from a redirected stdout to the terminal of stderr.
    return Progress(
        *columns, console=Console(stderr=True), speed_estimate_period=300, redirect_stdout=sys.stdout.isatty()
    )


def run_plan(settings: RunSettings, plan: Plan, emit: Callable[[list[Row]], None]) -> tuple[Results, list[str]]:
    """Run all servers, one after the other.

    Parameters
    ----------
    emit : takes the rows of each server when it is done.

    Returns
    -------
    Answers of the servers that were asked everything, and one sentence for each of the others.
    """
    results: Results = []
    errors: list[str] = []
    # What this run does not ask again still compares: a running server is measured by itself.
    earlier = read_answers(settings.out)
    with _progress() as progress:
        bar = progress.add_task("", total=sum(len(plan_keys(settings.seed, cells)) for _, cells in plan))

        def skip(count: int) -> None:
            # These do not count as progress: the time left is estimated from the questions that are asked.
            progress.update(bar, total=(progress.tasks[0].total or 0) - count)

        for spec, cells in plan:
            progress.update(bar, description=spec.label)
            try:
                known = (theirs for other, theirs in [*results, *earlier] if other.compressor == STOCK)
                stock = next(known, {})
                answers = _ask_spec(settings, spec, cells, stock, lambda: progress.advance(bar), skip)
            except (ServerError, Unreachable, BadAnswer, NotCompressed) as error:
                errors.append(f"{spec.label}: {error}")
                print(f"error: {errors[-1]}", file=sys.stderr, flush=True)
                continue
            results.append((spec, answers))
            emit(make_rows(spec, answers, [*earlier, *results]))
    return results, errors


def run_in_process(settings: RunSettings, plan: Plan, emit: Callable[[list[Row]], None]) -> Results:
    """Compute all answers here, those of all settings to one question at once; returns them."""
    from benchmarks.quality.in_process import Answerer, answer_cells
    from benchmarks.replay import ReplayedModel

    assert settings.model is not None, "what is computed here has a model"
    earlier = read_answers(settings.out)
    cells_of = {spec: [cell for cell in cells if isinstance(cell, Cell)] for spec, cells in plan}
    answerer = Answerer(ReplayedModel(settings.model), list(cells_of), settings.calibration)
    keys = {spec: plan_keys(settings.seed, cells) for spec, cells in cells_of.items()}
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(_progress())
        files = {spec: stack.enter_context(AnswerFile(settings.out, spec)) for spec in cells_of}
        missing = sum(key not in files[spec].answers for spec, asked in keys.items() for key in asked)
        bar = progress.add_task("in process", total=missing)
        for cell in dict.fromkeys(cell for cells in cells_of.values() for cell in cells):
            asked = {spec: files[spec] for spec, cells in cells_of.items() if cell in cells}
            answer_cells(
                answerer,
                [cell],
                asked,
                seed=settings.seed,
                advance=lambda count: progress.advance(bar, count),
                draw=settings.draw,
            )
        results: Results = [(spec, {key: files[spec].answers[key] for key in asked}) for spec, asked in keys.items()]
    for spec, answers in results:
        emit(make_rows(spec, answers, [*earlier, *results]))
    return results


def smoke_verdict(results: Results) -> str | None:
    """Return why the smoke test fails, in a sentence; None when it passes."""
    shares = [(spec, lookup_share(answers, LOOKUP_KINDS).value) for spec, answers in results]
    stock = next(share for spec, share in shares if spec.compressor == STOCK)
    ours = [(spec, share) for spec, share in shares if spec.compressor == HYBRIDKV]
    if not ours:
        return f"nothing to compare with stock: name {HYBRIDKV} among the compressors"
    if stock < SMOKE_LEAST:
        return f"stock answers only {100 * stock:.1f} % of the lookups: the model is not fit for a comparison"
    for spec, share in ours:
        if share < stock - SMOKE_MARGIN:
            return (
                f"{spec.label} answers {100 * share:.1f} % of the lookups, stock {100 * stock:.1f} %: "
                f"more than {100 * SMOKE_MARGIN:g} points below"
            )
    return None


def text_verdict(results: Results) -> str | None:
    """Return why the smoke test of a model of text fails, in a sentence; None when it passes."""
    stock = next(answers for spec, answers in results if spec.compressor == STOCK)
    judged = [answer["right"] for answer in stock.values() if answer["right"] is not None]
    ours = [(spec, answers) for spec, answers in results if spec.compressor == HYBRIDKV]
    if not ours:
        return f"nothing to compare with stock: name {HYBRIDKV} among the compressors"
    if not judged or sum(judged) < TEXT_LEAST * len(judged):
        return f"stock answers only {sum(judged)} of {len(judged)} questions: the model is not fit for a comparison"
    for spec, answers in ours:
        kept = kept_share(answers, stock)
        if kept is not None and kept.value < TEXT_KEPT:
            return (
                f"{spec.label} answers {100 * kept.value:.1f} % of the {sum(judged)} questions that stock answers: "
                f"less than {100 * TEXT_KEPT:g} %"
            )
    return None
