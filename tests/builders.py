"""A KV pool with compressed and dense requests in it, and the plain answers to compare with.

Everything that nobody wrote is NaN: foreign pages, unused reserved pages, unused host pages, and the slots of a
prompt once it is compressed.
"""

import contextlib
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

from benchmarks.gpu_check.pool import Pool, Request, Shape, make_geometry
from benchmarks.gpu_check.reference import full_attention
from hybridkv_kernels import cpu, dispatch, gpu, select_tokens
from hybridkv_kernels.head_pages import HeadPageLayout, HeadPageViews
from hybridkv_kernels.host_pages import HostPages
from sglang_hybridkv.cache.side_stream import SideStream
from sglang_hybridkv.compressors import get_compressor
from sglang_hybridkv.compressors.hybridkv import HybridKV, HybridKVConfig
from sglang_hybridkv.requests.geometry import PromptGeometry
from sglang_hybridkv.requests.ledger import Reservation
from tests.kernels.plain import plain_rounded

__all__ = ["full_attention", "make_geometry"]  # from the benches, where they are used, too

NAN = float("nan")
ALL_HEADS = 10**6  # more than a model has
NAN_BYTE = 255  # numbers of these bytes are NaN in every type, and so is the scale of a rounded row

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
        if name == "triton":
            # Interpreted, the selection takes a second a prompt. Its own tests have it (`test_select_tokens.py`).
            stack.enter_context(
                mock.patch.dict(select_tokens._IMPLEMENTATIONS, triton=select_tokens.naive.select_tokens)
            )
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
    eager = {"page_size": 8, "min_head_pages": 1, "min_prompt_tokens": 1}
    eager |= {"max_dynamic_heads": 1.0, "long_prompt_dynamic_heads": 1.0}
    return HybridKVConfig(**eager | values)


def make_reservation(geometry: PromptGeometry, pages, host_pages):
    """Reservation of `pages` and `host_pages`, given as integers."""
    pages, host_pages = (torch.as_tensor(ids, dtype=torch.int64) for ids in (pages, host_pages))
    outcome, most_dynamic = torch.zeros(2, dtype=torch.int64), geometry.max_dynamic_heads
    return Reservation(geometry, pages, host_pages, geometry.covered, (), most_dynamic, outcome)


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


def fill_host(host: HostPages, byte: int) -> None:
    """Make all bytes of a host store's pages this one."""
    for segment in host.segments:
        segment.fill_(byte)


def host_bytes(host: HostPages) -> torch.Tensor:
    """[M_host, P, record_bytes], uint8: a copy of all pages."""
    return torch.cat(host.segments) if host.segments else torch.empty(host.segment_shape(0), dtype=torch.uint8)


class LateSideStream(SideStream):
    """Runs all work at the last moment, when it is joined; what waited for too little meets fresh memory."""

    def __init__(self):
        super().__init__("cpu")
        self.waiting = []

    def run(self, work, *used):
        self.waiting.append(work)

    def join(self):
        while self.waiting:
            self.waiting.pop(0)()


