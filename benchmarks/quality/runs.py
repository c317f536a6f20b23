"""Ask every server its questions: concurrent, resumable, with proof that each prompt was compressed."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import NotCompressed, detect_device
from benchmarks.pages import PIECES_FILE, PageWriter
from benchmarks.quality.cases import (
    Cell,
    DrawText,
    Exchange,
    draw_case,
    exchange_key,
    is_right,
    scene_tasks,
    words_right,
)
from benchmarks.quality.client import Client, Reply
from benchmarks.quality.data import CaseExchange, DataSet, Questions, exchanges_of, score_case
from benchmarks.quality.servers import REQUEST_TOKENS, STOCK, ServerSpec
from benchmarks.quality.store import Answer, AnswerFile, Answers


@dataclass(frozen=True)
class RunSettings:
    """What all servers of a run share.

    Attributes
    ----------
    out : folder of the answers.
    model : checkpoint; None with `base_url`.
    request_tokens : tokens of the KV pool for each request that runs at once.
    base_url, served_model : a server that runs already, and its name for the model.
    in_process : answers are computed here, without servers.
    """

    out: Path
    seed: int
    concurrency: int
    request_tokens: int = REQUEST_TOKENS
    model: Path | None = None
    dtype: str | None = None
    calibration: Path | None = None
    base_url: str | None = None
    served_model: str = "default"
    in_process: bool = False

    @functools.cached_property
    def draw(self) -> DrawText | None:
        """What shows texts as pictures, where the model is one that reads pages."""
        if self.model is None or not (self.model / PIECES_FILE).is_file():
            return None
        return PageWriter.load(self.model).draw_parts


@functools.cache
def _cell_keys(seed: int, cell: Cell) -> list[str]:
    tasks = [scene_tasks(draw_case(seed, cell, index), cell.tasks) for index in range(cell.n)]
    return [exchange_key(cell, index, task) for index, asked in enumerate(tasks) for task in asked]


def plan_keys(seed: int, cells: Sequence[Questions]) -> list[str]:
    """Return the keys of all questions of some cells or data sets."""
    keys: list[str] = []
    for cell in cells:
        keys += [case.key for case in cell.cases] if isinstance(cell, DataSet) else _cell_keys(seed, cell)
    return keys


def check_service(spec: ServerSpec, reply: Reply) -> None:
    """Raise NotCompressed unless the request was served as the spec says."""
    if spec.compressor == STOCK:
        if reply.record is not None:
            raise NotCompressed("the stock server says that a compressor is active")
    elif reply.record is None:
        raise NotCompressed(f"{spec.label}: the answer carries no proof that the prompt was compressed")
    elif not reply.record["compressed"]:
        raise NotCompressed(
            f"{spec.label}: a prompt of {reply.prompt_tokens} tokens was served dense ({reply.record['reason']})"
        )


def score(exchange: Exchange, reply: Reply) -> Answer:
    """Return the line that is kept of an answer; of free text also the ids of its tokens, for `add_forced`."""
    question, said = exchange.question, reply.text.strip()
    if isinstance(exchange, CaseExchange):
        assert exchange.case is not None, "a question of a data set has its case"
        scored = score_case(exchange.case, said)
    else:
        scored = {"right": is_right(question, said), "partial": words_right(said, question)}
    return {
        "key": exchange.key,
        "question": question.text,
        "answer": question.answer,
        "said": said,
        **scored,
        "prompt_tokens": reply.prompt_tokens,
        "record": reply.record,
        "tokens": reply.tokens,
        "top": reply.top,
        **({} if question.answer else {"ids": reply.ids}),
    }


def add_forced(answer: Answer, exchange: Exchange, client: Client, stock: Answer | None) -> None:
    """Add to an answer of free text what the server would have said at each token of stock's."""
    if stock and stock.get("ids") and exchange.forced is None:
        answer["forced_top"] = client.force(exchange.messages, stock["ids"])


@contextlib.contextmanager
def _workers(count: int, stop: threading.Event) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads. When the block ends, for whatever reason, no request starts, and those on their way finish."""
    pool = ThreadPoolExecutor(max_workers=count)
    try:
        yield pool
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def ask_cells(
    settings: RunSettings,
    cells: Sequence[Questions],
    client: Client,
    file: AnswerFile,
    *,
    advance: Callable[[], Any],
    stock: Answers,
) -> None:
    """Ask the running server of a file's spec whatever the file does not have yet.

    The questions about one scene are asked one after the other, so that the radix tree has its images or its text;
    scenes, and the questions of a data set, run concurrently.

    Parameters
    ----------
    stock : what stock answered: the free text that the server is made to write after it has written its own.

    Raises
    ------
    Unreachable, BadAnswer, NotCompressed
        What was answered before is in the file.
    """
    stop = threading.Event()
    # SGLang encodes the images of one batch together, on the CPU with attention that is quadratic in all their patches.
    new_images = threading.Lock()

    # Every question of a data set has images of its own: one at a time, they would leave a GPU with little to do.
    together = all(isinstance(cell, DataSet) for cell in cells) and detect_device() != "cpu"

    def ask_scene(cell: Questions, index: int) -> None:
        exchanges = exchanges_of(settings.seed, cell, index, file.answers.keys(), settings.draw)
        for number, exchange in enumerate(exchanges):
            with contextlib.nullcontext() if number or together else new_images:
                if stop.is_set():
                    return
                reply = client.ask(
                    exchange, cell.max_tokens if isinstance(cell, DataSet) else exchange.question.max_tokens
                )
            check_service(file.spec, reply)
            answer = score(exchange, reply)
            add_forced(answer, exchange, client, stock.get(exchange.key))
            file.append(answer)
            advance()

    with _workers(settings.concurrency, stop) as pool:
        futures = [pool.submit(ask_scene, cell, index) for cell in cells for index in range(cell.n)]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
