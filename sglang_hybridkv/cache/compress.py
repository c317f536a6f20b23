"""End of prefill: from the observation of a prompt to head pages, chunk summaries and host rows."""

from __future__ import annotations

import dataclasses

import torch

from hybridkv_kernels.chunks import Retrieval, encode_keys, summarize_chunks, top_chunks
from hybridkv_kernels.compact_kv import compact_kv
from hybridkv_kernels.head_pages import HeadPageLayout, HeadPageTable
from hybridkv_kernels.offload_rows import offload_rows
from sglang_hybridkv.cache.memory import CacheMemory
from sglang_hybridkv.compressors.base import Compressor, HeadPlan, PromptObservation
from sglang_hybridkv.compressors.token_order import chunk_salience, pool_salience
from sglang_hybridkv.requests.geometry import PromptGeometry, window_pages
from sglang_hybridkv.requests.ledger import Reservation
from sglang_hybridkv.requests.plan_events import pack_bits
from sglang_hybridkv.requests.spans import VisualSpan, text_mask


@dataclasses.dataclass(frozen=True)
class ObservedPrompt:
    """What a compressor has seen of a prompt, layer by layer; L counts the layers that are compressed.

    Attributes
    ----------
    spans : its images and videos.
    statistic : [L, H] or [L, H, S]. salience : [L, H, >= covered]. fp32, from `Compressor.score_layer`.
    query_rms : [L, H, D], fp32. Root mean square of each element over the observed queries of a KV head.
    """

    spans: tuple[VisualSpan, ...]
    statistic: torch.Tensor
    salience: torch.Tensor
    query_rms: torch.Tensor


@dataclasses.dataclass(frozen=True)
class PromptPlan:
    """What becomes of a prompt, in the layers that are compressed, or in all of them (`with_windows`).

    Attributes
    ----------
    heads : type and pages of each head.
    kept : [L, H, covered], bool. Rows that go to head pages, num_head_pages * P of each head.
    is_text : [covered], bool.
    """

    heads: HeadPlan
    kept: torch.Tensor
    is_text: torch.Tensor


def plan_prompt(
    compressor: Compressor, geometry: PromptGeometry, observed: ObservedPrompt, *, may_retrieve: bool
) -> PromptPlan:
    """The compressor's decisions; a function of the prompt and its settings alone."""
    is_text = text_mask(observed.spans, geometry.covered).to(observed.salience.device)
    config = compressor.config
    pooled = pool_salience(observed.salience[..., : geometry.covered], config.pool_kernel, config.pool_mode)
    observation = PromptObservation(observed.statistic, pooled, is_text, geometry.num_prompt_pages)
    heads = compressor.plan(observation, geometry.budget_head_pages, may_retrieve=may_retrieve)
    return PromptPlan(heads, kept_tokens(compressor, observation, heads), is_text)


