"""Where a head page lies: the arithmetic between a request's pages and the pool, and the table that carries it.

A page of P tokens is, in every layer, P x H x D contiguous elements of K and of V. A page that belongs to one
compressed request is read as L x H *head pages* of P rows of one KV head. A request's n pages therefore hold
n * L * H head pages, which it hands to its heads in one linear order.
"""

from __future__ import annotations

import dataclasses

import torch

from hybridkv_kernels import checks


@dataclasses.dataclass(frozen=True)
class HeadPageLayout:
    """Shape of a pool that keeps all layers of K (and of V) in one tensor [L, pages_per_layer * P, H, D].

    Attributes
    ----------
    windows : of each layer the last tokens that it attends to, 0 for all of them; empty where all layers do. The heads
        of a layer with a window are not compressed: they keep the last rows of a prompt, in its order.
    """

    num_layers: int
    num_kv_heads: int
    pages_per_layer: int
    page_size: int
    windows: tuple[int, ...] = ()

    def window(self, layer_idx: int) -> int:
        """Tokens that the layer attends to, the newest included; 0 for all."""
        return self.windows[layer_idx] if self.windows else 0

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Layers that attend to all tokens, the ones that are compressed."""
        return tuple(layer_idx for layer_idx in range(self.num_layers) if not self.window(layer_idx))

    @property
    def head_windows(self) -> tuple[int, ...]:
        """The window of each KV head that has one, over all layers."""
        return tuple(window for window in self.windows if window for _ in range(self.num_kv_heads))

    @property
    def head_pages_per_page(self) -> int:
        """L * H: head pages that one page of a request provides."""
        return self.num_layers * self.num_kv_heads

    def head_page_ids(self, pages: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
        """Rows of the pool's head-page view for the `linear` indices of a request.

        Parameters
        ----------
        pages : [n], integer. The request's pages, in its own order.
        linear : [...], integer, in [0, n * L * H).

        Returns
        -------
        [...], int64, in [0, L * pages_per_layer * H).
        """
        linear = linear.to(torch.int64)
        inside = linear % self.head_pages_per_page
        page = pages.to(torch.int64)[linear // self.head_pages_per_page]
        layer_idx, kv_head = inside // self.num_kv_heads, inside % self.num_kv_heads
        return (layer_idx * self.pages_per_layer + page) * self.num_kv_heads + kv_head

    def host_page_ids(self, host_pages: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
        """Rows of the host store for `linear` indices; its pages keep their L * H head pages side by side."""
        linear = linear.to(torch.int64)
        page = host_pages.to(torch.int64)[linear // self.head_pages_per_page]
        return page * self.head_pages_per_page + linear % self.head_pages_per_page


@dataclasses.dataclass(frozen=True)
class HeadPageViews:
    """One pool's memory as the kernels see it; the pool owns it.

    Attributes
    ----------
    k_flat, v_flat : [L * slots * H, D]. Row (layer * slots + slot) * H + head.
    k_pages, v_pages : [M, P, D], the same memory; M = L * pages_per_layer * H.
    held_chunks : [M, P / chunk_size], int32. Residency map: the chunks that a dynamic head's buffer page holds.
    """

    layout: HeadPageLayout
    k_flat: torch.Tensor
    v_flat: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    held_chunks: torch.Tensor

    @classmethod
    def over(
        cls, layout: HeadPageLayout, keys: torch.Tensor, values: torch.Tensor, chunk_size: int | None = None
    ) -> HeadPageViews:
        """Views of a pool's contiguous `keys` and `values` [L, slots, H, D], and an empty residency map.

        The map takes 4 bytes for each chunk of `chunk_size` tokens (None: a page). With bf16 rows of 64 elements this
        is 1.6 % of the pool for chunks of a single token, and 0.2 % for pages of 8 tokens.
        """
        page_size, head_dim = layout.page_size, keys.shape[-1]
        num_head_pages = layout.head_pages_per_page * layout.pages_per_layer
        chunks = page_size // (chunk_size or page_size)
        return cls(
            layout=layout,
            k_flat=keys.view(-1, head_dim),  # [L * slots * H, D]
            v_flat=values.view(-1, head_dim),
            k_pages=keys.view(-1, page_size, head_dim),  # [M, P, D]
            v_pages=values.view(-1, page_size, head_dim),
            held_chunks=torch.zeros(num_head_pages, chunks, dtype=torch.int32, device=keys.device),
        )

    def check(self, q: torch.Tensor, layer_idx: int) -> None:
        """ValueError unless all views are contiguous, of one shape, like `q` [B, heads, D], and have the layer."""
        layout, head_dim = self.layout, q.shape[2]
        num_head_pages = layout.head_pages_per_page * layout.pages_per_layer
        for name in ("k_pages", "v_pages", "k_flat", "v_flat"):
            view, label = getattr(self, name), f"views.{name}"
            rows = (
                (num_head_pages, layout.page_size) if name.endswith("pages") else (num_head_pages * layout.page_size,)
            )
            checks.check_shape(label, view, (*rows, head_dim))
            checks.check_same(label, view, "q", q)
            checks.check_contiguous(label, view)
        checks.check_shape("views.held_chunks", self.held_chunks, (num_head_pages, None))
        checks.check_dtype("views.held_chunks", self.held_chunks, (torch.int32,))
        checks.check_contiguous("views.held_chunks", self.held_chunks)
        if not 0 <= layer_idx < layout.num_layers:
            raise ValueError(f"layer_idx: expected 0 to {layout.num_layers - 1}, got {layer_idx}")

    def check_chunks(self, chunk_size: int) -> None:
        """ValueError unless the residency map is one for chunks of `chunk_size` tokens."""
        shape = (self.k_pages.shape[0], self.layout.page_size // chunk_size)
        checks.check_shape("views.held_chunks", self.held_chunks, shape)

    def layer_rows(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [slots, H, D] of one layer's keys and values, by token slot."""
        shape = (self.layout.num_layers, -1, self.layout.num_kv_heads, self.k_flat.shape[1])
        return self.k_flat.view(shape)[layer_idx], self.v_flat.view(shape)[layer_idx]

    def token_rows(self, layer_idx: torch.Tensor, slots: torch.Tensor, kv_head: torch.Tensor) -> torch.Tensor:
        """Rows of k_flat for token `slots`; the three broadcast against each other."""
        slots_per_layer = self.layout.pages_per_layer * self.layout.page_size
        return (layer_idx * slots_per_layer + slots) * self.layout.num_kv_heads + kv_head


