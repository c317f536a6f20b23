"""Command line of ``hybridkv``.

Exit status: 0 done, 1 a fault that `doctor` found, 2 bad input, 130 interrupted (finished work is kept).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_hybridkv.cli.samples import SampleSource

DEFAULT_PAGES = 100


class _Version(argparse.Action):
    """Prints the installed versions without importing any of the packages."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        def version_of(name: str) -> str:
            try:
                return f"{name} {metadata.version(name)}"
            except metadata.PackageNotFoundError:
                return f"{name} is not installed"

        print(", ".join(map(version_of, ("sglang-hybridkv", "sglang", "torch"))))
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hybridkv", description="Tools of the SGLang plugin sglang-hybridkv.")
    parser.add_argument("--version", action=_Version, nargs=0, help="versions of this plugin, SGLang and torch")
    commands = parser.add_subparsers(dest="command", required=True)
    calibrate = commands.add_parser(
        "calibrate",
        help="compute a model's visual-head scores for --kv-compressor sparsemm",
        description="Compute the visual-head scores of a Qwen2-VL or Qwen2.5-VL checkpoint, as SparseMM does.",
    )
    calibrate.add_argument("--model-path", type=Path, required=True, metavar="DIR", help="local checkpoint")
    calibrate.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file to write")
    calibrate.add_argument(
        "--samples", type=int, metavar="N", help=f"pictures to read ({DEFAULT_PAGES}; with --samples-from: all)"
    )
    calibrate.add_argument("--seed", type=int, default=0, help="of the pages that are drawn (0)")
    calibrate.add_argument(
        "--samples-from", type=Path, metavar="FOLDER", help="read samples.jsonl and its pictures instead of drawing"
    )
    calibrate.add_argument(
        "--top-of",
        choices=("visual", "all"),
        default="visual",
        help="the key that must lie in a word's box: the top one of the visual tokens, or of all keys (visual)",
    )
    calibrate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    calibrate.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    _add_capacity(commands)
    doctor = commands.add_parser(
        "doctor",
        help="what a server would meet on this machine, without starting it",
        description="Look at versions, plugin, device and kernels, and with flags of a server at the model and at "
        "what would be refused. No server is started. Exit status 1 when something is at fault.",
    )
    doctor.add_argument(
        "flags", metavar="FLAG", nargs=argparse.REMAINDER, help="as sglang.launch_server would get them"
    )
    bench = commands.add_parser(
        "bench",
        help="SGLang's offline benchmarks with the flags of this plugin",
        description="Run sglang.benchmark.NAME with flags that SGLang's own command does not know. The result of "
        "offline_throughput says how many requests were compressed.",
    )
    bench.add_argument("name", metavar="NAME", help="offline_throughput or one_batch_server")
    bench.add_argument("flags", metavar="FLAG", nargs=argparse.REMAINDER, help="as SGLang's benchmark would get them")
    inspect = commands.add_parser(
        "inspect",
        help="draw what a server kept of a prompt",
        description="Ask a running server that publishes its plans (docs/events.md), or read a file of --save, and "
        "draw types, pages and kept tokens of all heads, and what was kept of each image.",
    )
    inspect.add_argument("--url", default="http://127.0.0.1:30000", help="of the server (%(default)s)")
    inspect.add_argument("--api-key", metavar="KEY", help="where the server wants one")
    inspect.add_argument("--prompt", metavar="TEXT", help="@ and a path reads a file")
    inspect.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="repeatable")
    inspect.add_argument("--from", dest="source", type=Path, metavar="FILE", help="of an earlier --save; asks nobody")
    inspect.add_argument("--save", type=Path, metavar="FILE", help="keep the plan and the images")
    inspect.add_argument("--png", type=Path, metavar="FILE", help="write the drawing")
    inspect.add_argument("--html", type=Path, metavar="FILE", help="write a page with all of it")
    watch = commands.add_parser(
        "watch",
        help="what a running server holds, again and again",
        description="Show what a compressing server says of itself under /server_info, until Ctrl-C.",
    )
    watch.add_argument("--url", default="http://127.0.0.1:30000", help="of the server (%(default)s)")
    watch.add_argument("--api-key", metavar="KEY", help="where the server wants one")
    watch.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="(%(default)g)")
    watch.add_argument("--once", action="store_true", help="print the figures once")
    config = commands.add_parser("config", help="settings of the compressors").add_subparsers(
        dest="config_command", required=True
    )
    explain = config.add_parser("explain", help="legal values, default and meaning of the fields of a compressor")
    explain.add_argument("name", metavar="NAME", help="value of --kv-compressor")
    explain.add_argument("field", metavar="FIELD", nargs="?", help="only this one")
    show = config.add_parser("print", help="all fields as a server would have them, as JSON")
    validate = config.add_parser("validate", help="exit status 2 and one sentence where a server would not start")
    for command in (show, validate):
        command.add_argument("name", metavar="NAME", help="value of --kv-compressor")
        command.add_argument("given", metavar="JSON", nargs="?", help="value of --kv-compressor-config, or @file")
        command.add_argument("--budget", type=float, metavar="B", help="value of --kv-compressor-budget")
    return parser


