"""End of prefill: from the observation of a prompt to head pages, chunk summaries and host rows.

Nothing here waits for the device, and every shape follows from the prompt's geometry, which the host knows. What was
decided for a prompt shows in numbers only: rows that are not kept are marked, and a plan that breaks the contract is
emptied on the device, because the first decode step may be launched before the host knows.
"""

from __future__ import annotations

import dataclasses

import torch

from hybridkv_kernels.compact_kv import compact_kv
from hybridkv_kernels.head_pages import HeadPageLayout, HeadPageTable
from hybridkv_kernels.select_tokens import select_tokens
from hybridkv_kernels.select_tokens.naive import first_of_order
from sglang_hybridkv.cache.memory import CacheMemory, full_layers
from sglang_hybridkv.cache.offload import offload_heads
from sglang_hybridkv.compressors.base import Compressor, HeadPlan, PromptObservation
from sglang_hybridkv.compressors.token_order import TokenOrder, chunk_salience, pool_salience
from sglang_hybridkv.requests.geometry import PromptGeometry, window_pages
from sglang_hybridkv.requests.ledger import Reservation
from sglang_hybridkv.requests.plan_events import pack_bits
from sglang_hybridkv.requests.plan_law import PlanFigures
from sglang_hybridkv.requests.spans import VisualSpan, text_mask


@dataclasses.dataclass(frozen=True)
class ObservedPrompt:
    """What a compressor has seen of a prompt, layer by layer; L counts the layers that are compressed.

    Attributes
    ----------
    spans : its images and videos.
    statistic : [L, H] or [L, H, S]. salience : [L, H, >= covered]. fp32, from `Compressor.score_layer`.
    query_rms : [L, H, D], fp32. Root mean square of each element over the observed queries of a KV head; [L, H, 0]
        where no head may be dynamic.
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
    compressor: Compressor, geometry: PromptGeometry, observed: ObservedPrompt, *, most_dynamic: int
) -> PromptPlan:
    """The compressor's decisions; a function of the prompt and its settings alone."""
    is_text = text_mask(observed.spans, geometry.covered, observed.salience.device)
    config = compressor.config
    pooled = pool_salience(observed.salience[..., : geometry.covered], config.pool_kernel, config.pool_mode)
    observation = PromptObservation(
        observed.statistic, pooled, is_text, geometry.num_prompt_pages, tuple(observed.spans)
    )
    heads = compressor.plan(observation, geometry.budget_head_pages, most_dynamic=most_dynamic)
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
    row : the request's row, bound in the table. It is dense afterwards where the compressor's plan or ranking breaks
        the contract, which `Reservation.refusal` says; then nothing was written beyond the reserved pages.
    slots : [>= covered], int64. Token slots of the prompt.

    Notes
    -----
    Runs on the forward's stream, but for the host rows. No host sync, and the same launches for every prompt of one
    geometry. Cost in traffic: kept rows twice, rows of dynamic heads once more, and keys of the heads that may be
    dynamic for their summaries.
    """
    geometry = reservation.geometry
    slots = slots[: geometry.covered]
    plan = plan_prompt(compressor, geometry, observed, most_dynamic=reservation.planned_dynamic)
    figures = _figures(plan, geometry)
    is_legal = figures.is_legal(geometry, reservation.most_dynamic)
    plan = _emptied_unless(is_legal, with_windows(plan, memory.layout))
    place_heads(memory.table, row, plan.heads, geometry)
    _make_dense_unless(is_legal, memory.table, row)
    places = plan.kept.flatten().cumsum(0, dtype=torch.int32) - 1  # of kept rows, over all heads in linear order
    kept_rows = rows_by_place(places, geometry.total_head_pages * memory.layout.page_size)
    _move_kept_rows(memory, row, slots, kept_rows, geometry)
    if compressor.merges:
        _merge_rows(memory, compressor, row, slots, plan, places.view_as(plan.kept), geometry)
    if compressor.config.retrieval is not None and reservation.most_dynamic:
        is_dynamic, rms = plan.heads.is_dynamic, observed.query_rms
        offload_heads(memory, compressor.config.retrieval, row, slots, geometry, is_dynamic, rms)
    reservation.figures = _to_host(figures.stack())
    reservation.digest = _to_host(digest_plan(kept_rows, plan.heads.is_dynamic, geometry.covered))
    if compressor.config.events is not None:
        share = salience_kept(observed.salience, plan.kept, memory.layout)
        reservation.plan = _to_host(plan.heads.is_dynamic), _to_host(pack_bits(plan.kept)), _to_host(share)
    _report(reservation, plan.heads, len(memory.layout.head_windows))


def _report(reservation: Reservation, heads: HeadPlan, num_in_windows: int) -> None:
    num_dynamic = heads.is_dynamic.sum()
    num_static = heads.is_dynamic.numel() - num_in_windows - num_dynamic
    reservation.outcome.copy_(torch.stack((num_static, num_dynamic)), non_blocking=True)
    reservation.head_counts = _to_host(heads.num_head_pages.to(torch.int32))
    if num_dynamic.is_cuda:
        reservation.written = torch.cuda.Event()
        reservation.written.record()


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Its copy in pinned memory, there once `Reservation.written` has happened."""
    return tensor.to("cpu", non_blocking=True)


