"""A KV pool with compressed and dense requests in it, and the plain answers to compare with.

Everything that nobody wrote is NaN: foreign pages, unused reserved pages, unused host pages, and the slots of a
prompt once it is compressed.
"""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import settings

from hybridkv_kernels import cpu, dispatch, gpu
from hybridkv_kernels.decode_attn import decode_attn
from hybridkv_kernels.head_pages import HeadPageLayout, HeadPageViews
from sglang_hybridkv.cache.compress import ObservedPrompt
from sglang_hybridkv.cache.compressed_cache import CompressedCache
from sglang_hybridkv.compressors import get_compressor
from sglang_hybridkv.compressors.hybridkv import HybridKV, HybridKVConfig
from sglang_hybridkv.config import CompressorConfig
from sglang_hybridkv.requests.geometry import PromptGeometry, covered_tokens, prompt_geometry
from sglang_hybridkv.requests.ledger import Reservation

NAN = float("nan")

# Laws are tried on fresh examples; with CI set, on the same ones in each run.
LAWS = settings(max_examples=80, deadline=None, derandomize="CI" in os.environ)


# Without the library the C++ kernels cannot be tested; where there is a compiler that is a failure, not an excuse.
NO_CPU_KERNELS = cpu.obstacle("cpu", torch.float32, 32, 1) is not None and not any(map(shutil.which, ("c++", "g++")))


@contextlib.contextmanager
def forced_kernels(name):
    """Run a kernel's implementation `name`, and no other."""
    with mock.patch.dict(os.environ, {dispatch.ENVIRONMENT: name}):
        yield


@contextlib.contextmanager
def use_kernels(name):
    """Run an implementation: "naive", "cpu" with an instruction set or the best one, "triton", or "cuda".

    The last is the Triton kernels on a GPU, where all tensors of the test lie then; "triton" interprets them.
    """
    name, _, isa = name.partition(" ")
    if name == "cpu" and NO_CPU_KERNELS:
        pytest.skip("the C++ kernels were not compiled, and there is no compiler")
    if isa and cpu.INSTRUCTION_SETS.index(isa) > cpu.best_isa():
        pytest.skip(f"this machine has no {isa}")
    if name == "triton" and not (gpu.is_installed() and gpu.is_interpreted()):
        pytest.skip("there is no Triton, or it compiles in this process")
    best = cpu.INSTRUCTION_SETS.index(isa) if isa else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(forced_kernels("triton" if name == "cuda" else name))
        if best is not None:
            stack.enter_context(mock.patch.object(cpu, "best_isa", return_value=best))
        if name == "cuda":
            stack.enter_context(torch.device("cuda"))
            # The kernels themselves must not rely on that: a server has no such default.
            load = gpu.load_twin
            stack.enter_context(mock.patch.object(gpu, "load_twin", lambda op: _as_in_a_server(load(op))))
        yield


def _as_in_a_server(twin):
    """`twin` where tensors are made on the CPU unless it says otherwise."""

    def run(*args, **kwargs):
        with torch.device("cpu"):
            return twin(*args, **kwargs)

    return run


@contextlib.contextmanager
def poisoned_memory(integers=None):
    """Fresh memory is NaN, of int32 one of `integers` (from, to): what a kernel leaves unwritten is seen."""

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(NAN)
            return tensor.random_(*integers) if integers and tensor.dtype == torch.int32 else tensor

        return made

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield


