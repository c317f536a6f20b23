"""Chat about drawn scenes with compressed servers and a stock one, and compare them.

``python -m benchmarks.demo`` serves the trained tiny Qwen2.5-VL with the same flags, with ``--kv-compressor hybridkv``
at two budgets and without; asks each server the same questions over the OpenAI API, streaming; then prints a table. The
last line of stdout is one JSON object with the figures. The exit status is 1 when a request was not compressed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.bench_memory import random_prompt
from benchmarks.harness import (
    ChatAnswer,
    NotCompressed,
    Server,
    compression_flags,
    detect_device,
    end_on_sigterm,
    engine_flags,
    parallel,
)
from benchmarks.provenance import run_metadata
from benchmarks.scenes import Question, Scene, ask, draw_scene, image_url, user_message

MODEL = Path(__file__).resolve().parent / "models" / "tiny-qwen2_5_vl-scenes"
BUDGETS = (0.1, 0.05)
SEED = 5
CHATS = (
    ("coherent", ((28, 29), (28, 29)), ("chain", "list", "get")),
    ("coherent", ((24, 24), (24, 24), (24, 24)), ("list", "chain", "get")),
    ("shuffled", ((40, 40),), ("get", "list", "chain")),
)
"""Arrangement and images of each chat, and what it asks, turn after turn."""
LONG_LAYOUT = ((20, 20),) * 10
LONG_NEW_TOKENS = 64
CROWD, CROWD_PROMPT_TOKENS, CROWD_NEW_TOKENS = 64, 1024, 32
POOL_TOKENS = 10 * (CROWD_PROMPT_TOKENS + CROWD_NEW_TOKENS)
LABELS = {
    "correct": "right answers in the chats",
    "ttft_ms": "first token, median of the chats (ms)",
    "tokens_per_second": "tokens/s, median of the chats",
    "long_prompt_tokens": "long prompt: tokens",
    "long_ttft_ms": "  first token (ms)",
    "long_tokens_per_second": "  tokens/s",
    "stock_kv_bytes": "  KV of stock (bytes)",
    "device_kv_bytes": "  KV on the device (bytes)",
    "resident_ratio": "  share of stock",
    "host_kv_bytes": "  KV of dynamic heads on the host (bytes)",
    "static_heads": "  KV heads static",
    "dynamic_heads": "  KV heads dynamic",
    "max_running": f"{CROWD_PROMPT_TOKENS:,}-token requests at once, of {CROWD}",
}
"""Figures of a server in the table."""
STEPS_PER_SERVER = 1 + sum(len(kinds) for *_, kinds in CHATS) + 2


Chat = tuple[Scene, tuple[Question, ...]]
"""A scene and the questions of its turns."""


@dataclass
class Run:
    """What one server did. `record` is that of the long prompt; `state` the totals before the crowd came."""

    budget: float | None
    turns: list[tuple[Question, ChatAnswer]] = field(default_factory=list)
    long: ChatAnswer | None = None
    record: dict[str, Any] | None = None
    state: dict[str, Any] | None = None
    max_running: int = 0

    @property
    def name(self) -> str:
        return "stock" if self.budget is None else f"hybridkv {self.budget:g}"

    @property
    def num_correct(self) -> int:
        return sum(answer.text == question.answer for question, answer in self.turns)

    def median(self, value: Callable[[ChatAnswer], float]) -> float:
        """Median over the turns of the chats."""
        return statistics.median(value(answer) for _, answer in self.turns)


def make_chats() -> tuple[list[Chat], Chat]:
    """Draw the scenes: those of the chats, and the long one."""
    rng = np.random.default_rng(SEED)
    chats = []
    for arrangement, layout, kinds in CHATS:
        scene = draw_scene(rng, layout, arrangement=arrangement)
        chats.append((scene, tuple(ask(rng, scene, kind) for kind in kinds)))
    scene = draw_scene(rng, LONG_LAYOUT)
    return chats, (scene, (ask(rng, scene, "get"),))


def _raw_prompt(chat: Chat) -> dict[str, Any]:
    """Return the body of /generate that asks the first question of a chat."""
    scene, (question, *_) = chat
    pictures = "<|vision_start|><|image_pad|><|vision_end|>" * len(scene.images)
    text = f"<|im_start|>user\n{pictures}{question.text}<|im_end|>\n<|im_start|>assistant\n"
    return {"text": text, "image_data": [image_url(image) for image in scene.images]}


def _show(console: Console, question: Question, answer: ChatAnswer) -> None:
    right = answer.text == question.answer
    mark = "[green]right[/]" if right else "[red]wrong[/]"
    expected = "" if right else f"  right answer: [bold]{escape(question.answer)}[/]"
    details = f"{answer.prompt_tokens} tokens, {answer.cached_tokens} cached, first token {answer.ttft * 1000:.0f} ms"
    console.print(f"  {escape(question.text)} -> {escape(answer.text)}  {mark}{expected}  [dim]({details})[/]")


def _hold_chat(server: Server, chat: Chat, run: Run, console: Console, advance: Callable[[], None]) -> None:
    """Ask the questions of a chat one after another; later turns keep the images and the answers so far."""
    scene, questions = chat
    messages = [user_message(scene, questions[0])]
    console.print(f"  [dim]images: {len(scene.images)}, cells: {scene.num_visual_tokens}[/]")
    for turn, question in enumerate(questions):
        if turn:
            messages.append({"role": "user", "content": question.text})
        answer = server.chat(messages, max_tokens=32)
        run.turns.append((question, answer))
        # The history gets the right answer, so that every server is asked the same in the next turn.
        messages.append({"role": "assistant", "content": question.answer})
        _show(console, question, answer)
        advance()


def _ask_long(server: Server, chat: Chat, run: Run, console: Console) -> None:
    scene, (question, *_) = chat
    console.print(f"  [dim]{len(scene.images)} images, longer than what the model was trained on: not scored[/]")
    sampling = {"max_new_tokens": LONG_NEW_TOKENS, "ignore_eos": True}
    run.long = server.chat([user_message(scene, question)], max_tokens=LONG_NEW_TOKENS, ignore_eos=True)
    details = f"first token {run.long.ttft * 1000:.0f} ms, then {run.long.tokens_per_second:.0f} tokens/s"
    console.print(f"  {run.long.prompt_tokens} tokens  [dim]({details})[/]")
    # The question is asked once more by /generate, whose answers say what compression did to the request.
    answer = server.generate(**_raw_prompt(chat), sampling_params=sampling)
    run.record, run.state = answer["meta_info"].get("kv_compressor"), server.compressor_state()


def _crowd(server: Server) -> int:
    """Send many requests at once; return how many the scheduler ran together."""

    def one(i: int) -> None:
        sampling = {"max_new_tokens": CROWD_NEW_TOKENS, "ignore_eos": True}
        server.generate(input_ids=random_prompt(i, CROWD_PROMPT_TOKENS), sampling_params=sampling)

    parallel(one, range(CROWD))
    return server.log_maximum("#running-req")


def _check_compressed(run: Run, num_before: int) -> None:
    """Raise unless every request was compressed: a dense answer would pass for a compressed one."""
    if not run.record or not run.state:
        raise NotCompressed("the server reports nothing under kv_compressor")
    if not run.record["compressed"]:
        raise NotCompressed(f"the long prompt was served dense: {run.record['reason']}")
    asked, done = len(run.turns) + 2, run.state["compressed_requests"] - num_before
    if done != asked:
        raise NotCompressed(f"{done} of {asked} requests were compressed; dense: {run.state['dense_requests']}")


def measure(budget: float | None, chats: list[Chat], long_chat: Chat, progress: Progress) -> Run:
    """Start a server, hold all conversations with it, and stop it. Budget None is stock SGLang."""
    console, run = progress.console, Run(budget)
    task = progress.add_task(run.name, total=STEPS_PER_SERVER)
    recipe = engine_flags(max_total_tokens=POOL_TOKENS, max_running_requests=CROWD + 4, chunked_prefill_size=2048)
    # The scheduler reports its running requests every fourth decode step.
    flags = [*recipe.flags, "--decode-log-interval", "4", *compression_flags(budget)]
    console.print(f"[bold]{run.name}[/]: starting the server")
    with Server(MODEL, flags, recipe.env, name=run.name.replace(" ", "-")) as server:
        progress.advance(task)
        num_before = (server.compressor_state() or {}).get("compressed_requests", 0)
        for chat in chats:
            _hold_chat(server, chat, run, console, lambda: progress.advance(task))
        _ask_long(server, long_chat, run, console)
        if budget is not None:
            _check_compressed(run, num_before)
        progress.advance(task)
        console.print(f"  {CROWD} requests of {CROWD_PROMPT_TOKENS} tokens at once")
        run.max_running = _crowd(server)
        progress.advance(task)
    return run


def figures(run: Run) -> dict[str, Any]:
    """Return one server's numbers."""
    assert run.long is not None
    row: dict[str, Any] = {"server": "stock" if run.budget is None else "hybridkv", "budget": run.budget}
    row |= {
        "correct": run.num_correct,
        "ttft_ms": round(run.median(lambda answer: answer.ttft) * 1000, 1),
        "tokens_per_second": round(run.median(lambda answer: answer.tokens_per_second), 1),
        "long_prompt_tokens": run.long.prompt_tokens,
        "long_ttft_ms": round(run.long.ttft * 1000, 1),
        "long_tokens_per_second": round(run.long.tokens_per_second, 1),
        "max_running": run.max_running,
    }
    if run.record and run.state:
        row |= {name: run.record[name] for name in ("resident_ratio", "static_heads", "dynamic_heads")}
        row |= {
            "device_kv_bytes": run.state["peak_device_kv_bytes"],
            "stock_kv_bytes": run.state["peak_stock_kv_bytes"],
        }
        row |= {"host_kv_bytes": run.record["host_bytes"], "chunk_fetch_hit_rate": run.state["chunk_fetch_hit_rate"]}
    return row


