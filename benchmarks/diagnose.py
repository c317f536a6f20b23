"""What compression does inside a Qwen2.5-VL: every KV head beside full attention, while the right answer is decoded.

``python -m benchmarks.diagnose --model-path M --compressor hybridkv --budget 0.1 --json`` prints one JSON object for
each KV head, then one for all of them, and nothing else on stdout. The model runs in this process on the CPU with its
full cache, along a prompt and its right answer; its queries, keys and values then go through the compressor and the
decode kernels. So a head's error is its own: no head sees what another one has lost.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.compressed_prompt import ROW, CompressedPrompt, make_compressor
from benchmarks.provenance import run_metadata
from benchmarks.scenes import ask, draw_scene
from benchmarks.traced_model import Trace, TracedModel, full_attention
from hybridkv_kernels.score_heads import STATISTICS, score_heads
from sglang_hybridkv.compressors import Compressor
from sglang_hybridkv.requests.spans import num_observation_rows

MEASURES = ("is_dynamic", "rows_kept", "output_error", "captured_mass", "needle_survival")


def all_statistics(trace: Trace, compressor: Compressor) -> dict[str, torch.Tensor]:
    """[L, H] of each statistic that `score_heads` has, whichever the compressor uses."""
    config, end = compressor.config, trace.prompt_len
    rows = num_observation_rows(trace.spans, end, config.observation_rows)
    return {
        name: torch.stack(
            [
                score_heads(
                    q[end - rows : end],
                    k[:end],
                    scaling=trace.scaling,
                    statistic=name,
                    chunk_size=config.page_size,
                    num_sinks=config.num_sink_tokens,
                    num_recent=config.recent_window,
                )[0]
                for q, k in zip(trace.q, trace.k, strict=True)
            ]
        )
        for name in STATISTICS
    }


@torch.inference_mode()
def measure_prompt(trace: Trace, compressor: Compressor) -> dict[str, torch.Tensor]:
    """Put one prompt through a compressor and decode its answer.

    Returns
    -------
    [L, H], fp32, by name; the last three of MEASURES are means over the answer's tokens, each a decode step.

    is_dynamic : 1 for a head that retrieves chunks, else 0.
    rows_kept : prompt rows in the head's pages.
    output_error : norm of the difference to the output of full attention, over the norm of that.
    captured_mass : probability of full attention on the rows that the step attended to, mean over the group.
    needle_survival : 1 when the prompt key with the largest probability was among those rows, else 0.
    STATISTICS : of `score_heads` with its default fractions, whichever the compressor uses.
    """
    prompt = CompressedPrompt(trace, compressor)
    num_layers, length, num_kv_heads, _ = trace.k.shape
    found = torch.zeros(3, num_layers, num_kv_heads)
    steps = range(trace.prompt_len, length)
    for layer_idx in range(num_layers):
        for position in steps:
            out = prompt.decode(layer_idx, position).float().view(num_kv_heads, -1)
            full, probs = full_attention(trace, layer_idx, position)
            seen = torch.ones(num_kv_heads, position + 1, dtype=torch.bool)
            seen[:, : prompt.covered] = prompt.resident(layer_idx)
            weights = probs.mean(dim=1)
            needle = weights[:, : trace.prompt_len].argmax(dim=1, keepdim=True)
            found[0, layer_idx] += (out - full.flatten(1)).norm(dim=1) / full.flatten(1).norm(dim=1)
            found[1, layer_idx] += (weights * seen).sum(dim=1)
            found[2, layer_idx] += seen.gather(1, needle)[:, 0]
    rows_kept = prompt.table.num_head_pages[ROW] * compressor.config.page_size
    measures = (prompt.table.is_dynamic[ROW].float(), rows_kept.float(), *(found / len(steps)))
    return dict(zip(MEASURES, measures, strict=True)) | all_statistics(trace, compressor)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's coefficient, with mean ranks for ties; None where one of the two does not vary."""
    ranks = []
    for values in (x, y):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        if len(counts) < 2:
            return None
        ranks.append((counts.cumsum() - (counts - 1) / 2)[inverse])
    return float(np.corrcoef(*ranks)[0, 1])


