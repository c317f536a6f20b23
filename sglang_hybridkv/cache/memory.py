"""The memory that compressed prompts live in: the pool's head pages, the table that says whose they are, host pages."""

from __future__ import annotations

import dataclasses
import functools

import torch

from hybridkv_kernels.head_pages import HeadPageLayout, HeadPageTable, HeadPageViews
from sglang_hybridkv.cache.host_store import HostStore
from sglang_hybridkv.cache.side_stream import SideStream
from sglang_hybridkv.config import CompressorConfig


@dataclasses.dataclass(frozen=True)
class CacheMemory:
    """Three parts of one shape, and a stream.

    Attributes
    ----------
    views : of the pool's keys and values, and the residency map of the chunks that dynamic heads hold.
    table : by request row.
    store : rows of dynamic heads.
    side : the stream on which they are written to the store.
    """

    views: HeadPageViews
    table: HeadPageTable
    store: HostStore
    side: SideStream

    @property
    def layout(self) -> HeadPageLayout:
        """Shape of the pool."""
        return self.views.layout


def layout_of(keys: torch.Tensor, page_size: int, windows: tuple[int, ...] = ()) -> HeadPageLayout:
    """Layout of a pool of keys (or values) [L, slots, H, D] in pages of `page_size` slots."""
    num_layers, num_slots, num_kv_heads, _ = keys.shape
    return HeadPageLayout(num_layers, num_kv_heads, num_slots // page_size, page_size, windows)


@functools.lru_cache
def full_layers(layout: HeadPageLayout, device: torch.device) -> torch.Tensor:
    """[compressed L], int64: the layers that are compressed. Copied to the device once, since that copy waits."""
    return torch.tensor(layout.full_layers, device="cpu").to(device)


def make_memory(
    keys: torch.Tensor,
    values: torch.Tensor,
    config: CompressorConfig,
    *,
    num_rows: int,
    max_prompt_tokens: int,
    num_host_pages: int,
    windows: tuple[int, ...] = (),
) -> CacheMemory:
    """Table and host store for the pool `keys`, `values` [L, slots, H, D], which stay the caller's.

    Parameters
    ----------
    config : of the compressor; says page size, chunk size and summaries.
    num_rows : request rows, row 0, which is padding, included.
    max_prompt_tokens : of the longest prompt that is compressed.
    num_host_pages : limit of the host store, of which nothing is made yet.
    windows : as in `HeadPageLayout`.

    Raises
    ------
    ValueError
        The head size cannot be coded as the settings say.
    """
    if config.retrieval is not None and config.retrieval.is_coded:
        config.retrieval.coded_channels(keys.shape[-1])
    page_size, device = config.page_size, keys.device
    layout = layout_of(keys, page_size, windows)
    prompt_pages = -(-max_prompt_tokens // page_size)
    summary_pages = -(-config.summary_vectors(prompt_pages * page_size) // (2 * page_size))
    return CacheMemory(
        views=HeadPageViews.over(layout, keys, values, config.tokens_per_chunk),
        table=HeadPageTable(num_rows, prompt_pages + summary_pages, prompt_pages, layout, device),
        store=HostStore(
            num_pages=num_host_pages,
            head_pages_per_page=layout.head_pages_per_page,
            page_size=page_size,
            head_dim=keys.shape[-1],
            dtype=keys.dtype,
            device=device,
            host_dtype=config.stored_dtype,
        ),
        side=SideStream(device),
    )