def compress_prompt(
    memory: CacheMemory,
    compressor: Compressor,
    reservation: Reservation,
    row: int,
    slots: torch.Tensor,
    observed: ObservedPrompt,
) -> None:
    """Fill the reserved pages of one prompt, after its last layer and before its first decode step.

    Parameters
    ----------
    memory : written in place; the prompt's own slots are only read.
    row : the request's row, bound in the table.
    slots : [>= covered], int64. Token slots of the prompt.

    Raises
    ------
    ValueError
        The compressor's plan or ranking breaks the contract; nothing of the pool was written.

    Notes
    -----
    Runs on the forward's stream. Cost in traffic: kept rows twice, rows of dynamic heads once more.
    """
    geometry = reservation.geometry
    slots = slots[: geometry.covered]
    plan = plan_prompt(compressor, geometry, observed, may_retrieve=reservation.may_retrieve)
    _check_plan(compressor, plan, reservation)
    num_dynamic = plan.heads.is_dynamic.sum()
    outcome = torch.stack((plan.heads.is_dynamic.numel() - num_dynamic, num_dynamic))
    plan = with_windows(plan, memory.layout)
    place_heads(memory.table, row, plan.heads, geometry)
    kept_rows = plan.kept.nonzero(as_tuple=True)
    is_dynamic = plan.heads.is_dynamic
    _move_kept_rows(memory, row, slots, kept_rows, is_dynamic)
    for place, layer_idx in enumerate(memory.layout.full_layers):
        if compressor.merges and not plan.kept[layer_idx].all():
            _merge_layer(memory, compressor, row, slots, plan, layer_idx)
        if compressor.config.retrieval is not None:
            _offload_layer(memory, compressor.config.retrieval, row, slots, layer_idx, observed.query_rms[place])
    reservation.outcome.copy_(outcome, non_blocking=True)
    reservation.head_counts = plan.heads.num_head_pages.to(torch.int32).to("cpu", non_blocking=True)
    reservation.digest = digest_plan(kept_rows, is_dynamic, geometry.covered).to("cpu", non_blocking=True)
    if compressor.config.events is not None:
        on_device = is_dynamic, pack_bits(plan.kept), salience_kept(observed.salience, plan.kept, memory.layout)
        reservation.plan = tuple(one.to("cpu", non_blocking=True) for one in on_device)
    if outcome.is_cuda:
        reservation.written = torch.cuda.Event()
        reservation.written.record()


