"""A KV pool on any device, with compressed and dense requests in it that are decoded step by step.

What nobody wrote is NaN: free pages, unused places, the slots of a prompt once it is compressed, unused host pages.
"""

from __future__ import annotations

import dataclasses

import torch

from hybridkv_kernels.head_pages import HeadPageLayout
from sglang_hybridkv.cache.compress import ObservedPrompt
from sglang_hybridkv.cache.compressed_cache import CompressedCache
from sglang_hybridkv.compressors.hybridkv import HybridKV, HybridKVConfig
from sglang_hybridkv.requests.geometry import PromptGeometry, covered_tokens, prompt_geometry
from sglang_hybridkv.requests.ledger import Reservation

NAN = float("nan")


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
    """Requests by row, from 1; row 0 is padding, whose one token is slot 0.

    Parameters
    ----------
    shape, config : of the model and the compressor; their page sizes agree.
    num_pages, num_host_pages : sizes; the dense prompt and its compressed pages are both there for a moment.
    max_context : tokens of the longest request.
    num_rows : requests at once.
    device : "cpu" or "cuda".
    generator : on that device.
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
        self.compressor = HybridKV(config)
        page_size, layers, heads, head_dim = shape.page_size, shape.num_layers, shape.num_kv_heads, shape.head_dim
        self.layout = HeadPageLayout(layers, heads, num_pages, page_size)
        sizes = (layers, num_pages * page_size, heads, head_dim)
        self.keys, self.values = (torch.full(sizes, NAN, dtype=shape.dtype, device=device) for _ in range(2))
        # Slot 0 is where padding rows read; SGLang's pool starts as zeros.
        self.keys[:, :page_size], self.values[:, :page_size] = 0, 0
        self.cache = CompressedCache.create(
            self.keys,
            self.values,
            self.compressor,
            num_rows=num_rows + 1,
            max_prompt_tokens=max_context,
            num_host_pages=num_host_pages,
        )
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
        self.free = (torch.randperm(num_pages - 1, generator=generator, device=device) + 1).tolist()
        self.req_to_token = torch.zeros(num_rows + 1, max_context, dtype=torch.int32, device=device)
        self.scaling = head_dim**-0.5
        self.seq_lens = [1] + [0] * num_rows
        self.free_rows = list(range(num_rows, 0, -1))
        self._pages: dict[int, list[int]] = {}
        self._reserved: dict[int, tuple[list[int], torch.Tensor]] = {}

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
        geometry = self._geometry(self.seq_lens[row])
        reservation = self._reserve(row, geometry)
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

    def _geometry(self, length: int) -> PromptGeometry:
        return prompt_geometry(
            length,
            self.config.budget,
            page_size=self.shape.page_size,
            head_pages_per_page=self.layout.head_pages_per_page,
            summary_vectors=self.config.summary_vectors(covered_tokens(length, self.shape.page_size)),
        )

    def _reserve(self, row: int, geometry: PromptGeometry) -> Reservation:
        host_pages = self.store.alloc(geometry.num_host_pages)
        assert host_pages is not None, "the host store of this check is too small"
        return Reservation(
            geometry=geometry,
            pages=torch.tensor([self.free.pop() for _ in range(geometry.num_pages)]),
            host_pages=host_pages,
            prefilled=self.seq_lens[row],
            spans=(),
            may_retrieve=True,
            outcome=torch.zeros(2, dtype=torch.int64),
        )

    def _commit(self, row: int, reservation: Reservation) -> None:
        """Give back the prompt's pages and what was reserved and not used, all of it NaN."""
        geometry, per_page = reservation.geometry, self.layout.head_pages_per_page
        num_dynamic = int(reservation.outcome[1])
        used = geometry.pages_used(num_dynamic, per_page)
        num_chunks = geometry.num_prompt_pages
        self._give_back(self._pages[row][:num_chunks] + reservation.pages[used:].tolist())
        self.req_to_token[row, : geometry.covered] = 0
        self._pages[row][:num_chunks] = [0] * num_chunks
        host_used = geometry.host_pages_used(num_dynamic, per_page)
        for pages in (self.store.k_pages, self.store.v_pages):
            by_page = pages.unflatten(0, (-1, per_page))
            by_page[reservation.host_pages[host_used:]] = NAN
        self.store.free(reservation.host_pages[host_used:])
        self._reserved[row] = (reservation.pages[:used].tolist(), reservation.host_pages[:host_used])

    def _give_back(self, pages: list[int]) -> None:
        if pages:
            by_page = (self.layout.num_layers, -1, self.shape.page_size, self.shape.num_kv_heads, self.shape.head_dim)
            places = torch.tensor(pages, device=self.device)
            self.keys.view(by_page)[:, places], self.values.view(by_page)[:, places] = NAN, NAN
        self.free += pages

    def remove(self, row: int) -> None:
        """End a request: its row is dense and empty, its pages are NaN and free."""
        pages, host_pages = self._reserved.pop(row, ([], torch.empty(0, dtype=torch.int64)))
        self._give_back(pages + [page for page in self._pages.pop(row) if page])
        self.store.free(host_pages)
        self.cache.release(row)
        self.seq_lens[row] = 0
        self.free_rows.append(row)

    def lens(self, rows: list[int]) -> torch.Tensor:
        """[B], int64, on the device. Lengths of these requests."""
        return torch.tensor([self.seq_lens[row] for row in rows], device=self.device)

    def retrieve(self, layer_idx: int, q: torch.Tensor, rows: torch.Tensor) -> None:
        """Bring the dynamic heads of one layer up to date with `q`; `rows` is on the device."""
        self.cache.retrieve(layer_idx, q, rows)

    def attend(self, layer_idx: int, q: torch.Tensor, rows: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        """[B, H * G, D]: decode attention of one layer."""
        return self.cache.attend(layer_idx, q, rows, self.req_to_token, lens, self.scaling)
