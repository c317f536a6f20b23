"""A KV pool of random keys and values on any device, with dense and compressed requests in it, for timings."""

from __future__ import annotations

import dataclasses

import torch

from sglang_hybridkv.cache.compress import ObservedPrompt
from sglang_hybridkv.cache.compressed_cache import CompressedCache
from sglang_hybridkv.compressors.hybridkv import HybridKV, HybridKVConfig
from sglang_hybridkv.requests.geometry import covered_tokens, prompt_geometry
from sglang_hybridkv.requests.ledger import Reservation


@dataclasses.dataclass(frozen=True)
class Shape:
    """Model and pool of one check. `head_dim` and `page_size` as in the kernels; `group_size` query heads a KV head."""

    dtype: torch.dtype = torch.float32
    page_size: int = 16
    group_size: int = 2
    head_dim: int = 64
    num_layers: int = 2
    num_kv_heads: int = 2

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}, page {self.page_size}, group {self.group_size}, head size {self.head_dim}"


def make_config(shape: Shape, budget: float, dynamic_share: float, **changes) -> HybridKVConfig:
    """Equal budgets for all heads; `Pool.compress` says which of them are dynamic."""
    fixed = {"preset": "paper", "theta": 0.5, "static_weight": "uniform", "min_prompt_tokens": 1, "min_head_pages": 1}
    fixed |= {"budget": budget, "dynamic_share": dynamic_share, "page_size": shape.page_size}
    return HybridKVConfig(**fixed | changes)


class Pool:
    """Requests by row, from 1, at most `num_rows` of at most `max_context` tokens.

    The dense prompt and its compressed pages are both there for a moment. `generator` is on the `device`.
    """

    def __init__(
        self,
        shape: Shape,
        config: HybridKVConfig,
        *,
        num_pages: int,
        num_host_pages: int,
        max_context: int,
        num_rows: int = 8,
        device: str,
        generator: torch.Generator,
    ) -> None:
        self.shape, self.config, self.device, self.generator = shape, config, device, generator
        compressor = HybridKV(config)
        compressor.bind(shape.num_layers, shape.num_kv_heads)
        page_size, layers, heads, head_dim = shape.page_size, shape.num_layers, shape.num_kv_heads, shape.head_dim
        sizes = (layers, num_pages * page_size, heads, head_dim)
        self.keys, self.values = (torch.zeros(sizes, dtype=shape.dtype, device=device) for _ in range(2))
        sizes_of_cache = {"num_rows": num_rows + 1, "max_prompt_tokens": max_context, "num_host_pages": num_host_pages}
        self.cache = CompressedCache.create(self.keys, self.values, compressor, **sizes_of_cache)
        self.views, self.table, self.counters = self.cache.memory.views, self.cache.memory.table, self.cache.counters
        self.free = (torch.randperm(num_pages - 1, generator=generator, device=device) + 1).tolist()
        self.req_to_token = torch.zeros(num_rows + 1, max_context, dtype=torch.int32, device=device)
        self.scaling = head_dim**-0.5
        self.seq_lens = [1] + [0] * num_rows
        self.free_rows = list(range(num_rows, 0, -1))
        self._pages: dict[int, list[int]] = {}

    def randn(self, *sizes: int) -> torch.Tensor:
        """Gaussian numbers of the pool's type."""
        return torch.randn(sizes, generator=self.generator, device=self.device, dtype=self.shape.dtype)

    def queries(self, num_requests: int) -> torch.Tensor:
        """[B, H * G, D]."""
        return self.randn(num_requests, self.shape.num_kv_heads * self.shape.group_size, self.shape.head_dim)

    def add(self, length: int) -> int:
        """A dense request of `length` tokens on random pages; its row."""
        row = self.free_rows.pop()
        self._pages[row], self.seq_lens[row] = [], 0
        self._extend(row, length)
        return row

    def append_token(self, row: int) -> None:
        """One more token in the dense tail."""
        self._extend(row, 1)

    def _extend(self, row: int, count: int) -> None:
        page_size, start = self.shape.page_size, self.seq_lens[row]
        end = start + count
        pages = self._pages[row]
        # A compressed prompt has left `covered // P` places in this list empty, so that positions still count in it.
        pages += [self.free.pop() for _ in range(-(-end // page_size) - len(pages))]
        positions = torch.arange(start, end)
        slots = torch.tensor(pages)[positions // page_size] * page_size + positions % page_size
        slots = slots.to(self.device)
        self.req_to_token[row, start:end] = slots.to(torch.int32)
        sizes = (self.shape.num_layers, count, self.shape.num_kv_heads, self.shape.head_dim)
        self.keys[:, slots], self.values[:, slots] = self.randn(*sizes), self.randn(*sizes)
        self.seq_lens[row] = end

    def compress(self, row: int, num_dynamic: int) -> None:
        """Compress the request; the first `num_dynamic` KV heads of each layer become dynamic."""
        reservation = self._reserve(row)
        geometry = reservation.geometry
        slots = self.req_to_token[row, : geometry.covered].long()
        heads = (self.shape.num_layers, self.shape.num_kv_heads)
        statistic = torch.ones(heads, device=self.device)
        statistic[:, :num_dynamic] = 0.0
        salience = torch.rand((*heads, self.seq_lens[row]), generator=self.generator, device=self.device)
        self.cache.observer.watch(row, range(self.seq_lens[row]))
        self.cache.bind(row, reservation)
        self.cache.compress(row, slots, ObservedPrompt((), statistic, salience))
        if self.device == "cuda":
            torch.cuda.synchronize()
        self._commit(row, reservation)

    def _reserve(self, row: int) -> Reservation:
        length, page_size = self.seq_lens[row], self.shape.page_size
        geometry = prompt_geometry(
            length,
            self.config.budget,
            page_size=page_size,
            head_pages_per_page=self.cache.memory.layout.head_pages_per_page,
            summary_vectors=self.config.summary_vectors(covered_tokens(length, page_size)),
        )
        host_pages = self.cache.memory.store.alloc(geometry.num_host_pages)
        assert host_pages is not None, "the host store is too small"
        pages = torch.tensor([self.free.pop() for _ in range(geometry.num_pages)])
        return Reservation(geometry, pages, host_pages, length, (), True, torch.zeros(2, dtype=torch.int64))

    def _commit(self, row: int, reservation: Reservation) -> None:
        """Give back the prompt's pages and what was reserved and not used."""
        geometry, per_page = reservation.geometry, self.cache.memory.layout.head_pages_per_page
        num_dynamic, num_pages = int(reservation.outcome[1]), geometry.num_prompt_pages
        used = geometry.pages_used(num_dynamic, per_page)
        self.free += self._pages[row][:num_pages] + reservation.pages[used:].tolist()
        self._pages[row][:num_pages] = [0] * num_pages
        self.cache.memory.store.free(reservation.host_pages[geometry.host_pages_used(num_dynamic, per_page) :])

    def lens(self, rows: list[int]) -> torch.Tensor:
        """[B], int64, on the device. Lengths of these requests."""
        return torch.tensor([self.seq_lens[row] for row in rows], device=self.device)

    def retrieve(self, layer_idx: int, q: torch.Tensor, rows: torch.Tensor) -> None:
        """Bring the dynamic heads of one layer up to date with `q`; `rows` is on the device."""
        self.cache.retrieve(layer_idx, q, rows)

    def attend(self, layer_idx: int, q: torch.Tensor, rows: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        """[B, H * G, D]: decode attention of one layer."""
        return self.cache.attend(layer_idx, q, rows, self.req_to_token, lens, self.scaling)
