"""What dynamic heads leave at the end of prefill: all rows in the host store, summaries of their keys on the device.

How many heads are dynamic is known on the device only. So there are as many *entries* as heads may be so: the dynamic
heads first, in linear order, and then others, of which no row goes to the host, and whose summary pages nobody reads
and which go back at the commit. Entry i is the dynamic head whose `host_rank` is i.
"""

from __future__ import annotations

import functools

import torch

from hybridkv_kernels.chunks import Retrieval, encode_keys, summarize_chunks
from hybridkv_kernels.offload_rows import offload_rows
from sglang_hybridkv.cache.memory import CacheMemory, full_layers
from sglang_hybridkv.requests.geometry import PromptGeometry

_BATCH_BYTES = 1 << 26  # of keys that are gathered at once; their summaries need several times as much in fp32


def offload_heads(
    memory: CacheMemory,
    retrieval: Retrieval,
    row: int,
    slots: torch.Tensor,
    geometry: PromptGeometry,
    is_dynamic: torch.Tensor,
    query_rms: torch.Tensor,
) -> None:
    """Write host rows and summaries of `geometry.max_dynamic_heads` heads of one prompt, the dynamic ones first.

    Parameters
    ----------
    memory : host rows are written on its side stream. Until the forward's stream joins that, neither these rows nor the
        prompt's own slots may get a new content.
    slots : [covered], int64. Token slots of the prompt.
    is_dynamic : [L, H], bool. At most max_dynamic_heads of them.
    query_rms : [compressed L, H, D]. See `ObservedPrompt`.

    Notes
    -----
    No host sync, fixed shapes. Host memory is written here alone; see `HostStore`. On CUDA the host link is busy for
    milliseconds with a long prompt, and nothing of this forward waits for it: neither the layers' rest and the first
    token nor the prompts of the same batch that are compressed after this one.
    """
    views, num_kv_heads = memory.views, memory.layout.num_kv_heads
    layers = full_layers(memory.layout, slots.device)
    heads = (~is_dynamic[layers].flatten()).to(torch.uint8).argsort(stable=True)[: geometry.max_dynamic_heads]
    layer_idx, kv_head = layers[heads // num_kv_heads], heads % num_kv_heads
    is_read = is_dynamic[layer_idx, kv_head][:, None]
    rms = query_rms.flatten(0, 1)
    head_bytes = len(slots) * views.k_flat.shape[1] * views.k_flat.itemsize
    batch_size = max(1, _BATCH_BYTES // head_bytes)
    for start in range(0, len(heads), batch_size):
        batch = slice(start, min(start + batch_size, len(heads)))
        rows = views.token_rows(layer_idx[batch, None], slots, kv_head[batch, None])  # [E, N]
        ranks = torch.arange(batch.start, batch.stop, device=slots.device)[:, None]
        host_pages = ranks * geometry.num_prompt_pages + torch.arange(geometry.num_prompt_pages, device=slots.device)
        ids = memory.layout.host_page_ids(memory.table.host_pages[row], host_pages)
        ids = ids.where(is_read[batch], -1)
        memory.side.run(functools.partial(offload_rows, views, memory.store.pages, rows, ids), rows, ids)
        values = views.v_flat[rows] if retrieval.estimate else None
        vectors = summarize_heads(retrieval, views.k_flat[rows], values, rms[heads[batch]])
        _write_summaries(memory, row, geometry, ranks, vectors)


def summarize_heads(
    retrieval: Retrieval, keys: torch.Tensor, values: torch.Tensor | None, query_rms: torch.Tensor
) -> torch.Tensor:
    """[E, vectors, D]: what the device keeps of keys and values [E, covered, D] to choose, or to estimate, chunks.

    values : of the same shape; may be None where nothing is estimated. query_rms : [E, D]. See `ObservedPrompt`.
    """
    if retrieval.is_coded:
        return encode_keys(keys, query_rms, retrieval.coded_channels(keys.shape[2]))
    chunks = keys.unflatten(1, (-1, retrieval.chunk_size))
    if not retrieval.estimate:
        return summarize_chunks(chunks, retrieval.chunk_score).flatten(1, 2)
    assert values is not None, "chunks are estimated by their values"
    of_values = values.unflatten(1, (-1, retrieval.chunk_size))
    return summarize_chunks(chunks, retrieval.chunk_score, of_values).flatten(1, 2)


def _write_summaries(
    memory: CacheMemory, row: int, geometry: PromptGeometry, ranks: torch.Tensor, vectors: torch.Tensor
) -> None:
    """Write `vectors` [E, vectors, D] of entries `ranks` [E, 1] as `HeadPageTable.summary_places` has them.

    Whole pages: what is left of the last one gets zeros.
    """
    page_size, pages_per_head = memory.layout.page_size, geometry.summary_pages_per_head
    room = 2 * page_size * pages_per_head
    padded = torch.nn.functional.pad(vectors, (0, 0, 0, room - vectors.shape[1]))
    padded = padded.view(len(vectors), pages_per_head, 2, page_size, -1)
    linear = geometry.total_head_pages + ranks * pages_per_head + torch.arange(pages_per_head, device=ranks.device)
    ids = memory.layout.head_page_ids(memory.table.pages[row], linear)  # [E, pages]
    memory.views.k_pages[ids], memory.views.v_pages[ids] = padded[:, :, 0], padded[:, :, 1]