class HeadPageTable:
    """What the forward knows of each request row's compressed prompt, as persistent tensors indexed by that row.

    `bind` and `clear` belong to the scheduler, `num_head_pages` and what follows to the forward that compresses.
    A row with `num_pages` 0 is dense; row 0 is padding and never bound.

    Attributes
    ----------
    pages : [R, max_pages], int32. The request's pages in its linear order.
    num_pages : [R], int32. Pages held.
    covered, num_prompt_pages : [R], int32. The page-aligned prompt that they stand for, in tokens and in pages of P.
    first_head_page, num_head_pages : [R, L, H], int32. Linear index and number of a head's kept or buffer pages.
    is_dynamic : [R, L, H], bool. first_summary_page : [R, L, H], int32, linear; dynamic heads only.
    host_pages : [R, max_host_pages], int32. host_rank : [R, L, H], int32. Place of a dynamic head in the host store:
        page i of the prompt is linear index host_rank * num_prompt_pages + i of the request's host pages.
    windows : [L], int32. The layout's windows for kernels that see all layers; 2 ** 31 - 1 where a layer has none.
    """

    def __init__(self, num_rows: int, max_pages: int, max_host_pages: int, layout: HeadPageLayout, device):
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        heads = (num_rows, layout.num_layers, layout.num_kv_heads)
        self.layout = layout
        self.pages, self.host_pages = zeros(num_rows, max_pages), zeros(num_rows, max_host_pages)
        self.num_pages, self.covered, self.num_prompt_pages = zeros(num_rows), zeros(num_rows), zeros(num_rows)
        self.first_head_page, self.num_head_pages = zeros(*heads), zeros(*heads)
        self.first_summary_page, self.host_rank = zeros(*heads), zeros(*heads)
        self.is_dynamic = zeros(*heads, dtype=torch.bool)
        windows = [layout.window(layer_idx) or 2**31 - 1 for layer_idx in range(layout.num_layers)]
        self.windows = torch.tensor(windows, dtype=torch.int32, device=device)

    def bind(self, row: int, pages: torch.Tensor, host_pages: torch.Tensor, covered: int) -> None:
        """Give `row` its pages before the forward that compresses it is launched; heads are empty until then."""
        self.pages[row, : len(pages)] = pages.to(torch.int32)
        host_ids = host_pages.to(torch.int32)
        if self.host_pages.is_cuda and not host_ids.is_cuda:
            # From pageable memory the caller would wait for the forward that its stream waits for.
            host_ids = host_ids.pin_memory()
        self.host_pages[row, : len(host_ids)].copy_(host_ids, non_blocking=True)
        self.covered[row], self.num_prompt_pages[row] = covered, covered // self.layout.page_size
        self.num_head_pages[row] = 0
        self.num_pages[row] = len(pages)

    def clear(self, row: int) -> None:
        """Make `row` dense again."""
        self.num_pages[row] = 0
        self.covered[row] = 0
        self.num_prompt_pages[row] = 0
        self.num_head_pages[row] = 0
        self.is_dynamic[row] = False

    def buffer_page_ids(self, row: int, layer_idx: int, heads: torch.Tensor, num_pages: torch.Tensor) -> torch.Tensor:
        """[E, S], int64: kept or buffer head pages of `heads` [E]; columns beyond num_pages[e] repeat the first."""
        places = torch.arange(int(num_pages.max()), device=heads.device)
        first = self.first_head_page[row, layer_idx, heads].to(torch.int64)[:, None]
        linear = torch.where(places < num_pages[:, None], first + places, first)
        return self.layout.head_page_ids(self.pages[row], linear)

    def host_page_ids(self, row: int, layer_idx: int, heads: torch.Tensor, num_prompt_pages: int) -> torch.Tensor:
        """[E, num_prompt_pages], int64: host head pages of the prompt's pages, for dynamic `heads` [E] of one layer."""
        pages = torch.arange(num_prompt_pages, device=heads.device)
        linear = self.host_rank[row, layer_idx, heads].to(torch.int64)[:, None] * num_prompt_pages + pages
        return self.layout.host_page_ids(self.host_pages[row], linear)

    def summary_places(
        self, row: int, layer_idx: int, heads: torch.Tensor, num_vectors: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where summary vector i of a dynamic head lies: half i // P of its summary pages, K page, V page, next K page.

        Returns
        -------
        Head page [E, num_vectors], half [num_vectors] (0 in K, 1 in V) and row in the page [num_vectors], int64.
        """
        page_size = self.layout.page_size
        vector = torch.arange(num_vectors, device=heads.device)
        first = self.first_summary_page[row, layer_idx, heads].to(torch.int64)[:, None]
        ids = self.layout.head_page_ids(self.pages[row], first + vector // (2 * page_size))
        return ids, vector // page_size % 2, vector % page_size

    def read_summaries(
        self, views: HeadPageViews, row: int, layer_idx: int, heads: torch.Tensor, num_vectors: int
    ) -> torch.Tensor:
        """[E, num_vectors, D]: the first summary vectors of the dynamic `heads` [E] of one layer."""
        ids, half, place = self.summary_places(row, layer_idx, heads, num_vectors)
        return torch.where((half == 0)[:, None], views.k_pages[ids, place], views.v_pages[ids, place])

    def check_rows(self, req_rows: torch.Tensor, layer_idx: int) -> None:
        """ValueError when a page, or a place in the pages, of one of these requests is out of range; debug mode."""
        checks.check_range("req_rows", req_rows, len(self.pages))
        for row in req_rows.tolist():
            num_pages = int(self.num_pages[row])
            if num_pages == 0:
                continue
            checks.check_range(f"table.pages[{row}]", self.pages[row, :num_pages], self.layout.pages_per_layer)
            ends = self.first_head_page[row, layer_idx] + self.num_head_pages[row, layer_idx]
            limit = num_pages * self.layout.head_pages_per_page + 1
            checks.check_range(f"table.first_head_page[{row}]", self.first_head_page[row, layer_idx], limit)
            checks.check_range(f"table.num_head_pages[{row}]", ends, limit)

    def check_summaries(self, req_rows: torch.Tensor, layer_idx: int, num_vectors: int, views: HeadPageViews) -> None:
        """ValueError when the residency map or the summary pages of a dynamic head are out of range; debug mode."""
        for row in req_rows.tolist():
            heads = self.is_dynamic[row, layer_idx].nonzero().squeeze(1)
            if len(heads) == 0:
                continue
            num_prompt_pages = int(self.num_prompt_pages[row])
            ids = self.buffer_page_ids(row, layer_idx, heads, self.num_head_pages[row, layer_idx, heads])
            checks.check_range(f"views.held_chunks[{row}]", views.held_chunks[ids], num_prompt_pages)
            pages = -(-num_prompt_pages * num_vectors // (2 * self.layout.page_size))
            limit = int(self.num_pages[row]) * self.layout.head_pages_per_page - pages + 1
            first = self.first_summary_page[row, layer_idx, heads]
            checks.check_range(f"table.first_summary_page[{row}]", first, limit)

    def clear_all(self) -> None:
        """Make every row dense."""
        for tensor in (self.num_pages, self.covered, self.num_prompt_pages, self.num_head_pages, self.is_dynamic):
            tensor.zero_()