def with_windows(plan: PromptPlan, layout: HeadPageLayout) -> PromptPlan:
    """The plan of all layers: heads that attend to their last tokens only are static, and keep the last rows."""
    if not layout.windows:
        return plan
    full, device = full_layers(layout, plan.kept.device), plan.kept.device
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
    full = full_layers(layout, kept.device)
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
    num_kept = plan.num_head_pages * page_size
    order = compressor.rank_tokens(observation, plan)
    static = order.first(num_kept) if isinstance(order, TokenOrder) else first_of_order(order, num_kept)
    retrieval = compressor.config.retrieval
    if retrieval is None:
        return static
    chunk_size = retrieval.chunk_size
    counts = plan.num_head_pages.flatten() * (page_size // chunk_size)
    scores = chunk_salience(observation.salience, chunk_size).flatten(0, 1)
    forced = retrieval.forced_chunks(scores.shape[1], counts)
    chunks = select_tokens(scores.masked_fill(forced, float("inf")), counts)
    dynamic = chunks.repeat_interleave(chunk_size, dim=1).view_as(static)
    return torch.where(plan.is_dynamic.unsqueeze(-1), dynamic, static)


def rows_by_place(places: torch.Tensor, num_places: int) -> torch.Tensor:
    """[num_places], int64: which row lies at each place of the kept rows, -1 where none does.

    Parameters
    ----------
    places : [rows], int32. How many kept rows come before a row, itself included, minus 1.
    """
    wanted = torch.arange(num_places, dtype=torch.int32, device=places.device)
    row = torch.searchsorted(places, wanted)  # the first row that has reached the place is the one that lies there
    return torch.where(row < len(places), row, -1)


def digest_plan(kept_rows: torch.Tensor, is_dynamic: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[], int64: differs, but for chance, when a head's type, its pages or one of its kept tokens differs.

    Parameters
    ----------
    kept_rows : [M], int64. Kept rows as numbers in [L, H, num_tokens], in any order; negative ones count for nothing.
    is_dynamic : [L, H], bool.
    num_tokens : covered tokens.

    Notes
    -----
    The wrapping sum of SplitMix64 over the rows: integers, so that no device or order changes it, and no sync.
    """
    head = kept_rows.clamp(min=0) // num_tokens
    mixed = (2 * kept_rows + is_dynamic.flatten()[head] + 1) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return (mixed ^ (mixed >> 31)).where(kept_rows >= 0, 0).sum()


def _figures(plan: PromptPlan, geometry: PromptGeometry) -> PlanFigures:
    """Of the heads that are compressed; scalars on the device."""
    counts, page_size = plan.heads.num_head_pages, geometry.covered // geometry.num_prompt_pages
    misfits = plan.kept.sum(-1) != counts * page_size
    return PlanFigures(counts.sum(), counts.min(), counts.max(), plan.heads.is_dynamic.sum(), misfits.sum())


def _emptied_unless(is_legal: torch.Tensor, plan: PromptPlan) -> PromptPlan:
    """Otherwise no head has a page, and no row is kept: whatever follows stays within the prompt's own pages."""
    heads = HeadPlan(plan.heads.is_dynamic & is_legal, plan.heads.num_head_pages * is_legal)
    return PromptPlan(heads, plan.kept & is_legal, plan.is_text)


def _make_dense_unless(is_legal: torch.Tensor, table: HeadPageTable, row: int) -> None:
    for figure in (table.num_pages, table.covered, table.num_prompt_pages):
        figure[row].mul_(is_legal)


def _own_rows(memory: CacheMemory, row: int, geometry: PromptGeometry) -> torch.Tensor:
    """[places], int64: rows of k_flat for the places of kept rows, counted over all heads in linear order."""
    page_size, device = memory.layout.page_size, memory.table.pages.device
    linear = torch.arange(geometry.total_head_pages, device=device)
    head_pages = memory.layout.head_page_ids(memory.table.pages[row], linear)
    return (head_pages[:, None] * page_size + torch.arange(page_size, device=device)).flatten()


def _move_kept_rows(
    memory: CacheMemory, row: int, slots: torch.Tensor, kept_rows: torch.Tensor, geometry: PromptGeometry
) -> None:
    views, num_tokens = memory.views, geometry.covered
    head, token = kept_rows.clamp(min=0) // num_tokens, kept_rows.clamp(min=0) % num_tokens
    num_kv_heads = views.layout.num_kv_heads
    source = views.token_rows(head // num_kv_heads, slots[token], head % num_kv_heads)
    destination = _own_rows(memory, row, geometry)
    compact_kv(views.k_flat, views.v_flat, source.where(kept_rows >= 0, -1), destination)
    # The map is read of dynamic heads only, whose chunks are whole: each starts where a chunk of the buffer does.
    chunk_size = views.layout.page_size // views.held_chunks.shape[1]
    chunk = (token[::chunk_size] // chunk_size).to(torch.int32)
    views.held_chunks.view(-1)[destination[::chunk_size] // chunk_size] = chunk


def _merge_rows(
    memory: CacheMemory,
    compressor: Compressor,
    row: int,
    slots: torch.Tensor,
    plan: PromptPlan,
    places: torch.Tensor,
    geometry: PromptGeometry,
) -> None:
    """Write what the compressor makes of kept rows over their copies in the head pages; places [L, H, N]."""
    views, own_rows = memory.views, _own_rows(memory, row, geometry)
    heads = torch.arange(memory.layout.num_kv_heads, device=slots.device)[:, None]
    for layer_idx in memory.layout.full_layers:
        kept = plan.kept[layer_idx]  # [H, N]
        rows = views.token_rows(torch.tensor(layer_idx), slots, heads)  # [H, N]
        merged = compressor.merge(views.k_flat[rows], views.v_flat[rows], kept, plan.is_text)
        # In place of a row that is not kept, its head's first kept row is written once more.
        written = torch.arange(kept.shape[1], device=kept.device).where(kept, kept.to(torch.uint8).argmax(1)[:, None])
        destination = own_rows[places[layer_idx].gather(1, written).clamp(min=0).long()]
        for flat, changed in zip((views.k_flat, views.v_flat), merged, strict=True):
            flat[destination] = changed[heads, written]