def fresh_generator() -> torch.Generator:
    """Generator with a new seed, which pytest prints when the test fails; HYBRIDKV_TEST_SEED repeats a run."""
    seed = int(os.environ.get("HYBRIDKV_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"HYBRIDKV_TEST_SEED={seed}")
    return seeded(seed)


def seeded(seed: int) -> torch.Generator:
    """Generator on the device where the test's tensors lie."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def make_calibration(path, num_layers, num_kv_heads, scores=None, **changes):
    """Write a calibration file of a model of this shape and return its path."""
    model = {"name": "m", "num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": 32, "fingerprint": None}
    made_up = [[1.0 + layer + head for head in range(num_kv_heads)] for layer in range(num_layers)]
    values = {
        "format": 1,
        "kind": "visual_head_scores",
        "model": model,
        "scores": made_up if scores is None else scores,
        "num_samples": 3,
    }
    path.write_text(json.dumps(values | changes))
    return path


def make_compressor(name, num_layers, num_kv_heads, *, scores=None, **config):
    """A compressor that has met its model; SparseMM with `scores` or made-up ones."""
    compressor_class = get_compressor(name)
    with tempfile.TemporaryDirectory() as folder:
        if "calibration" in compressor_class.config_class.model_fields:
            path = make_calibration(Path(folder) / "scores.json", num_layers, num_kv_heads, scores)
            config = {"calibration": str(path)} | config
        compressor = compressor_class(compressor_class.config_class(**config))
        compressor.bind(num_layers, num_kv_heads)
    return compressor


def eager_config(**values) -> HybridKVConfig:
    """A method that compresses the shortest prompts, to the least, and may make every head dynamic."""
    eager = {"page_size": 8, "min_head_pages": 1, "min_prompt_tokens": 1, "max_dynamic_heads": 1.0}
    return HybridKVConfig(**eager | values)


def make_geometry(prompt_len: int, config: CompressorConfig, layout: HeadPageLayout) -> PromptGeometry:
    """Geometry of a prompt, without admission's rules."""
    return prompt_geometry(
        prompt_len,
        config.budget,
        page_size=config.page_size,
        head_pages_per_page=layout.head_pages_per_page,
        summary_vectors=config.summary_vectors(covered_tokens(prompt_len, layout.page_size)),
    )


def make_reservation(geometry: PromptGeometry, pages, host_pages, *, prompt_len=None, spans=(), may_retrieve=True):
    """Reservation of `pages` and `host_pages`, given as integers."""
    return Reservation(
        geometry=geometry,
        pages=torch.as_tensor(pages, dtype=torch.int64),
        host_pages=torch.as_tensor(host_pages, dtype=torch.int64),
        prefilled=geometry.covered if prompt_len is None else prompt_len,
        spans=tuple(spans),
        may_retrieve=may_retrieve,
        outcome=torch.zeros(2, dtype=torch.int64),
    )


def make_views(layout: HeadPageLayout, head_dim: int, dtype=torch.float32):
    """Keys and values [L, slots, H, D] of a pool, all NaN, and the head-page views over them."""
    shape = (layout.num_layers, layout.pages_per_layer * layout.page_size, layout.num_kv_heads, head_dim)
    keys, values = torch.full(shape, NAN, dtype=dtype), torch.full(shape, NAN, dtype=dtype)
    views = HeadPageViews.over(layout, keys, values)
    views.held_chunks.fill_(-1)
    return keys, values, views


def head_page(pool_LSHD: torch.Tensor, page: int, layer_idx: int, kv_head: int, page_size: int) -> torch.Tensor:
    """[P, D]: one head page, found by reshaping the page's own memory and by no other arithmetic."""
    rows = pool_LSHD[layer_idx, page * page_size : (page + 1) * page_size]
    return rows.reshape(rows.shape[1], page_size, rows.shape[2])[kv_head]


def full_attention(q, keys_HND, values_HND, scaling, keep_HN=None) -> torch.Tensor:
    """[H * G, D], fp64: one query's attention over the kept keys, head by head."""
    num_kv_heads = len(keys_HND)
    q_HGD = q.double().view(num_kv_heads, -1, q.shape[-1])
    logits = q_HGD @ keys_HND.double().transpose(1, 2) * scaling
    if keep_HN is not None:
        logits = logits.masked_fill(~keep_HN[:, None], float("-inf"))
    return (logits.softmax(-1) @ values_HND.double()).flatten(0, 1)


def plain_scores(keys, q, chunk_score):
    """Score of each chunk of one head, from the keys themselves, in fp64 and by the published formulas."""
    scores = []
    for chunk in keys.double():
        mean, low, high = chunk.mean(0), chunk.amin(0), chunk.amax(0)
        per_query = []
        for query in q.double():
            if chunk_score == "quest":
                per_query.append(torch.maximum(query * low, query * high).sum())
            elif chunk_score == "arkvale":
                per_query.append(query @ (low + high) / 2 + query.norm() * (high - low).norm() / 4)
            else:
                per_query.append(query @ mean)
        scores.append(float(torch.stack(per_query).mean() if chunk_score == "mean_mean" else max(per_query)))
    return scores


def plain_forced(num_chunks, count, num_sinks, num_recent):
    """Sinks, then the last chunks, until one place is left; all of it when there is only one."""
    forced = []
    for chunk in [*range(num_sinks), *range(num_chunks - 1, num_chunks - 1 - num_recent, -1)]:
        if 0 <= chunk < num_chunks and chunk not in forced and len(forced) < max(count - 1, 1):
            forced.append(chunk)
    return set(forced)


@dataclasses.dataclass
class Prompt:
    """One request of a `TinyPool`; `keys`, `values` [L, H, N, D] grow with each decoded token."""

    row: int
    keys: torch.Tensor
    values: torch.Tensor
    pages: list[int]
    reservation: Reservation | None = None

    @property
    def seq_len(self) -> int:
        return self.keys.shape[2]


class TinyPool:
    """A pool, table and host store in which requests are placed on random pages, and decoded one step at a time."""

    def __init__(
        self,
        generator,
        config=None,
        *,
        compressor=None,
        num_layers=2,
        num_kv_heads=2,
        group_size=2,
        head_dim=32,
        pages=160,
        host_pages=64,
        dtype=torch.float32,
    ):
        self.generator, self.dtype, self.head_dim, self.group_size = generator, dtype, head_dim, group_size
        config = config or HybridKVConfig(preset="paper", min_prompt_tokens=1, min_head_pages=1)
        self.compressor = compressor or HybridKV(config)
        self.config = self.compressor.config
        page_size = self.config.page_size
        self.layout = HeadPageLayout(num_layers, num_kv_heads, pages, page_size)
        self.keys, self.values, _ = make_views(self.layout, head_dim, dtype)
        sizes = {"num_rows": 9, "max_prompt_tokens": pages * page_size, "num_host_pages": host_pages}
        with torch.device("cpu"):  # a server has no other default
            self.cache = CompressedCache.create(self.keys, self.values, self.compressor, **sizes)
        memory = self.cache.memory
        self.views, self.table, self.store, self.counters = (
            memory.views,
            memory.table,
            memory.store,
            self.cache.counters,
        )
        self.views.held_chunks.fill_(-1)
        self.store.k_pages.fill_(NAN)
        self.store.v_pages.fill_(NAN)
        self.store.free_pages = torch.randperm(host_pages, generator=generator).cpu()
        self.free = (torch.randperm(pages - 1, generator=generator) + 1).tolist()  # page 0 is padding
        self.req_to_token = torch.zeros(9, pages * page_size, dtype=torch.int32)
        self.scaling = head_dim**-0.5
        self.free_rows = list(range(8, 0, -1))

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def rand(self, *shape):
        return torch.rand(shape, generator=self.generator)

    def add_prompt(self, prompt_len: int) -> Prompt:
        """A dense request on random pages."""
        row, page_size, layout = self.free_rows.pop(), self.config.page_size, self.layout
        pages = [self.free.pop() for _ in range(-(-prompt_len // page_size))]
        shape = (layout.num_layers, layout.num_kv_heads, prompt_len, self.head_dim)
        prompt = Prompt(row, self.randn(*shape), self.randn(*shape), pages)
        slots = (torch.tensor(pages)[:, None] * page_size + torch.arange(page_size)).flatten()[:prompt_len]
        self.req_to_token[prompt.row, :prompt_len] = slots.int()
        self.keys[:, slots] = prompt.keys.transpose(1, 2)
        self.values[:, slots] = prompt.values.transpose(1, 2)
        return prompt

    def compress(self, prompt: Prompt, statistic=None, salience=None, *, spans=(), may_retrieve=True) -> None:
        """Compress `prompt`, then poison its original slots and whatever the compression did not need."""
        layout, page_size, length = self.layout, self.config.page_size, prompt.seq_len
        heads = (layout.num_layers, layout.num_kv_heads)
        statistic = self.rand(*heads) if statistic is None else statistic
        salience = self.rand(*heads, length) / length if salience is None else salience
        geometry = make_geometry(length, self.config, layout)
        pages = [self.free.pop() for _ in range(geometry.num_pages)]
        host_pages = self.store.alloc(geometry.num_host_pages) if may_retrieve else torch.empty(0, dtype=torch.int64)
        reservation = make_reservation(
            geometry, pages, host_pages, prompt_len=length, spans=spans, may_retrieve=may_retrieve
        )
        slots = self.req_to_token[prompt.row, : geometry.covered].long()
        before = self.keys[:, slots].clone()
        self.cache.observer.watch(prompt.row, range(length))
        with torch.device("cpu"):  # a server has no other default
            self.cache.bind(prompt.row, reservation)
            self.cache.compress(prompt.row, slots, ObservedPrompt(reservation.spans, statistic, salience))
        assert torch.equal(self.keys[:, slots], before), "the prompt's own slots must only be read"
        prompt.reservation = reservation
        self.keys[:, slots], self.values[:, slots] = NAN, NAN
        self.req_to_token[prompt.row, : geometry.covered] = 0
        used = geometry.pages_used(int(reservation.outcome[1]), layout.head_pages_per_page)
        for page in pages[used:]:
            self.keys[:, page * page_size : (page + 1) * page_size] = NAN
            self.values[:, page * page_size : (page + 1) * page_size] = NAN
        host_used = geometry.host_pages_used(int(reservation.outcome[1]), layout.head_pages_per_page)
        per_page = layout.head_pages_per_page
        for page in reservation.host_pages[host_used:].tolist():
            self.store.k_pages[page * per_page : (page + 1) * per_page] = NAN
            self.store.v_pages[page * per_page : (page + 1) * per_page] = NAN

    def remove(self, prompt: Prompt) -> None:
        """End a request: its row is dense, and its pages are free and NaN."""
        pages, page_size = list(prompt.pages), self.config.page_size
        if prompt.reservation is not None:
            pages += prompt.reservation.pages.tolist()
            self.store.free(prompt.reservation.host_pages.cpu())
        slots = (torch.tensor(pages)[:, None] * page_size + torch.arange(page_size)).flatten()
        self.keys[:, slots], self.values[:, slots] = NAN, NAN
        self.cache.release(prompt.row)
        self.free += pages
        self.free_rows.append(prompt.row)

    def append_token(self, prompt: Prompt) -> None:
        """Write a new token's K and V to the dense tail."""
        page_size, position = self.config.page_size, prompt.seq_len
        if position % page_size == 0:
            prompt.pages.append(self.free.pop())
        slot = prompt.pages[position // page_size] * page_size + position % page_size
        shape = (self.layout.num_layers, self.layout.num_kv_heads, 1, self.head_dim)
        key, value = self.randn(*shape), self.randn(*shape)
        self.keys[:, slot], self.values[:, slot] = key[:, :, 0], value[:, :, 0]
        self.req_to_token[prompt.row, position] = slot
        prompt.keys, prompt.values = torch.cat((prompt.keys, key), 2), torch.cat((prompt.values, value), 2)

    def retrieve(self, prompts: list[Prompt], layer_idx: int, q: torch.Tensor) -> None:
        self.cache.retrieve(layer_idx, q, torch.tensor([p.row for p in prompts]))

    def decode(self, prompts: list[Prompt], layer_idx: int, q: torch.Tensor) -> torch.Tensor:
        """[B, H * G, D]: retrieval and attention of one layer, as the backend runs them."""
        self.retrieve(prompts, layer_idx, q)
        return self.attend(prompts, layer_idx, q, self.config.retrieval)

    def attend(self, prompts: list[Prompt], layer_idx: int, q: torch.Tensor, retrieval) -> torch.Tensor:
        """[B, H * G, D]: attention of one layer over what the pool holds."""
        rows, lens = torch.tensor([p.row for p in prompts]), torch.tensor([p.seq_len for p in prompts])
        where = (self.views, self.table, layer_idx, rows, self.req_to_token, lens)
        return decode_attn(q, *where, scaling=self.scaling, retrieval=retrieval)

    def queries(self, num_requests: int) -> torch.Tensor:
        return self.randn(num_requests, self.layout.num_kv_heads * self.group_size, self.head_dim)

    def head_pages_of(self, prompt: Prompt, layer_idx: int, kv_head: int) -> list[tuple[int, int, int]]:
        """(page, layer, head) of each kept or buffer page of one head: a request's pages hand out their head pages
        in the order page, layer, head."""
        first = int(self.table.first_head_page[prompt.row, layer_idx, kv_head])
        count = int(self.table.num_head_pages[prompt.row, layer_idx, kv_head])
        heads, per_page = self.layout.num_kv_heads, self.layout.head_pages_per_page
        pages = prompt.reservation.pages.tolist()
        return [
            (pages[i // per_page], i % per_page // heads, i % per_page % heads) for i in range(first, first + count)
        ]

    def held_rows(self, prompt: Prompt, layer_idx: int, kv_head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V rows [rows, D] that one head keeps, read from the pool's plain layout."""
        places = self.head_pages_of(prompt, layer_idx, kv_head)
        page_size = self.config.page_size
        return tuple(torch.cat([head_page(pool, *p, page_size) for p in places]) for pool in (self.keys, self.values))

    def held_tokens(self, prompt: Prompt, layer_idx: int, kv_head: int) -> list[int]:
        """Prompt tokens that one head holds, told from the key rows themselves; values must be those of the keys."""
        keys, values = self.held_rows(prompt, layer_idx, kv_head)
        covered = prompt.reservation.geometry.covered
        exact = prompt.keys[layer_idx, kv_head, :covered]
        same = (keys[:, None] == exact[None]).all(-1)
        assert same.sum(1).eq(1).all(), f"layer {layer_idx} head {kv_head} holds rows that are not the prompt's"
        tokens = same.int().argmax(1)
        assert torch.equal(values, prompt.values[layer_idx, kv_head, tokens]), "values do not belong to the keys"
        return tokens.tolist()

    def mapped_chunks(self, prompt: Prompt, layer_idx: int, kv_head: int) -> list[int]:
        """What the residency map says of one dynamic head's buffer."""
        heads, pages_per_layer = self.layout.num_kv_heads, self.layout.pages_per_layer
        places = self.head_pages_of(prompt, layer_idx, kv_head)
        rows = [(layer * pages_per_layer + page) * heads + head for page, layer, head in places]
        return self.views.held_chunks[torch.tensor(rows, dtype=torch.int64)].flatten().tolist()

    def is_dynamic(self, prompt: Prompt, layer_idx: int, kv_head: int) -> bool:
        return bool(self.table.is_dynamic[prompt.row, layer_idx, kv_head])