def _config(args: argparse.Namespace) -> Iterator[str]:
    if args.config_command == "explain":
        from sglang_hybridkv.cli.explain import explain

        yield from explain(args.name, args.field)
        return
    from sglang_hybridkv.compressors import get_compressor
    from sglang_hybridkv.config import parse_config

    config = parse_config(args.given, get_compressor(args.name).config_class, budget=args.budget)
    if args.config_command == "print":
        yield json.dumps(config.model_dump(), indent=1)
    else:
        yield f"{args.name} with budget {config.budget:g}: the settings are valid"


def _add_capacity(commands: argparse._SubParsersAction) -> None:
    capacity = commands.add_parser(
        "capacity",
        help="how many requests fit in a KV pool, and how fast they decode by the bytes they move",
        description="Compare stock SGLang with a compressed KV cache, by arithmetic: no server is started. "
        "docs/capacity.md explains each number.",
    )
    capacity.add_argument("--model-path", type=Path, required=True, metavar="DIR", help="checkpoint, or config.json")
    capacity.add_argument("--weight-gb", type=float, metavar="GB", help="weights (size of the safetensors files)")
    pool = capacity.add_mutually_exclusive_group(required=True)
    pool.add_argument("--pool-tokens", type=int, metavar="N", help="max_total_num_tokens in the log")
    pool.add_argument("--gpu-gb", type=float, metavar="GB", help="memory of the device, of which the pool is estimated")
    capacity.add_argument(
        "--mem-fraction-static", type=float, default=0.88, metavar="X", help="for --gpu-gb, as the server's (0.88)"
    )
    capacity.add_argument(
        "--load", action="append", required=True, metavar="P+N[:W]", help="tokens of prompt and answer; repeatable"
    )
    capacity.add_argument("--memory-gb-s", type=float, default=4000.0, metavar="X", help="of a copy (4000, an H200)")
    capacity.add_argument("--link-gb-s", type=float, default=50.0, metavar="X", help="from host memory (50, PCIe 5)")
    capacity.add_argument("--host-gb", type=float, metavar="GB", help="host store (as large as it needs to be)")
    capacity.add_argument(
        "--fetched-share",
        type=float,
        default=0.15,
        metavar="X",
        help="of a dynamic head's rows, what a step fetches: 1 - chunk_fetch_hit_rate of /server_info (0.15)",
    )
    capacity.add_argument("--price", type=float, metavar="X", help="of an hour of the machine")
    capacity.add_argument("--plot", type=Path, metavar="FILE", help="draw rates, and how many requests fit")
    capacity.add_argument("--kv-compressor", default="hybridkv", metavar="NAME")
    capacity.add_argument("--kv-compressor-budget", type=float, metavar="B")
    capacity.add_argument("--kv-compressor-config", metavar="JSON")
    capacity.add_argument("--json", action="store_true", help="one JSON object, in bytes, milliseconds and tokens")