def result_rows(measured: Sequence[dict[str, torch.Tensor]]) -> Iterator[dict[str, Any]]:
    """A row for each head, means over prompts, then one for all heads, with layer and kv_head null.

    The last one has `error_correlation`: of each statistic with output_error, over all heads and prompts. A statistic
    that tells which heads may be pruned has a clearly negative one when every head is pruned.
    """
    stacked = {name: torch.stack([one[name] for one in measured]) for name in measured[0]}

    def row(**place: Any) -> dict[str, Any]:
        layer, head = place["layer"], place["kv_head"]
        parts = {name: x if layer is None else x[:, layer, head] for name, x in stacked.items()}
        means = {name: round(part.double().mean().item(), 5) for name, part in parts.items()}
        measures = {name: means[name] for name in MEASURES}
        return place | measures | {"statistics": {name: means[name] for name in STATISTICS}}

    num_layers, num_kv_heads = stacked["output_error"].shape[1:]
    for layer_idx in range(num_layers):
        for kv_head in range(num_kv_heads):
            yield row(layer=layer_idx, kv_head=kv_head)
    error = stacked["output_error"].flatten().numpy()
    correlation = {name: rank_correlation(stacked[name].flatten().numpy(), error) for name in STATISTICS}
    rounded = {name: None if value is None else round(value, 3) for name, value in correlation.items()}
    yield row(layer=None, kv_head=None) | {"error_correlation": rounded}


def _layout(text: str) -> list[tuple[int, int]]:
    try:
        sizes = [tuple(int(side) for side in image.split("x")) for image in text.split(",")]
        return [(rows, columns) for rows, columns in sizes]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}; legal: rows x columns of each image, such as 20x20,30x25"
        ) from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; legal: an integer of at least 1")
    return int(text)


def diagnose(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Draw the scenes, trace the model, measure; returns the rows."""
    compressor = make_compressor(args.compressor, args.config, args.budget)
    rng = np.random.default_rng(args.seed)
    model = TracedModel(args.model_path, getattr(torch, args.dtype))
    measured, prompt_lens, accuracies = [], [], []
    for i in range(args.num_prompts):
        scene = draw_scene(rng, args.layout, arrangement=args.scene)
        trace = model.trace(scene, ask(rng, scene, args.task))
        measured.append(measure_prompt(trace, compressor))
        prompt_lens.append(trace.prompt_len)
        accuracies.append(trace.accuracy)
        console.print(f"diagnose: prompt {i + 1} of {args.num_prompts}, {trace.prompt_len} tokens", style="dim")
    head = {"bench": "diagnose", "compressor": args.compressor, "budget": args.budget, "task": args.task}
    head |= {"scene": args.scene, "prompt_tokens": round(sum(prompt_lens) / len(prompt_lens)), "n": args.num_prompts}
    defaults = compressor.config_class.defaults()
    config = {name: value for name, value in compressor.config.model_dump().items() if value != defaults.get(name)}
    config.pop("budget", None)
    head |= {"full_accuracy": round(sum(accuracies) / len(accuracies), 4), "config": config}
    return [head | row for row in result_rows(measured)]


def _show(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table("layer", "head", "dynamic", "rows", "error", "mass", "needle", *STATISTICS)
    for row in rows:
        place = ("all", "") if row["layer"] is None else (str(row["layer"]), str(row["kv_head"]))
        values = (*(row[name] for name in MEASURES), *row["statistics"].values())
        table.add_row(*place, *(f"{value:.3g}" for value in values))
    correlation = rows[-1]["error_correlation"].values()
    table.add_row(
        "correlation with error", *[""] * 6, *("" if value is None else f"{value:.2f}" for value in correlation)
    )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the diagnosis; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-path", required=True, help="folder of a Qwen2.5-VL checkpoint")
    parser.add_argument("--compressor", default="hybridkv", help="as --kv-compressor of SGLang")
    parser.add_argument("--budget", type=float, default=0.1, help="as --kv-compressor-budget")
    parser.add_argument("--config", help="as --kv-compressor-config: a JSON object, or @file")
    parser.add_argument("--task", default="chain", help="kind of question, see benchmarks/scenes.py")
    parser.add_argument("--scene", default="coherent", help="arrangement of the scene, see benchmarks/scenes.py")
    help_text = "rows x columns of cells of each image (default: 40x40, 1,600 visual tokens)"
    parser.add_argument("--layout", type=_layout, default=[(40, 40)], help=help_text)
    parser.add_argument("--num-prompts", type=_count, default=4, help="prompts to average over (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", action="store_true", help="one JSON object a row on stdout")
    args = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        rows = diagnose(args, console)
    except ValueError as error:
        console.print(f"diagnose: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    if args.json:
        metadata = run_metadata()
        for row in rows:
            print(json.dumps(row | metadata), flush=True)
    _show(console if args.json else Console(), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
