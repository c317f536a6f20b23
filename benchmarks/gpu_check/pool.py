"""A KV pool of random keys and values on any device, with dense and compressed requests in it, for timings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from hybridkv_kernels.head_pages import HeadPageLayout
from sglang_hybridkv.cache.compress import ObservedPrompt
from sglang_hybridkv.cache.compressed_cache import CompressedCache
from sglang_hybridkv.compressors.base import Compressor
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from sglang_hybridkv.config import CompressorConfig
from sglang_hybridkv.requests.geometry import PromptGeometry, covered_tokens, prompt_geometry
from sglang_hybridkv.requests.ledger import Reservation
from sglang_hybridkv.requests.spans import VisualSpan


@dataclasses.dataclass(frozen=True)
class Shape:
    """Model and pool of one check.

    `head_dim`, `page_size` and `windows` as in the kernels; `group_size` query heads a KV head.
    """

    dtype: torch.dtype = torch.float32
    page_size: int = 16
    group_size: int = 2
    head_dim: int = 64
    num_layers: int = 2
    num_kv_heads: int = 2
    windows: tuple[int, ...] = ()

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}, page {self.page_size}, group {self.group_size}, head size {self.head_dim}"


def make_config(shape: Shape, budget: float, dynamic_share: float, **changes) -> HybridKVConfig:
    """Equal budgets for all heads; the statistic of `Pool.compress` says which of them are dynamic."""
    fixed = {"preset": "paper", "theta": 0.5, "static_weight": "uniform", "min_prompt_tokens": 1, "min_head_pages": 1}
    fixed |= {"budget": budget, "dynamic_share": dynamic_share, "page_size": shape.page_size}
    return HybridKVConfig(**fixed | changes)


def first_heads(shape: Shape, num_dynamic: int) -> torch.Tensor:
    """[L, H]: the statistic that makes the first `num_dynamic` KV heads of each layer dynamic."""
    return (torch.arange(shape.num_kv_heads) >= num_dynamic).float().expand(shape.num_layers, -1)


@dataclasses.dataclass
class Request:
    """One request of a `Pool`. A compressed prompt leaves zeros in `pages`, so that the places of later pages stay."""

    row: int
    seq_len: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    reservation: Reservation | None = None
    query_rms: torch.Tensor | None = None


def make_geometry(prompt_len: int, config: CompressorConfig, layout: HeadPageLayout) -> PromptGeometry:
    """Geometry of a prompt, without admission's rules."""
    return prompt_geometry(
        prompt_len,
        config.budget,
        page_size=config.page_size,
        head_pages_per_page=layout.head_pages_per_page,
        summary_vectors=config.summary_vectors(covered_tokens(prompt_len, layout.page_size)),
        head_windows=layout.head_windows,
    )