def _capacity(args: argparse.Namespace) -> Iterator[str]:
    from sglang_hybridkv.cli import capacity
    from sglang_hybridkv.compressors import get_compressor
    from sglang_hybridkv.config import parse_config

    for flag in ("pool_tokens", "gpu_gb", "mem_fraction_static", "memory_gb_s", "link_gb_s", "weight_gb", "host_gb"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{flag.replace('_', '-')} = {value}: expected a number above 0")
    if args.mem_fraction_static > 1:
        raise ValueError(f"--mem-fraction-static = {args.mem_fraction_static}: expected a number of at most 1")
    if not 0 <= args.fetched_share <= 1:
        raise ValueError(f"--fetched-share = {args.fetched_share}: expected a number from 0 to 1")
    if args.price is not None and not 0 <= args.price < float("inf"):
        raise ValueError(f"--price = {args.price}: expected a number at least 0")
    config_class = get_compressor(args.kv_compressor).config_class
    config = parse_config(args.kv_compressor_config, config_class, budget=args.kv_compressor_budget)
    shape = capacity.read_shape(args.model_path, None if args.weight_gb is None else int(1e9 * args.weight_gb))
    host_bytes = None if args.host_gb is None else int(1e9 * args.host_gb)
    tokens = args.pool_tokens or capacity.pool_tokens(shape, 1e9 * args.gpu_gb, args.mem_fraction_static)
    machine = capacity.Machine(tokens, args.memory_gb_s, args.link_gb_s, host_bytes, args.price)
    loads = [capacity.parse_load(text) for text in args.load]
    plans = {
        "stock": capacity.plan_stock(shape, machine, loads),
        args.kv_compressor: capacity.plan_compressed(shape, machine, loads, config, args.fetched_share),
    }
    shortest = capacity.break_even(shape, machine, loads[0].new_tokens, config, args.fetched_share)
    if args.json:
        numbers = {name: dataclasses.asdict(plan) for name, plan in plans.items()}
        yield json.dumps({**numbers, "pool_tokens": tokens, "break_even_prompt_tokens": shortest})
    else:
        yield from capacity.as_table(plans)
        yield ""
        yield from capacity.as_sentences(plans, shortest, args.price)
    if args.plot is not None:
        counts = capacity.counts_by_length(shape, machine, loads[0].new_tokens, config)
        by_length = dict(zip(plans, counts.values(), strict=True))
        written = list(_write(args.plot, lambda path: capacity.write_plot(path, shape, machine, plans, by_length)))
        yield from () if args.json else written


def _write(path: Path, write: Callable[[Path], None]) -> Iterator[str]:
    """Have a drawing written, or say in one sentence why it cannot be."""
    try:
        write(path)
    except ImportError as error:
        raise ValueError(f"{error.name} is missing; pip install matplotlib pillow") from None
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be written: {error.strerror}") from None
    yield f"{'written':12}  {path}"


def _watch(args: argparse.Namespace) -> Iterator[str]:
    from sglang_hybridkv.cli import watch

    if not 0 < args.interval < float("inf"):
        raise ValueError(f"--interval = {args.interval:g}: expected a number of seconds above 0")
    if args.once:
        yield from (f"{name:12}  {value}" for name, value in watch.rows(watch.read(args.url, args.api_key)))
        return
    try:
        watch.watch(args.url, args.api_key, args.interval)
    except ImportError as error:
        raise ValueError(f"{error.name} is missing; pip install rich, or give --once") from None
    except KeyboardInterrupt:
        return


def _inspect(args: argparse.Namespace) -> Iterator[str]:
    from sglang_hybridkv.cli import inspect

    if (args.source is None) == (args.prompt is None):
        raise ValueError("give either --prompt or --from")
    if args.source is not None:
        found = inspect.Inspection.load(args.source)
    else:
        prompt = _read(Path(args.prompt[1:]), "--prompt").decode() if args.prompt.startswith("@") else args.prompt
        pictures = [_read(path, "--image") for path in args.image]
        found = inspect.ask(args.url, inspect.with_pictures(prompt, pictures), pictures, api_key=args.api_key)
    yield from (f"{name:12}  {value}" for name, value in inspect.summary(found.event))
    for path, write in (
        (args.save, found.save),
        (args.png, lambda path: inspect.write_png(found, path)),
        (args.html, lambda path: inspect.write_page(found, path)),
    ):
        if path is not None:
            yield from _write(path, write)


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{flag} = {path}: cannot be read ({error.strerror})") from None


def _choose_samples(args: argparse.Namespace) -> SampleSource:
    if args.samples is not None and args.samples < 1:
        raise ValueError(f"--samples = {args.samples}: expected at least 1")
    if args.samples_from is not None:
        from sglang_hybridkv.cli.samples import FolderSamples

        return FolderSamples(args.samples_from, args.samples)
    from sglang_hybridkv.cli.pages import RenderedPages

    return RenderedPages(DEFAULT_PAGES if args.samples is None else args.samples, args.seed)


def _calibrate(args: argparse.Namespace) -> None:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        samples = _choose_samples(args)
    except ImportError as error:
        raise ValueError(f"{error.name} is missing; pip install sglang-hybridkv[quality]") from None

    from sglang_hybridkv.cli.calibrate import calibrate
    from sglang_hybridkv.cli.vision_model import VisionModel, read_facts

    columns = (TextColumn("pictures read"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True))
    task = progress.add_task("", total=len(samples))

    def show(num_done: int) -> None:
        if not progress.live.is_started:  # no bar above a complaint about the arguments
            bar.enter_context(progress)
        progress.update(task, completed=num_done)

    with ExitStack() as bar:
        result = calibrate(
            lambda: VisionModel(args.model_path, args.device, args.top_of),
            read_facts(args.model_path),
            samples,
            args.out,
            top_of=args.top_of,
            resume=args.resume,
            on_progress=show,
        )
    num_scored = sum(score > 0 for layer in result["scores"] for score in layer)
    num_heads = sum(map(len, result["scores"]))
    print(f"{args.out}: {num_scored} of {num_heads} KV heads looked at a word they wrote")


_OF_PATCHES = {"doctor": "doctor", "bench": "offline_bench"}
_LINES = {"config": _config, "capacity": _capacity, "watch": _watch, "inspect": _inspect}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, by default that of the process, and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in _OF_PATCHES and not {"-h", "--help"} & set(words[:2]):
        # In a process of its own: it changes SGLang as a server would, and the flags are SGLang's.
        module = _OF_PATCHES[words[0]]
        return subprocess.call([sys.executable, "-m", f"hybridkv_patches.{module}", *words[1:]])
    args = _parser().parse_args(words)
    try:
        if args.command in _LINES:
            print("\n".join(_LINES[args.command](args)))
        else:
            _calibrate(args)
    except ValueError as error:
        print(f"hybridkv {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hybridkv {args.command}: interrupted; go on with the same command and --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
