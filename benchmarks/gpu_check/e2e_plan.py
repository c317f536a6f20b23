"""Which servers the part e2e starts: kinds and backends, loads, the pool that all of them share, and their flags."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import fixed_heads
from benchmarks.harness import compression_flags, engine_flags
from benchmarks.models.dummy_7b import make_dummy_7b
from benchmarks.models.make_models import make_model
from benchmarks.serve import merge_flags
from sglang_hybridkv.compressors.hybridkv import HybridKV
from sglang_hybridkv.config import parse_config

BUDGET = 0.1
CHUNK_TOKENS = {"cuda": 8192, "cpu": 512}
HOST_SLACK = 1.05
HEADS = {"heads": {"quarter": 0.25, "static": 0.0}, "dynamic": {"dynamic": 1.0}}
"""Head types that a kind of server is measured with, by the share of KV heads that are dynamic."""


@dataclasses.dataclass(frozen=True)
class Load:
    """`requests` distinct prompts of `prompt_tokens`, each answered with `new_tokens`."""

    requests: int
    prompt_tokens: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        """Of one request, with its last page."""
        return self.prompt_tokens + self.new_tokens + 64


LOADS = {"cuda": (Load(16, 32768, 128), Load(64, 8192, 128)), "cpu": (Load(3, 700, 24),)}


@dataclasses.dataclass(frozen=True)
class Setup:
    """One server. `kind`: "stock", "heads" or "dynamic" (HEADS), or "defaults", which is hybridkv as it comes.

    `backend` is SGLang's attention backend, or those of prefill and decode as "flashinfer+triton".
    """

    kind: str
    backend: str

    @property
    def name(self) -> str:
        """As `--setups` has it."""
        return f"{self.kind}:{self.backend}"

    @property
    def heads(self) -> dict[str, float | None]:
        """Head types to measure, with what a request asks for; of stock and of the defaults nothing."""
        return dict(HEADS.get(self.kind, {self.kind: None}))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all servers of a run share.

    Attributes
    ----------
    wall_requests : requests at once of the last measurement; None is twice what stock's pool holds, 0 leaves it out.
    config : further settings of our servers.
    model : checkpoint; None is one that is made, on a GPU of Qwen2.5-VL-7B's shape and without weights.
    server_seconds : after so long a server is given up, start included.
    """

    device: str
    loads: tuple[Load, ...]
    wall_requests: int | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: Path | None = None
    server_seconds: float = 900.0

    @property
    def pool_tokens(self) -> int:
        """Of every server: all prompts stay cached beside their compressed pages, and one more prompt fits."""
        return max((load.requests + 1) * load.tokens + load.requests * load.prompt_tokens // 5 for load in self.loads)

    @property
    def wall(self) -> Load | None:
        """More requests of the shortest prompts than fit stock's pool."""
        load = min(self.loads, key=lambda load: load.prompt_tokens)
        number = 2 * self.pool_tokens // load.tokens if self.wall_requests is None else self.wall_requests
        return dataclasses.replace(load, requests=number) if number else None

    @property
    def checkpoint(self) -> Path:
        """The model's folder, made if it has to be."""
        return self.model or (make_dummy_7b() if self.device == "cuda" else make_model("tiny-qwen2"))

    @property
    def all_loads(self) -> tuple[Load, ...]:
        """With the wall."""
        return self.loads + ((self.wall,) if self.wall else ())


def setups(device: str) -> tuple[list[Setup], list[Setup], list[str]]:
    """What runs on a device, what runs when it is named, and what cannot run, with the reason."""
    if device == "cpu":
        some = [Setup(kind, "torch_native") for kind in ("stock", "heads", "dynamic", "defaults")]
        return some, [], ["Qwen2.5-VL-7B's shape, the attention backends of a GPU and the aims: they need a GPU"]
    has_flashinfer = importlib.util.find_spec("flashinfer") is not None
    stock = [Setup("stock", "flashinfer")] if has_flashinfer else []
    standard = [*stock, *(Setup(kind, "triton") for kind in ("stock", "heads", "defaults"))]
    others = ("triton", "flashinfer", "fa3", "flashinfer+triton", "fa3+triton")
    named = [Setup(kind, backend) for backend in others for kind in ("stock", "heads", "dynamic", "defaults")]
    skipped = [] if has_flashinfer else ["stock on flashinfer: the package flashinfer is not installed"]
    return standard, [setup for setup in named if setup not in standard], skipped


def kv_bytes_per_token(model: Path, element_bytes: int) -> tuple[int, int]:
    """Bytes of keys and values of one token in all layers, and how many KV heads they belong to."""
    config = json.loads((model / "config.json").read_text())
    text = config.get("text_config", config)
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    heads = text["num_hidden_layers"] * text["num_key_value_heads"]
    return 2 * heads * head_dim * element_bytes, heads


def host_bytes(plan: Plan, setup: Setup, model: Path) -> int:
    """Host memory that the largest load needs for the rows of dynamic heads."""
    per_token, heads = kv_bytes_per_token(model, 2 if plan.device == "cuda" else 4)

    def share(load: Load) -> float:
        if setup.kind in HEADS:
            return max(HEADS[setup.kind].values())
        config = parse_config(plan.config, HybridKV.config_class, budget=BUDGET)
        return config.most_dynamic_heads(heads, load.prompt_tokens) / heads

    return int(HOST_SLACK * max(load.requests * load.tokens * share(load) for load in plan.all_loads) * per_token)


def flags_of(plan: Plan, setup: Setup, model: Path, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Flags and environment of a server; its compressor is described in `folder`."""
    on_gpu = plan.device == "cuda"
    most = max(load.requests for load in plan.all_loads)
    recipe = engine_flags(
        plan.device,
        max_total_tokens=plan.pool_tokens,
        max_running_requests=most + 4,
        chunked_prefill_size=CHUNK_TOKENS[plan.device],
        dtype="bfloat16" if on_gpu else "float32",
    )
    longest = max(load.tokens for load in plan.loads)
    own = ["--skip-server-warmup", "--context-length", str(longest + 64)]
    if on_gpu:
        own += ["--load-format", "dummy"] if plan.model is None else []
        own += ["--mem-fraction-static", "0.88", "--cuda-graph-max-bs-decode", str(most)]
        # Compression switches them off; a start with them would be compared with one without.
        own += ["--cuda-graph-backend-prefill", "disabled"]
        prefill, _, decode = setup.backend.partition("+")
        split = ["--prefill-attention-backend", prefill, "--decode-attention-backend", decode] if decode else []
        own += ["--attention-backend", decode or prefill, *split]
    flags, env = merge_flags(list(recipe.flags), own), dict(recipe.env)
    if setup.kind == "stock":
        return flags, env
    config = {"min_prompt_tokens": 64, "host_store_bytes": host_bytes(plan, setup, model), **plan.config}
    if setup.kind in HEADS:
        config["dynamic_heads"] = max(HEADS[setup.kind].values())
        env |= fixed_heads.environment(folder)
    name = fixed_heads.NAME if setup.kind in HEADS else HybridKV.name
    return flags + compression_flags(BUDGET, config, name), env


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan of a command line; ValueError that names the option."""
    defaults = LOADS[args.device]
    requests = _numbers("--requests", args.requests, [load.requests for load in defaults])
    lengths = _numbers("--prompt-tokens", args.prompt_tokens, [load.prompt_tokens for load in defaults])
    if len(requests) != len(lengths):
        raise ValueError(
            f"--requests has {len(requests)} numbers and --prompt-tokens has {len(lengths)}; give one of each a load"
        )
    new_tokens = defaults[0].new_tokens if args.new_tokens is None else args.new_tokens
    if new_tokens < 2:
        raise ValueError(f"--new-tokens = {new_tokens} is not allowed; legal: an integer at least 2")
    loads = tuple(Load(number, length, new_tokens) for number, length in zip(requests, lengths, strict=True))
    config = json.loads(args.kv_config) if args.kv_config else {}
    parse_config(config, HybridKV.config_class, budget=BUDGET)
    return Plan(args.device, loads, args.wall_requests, config, args.model_path, args.server_seconds)


def _numbers(option: str, given: str | None, default: list[int]) -> list[int]:
    if given is None:
        return default
    words = [word.strip() for word in given.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(f"{option} = {given!r} is not allowed; legal: positive integers, comma-separated")
    return [int(word) for word in words]
