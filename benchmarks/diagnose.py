"""What compression does inside a model: every KV head beside full attention, while the right answer is decoded.

``python -m benchmarks.diagnose --model-path M --compressor hybridkv --budget 0.1 --json`` prints one JSON object for
each KV head, then one for all of them, and nothing else on stdout. The model runs in this process on the CPU with its
full cache, along a prompt of bench_quality and its right answer; what `benchmarks.replay` holds of the prompt is asked
the same queries beside it. So a head's error is its own: no head sees what another one has lost.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console

from benchmarks.provenance import run_metadata
from benchmarks.quality.cases import CONTEXTS, Cell, contexts_of, make_exchanges
from benchmarks.replay import Held, Prompt, Replay, ReplayedModel, compress, everything
from hybridkv_kernels.score_heads import STATISTICS, score_heads
from sglang_hybridkv.compressors import Compressor, get_compressor
from sglang_hybridkv.config import parse_config
from sglang_hybridkv.requests.spans import num_observation_rows

MEASURES = ("is_dynamic", "rows_kept", "output_error", "captured_mass", "needle_survival")


class Comparison:
    """Attention for `ReplayedModel.run`: the full cache's, beside which a setting attends to what it holds.

    Attributes
    ----------
    found : [3, L, H]: sums over the queries so far of the last three of MEASURES.
    """

    def __init__(self, prompt: Prompt, held: Held, whole: Held):
        self.prompt = prompt
        self.full, self.ours = (Replay(None, prompt, [one]) for one in (whole, held))
        self.found = torch.zeros(3, *prompt.shape)

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        """[1, H * G, T, D]: full attention of T new queries, all of them in one call a layer."""
        seen = self.ours.seen(layer_idx, q)[0]  # [H, T, N]; before `attend`, which leaves other chunks resident
        full, ours = (one.attend(layer_idx, q, k, v, scaling) for one in (self.full, self.ours))
        grouped, num_prompt = q.unflatten(1, (k.shape[1], -1))[0], len(self.prompt.ids)  # [H, G, T, D]
        keys = torch.cat((self.prompt.k[layer_idx].transpose(0, 1), k[0]), dim=1)
        place = torch.arange(keys.shape[1])
        logits = grouped @ keys.transpose(1, 2).unsqueeze(1) * scaling
        weights = logits.masked_fill(place > place[num_prompt:, None], float("-inf")).softmax(-1).mean(dim=1)
        on_prompt = weights[..., :num_prompt]  # [H, T, N]
        by_head = (x[0].unflatten(0, (k.shape[1], -1)).transpose(1, 2).flatten(2) for x in (ours - full, full))
        lost, whole = (x.norm(dim=-1) for x in by_head)
        needle = on_prompt.argmax(dim=-1, keepdim=True)
        self.found[0, layer_idx] = (lost / whole).sum(dim=1)
        self.found[1, layer_idx] = (on_prompt * seen).sum(dim=(1, 2)) + weights[..., num_prompt:].sum(dim=(1, 2))
        self.found[2, layer_idx] = seen.gather(2, needle).sum(dim=(1, 2))
        return full


def all_statistics(prompt: Prompt, compressor: Compressor) -> dict[str, torch.Tensor]:
    """[L, H] of each statistic that `score_heads` has with its default fractions, whichever the compressor uses."""
    config = compressor.config
    rows = num_observation_rows(prompt.spans, len(prompt.ids), config.observation_rows)
    settings = {"chunk_size": config.page_size, "num_sinks": config.num_sink_tokens, "num_recent": config.recent_window}

    def one(name: str, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return score_heads(q[-rows:].contiguous(), k, scaling=prompt.scaling, statistic=name, **settings)[0]

    layers = list(zip(prompt.q, prompt.k, strict=True))
    return {name: torch.stack([one(name, q, k) for q, k in layers]) for name in STATISTICS}


@torch.inference_mode()
def measure_prompt(
    model: ReplayedModel, prompt: Prompt, answer: torch.Tensor, compressor: Compressor
) -> tuple[dict[str, torch.Tensor], float]:
    """Put one prompt through a compressor and decode its right answer, token ids [T].

    Returns
    -------
    Measures [L, H], fp32, by name, and the share of the answer's tokens that the model predicts with its full cache.
    The last three of MEASURES are means over the answer's tokens, each of which is a decode step.

    is_dynamic : 1 for a head that retrieves chunks, else 0.
    rows_kept : prompt rows in the head's pages.
    output_error : norm of the difference to the output of full attention, over the norm of that.
    captured_mass : probability of full attention on the rows that the step attended to, mean over the group.
    needle_survival : 1 when the prompt key with the largest probability was among those rows, else 0.
    STATISTICS : see `all_statistics`.
    """
    held = compress(prompt, compressor, len(answer) + 1)
    comparison = Comparison(prompt, held, everything(prompt, compressor))
    start = len(prompt.ids) + prompt.position_delta
    logits = model.run(answer[None], torch.arange(start, start + len(answer)), comparison)[0]
    predicted = torch.cat((prompt.logits[None], logits[:-1])).argmax(-1)
    rows_kept = held.num_pages * compressor.config.page_size
    measures = (held.is_dynamic.float(), rows_kept.float(), *(comparison.found / len(answer)))
    named = dict(zip(MEASURES, measures, strict=True)) | all_statistics(prompt, compressor)
    return named, (predicted == answer).float().mean().item()


def result_rows(measured: Sequence[dict[str, torch.Tensor]]) -> Iterator[dict[str, Any]]:
    """A row for each head, means over prompts, then one for all heads, with layer and kv_head null."""
    means = {name: torch.stack([one[name] for one in measured]).double().mean(dim=0) for name in measured[0]}
    num_layers, num_kv_heads = means["output_error"].shape
    heads = [(layer_idx, kv_head) for layer_idx in range(num_layers) for kv_head in range(num_kv_heads)]
    for layer, head in [*heads, (None, None)]:
        values = {name: round((x.mean() if layer is None else x[layer, head]).item(), 5) for name, x in means.items()}
        statistics = {name: values.pop(name) for name in STATISTICS}
        yield {"layer": layer, "kv_head": head, **values, "statistics": statistics}


def diagnose(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Ask the questions of bench_quality that the arguments name, and measure; returns the rows."""
    compressor_class = get_compressor(args.compressor)
    compressor = compressor_class(parse_config(args.config, compressor_class.config_class, budget=args.budget))
    context = args.context or contexts_of(args.scene)[1]
    cell = Cell(args.scene, context, args.num_prompts, (args.task,))
    exchanges = [one for index in range(cell.n) for one in make_exchanges(args.seed, cell, index, ())]
    if not exchanges or not exchanges[0].question.answer:
        raise ValueError(f"--task = {args.task!r}: {args.scene} scenes have no right answer to it")
    try:
        model = ReplayedModel(args.model_path)
    except OSError:
        raise ValueError(f"--model-path = {args.model_path!r} is not the folder of a checkpoint") from None
    measured, prompt_lens, accuracies = [], [], []
    for exchange in exchanges:
        prompt = model.prefill(model.encode(exchange.messages))
        answer = model.tokenizer(exchange.question.answer, add_special_tokens=False, return_tensors="pt")["input_ids"][
            0
        ]
        measures, accuracy = measure_prompt(model, prompt, answer, compressor)
        measured.append(measures)
        prompt_lens.append(len(prompt.ids))
        accuracies.append(accuracy)
        console.print(f"diagnose: prompt {len(measured)} of {cell.n}, {prompt_lens[-1]} tokens", style="dim")
    head = {"bench": "diagnose", "compressor": args.compressor, "budget": args.budget, "task": args.task}
    head |= {"scene": args.scene, "prompt_tokens": round(sum(prompt_lens) / len(prompt_lens)), "n": len(measured)}
    defaults = compressor.config_class.defaults()
    config = {name: value for name, value in compressor.config.model_dump().items() if value != defaults.get(name)}
    config.pop("budget", None)
    head |= {"full_accuracy": round(sum(accuracies) / len(accuracies), 4), "config": config}
    return [head | row for row in result_rows(measured)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the diagnosis; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-path", required=True, help="folder of a checkpoint that bench_quality can ask")
    parser.add_argument("--compressor", default="hybridkv", help="as --kv-compressor of SGLang")
    parser.add_argument("--budget", type=float, default=0.1, help="as --kv-compressor-budget")
    parser.add_argument("--config", help="as --kv-compressor-config: a JSON object, or @file")
    parser.add_argument("--task", default="chain", help="as one of --tasks of bench_quality (default: chain)")
    parser.add_argument("--scene", default="coherent", help="as one of --scenes of bench_quality (default: coherent)")
    help_text = f"as one of --contexts of bench_quality (default: {tuple(CONTEXTS)[1]}; of texts 2000)"
    parser.add_argument("--context", type=int, help=help_text)
    parser.add_argument("--num-prompts", type=int, default=4, help="prompts to average over (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object a row; else a readable line a row")
    args = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        rows = diagnose(args, console)
    except ValueError as error:
        console.print(f"diagnose: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    origin = run_metadata()
    for row in rows:
        print(json.dumps(row | origin) if args.json else ", ".join(f"{key} {value}" for key, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
