"""Model the host link: what a decode step fetches, counted while trained models answer, before and after each measure.

``python -m benchmarks.link_model --json`` lets a model answer with its full cache, then decodes the same answer under
each of MEASURES and records which chunks the dynamic heads choose at every step, and which of them have to be fetched.
From these counts follow bytes a step, of the model itself and of Qwen2.5-VL-7B's shape with long prompts, and the time
that they take on a link whose pace was measured. The quality of the answers is that of the same decode. `--table ROWS`
prints the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.chunk_trace import TracedReplay, rounded
from benchmarks.provenance import run_metadata
from benchmarks.quality.cases import END_OF_TURN, TEXT, Cell, Exchange, make_exchanges
from benchmarks.quality.models import MODELS
from benchmarks.replay import Held, Prompt, Replay, ReplayedModel, compress, everything
from hybridkv_kernels.host_pages import record_bytes
from sglang_hybridkv.compressors import get_compressor
from sglang_hybridkv.compressors.hybridkv import HybridKV, HybridKVConfig
from sglang_hybridkv.config import parse_config
from sglang_hybridkv.requests.admission import DenseReason, PoolShape, decide

BUDGET = 0.1
MAX_ANSWER_TOKENS = 48
BF16_BYTES = 2
PAGE_GB_S, ROW_GB_S = 50.0, 28.0
"""Pace of an H200's link for whole pages and for single rows, both measured (docs/performance.md)."""
LONG_HEADS, LONG_HEAD_DIM, LONG_CONTEXT, LONG_REQUESTS = 28 * 4, 128, 32768, 16
"""KV heads of Qwen2.5-VL-7B in all layers, their size, and the workload that the aims are about."""
CELLS = {
    "smollm2": (
        Cell(TEXT, 2000, 4, ("summary", "sequel")),
        Cell(TEXT, 1000, 3, ("summary", "sequel")),
        Cell(TEXT, 2000, 4, ("needle", "price", "crew")),
    ),
    "tiny": (Cell("coherent", 1600, 5, ("get", "list", "chain")),),
}
"""What each model is asked."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Measure:
    """One way to serve dynamic heads.

    Attributes
    ----------
    config : settings of hybridkv.
    prefetch : attend to what the previous query has retrieved, unless the queries differ (prefetch "previous_query").
    host_dtype : of rows in host memory.
    """

    name: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    prefetch: bool = False
    host_dtype: str = "same"

    @property
    def compressor(self) -> HybridKV:
        """With these settings, at BUDGET."""
        return HybridKV(parse_config({"min_prompt_tokens": 64, **self.config}, HybridKVConfig, budget=BUDGET))

    def chunk_bytes(self, head_dim: int) -> int:
        """Bytes of one chunk of one head on the link, keys and values."""
        return self.compressor.config.tokens_per_chunk * record_bytes(head_dim, BF16_BYTES, self.host_dtype)


_PAGES = {"chunk_size": 8}
MEASURES = (
    Measure("pages, without hysteresis", {**_PAGES, "hysteresis": 0.0}),
    Measure("pages", _PAGES),
    Measure("pages, prefetch", _PAGES, prefetch=True),
    Measure("pages, one byte an element", _PAGES, host_dtype="int8"),
    Measure("tokens, without hysteresis", {"hysteresis": 0.0}),
    Measure("tokens (the default)"),
    Measure("tokens, prefetch", prefetch=True),
    Measure("tokens, one byte an element", host_dtype="int8"),
    Measure("tokens, prefetch, one byte an element", prefetch=True, host_dtype="int8"),
)


def full_answer(model: ReplayedModel, prompt: Prompt, max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [T] that the model answers with its full cache, and the logits [T, vocabulary] of each."""
    full = get_compressor("full")
    whole = everything(prompt, full(parse_config(None, full.config_class, budget=1.0)))
    ends = {model.tokenizer.convert_tokens_to_ids(END_OF_TURN), model.tokenizer.eos_token_id}
    replay, logits = Replay(model, prompt, [whole]), [prompt.logits]
    ids = [int(prompt.logits.argmax())]
    while len(ids) < max_tokens and ids[-1] not in ends:
        logits.append(replay.step(torch.tensor([[ids[-1]]]))[0, 0])
        ids.append(int(logits[-1].argmax()))
    return torch.tensor(ids), torch.stack(logits)