def with_windows(plan: PromptPlan, layout: HeadPageLayout) -> PromptPlan:
    """The plan of all layers: heads that attend to their last tokens only are static, and keep the last rows."""
    if not layout.windows:
        return plan
    full, device = torch.tensor(layout.full_layers), plan.kept.device
    covered = plan.kept.shape[-1]
    shape = layout.num_layers, layout.num_kv_heads
    is_dynamic = torch.zeros(shape, dtype=torch.bool, device=device)
    counts = torch.zeros(shape, dtype=plan.heads.num_head_pages.dtype, device=device)
    kept = torch.zeros(*shape, covered, dtype=torch.bool, device=device)
    is_dynamic[full], counts[full], kept[full] = plan.heads.is_dynamic, plan.heads.num_head_pages, plan.kept
    for layer_idx in range(layout.num_layers):
        if layout.window(layer_idx):
            pages = window_pages(layout.window(layer_idx), covered // layout.page_size, layout.page_size)
            counts[layer_idx], kept[layer_idx, :, covered - pages * layout.page_size :] = pages, True
    return PromptPlan(HeadPlan(is_dynamic, counts), kept, plan.is_text)


def salience_kept(salience: torch.Tensor, kept: torch.Tensor, layout: HeadPageLayout) -> torch.Tensor:
    """[L, H], fp32: what `kept` [L, H, covered], bool, hold of the salience of a prompt, [compressed L, H, >= covered].

    NaN where a compressor gives no token any, and in layers with a window.
    """
    salience = salience[..., : kept.shape[-1]]
    if not layout.windows:
        return (salience * kept).sum(-1) / salience.sum(-1)
    full = torch.tensor(layout.full_layers)
    shares = torch.full(kept.shape[:2], float("nan"), device=kept.device)
    shares[full] = (salience * kept[full]).sum(-1) / salience.sum(-1)
    return shares


def place_heads(table: HeadPageTable, row: int, plan: HeadPlan, geometry: PromptGeometry) -> None:
    """Write each head's place in the request's linear order: kept and buffer pages first, summaries after them."""
    counts = plan.num_head_pages.flatten()
    rank = plan.is_dynamic.flatten().cumsum(0) - 1
    shape = plan.is_dynamic.shape
    table.first_head_page[row] = (counts.cumsum(0) - counts).view(shape).to(torch.int32)
    table.num_head_pages[row] = plan.num_head_pages.to(torch.int32)
    table.is_dynamic[row] = plan.is_dynamic
    table.host_rank[row] = rank.view(shape).to(torch.int32)
    first_summary = geometry.total_head_pages + rank * geometry.summary_pages_per_head
    table.first_summary_page[row] = first_summary.view(shape).to(torch.int32)


def kept_tokens(compressor: Compressor, observation: PromptObservation, plan: HeadPlan) -> torch.Tensor:
    """[L, H, N], bool: rows that go to head pages, num_head_pages * P of each head.

    Dynamic heads start with the chunks that prefill found salient, so that the first step already hits.
    """
    page_size = observation.page_size
    order = compressor.rank_tokens(observation, plan)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.full_like(order, order.shape[-1]).scatter_(-1, order, places)
    static = rank < (plan.num_head_pages * page_size).unsqueeze(-1)
    retrieval = compressor.config.retrieval
    if retrieval is None:
        return static
    chunk_size = retrieval.chunk_size
    counts = plan.num_head_pages.flatten() * (page_size // chunk_size)
    scores = chunk_salience(observation.salience, chunk_size).flatten(0, 1)
    forced = retrieval.forced_chunks(scores.shape[1], counts)
    chunks = top_chunks(scores.masked_fill(forced, float("inf")), counts)
    dynamic = chunks.repeat_interleave(chunk_size, dim=1).view_as(static)
    return torch.where(plan.is_dynamic.unsqueeze(-1), dynamic, static)


def digest_plan(kept_rows: tuple[torch.Tensor, ...], is_dynamic: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[], int64: differs, but for chance, when a head's type, its pages or one of its kept tokens differs.

    Parameters
    ----------
    kept_rows : three times [M], int64. Layer, head and token of each kept row, in any order.
    is_dynamic : [L, H], bool.
    num_tokens : covered tokens.

    Notes
    -----
    The wrapping sum of SplitMix64 over the rows: integers, so that no device or order changes it, and no sync.
    """
    layer_idx, kv_head, token = kept_rows
    place = (layer_idx * is_dynamic.shape[1] + kv_head) * num_tokens + token
    mixed = (2 * place + is_dynamic[layer_idx, kv_head] + 1) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return (mixed ^ (mixed >> 31)).sum()


def _check_plan(compressor: Compressor, plan: PromptPlan, reservation: Reservation) -> None:
    """Refuse what would write to pages of other requests, or leave rows that nobody wrote."""
    geometry, counts = reservation.geometry, plan.heads.num_head_pages
    # One sync; finding the kept rows needs one anyway.
    total, least, most, num_dynamic, is_whole = torch.stack(
        (
            counts.sum(),
            counts.min(),
            counts.max(),
            plan.heads.is_dynamic.sum(),
            (plan.kept.sum(-1) == counts * (geometry.covered // geometry.num_prompt_pages)).all().long(),
        )
    ).tolist()
    origin = f"KV compressor {compressor.name!r}"
    if total > geometry.budget_head_pages or least < 1 or most > geometry.num_prompt_pages:
        raise ValueError(
            f"{origin}: num_head_pages = {least} to {most}, {total} in all; legal: 1 to {geometry.num_prompt_pages} "
            f"a head, at most {geometry.budget_head_pages} in all"
        )
    most_dynamic = geometry.max_dynamic_heads if reservation.may_retrieve else 0
    if num_dynamic > most_dynamic:
        raise ValueError(f"{origin}: is_dynamic = {num_dynamic} heads; legal: at most {most_dynamic}")
    if not is_whole:
        raise ValueError(f"{origin}: rank_tokens must name each token once a head")


def _move_kept_rows(
    memory: CacheMemory,
    row: int,
    slots: torch.Tensor,
    kept_rows: tuple[torch.Tensor, ...],
    is_dynamic: torch.Tensor,
) -> None:
    views = memory.views
    layer_idx, kv_head, token = kept_rows
    destination = _head_page_rows(memory, row, torch.arange(len(token), device=token.device))
    compact_kv(views.k_flat, views.v_flat, views.token_rows(layer_idx, slots[token], kv_head), destination)
    chunk_size = views.layout.page_size // views.held_chunks.shape[1]
    is_chunk_start = (destination % chunk_size == 0) & is_dynamic[layer_idx, kv_head]
    chunk = (token[is_chunk_start] // chunk_size).to(torch.int32)
    views.held_chunks.view(-1)[destination[is_chunk_start] // chunk_size] = chunk


def _head_page_rows(memory: CacheMemory, row: int, place: torch.Tensor) -> torch.Tensor:
    """Rows of k_flat for the places of kept rows, counted over all heads in the request's linear order."""
    # Heads lie there in the order in which nonzero lists them, each with whole pages.
    page_size = memory.layout.page_size
    head_pages = memory.layout.head_page_ids(memory.table.pages[row], place // page_size)
    return head_pages * page_size + place % page_size


def _merge_layer(
    memory: CacheMemory, compressor: Compressor, row: int, slots: torch.Tensor, plan: PromptPlan, layer_idx: int
) -> None:
    """Write what the compressor makes of one layer's kept rows over their copies in the head pages."""
    views, kept = memory.views, plan.kept[layer_idx]  # kept [H, N]
    heads = torch.arange(memory.layout.num_kv_heads, device=slots.device)
    rows = views.token_rows(torch.tensor(layer_idx), slots, heads[:, None])  # [H, N]
    keys, values = compressor.merge(views.k_flat[rows], views.v_flat[rows], kept, plan.is_text)
    first = int(plan.kept[:layer_idx].sum())
    place = torch.arange(first, first + int(kept.sum()), device=slots.device)
    destination = _head_page_rows(memory, row, place)
    views.k_flat[destination], views.v_flat[destination] = keys[kept], values[kept]


def _offload_layer(
    memory: CacheMemory,
    retrieval: Retrieval,
    row: int,
    slots: torch.Tensor,
    layer_idx: int,
    query_rms: torch.Tensor,
) -> None:
    """Write host rows and summaries of one layer's dynamic heads; query_rms [H, D]."""
    views, table, store = memory.views, memory.table, memory.store
    heads = table.is_dynamic[row, layer_idx].nonzero().squeeze(1)
    if len(heads) == 0:
        return
    num_pages = len(slots) // memory.layout.page_size
    rows = views.token_rows(torch.tensor(layer_idx), slots, heads[:, None])  # [E, N]
    keys, values = views.k_flat[rows], views.v_flat[rows]  # [E, N, D]
    offload_rows(views, store.pages, rows, table.host_page_ids(row, layer_idx, heads, num_pages))
    _write_summaries(memory, row, layer_idx, heads, summarize_heads(retrieval, keys, values, query_rms[heads]))


def summarize_heads(
    retrieval: Retrieval, keys: torch.Tensor, values: torch.Tensor, query_rms: torch.Tensor
) -> torch.Tensor:
    """[E, vectors, D]: what the device keeps of keys and values [E, covered, D] to choose, or to estimate, chunks.

    query_rms : [E, D]. See `ObservedPrompt`.
    """
    if retrieval.is_coded:
        return encode_keys(keys, query_rms, retrieval.coded_channels(keys.shape[2]))
    k, v = (x.unflatten(1, (-1, retrieval.chunk_size)) for x in (keys, values))
    return summarize_chunks(k, retrieval.chunk_score, v if retrieval.estimate else None).flatten(1, 2)


def _write_summaries(memory: CacheMemory, row: int, layer_idx: int, heads: torch.Tensor, vectors: torch.Tensor) -> None:
    ids, half, place = memory.table.summary_places(row, layer_idx, heads, vectors.shape[1])
    for which, pages in enumerate((memory.views.k_pages, memory.views.v_pages)):
        mine = half == which
        pages[ids[:, mine], place[mine]] = vectors[:, mine]
