"""Prove on a GPU host what only a GPU can prove; on any other machine the same code, as far as it goes.

``python -m benchmarks.gpu_check`` runs the parts in order, correctness before timings, appends a JSON object a row to
the file that --out names, and ends with a short table. The exit status is 1 when something that ran failed.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.gpu_check.e2e_plan import make_plan
from benchmarks.gpu_check.parts import NAMES, Context, Outcome, chosen_parts, chosen_setups, run_part
from benchmarks.harness import detect_device, end_on_sigterm
from benchmarks.models.make_models import make_model
from benchmarks.provenance import run_metadata

MODEL = "tiny-qwen2_5_vl-d128"
COLORS = {"ran": "green", "reduced": "yellow", "failed": "bold red"}


def make_table(outcomes: Sequence[Outcome], device: str) -> Table:
    """The outcomes for people."""
    table = Table("part", "outcome", "rows", "seconds", "not run, or what failed", title=f"gpu_check on {device}")
    for outcome in outcomes:
        color = COLORS[outcome.status]
        notes = outcome.fault or "; ".join(outcome.skipped)
        status = f"[{color}]{outcome.status}[/]"
        table.add_row(outcome.part, status, str(outcome.rows), f"{outcome.seconds:.0f}", escape(notes))
    return table


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """1 when a part that ran failed."""
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--parts", default=",".join(NAMES), help="comma-separated; they run in this order (default: %(default)s)")
    add("--setups", default="", help="servers of the parts server and e2e, as triton:float16,stock:flashinfer")
    add("--out", type=Path, help="file to which the rows are appended, one JSON object a line")
    add("--model-path", type=Path, help=f"checkpoint of the servers (default: {MODEL}, made when it is not there)")
    add("--json", action="store_true", help="print the rows, and nothing else, on stdout")
    add("--device", choices=["cpu", "cuda"], default=detect_device(), help="default: what torch finds")
    add("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="of the random input (default: new)")
    e2e = parser.add_argument_group("of the part e2e")
    add = e2e.add_argument
    add("--requests", help="at once, a number a load (default: 16,64; 3 without a GPU)")
    add("--prompt-tokens", help="of each of them, a number a load (default: 32768,8192; 700 without a GPU)")
    add("--new-tokens", type=int, help="of each answer (default: 128; 24 without a GPU)")
    add(
        "--wall-requests", type=int, help="at once at the memory wall; 0: none (default: twice what stock's pool holds)"
    )
    add("--server-seconds", type=float, default=900.0, help="a server is given up after so long (default: %(default)s)")
    add("--kv-config", help="further settings of our servers, as --kv-compressor-config")
    args = parser.parse_args()
    try:
        args.parts = chosen_parts(args.parts)
        args.setups = chosen_setups(args.setups, args.device)
        args.plan = make_plan(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> int:
    """Run the parts; return the exit status."""
    args = _arguments()
    end_on_sigterm()
    console = Console(stderr=args.json, soft_wrap=True)
    model = functools.cache(lambda: args.model_path or make_model(MODEL))
    context, origin = Context(args.device, model, args.seed, args.setups, args.plan), run_metadata()

    def put(row: dict[str, Any]) -> None:
        line = json.dumps(row | origin)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as out:
                out.write(line + "\n")
        if args.json:
            print(line, flush=True)
        else:
            console.print(f"  {escape(json.dumps(row))}", style="dim" if row["ok"] else "red")

    outcomes = []
    for part in args.parts:
        console.print(f"[bold]{part.name}[/]: {part.title}")
        outcome = run_part(part, context, put)
        outcomes.append(outcome)
        console.print(f"  [{COLORS[outcome.status]}]{outcome.status}[/] {escape(outcome.fault or '')}")
        for reason in outcome.skipped:
            console.print(f"  skipped: {escape(reason)}")
    console.print(make_table(outcomes, args.device))
    return exit_status(outcomes)


if __name__ == "__main__":
    sys.exit(main())