@torch.inference_mode()
def measure_answer(
    model: ReplayedModel, prompt: Prompt, held: Held, measure: Measure, ids: torch.Tensor, logits: torch.Tensor
) -> Row:
    """Traffic and quality of one answer of the full cache, ids [T] and logits [T, vocabulary], under a measure."""
    stored = prompt if measure.host_dtype == "same" else rounded(prompt, held.is_dynamic)
    replay = TracedReplay(model, stored, held, prefetch=measure.prefetch, whole=prompt)
    ours = replay.step(ids[None, :-1])[0].log_softmax(-1)
    full = logits[1:].log_softmax(-1)
    kept = ours.argmax(-1) == ids[1:]
    return {
        "traffic": replay.traffic,
        "kl": (full.exp() * (full - ours)).sum(-1),
        "kept": kept,
        "dynamic_heads": int(held.is_dynamic.sum()),
    }


def long_prompt(measure: Measure, miss_rate: float, waited_share: float) -> Row:
    """What LONG_REQUESTS requests of Qwen2.5-VL-7B's shape fetch a step when as large a share of chunks is missing.

    The rows of a dynamic head follow from the compressor's own arithmetic at that length. What is carried over from the
    measured answers is the share of chosen chunks that has to be fetched.
    """
    config = measure.compressor.config
    geometry = decide(LONG_CONTEXT, MAX_ANSWER_TOKENS, config, PoolShape(config.page_size, LONG_HEADS, sys.maxsize))
    assert not isinstance(geometry, DenseReason), geometry
    dynamic, ratio = geometry.max_dynamic_heads, config.dynamic_ratio
    rows = geometry.total_head_pages * config.page_size * ratio / (ratio * dynamic + LONG_HEADS - dynamic)
    always = (config.retrieval.num_sink_chunks + config.retrieval.num_recent_chunks) * config.tokens_per_chunk
    chosen = dynamic * (rows - always) / config.tokens_per_chunk
    fetched = LONG_REQUESTS * chosen * miss_rate * measure.chunk_bytes(LONG_HEAD_DIM)
    gb_s = PAGE_GB_S if config.tokens_per_chunk == config.page_size else ROW_GB_S
    return {
        "long_dynamic_heads": dynamic,
        "long_rows_per_dynamic_head": round(rows),
        "long_mb_per_step": round(fetched / 1e6, 1),
        "link_gb_s": gb_s,
        "long_link_ms": round(fetched / gb_s / 1e6, 2),
        "long_waited_ms": round(fetched * waited_share / gb_s / 1e6, 2),
    }


def summary(measure: Measure, answers: Sequence[Row], head_dim: int) -> Row:
    """The row of one measure, over all answers.

    A head begins with what prefill found salient, so that its first step fetches more than those that follow. The hit
    rate and the bytes are of the steps after the first.
    """
    traffic = [answer["traffic"] for answer in answers]

    def total(field: str, steps: slice) -> int:
        return sum(int(getattr(one, field)[steps].sum()) for one in traffic)

    first, later = slice(0, 1), slice(1, None)
    steps = sum(len(one.chosen) - 1 for one in traffic)
    chosen, fetched = (total(name, later) for name in ("chosen", "fetched"))
    miss_rate, waited = fetched / chosen, total("waited", later) / max(fetched, 1)
    kept = torch.cat([answer["kept"] for answer in answers])
    return {
        "measure": measure.name,
        "config": measure.config,
        "prefetch": measure.prefetch,
        "element_bytes": BF16_BYTES if measure.host_dtype == "same" else 1,
        "answers": len(answers),
        "steps": steps,
        "dynamic_heads": round(sum(answer["dynamic_heads"] for answer in answers) / len(answers), 1),
        "chosen_per_step": round(chosen / steps, 1),
        "hit_rate": round(1 - miss_rate, 4),
        "first_hit_rate": round(1 - total("fetched", first) / total("chosen", first), 4),
        "bytes_per_step": round(fetched / steps * measure.chunk_bytes(head_dim)),
        "waited_share": round(waited, 4),
        "correction_rate": round(total("corrected", later) / total("layers", later), 4),
        "kl": round(torch.cat([answer["kl"] for answer in answers]).mean().item(), 5),
        "tokens_kept": round(kept.float().mean().item(), 4),
        "answers_kept": round(sum(bool(answer["kept"].all()) for answer in answers) / len(answers), 4),
        **long_prompt(measure, miss_rate, waited),
    }


