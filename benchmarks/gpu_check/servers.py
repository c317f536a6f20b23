"""Real servers: compression at budget 1.0 against stock, and at 0.1 beside it, with each attention backend."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench_memory import random_prompt
from benchmarks.gpu_check.reference import expect
from benchmarks.harness import Server, compression_flags, engine_flags, parallel
from benchmarks.serve import merge_flags

LOGPROB_TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
"""Largest difference of the log-probs of the same token at budget 1.0. Attention sums in another order there than in
stock's kernels, and in 16 bits each layer rounds that to a neighbouring number."""
BUDGET = 0.1
READY_SECONDS = 900.0
"""The first start on a GPU compiles kernels."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked of each server: prompts of these lengths, first alone, then all at once."""

    prompt_tokens: tuple[int, ...]
    new_tokens: int
    chunked_prefill_size: int = 1024

    def pool_tokens(self) -> int:
        """Tokens of the pool: every request counts twice, as at budget 1.0 its prompt and compressed pages coexist."""
        return 2 * sum(length + self.new_tokens for length in self.prompt_tokens) + 4096


@dataclasses.dataclass(frozen=True)
class Setup:
    """One comparison. `dtype` as SGLang's flag, `attention_backend` as SGLang's flag."""

    device: str
    attention_backend: str
    dtype: str

    @property
    def name(self) -> str:
        """As `--setups` has it."""
        return f"{self.attention_backend}:{self.dtype}"

    def flags(self, load: Load, budget: float | None) -> tuple[list[str], dict[str, str]]:
        """Flags and environment of a server. CUDA graphs and the overlap scheduler stay on, as in SGLang."""
        recipe = engine_flags(
            self.device,
            max_total_tokens=load.pool_tokens(),
            max_running_requests=len(load.prompt_tokens) + 4,
            chunked_prefill_size=load.chunked_prefill_size,
            dtype=self.dtype,
        )
        flags = merge_flags(list(recipe.flags), ["--attention-backend", self.attention_backend])
        # Heads of random weights get small budgets, so that a short prompt is compressed, too.
        config = None if budget is None else {"min_prompt_tokens": 64}
        return flags + compression_flags(budget, config), dict(recipe.env)


@dataclasses.dataclass(frozen=True)
class Answer:
    """Generated tokens, their log-probs, and what the compressor did, which a stock server does not say."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    record: dict[str, Any] | None


def setups(device: str) -> tuple[list[Setup], list[str]]:
    """What can be compared on a device, and what not, with the reason."""
    if device == "cpu":
        return [Setup("cpu", "torch_native", "float32")], [
            "attention backends triton and flashinfer, CUDA graphs: they need a GPU"
        ]
    # Not float32: SGLang's RMSNorm has no CUDA kernel for it, and stock's Triton kernels multiply it as TF32.
    found = [Setup("cuda", "triton", "float16"), Setup("cuda", "triton", "bfloat16")]
    if importlib.util.find_spec("flashinfer") is None:
        return found, ["attention backend flashinfer: the package flashinfer is not installed"]
    return [*found, Setup("cuda", "flashinfer", "bfloat16")], []


def compare(ours: Sequence[Answer], stock: Sequence[Answer]) -> Row:
    """How far answers agree: the requests with the same tokens, and the largest difference of log-probs.

    The difference is taken over the tokens up to the first that differs, where both servers had read the same.
    """
    worst, same, common, total = 0.0, 0, 0, 0
    for mine, theirs in zip(ours, stock, strict=True):
        pairs = list(zip(mine.ids, theirs.ids, strict=True))
        agreed = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        differences = [abs(a - b) for a, b in zip(mine.logprobs[:agreed], theirs.logprobs[:agreed], strict=True)]
        worst = max([worst, *differences])
        same, common, total = same + (agreed == len(pairs)), common + agreed, total + len(pairs)
    row = {"requests": len(stock), "same_tokens": same, "common_prefix": round(common / max(total, 1), 4)}
    return row | {"max_logprob_difference": float(f"{worst:.3g}")}


def judge(row: Row) -> None:
    """Mismatch when the comparison at budget 1.0 is not what the dtype promises, or graphs or overlap are off."""
    dtype = row["dtype"]
    where = f"{row['attention_backend']}, {dtype}, budget 1.0"
    if dtype == "float32":
        expect(row["same_tokens"] == row["requests"], f"{where}: tokens differ from stock's")
    expect(row["common_prefix"] > 0, f"{where}: no answer begins as stock's does")
    worst, limit = row["max_logprob_difference"], LOGPROB_TOLERANCE[dtype]
    expect(worst <= limit, f"{where}: log-probs differ by {worst:g}, tolerance {limit:g}")
    expect(row["overlap"], f"{where}: the overlap scheduler is off")
    expect(row["device"] == "cpu" or row["decode_graphs"] == "full", f"{where}: CUDA graphs are {row['decode_graphs']}")


def comparisons(setup: Setup, model: Path, load: Load) -> Iterator[Row]:
    """Start stock and compressing servers one after another; a row a budget. Mismatch when 1.0 differs from stock."""
    stock, _ = _answers(setup, model, load, None)
    for budget in (1.0, BUDGET):
        answers, running = _answers(setup, model, load, budget)
        ratios = [
            answer.record["resident_ratio"] for answer in answers if answer.record and answer.record["compressed"]
        ]
        expect(len(ratios) == len(answers), f"budget {budget}: {len(answers) - len(ratios)} requests were served dense")
        row: Row = dataclasses.asdict(setup) | {"budget": budget} | compare(answers, stock) | running
        row |= {"model": model.name, "resident_ratio": round(max(ratios), 4), "ok": True}
        if budget == 1.0:
            judge(row)
        yield row


def _answers(setup: Setup, model: Path, load: Load, budget: float | None) -> tuple[list[Answer], dict[str, Any]]:
    """Each prompt alone, then all at once: decode alone and in a batch that changes."""
    flags, env = setup.flags(load, budget)
    name = f"{setup.attention_backend}-{setup.dtype}-{'stock' if budget is None else budget}"
    with Server(model, flags, env, name=name, ready_seconds=READY_SECONDS) as server:
        alone = [_ask(server, seed, length, load.new_tokens) for seed, length in enumerate(load.prompt_tokens)]
        numbered = list(enumerate(load.prompt_tokens, start=100))
        together = parallel(lambda item: _ask(server, *item, load.new_tokens), numbered)
        info = server.server_info()
        graphs = "disabled" if setup.device == "cpu" else info["cuda_graph_config"]["decode"]["backend"]
        return alone + together, {"overlap": not info["disable_overlap_schedule"], "decode_graphs": graphs}


def _ask(server: Server, seed: int, length: int, new_tokens: int) -> Answer:
    sampling = {"max_new_tokens": new_tokens, "ignore_eos": True}
    body = {"input_ids": random_prompt(seed, length), "sampling_params": sampling, "return_logprob": True}
    meta = server.generate(**body)["meta_info"]
    pairs = [(token, value) for value, token, *_ in meta["output_token_logprobs"]]
    ids, logprobs = zip(*pairs, strict=True)
    return Answer(ids, logprobs, meta.get("kv_compressor"))
