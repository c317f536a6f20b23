"""``--kv-compressor`` and its knobs on SGLang's command line, and what they do to the server's arguments."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

from hybridkv_patches import activation
from hybridkv_patches.hook import Hook
from sglang_hybridkv.compressors import NONE, compressor_names, get_compressor
from sglang_hybridkv.config import BUDGET_FLAG, CONFIG_FLAG, EVENTS_FLAG, CompressorConfig, parse_config
from sglang_hybridkv.srt import refusals
from sglang_hybridkv.srt import settings as settings_module
from sglang_hybridkv.srt.settings import Settings

FLAG = "--kv-compressor"
# Refusals that docs/refusals.md lists; names in braces stand for what the user gave.
NO_COMPRESSOR = "{flags} would change nothing without {flag} {names}; add it"
OTHER_PAGE_SIZE = (
    "--page-size {page_size} differs from {expected}, the page_size of the compressor; "
    "leave it out, or set page_size in {flag}"
)
# Rides on ServerArgs next to the settings: how its owner wants to hear about a refusal.
_FROM_CLI = "_hybridkv_from_cli"


def add_flags(_result: Any, parser: Any) -> None:
    """AFTER ServerArgs.add_cli_args: plain store actions, which SGLang's YAML ``--config`` file understands too."""
    group = parser.add_argument_group("KV cache compression (sglang-hybridkv)")
    group.add_argument(
        FLAG,
        type=_compressor_name,
        choices=[NONE, *compressor_names()],
        default=NONE,
        help="Compress the KV cache of running requests with this method. Default: none, which leaves SGLang as it is.",
    )
    group.add_argument(
        BUDGET_FLAG,
        metavar="FRACTION",
        help="Fraction of a prompt's KV rows that stays in device memory, above 0 and at most 1; 1 keeps every row. "
        f"Default: {CompressorConfig().budget}.",
    )
    group.add_argument(
        EVENTS_FLAG,
        metavar="ENDPOINT",
        help="Publish the plan of each compressed prompt over ZMQ, such as tcp://127.0.0.1:5559. Default: nowhere.",
    )
    group.add_argument(
        CONFIG_FLAG,
        metavar="JSON|@FILE",
        help="Settings of the compressor: a JSON object, or @ and the path of a file that holds one. "
        "'hybridkv config explain NAME' lists the fields of a compressor with their legal values and defaults.",
    )


def take_flags(original: Any, cls: Any, namespace: Any) -> Any:
    """AROUND ServerArgs.from_cli_args: validate the flags and stash them; a bad value exits with one sentence."""
    try:
        settings = make_settings(
            getattr(namespace, "kv_compressor", None),
            getattr(namespace, "kv_compressor_budget", None),
            getattr(namespace, "kv_compressor_config", None),
            getattr(namespace, "kv_compressor_events", None),
        )
        if settings is not None:
            namespace.page_size = claim_page_size(getattr(namespace, "page_size", None), settings.config)
    except ValueError as error:
        _exit(str(error))
    server_args = original(cls, namespace)
    if settings is not None:
        setattr(server_args, _FROM_CLI, True)
        try:
            adopt(server_args, settings)
        except ValueError as error:
            refuse(server_args, error)
    return server_args


def adopt(server_args: Any, settings: Settings) -> None:
    """Let fresh `server_args` carry `settings`; ValueError in one sentence when they ask for what cannot work."""
    refusals.check_flags(server_args, settings)
    settings_module.stash(server_args, settings)


def refuse(server_args: Any, error: Exception) -> NoReturn:
    """End a server that was started on the command line with one sentence; raise `error` into a Python caller."""
    if getattr(server_args, _FROM_CLI, False):
        _exit(str(error))
    raise error


def end_at_once(server_args: Any, error: Exception) -> NoReturn:
    """As `refuse`, for a launcher that has started its other processes; ends them, too.

    It cannot end as usual: the interpreter's exit terminates ZMQ contexts, which waits for ever for sockets that SGLang
    has left open.
    """
    if getattr(server_args, _FROM_CLI, False):
        from sglang.srt.utils import kill_process_tree

        kill_process_tree(os.getpid(), include_parent=False)
        print(f"sglang: error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    raise error


def make_settings(name: Any, budget: Any, config: Any, events: Any = None) -> Settings | None:
    """Validated settings from the knobs as the user gave them; None when compression is off.

    Raises
    ------
    ValueError
        One sentence: a bad value, knobs without a compressor, or an SGLang that cannot be hooked.
    """
    if name is None or name == NONE:
        knobs = ((BUDGET_FLAG, budget), (EVENTS_FLAG, events), (CONFIG_FLAG, config))
        given = [flag for flag, value in knobs if value is not None]
        if given:
            names = "|".join(compressor_names())
            raise ValueError(NO_COMPRESSOR.format(flags=" and ".join(given), flag=FLAG, names=names))
        return None
    config_class = get_compressor(name).config_class
    settings = Settings(name, parse_config(config, config_class, budget=_number(budget), events=events))
    fault = activation.startup_fault()
    if fault is not None:
        raise ValueError(fault)
    return settings


def claim_page_size(page_size: int | None, config: CompressorConfig) -> int:
    """The page size that the server must have; ValueError when the user asked for another one."""
    if page_size is not None and page_size != config.page_size:
        raise ValueError(OTHER_PAGE_SIZE.format(page_size=page_size, expected=config.page_size, flag=CONFIG_FLAG))
    return config.page_size


def _compressor_name(text: str) -> str:
    """Argparse type: argparse's own answer would be SGLang's usage, hundreds of lines, before the sentence."""
    if text == NONE:
        return text
    try:
        get_compressor(text)
    except ValueError as error:
        _exit(str(error))
    # Checked here as well as in `make_settings`, which nobody would call if from_cli_args is not hooked.
    fault = activation.startup_fault()
    if fault is not None:
        _exit(fault)
    return text


def _number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _exit(sentence: str) -> NoReturn:
    print(f"sglang: error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)


FLAG_ENTRIES = (
    Hook(
        target="sglang.srt.server_args.ServerArgs.add_cli_args",
        kind="after",
        function=add_flags,
        why="SGLang has no way for a plugin to declare a flag",
        until="plugins can add server arguments",
    ),
)
ENTRIES = (
    *FLAG_ENTRIES,
    Hook(
        target="sglang.srt.server_args.ServerArgs.from_cli_args",
        kind="around",
        function=take_flags,
        why="the parsed flags are dropped unless they are fields of ServerArgs",
        until="plugins can add server arguments",
    ),
)