def cell_rows(name: str, model: ReplayedModel, cell: Cell, seed: int, console: Console) -> Iterator[Row]:
    """A row a measure: every question of a cell, answered with the full cache and decoded again under the measure."""
    answers: list[list[Row]] = [[] for _ in MEASURES]
    prompt_lens, head_dim = [], 0
    for prompt, exchange in _prompts(model, cell, seed):
        limit = MAX_ANSWER_TOKENS if not exchange.question.answer else exchange.question.max_tokens
        ids, logits = full_answer(model, prompt, min(limit, MAX_ANSWER_TOKENS))
        console.print(f"{name}, {exchange.key}: {len(prompt.ids)} tokens, answer of {len(ids)}", style="dim")
        if len(ids) < 3:  # one step to begin with and one that counts
            continue
        prompt_lens.append(len(prompt.ids))
        head_dim = prompt.k.shape[-1]
        kept: dict[str, Held] = {}
        for measure, found in zip(MEASURES, answers, strict=True):
            settings = str(measure.config)
            if settings not in kept:
                kept[settings] = compress(prompt, measure.compressor, len(ids) + 1)
            found.append(measure_answer(model, prompt, kept[settings], measure, ids, logits))
    head = {"bench": "link_model", "model": name, "scene": cell.scene, "context": cell.context, "budget": BUDGET}
    head |= {"tasks": list(cell.tasks), "prompt_tokens": round(sum(prompt_lens) / len(prompt_lens)), "seed": seed}
    for measure, found in zip(MEASURES, answers, strict=True):
        yield head | summary(measure, found, head_dim)


def _prompts(model: ReplayedModel, cell: Cell, seed: int) -> Iterator[tuple[Prompt, Exchange]]:
    for index in range(cell.n):
        base = None
        for exchange in make_exchanges(seed, cell, index, ()):
            base = model.prefill(model.encode(exchange.messages), base)
            yield base, exchange


COLUMNS = {
    "measure": "measure",
    "hit_rate": "chosen chunks on the device",
    "bytes_per_step": "fetched a step, measured",
    "kl": "KL to the full cache",
    "tokens_kept": "tokens kept",
    "answers_kept": "answers kept",
    "long_mb_per_step": "fetched a step, 16 x 32k",
    "long_link_ms": "on the link",
    "long_waited_ms": "of it attention waits",
}


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, a table for each model and kind of prompt."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        where = f"`{row['model']}`, {row['answers']} answers ({', '.join(row['tasks'])}) about"
        kind = "texts" if row["scene"] == TEXT else "scenes"
        where += f" {kind} of {row['prompt_tokens']:,} tokens, {row['steps']} steps"
        groups.setdefault(where, []).append(row)
    lines = []
    for where, some in groups.items():
        lines += [f"{where}:", "", f"| {' | '.join(COLUMNS.values())} |", "|---" * len(COLUMNS) + "|"]
        for row in some:
            cells = [row["measure"], f"{row['hit_rate']:.1%}", f"{row['bytes_per_step'] / 1e3:.0f} kB"]
            cells += [f"{row['kl']:.4f}", f"{row['tokens_kept']:.1%}", f"{row['answers_kept']:.0%}"]
            cells += [f"{row['long_mb_per_step']:.0f} MB", f"{row['long_link_ms']:.1f} ms"]
            cells += [f"{row['long_waited_ms']:.1f} ms"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=list(CELLS), default=list(CELLS), help="of bench_quality (default: all)")
    add("--seed", type=int, default=0, help="of texts and scenes (default: 0)")
    add("--json", action="store_true", help="print one JSON object a row; else a readable line a row")
    add("--table", type=Path, metavar="ROWS", help="print these rows as Markdown; nothing is measured")
    args = parser.parse_args(argv)
    if args.table is not None:
        print(table([json.loads(line) for line in args.table.read_text().splitlines()]))
        return 0
    console, origin = Console(stderr=True, soft_wrap=True), run_metadata()
    for name in args.models:
        model = ReplayedModel(MODELS[name].folder())
        for cell in CELLS[name]:
            for row in cell_rows(name, model, cell, args.seed, console):
                line = ", ".join(f"{key} {value}" for key, value in row.items())
                print(json.dumps(row | origin) if args.json else line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