def make_table(runs: list[dict[str, Any]]) -> Table:
    """Return the comparison for people: one column per server, stock last."""
    table = Table("", title=f"KV compression beside stock SGLang, same flags ({detect_device()})", title_justify="left")
    for run in runs:
        table.add_column("stock" if run["budget"] is None else f"budget {run['budget']:g}", justify="right")
    for name, label in LABELS.items():
        values = (run.get(name, "-") for run in runs)
        table.add_row(label, *(value if isinstance(value, str) else f"{round(value, 3):,}" for value in values))
    return table


def main() -> int:
    """Run the demo; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    help_text = "shares of a prompt's KV to keep, one server each (default: 0.1 0.05)"
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS), help=help_text)
    args = parser.parse_args()
    end_on_sigterm()
    chats, long_chat = make_chats()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(soft_wrap=True)
    try:
        with Progress(*columns, console=console) as progress:
            runs = [figures(measure(budget, chats, long_chat, progress)) for budget in [*args.budgets, None]]
    except NotCompressed as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]COMPRESSION DID NOT RUN[/]: {escape(str(error))}")
        return 1
    num_questions = sum(len(questions) for _, questions in chats)
    console.print(make_table(runs))
    row = {"demo": "hybridkv", "device": detect_device(), "model": MODEL.name, "questions": num_questions}
    row |= {"max_total_tokens": POOL_TOKENS, "crowd_requests": CROWD, "crowd_prompt_tokens": CROWD_PROMPT_TOKENS}
    print(json.dumps(row | {"servers": runs} | run_metadata()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
