"""Command line of bench_quality."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.datasets import dataset_names
from benchmarks.harness import end_on_sigterm
from benchmarks.provenance import REPOSITORY, run_metadata
from benchmarks.quality.cases import CONTEXTS, SCENES, TASKS, TEXT, Cell
from benchmarks.quality.client import Client, Unreachable
from benchmarks.quality.data import MAX_TOKENS, DataSet, check_stored, load_data
from benchmarks.quality.models import MODELS, KnownModel
from benchmarks.quality.presets import PRESETS, Choices, Plan, Preset, Variants, build_plan
from benchmarks.quality.report import write_markdown, write_report
from benchmarks.quality.rows import Row
from benchmarks.quality.runs import RunSettings, plan_keys
from benchmarks.quality.servers import (
    CALIBRATION_FILE,
    REQUEST_TOKENS,
    STOCK,
    ServerSpec,
    check_compressors,
    code_fingerprint,
    model_fingerprint,
    with_calibration,
)
from benchmarks.quality.store import open_store
from benchmarks.quality.table import run_in_process, run_plan
from benchmarks.texts import LENGTHS, SPLITS, sources_digest
from sglang_hybridkv.compressors import get_compressor

STORES = REPOSITORY / ".cache" / "quality"
BAD_INPUT = 2
INTERRUPTED = 130


def _listed(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        return [convert(word.strip()) for word in text.split(",") if word.strip()]

    parse.__name__ = f"comma-separated list of {convert.__name__}"
    return parse


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_quality",
        description="Ask servers with and without compression the same questions; `report --out DIR` draws the result.",
    )
    parser.add_argument("--preset", default="headline", help=f"{', '.join(PRESETS)} (default: headline)")
    parser.add_argument("--compressors", type=_listed(str), help="in place of the preset's; stock is always asked")
    parser.add_argument("--budgets", type=_listed(float), help="shares of the KV rows, such as 0.1,0.05")
    parser.add_argument("--tasks", type=_listed(str), help=", ".join(TASKS))
    parser.add_argument("--scenes", type=_listed(str), help=", ".join(SCENES))
    parser.add_argument(
        "--contexts",
        type=_listed(int),
        help=f"visual tokens of drawn scenes: {_numbers(CONTEXTS)}; tokens of texts: {_numbers(LENGTHS)}",
    )
    parser.add_argument("--split", choices=SPLITS, help="half of the texts (default: development)")
    parser.add_argument("--n", type=int, help="scenes of each cell; questions of each data set (default: all)")
    parser.add_argument(
        "--data",
        action="append",
        metavar="NAME=FOLDER",
        help=f"ask a published data set in place of drawn scenes, may be repeated: {', '.join(dataset_names())}",
    )
    parser.add_argument("--max-tokens", type=int, help=f"longest answer to --data (default: {MAX_TOKENS})")
    parser.add_argument("--variants", help='settings of hybridkv by name, {"name": {"theta": 0.8}}: JSON or @file')
    parser.add_argument(
        "--model",
        choices=MODELS,
        default="tiny",
        help="known model, with its presets: the trained tiny one (default), or SmolLM2 with texts",
    )
    parser.add_argument("--model-path", type=Path, help="another checkpoint, asked what --model would be asked")
    parser.add_argument("--in-process", action="store_true", help="compute all answers here, in fp32, without servers")
    parser.add_argument("--base-url", help="ask a server that runs already, in place of starting some")
    parser.add_argument("--served-model", default="default", help="name of the model at --base-url")
    parser.add_argument("--calibration", type=Path, help=f"of sparsemm (default: {CALIBRATION_FILE} beside the model)")
    parser.add_argument("--dtype", help="as SGLang's --dtype")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--concurrency", type=int, help="requests at once (default: 8; smollm2: 2)")
    parser.add_argument("--out", type=Path, help="answers; what is there is not asked again (default: .cache/quality/)")
    parser.add_argument("--ignore-code-change", action="store_true", help="go on with answers of an older version")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row; else a readable line a row")
    return parser


def _report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_quality report", description="Tables and plots of stored answers.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the answers; the plots go there")
    parser.add_argument("--markdown", type=Path, help="write the tables into this file, not to stdout")
    return parser


def parse_variants(text: str | None) -> Variants | None:
    """Return the settings of --variants by name; ValueError in one sentence."""
    if text is None:
        return None
    try:
        variants = json.loads(Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text)
    except OSError as error:
        raise ValueError(f"--variants: {text[1:]} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--variants: not valid JSON ({error})") from None
    if not isinstance(variants, dict) or not all(isinstance(config, dict) for config in variants.values()):
        raise ValueError('--variants: expected {"name": {"field": value}}')
    defaults: Variants = {"": {}}
    return defaults | variants


def _preset(model: KnownModel, name: str) -> Preset:
    if name not in model.presets:
        raise ValueError(f"--preset: {name!r} is unknown; legal: {', '.join(model.presets)}")
    return model.presets[name]


def _data(args: argparse.Namespace) -> list[DataSet]:
    if args.max_tokens is not None and (args.max_tokens < 1 or not args.data):
        expected = "at least 1" if args.data else "only with --data"
        raise ValueError(f"--max-tokens: expected {expected}, got {args.max_tokens}")
    for flag in ("tasks", "scenes", "contexts"):
        if args.data and getattr(args, flag):
            raise ValueError(f"--{flag}: expected none with --data, which leaves the drawn scenes out")
    return load_data(args.data or (), args.n, args.max_tokens or MAX_TOKENS)


def _plan(args: argparse.Namespace) -> Plan:
    if args.concurrency is not None and args.concurrency < 1:
        raise ValueError(f"--concurrency: expected at least 1, got {args.concurrency}")
    if args.n is not None and args.n < 1:
        raise ValueError(f"--n: expected at least 1, got {args.n}")
    if args.seed < 0:
        raise ValueError(f"--seed: expected at least 0, got {args.seed}")
    data, preset = _data(args), _preset(MODELS[args.model], args.preset)
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Choices)}
    plan = build_plan(preset, Choices(**given | {"variants": parse_variants(args.variants)}))
    if args.split and not any(isinstance(cell, Cell) and cell.scene == TEXT for cell in data or plan[0][1]):
        raise ValueError("--split: only texts have halves; name them with --scenes or choose a --model of text")
    return [(spec, data) for spec, _ in plan] if data else plan


def served_spec(client: Client) -> tuple[ServerSpec, str]:
    """Return what the server at --base-url says about itself, and its model; Unreachable when it says nothing."""
    models = client.get("/v1/models")
    if models is None:
        raise Unreachable(f"--base-url: {client.url} has no /v1/models; expected an OpenAI endpoint")
    model = (models.get("data") or [{}])[0].get("id", client.model)
    states = (client.get("/server_info") or {}).get("internal_states") or [{}]
    active = states[0].get("kv_compressor")
    if not active:
        return ServerSpec(STOCK), model
    usual = get_compressor(active["name"]).config_class.defaults()
    config = {name: value for name, value in active["config"].items() if name != "budget" and value != usual.get(name)}
    return ServerSpec(active["name"], active["budget"], config), model


def _prepare(args: argparse.Namespace) -> tuple[RunSettings, Plan]:
    """Check everything that can be checked before a server starts."""
    plan = _plan(args)
    if not any(plan_keys(args.seed, cells) for _, cells in plan):
        raise ValueError("--tasks: none of them can be asked of these scenes")
    if args.base_url:
        with contextlib.closing(Client(args.base_url, args.served_model)) as client:
            spec, model = served_spec(client)
        plan = [(spec, plan[0][1])]
        identity = {"model": model, "seed": args.seed, "dtype": "served", "code": "served"}
        name = "-".join([re.sub(r"[^\w.]+", "_", model), str(args.seed), "served"])
    else:
        check_compressors([spec.compressor for spec, _ in plan])
        args.model_path = args.model_path or MODELS[args.model].folder()
        args.calibration = args.calibration or args.model_path / CALIBRATION_FILE
        plan = [(with_calibration(spec, args.calibration), cells) for spec, cells in plan]
        identity = {"model": model_fingerprint(args.model_path), "seed": args.seed, "dtype": args.dtype}
        identity["code"] = code_fingerprint()
        name = "-".join(str(value) for value in identity.values() if value is not None)
    data = [cell for cell in plan[0][1] if isinstance(cell, DataSet)]
    if args.in_process:
        if data or args.base_url or args.dtype:
            raise ValueError("--in-process: expected without --data, --base-url and --dtype")
        identity["engine"] = "in process"
        name += "-in-process"
    if data:
        identity["max_tokens"] = data[0].max_tokens
        name += f"-data-{data[0].max_tokens}"
    lengths = [cell.context for cell in plan[0][1] if isinstance(cell, Cell) and cell.scene == TEXT]
    if lengths:
        identity["texts"] = sources_digest()
    out = args.out or STORES / name
    open_store(out, identity, ignore=("code",) if args.ignore_code_change else ())
    check_stored(out, data)
    settings = RunSettings(
        out=out,
        seed=args.seed,
        concurrency=args.concurrency or MODELS[args.model].concurrency,
        # The text of one request and that of the next one.
        request_tokens=max([REQUEST_TOKENS, *(2 * length for length in lengths)]),
        model=None if args.base_url else args.model_path,
        dtype=args.dtype,
        calibration=args.calibration,
        base_url=args.base_url,
        served_model=args.served_model,
        in_process=args.in_process,
    )
    return settings, plan


def _emitter(args: argparse.Namespace) -> Callable[[list[Row]], None]:
    origin = run_metadata() | {"model": args.served_model if args.base_url else args.model_path.name, "seed": args.seed}

    def emit(rows: list[Row]) -> None:
        for row in rows:
            known = ", ".join(f"{key} {value}" for key, value in row.items() if value not in (None, "", {}))
            print(json.dumps(row | origin) if args.json else known, flush=True)

    return emit


def _measure(arguments: Sequence[str]) -> int:
    args = _parser().parse_args(arguments)
    settings, plan = _prepare(args)
    try:
        if settings.in_process:
            results, errors = run_in_process(settings, plan, _emitter(args)), []
        else:
            results, errors = run_plan(settings, plan, _emitter(args))
    except (KeyboardInterrupt, SystemExit):
        print(f"interrupted: the answers so far are in {settings.out}; run the same command to go on", file=sys.stderr)
        return INTERRUPTED
    if errors:
        count = f"{len(errors)} of {len(plan)} servers"
        print(
            f"error: {count} could not be measured (see above); the answers so far are in {settings.out}, "
            "run the same command to go on",
            file=sys.stderr,
        )
        return BAD_INPUT
    if args.preset == "smoke" and not args.base_url and not args.data:
        verdict = MODELS[args.model].verdict(results)
        if verdict:
            print(f"failed: {verdict}", file=sys.stderr)
            return 1
    return 0


def _report(arguments: Sequence[str]) -> int:
    args = _report_parser().parse_args(arguments)
    text, plots = write_report(args.out)
    if args.markdown:
        write_markdown(text, args.markdown)
    else:
        print(text)
    for path in plots:
        print(f"wrote {path}", file=sys.stderr)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or report; return the exit status: 1 a failed smoke test, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end_on_sigterm()
    try:
        return _report(arguments[1:]) if arguments[:1] == ["report"] else _measure(arguments)
    except (ValueError, Unreachable, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