class TinyPool(Pool):
    """A small pool in which all that is nobody's is NaN: foreign, free and given-back pages, here and on the host.

    `keys`, `values` [L, H, N, D] of a request are all that was ever written for it.
    """

    def __init__(self, generator, config=None, *, compressor=None, pages=160, host_pages=64, **shape):
        config = config or HybridKVConfig(preset="paper", min_prompt_tokens=1, min_head_pages=1)
        compressor = compressor or HybridKV(config)
        page_size = compressor.config.page_size
        sizes = {"num_pages": pages, "num_host_pages": host_pages, "max_context": pages * page_size}
        shape = Shape(**{"page_size": page_size, "head_dim": 32} | shape)
        super().__init__(shape, compressor, **sizes, generator=generator)
        for tensor in (self.keys, self.values):
            tensor.fill_(NAN)
        fill_host(self.store.pages, NAN_BYTE)
        self.views.held_chunks.fill_(-1)
        self.store.free_pages = torch.randperm(host_pages, generator=generator).cpu()

    def _extend(self, prompt, count):
        start = prompt.seq_len
        super()._extend(prompt, count)
        slots = self.req_to_token[prompt.row, start : prompt.seq_len].long()
        for name, pool in (("keys", self.keys), ("values", self.values)):
            new = pool[:, slots].transpose(1, 2)
            setattr(prompt, name, torch.cat((getattr(prompt, name), new), 2) if start else new)

    def rewrite(self, prompt):
        """Put a dense prompt's `keys` and `values`, which the test has changed, into the pool."""
        slots = self.req_to_token[prompt.row, : prompt.seq_len].long()
        self.keys[:, slots], self.values[:, slots] = prompt.keys.transpose(1, 2), prompt.values.transpose(1, 2)

    def compress(self, prompt, *observed, **options):
        """Compress `prompt`; its original slots and whatever the compression did not need are NaN then."""
        slots = self.req_to_token[prompt.row, : prompt.seq_len].long()
        before = self.keys[:, slots].clone()
        super().compress(prompt, *observed, **options)
        assert torch.equal(self.keys[:, slots], before), "the prompt's own slots must only be read"
        self.poison_free_pages()

    def remove(self, prompt):
        """End a request: its row is dense, and its pages are free."""
        self.free += [page for page in prompt.pages if page]
        if prompt.reservation is not None:
            self.free += prompt.reservation.pages.tolist()
            self.store.free(prompt.reservation.host_pages)
        self.cache.release(prompt.row)
        self.free_rows.append(prompt.row)
        self.poison_free_pages()

    def poison_free_pages(self):
        for pool in (self.keys, self.values):
            pool.unflatten(1, (-1, self.shape.page_size))[:, self.free] = NAN
        per_segment = self.store.pages.segment_pages // self.layout.head_pages_per_page
        for i, segment in enumerate(self.store.pages.segments):
            places = self.store.free_pages[self.store.free_pages // per_segment == i] % per_segment
            segment.unflatten(0, (-1, self.layout.head_pages_per_page))[places] = NAN_BYTE

    def decode(self, prompts, layer_idx, q):
        """[B, H * G, D]: retrieval and attention of one layer, as the backend runs them."""
        rows = self.rows(prompts)
        later = self.cache.retrieve_first(layer_idx, q, rows)
        out = self.attend(prompts, layer_idx, q)
        self.cache.retrieve_ahead(layer_idx, q, later)
        return out

    def head_pages_of(self, prompt: Request, layer_idx: int, kv_head: int) -> list[tuple[int, int, int]]:
        """(page, layer, head) of each kept or buffer page of one head: a request's pages hand out their head pages
        in the order page, layer, head."""
        first = int(self.table.first_head_page[prompt.row, layer_idx, kv_head])
        count = int(self.table.num_head_pages[prompt.row, layer_idx, kv_head])
        heads, per_page = self.layout.num_kv_heads, self.layout.head_pages_per_page
        pages = prompt.reservation.pages.tolist()
        return [
            (pages[i // per_page], i % per_page // heads, i % per_page % heads) for i in range(first, first + count)
        ]

    def held_rows(self, prompt: Request, layer_idx: int, kv_head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V rows [rows, D] that one head keeps, read from the pool's plain layout."""
        places = self.head_pages_of(prompt, layer_idx, kv_head)
        page_size = self.config.page_size
        return tuple(torch.cat([head_page(pool, *p, page_size) for p in places]) for pool in (self.keys, self.values))

    def held_tokens(self, prompt: Request, layer_idx: int, kv_head: int) -> list[int]:
        """Prompt tokens that one head holds, told from the key rows themselves; values must be those of the keys."""
        keys, values = self.held_rows(prompt, layer_idx, kv_head)
        covered = prompt.reservation.geometry.covered
        kinds = [tuple(rows[layer_idx, kv_head, :covered] for rows in (prompt.keys, prompt.values))]
        if self.store.pages.host_dtype == "int8" and self.is_dynamic(prompt, layer_idx, kv_head):
            kinds.append(tuple(plain_rounded(rows) for rows in kinds[0]))  # what was fetched
        same = torch.cat([(keys[:, None] == exact[None]).all(-1) for exact, _ in kinds], 1)
        assert same.sum(1).eq(1).all(), f"layer {layer_idx} head {kv_head} holds rows that are not the prompt's"
        tokens = same.int().argmax(1)
        wanted = torch.cat([exact for _, exact in kinds])[tokens]
        assert torch.equal(values, wanted), "values do not belong to the keys"
        return (tokens % covered).tolist()

    def mapped_chunks(self, prompt: Request, layer_idx: int, kv_head: int) -> list[int]:
        """What the residency map says of one dynamic head's buffer."""
        heads, pages_per_layer = self.layout.num_kv_heads, self.layout.pages_per_layer
        places = self.head_pages_of(prompt, layer_idx, kv_head)
        rows = [(layer * pages_per_layer + page) * heads + head for page, layer, head in places]
        return self.views.held_chunks[torch.tensor(rows, dtype=torch.int64)].flatten().tolist()

    def is_dynamic(self, prompt: Request, layer_idx: int, kv_head: int) -> bool:
        return bool(self.table.is_dynamic[prompt.row, layer_idx, kv_head])