class Pool:
    """At most `num_rows` requests, on rows from 1, of at most `max_context` tokens, where `generator` is.

    The dense prompt and its compressed pages are both there for a moment.
    """

    def __init__(
        self,
        shape: Shape,
        compressor: Compressor,
        *,
        num_pages: int,
        num_host_pages: int,
        max_context: int,
        num_rows: int = 8,
        generator: torch.Generator,
    ) -> None:
        self.shape, self.compressor, self.config = shape, compressor, compressor.config
        self.generator, self.device = generator, generator.device
        sizes = (shape.num_layers, num_pages * shape.page_size, shape.num_kv_heads, shape.head_dim)
        self.keys, self.values = (torch.zeros(sizes, dtype=shape.dtype, device=self.device) for _ in range(2))
        sizes_of_cache = {"num_rows": num_rows + 1, "max_prompt_tokens": max_context, "num_host_pages": num_host_pages}
        sizes_of_cache["windows"] = shape.windows
        with torch.device("cpu"):  # tests may have another default device, a server has not
            self.cache = CompressedCache.create(self.keys, self.values, compressor, **sizes_of_cache)
        memory = self.cache.memory
        self.layout, self.views, self.table, self.store = memory.layout, memory.views, memory.table, memory.store
        self.store.make_all()
        self.counters = self.cache.counters
        order = torch.randperm(num_pages - 1, generator=generator, device=self.device)
        self.free = (order + 1).tolist()  # page 0 is padding
        self.req_to_token = torch.zeros(num_rows + 1, max_context, dtype=torch.int32, device=self.device)
        self.scaling = shape.head_dim**-0.5
        self.free_rows = list(range(num_rows, 0, -1))

    def randn(self, *sizes: int) -> torch.Tensor:
        """Gaussian numbers of the pool's type."""
        return torch.randn(sizes, generator=self.generator, device=self.device, dtype=self.shape.dtype)

    def rand(self, *sizes: int) -> torch.Tensor:
        """Numbers between 0 and 1, fp32."""
        return torch.rand(sizes, generator=self.generator, device=self.device)

    def queries(self, num_requests: int) -> torch.Tensor:
        """[B, H * G, D]."""
        return self.randn(num_requests, self.shape.num_kv_heads * self.shape.group_size, self.shape.head_dim)

    def add_prompt(self, prompt_len: int) -> Request:
        """A dense request on random pages."""
        request = Request(self.free_rows.pop())
        self._extend(request, prompt_len)
        return request

    def append_token(self, request: Request) -> None:
        """One more token in the dense tail."""
        self._extend(request, 1)

    def _extend(self, request: Request, count: int) -> None:
        page_size, start, shape = self.shape.page_size, request.seq_len, self.shape
        end = start + count
        request.pages += [self.free.pop() for _ in range(-(-end // page_size) - len(request.pages))]
        positions = torch.arange(start, end)
        slots = torch.tensor(request.pages)[positions // page_size] * page_size + positions % page_size
        slots = slots.to(self.device)
        self.req_to_token[request.row, start:end] = slots.to(torch.int32)
        sizes = (shape.num_layers, count, shape.num_kv_heads, shape.head_dim)
        self.keys[:, slots], self.values[:, slots] = self.randn(*sizes), self.randn(*sizes)
        request.seq_len = end

    def compress(
        self,
        request: Request,
        statistic: torch.Tensor | None = None,
        salience: torch.Tensor | None = None,
        query_rms: torch.Tensor | None = None,
        *,
        spans: Sequence[VisualSpan] = (),
        most_dynamic: int | None = None,
    ) -> None:
        """Compress a request, then give back its prompt's pages and what was reserved and not used.

        `statistic` is [L, H], `salience` [L, H, N], `query_rms` [L, H, D], of the L layers without a window; they are
        random unless given. No more than `most_dynamic` heads are dynamic; with None, as many as the compressor wants.
        """
        heads = (len(self.layout.full_layers), self.shape.num_kv_heads)
        statistic = self.rand(*heads) if statistic is None else statistic
        salience = self.rand(*heads, request.seq_len) / request.seq_len if salience is None else salience
        request.query_rms = self.rand(*heads, self.shape.head_dim) if query_rms is None else query_rms
        with torch.device("cpu"):
            reservation = self._reserve(request.seq_len, tuple(spans), most_dynamic)
            slots = self.req_to_token[request.row, : reservation.geometry.covered].long()
            self.cache.observer.watch(request.row, range(request.seq_len))
            self.cache.bind(request.row, reservation)
            observed = ObservedPrompt(reservation.spans, statistic, salience, request.query_rms)
            self.cache.compress(request.row, slots, observed)
            self.cache.join()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._commit(request, reservation)

    def _reserve(self, length: int, spans: tuple[VisualSpan, ...], most_dynamic: int | None = None) -> Reservation:
        geometry = make_geometry(length, self.config, self.layout)
        most_dynamic = geometry.max_dynamic_heads if most_dynamic is None else most_dynamic
        host_pages = self.store.alloc(geometry.host_pages_used(most_dynamic, self.layout.head_pages_per_page))
        assert host_pages is not None, "the host store is too small"
        pages = torch.tensor([self.free.pop() for _ in range(geometry.num_pages)], dtype=torch.int64)
        outcome = torch.zeros(2, dtype=torch.int64)
        return Reservation(geometry, pages, host_pages, length, spans, most_dynamic, outcome)

    def _commit(self, request: Request, reservation: Reservation) -> None:
        geometry, num_dynamic = reservation.geometry, int(reservation.outcome[1])
        used = geometry.pages_used(num_dynamic, self.layout.head_pages_per_page)
        host_used = geometry.host_pages_used(num_dynamic, self.layout.head_pages_per_page)
        num_pages = geometry.num_prompt_pages
        self.free += request.pages[:num_pages] + reservation.pages[used:].tolist()
        self.store.free(reservation.host_pages[host_used:])
        reservation.pages, reservation.host_pages = reservation.pages[:used], reservation.host_pages[:host_used]
        request.pages[:num_pages], request.reservation = [0] * num_pages, reservation
        self.req_to_token[request.row, : geometry.covered] = 0

    def rows(self, requests: Sequence[Request]) -> torch.Tensor:
        """[B], int64, on the device. Rows of these requests."""
        return torch.tensor([request.row for request in requests], device=self.device)

    def lens(self, requests: Sequence[Request]) -> torch.Tensor:
        """[B], int64, on the device. Lengths of these requests."""
        return torch.tensor([request.seq_len for request in requests], device=self.device)

    def retrieve(self, requests: Sequence[Request], layer_idx: int, q: torch.Tensor) -> None:
        """Bring the dynamic heads of one layer up to date with `q`."""
        self.cache.retrieve(layer_idx, q, self.rows(requests))

    def attend(self, requests: Sequence[Request], layer_idx: int, q: torch.Tensor) -> torch.Tensor:
        """[B, H * G, D]: decode attention of one layer over what the pool holds."""
        rows, lens = self.rows(requests), self.lens(requests)
        return self.cache.attend(layer_idx, q, rows, self.req_to_token, lens, self.scaling)
