"""Readable reference of `retrieve_chunks`: score the chunks, choose the best, fetch what is missing.

One request at a time, its dynamic heads at once. Buffer places, slots of the pool and slots of the host store are
counted in chunks, of which a head page has page_size / chunk_size.
"""

import torch

from hybridkv_kernels.chunks import Retrieval, read_codes, top_chunks, turn_channels
from hybridkv_kernels.head_pages import HeadPageTable, HeadPageViews
from hybridkv_kernels.host_pages import HostPages

SPREAD_WEIGHT = 0.5  # of a chunk's spread along the query, beside q . mean key


def retrieve_chunks(
    q: torch.Tensor,
    views: HeadPageViews,
    table: HeadPageTable,
    host_pages: HostPages,
    counters: torch.Tensor,
    layer_idx: int,
    req_rows: torch.Tensor,
    retrieval: Retrieval,
) -> None:
    """Arguments as the public function's."""
    head_dim, in_page = q.shape[-1], table.layout.page_size // retrieval.chunk_size
    # The same memory by chunks: [M, P, D] -> [M * P / T, T, D].
    k_chunks, v_chunks = (x.view(-1, retrieval.chunk_size, head_dim) for x in (views.k_pages, views.v_pages))
    for i, row in enumerate(req_rows.tolist()):
        heads = table.is_dynamic[row, layer_idx].nonzero().squeeze(1)
        if len(heads) == 0:
            continue
        queries = q[i].view(table.layout.num_kv_heads, -1, head_dim)[heads]  # [E, G, D]
        scores = score_row(queries, views, table, row, layer_idx, heads, retrieval)
        counts = table.num_head_pages[row, layer_idx, heads].to(torch.int64)
        num_selected = counts * in_page
        forced = retrieval.forced_chunks(scores.shape[1], num_selected)
        places = chunk_places(table.buffer_page_ids(row, layer_idx, heads, counts), in_page)
        held, in_buffer = held_in(places, num_selected, views.held_chunks.view(-1))
        scores = scores + retrieval.hysteresis * resident_chunks(held, in_buffer, scores.shape[1])
        selected = choose_chunks(scores, forced, num_selected)
        num_prompt_pages = int(table.num_prompt_pages[row])
        moved = fetch_chunks(
            selected,
            places,
            num_selected,
            views.held_chunks.view(-1),
            k_chunks,
            v_chunks,
            chunk_places(table.host_page_ids(row, layer_idx, heads, num_prompt_pages), in_page),
            host_pages,
        )
        by_score = num_selected.sum() - forced.sum()
        counters += torch.stack((by_score, by_score - moved))


def chunk_places(page_ids: torch.Tensor, chunks_per_page: int) -> torch.Tensor:
    """[E, S * chunks_per_page]: the same memory counted in chunks, for pages [E, S]."""
    inside = torch.arange(chunks_per_page, device=page_ids.device)
    return (page_ids.unsqueeze(2) * chunks_per_page + inside).flatten(1)


def score_row(
    q: torch.Tensor,
    views: HeadPageViews,
    table: HeadPageTable,
    row: int,
    layer_idx: int,
    heads: torch.Tensor,
    retrieval: Retrieval,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[E, C], dtype: how much the query groups q [E, G, D] of the dynamic `heads` [E] want each chunk of a request."""
    num_tokens, chunk_score = int(table.num_prompt_pages[row]) * table.layout.page_size, retrieval.chunk_score
    vectors = table.read_summaries(views, row, layer_idx, heads, retrieval.count_vectors(num_tokens))
    if retrieval.is_coded:
        num_channels = retrieval.coded_channels(q.shape[-1])
        return score_coded_chunks(q, vectors, num_channels, retrieval.chunk_size, num_tokens, dtype)
    # [E, C * stored, D] -> [E, C, stored, D], of which the score reads the first V.
    summaries = vectors.unflatten(1, (num_tokens // retrieval.chunk_size, -1))[:, :, : retrieval.score_vectors]
    q, chunk_score = as_plain_score(q, chunk_score)
    return score_chunks(q.to(dtype), summaries.to(dtype), chunk_score)


def score_coded_chunks(
    q: torch.Tensor,
    vectors: torch.Tensor,
    num_channels: int,
    chunk_size: int,
    num_tokens: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[E, C], dtype: the best score of any query of the group and any of the `chunk_size` tokens of each chunk."""
    scores = score_tokens_by_query(q, vectors, num_channels, dtype)[..., :num_tokens]
    by_chunk = scores.masked_fill(scores.isnan(), float("-inf")).unflatten(2, (-1, chunk_size))  # [E, G, C, T]
    return by_chunk.amax(dim=(1, 3))


def score_tokens_by_query(
    q: torch.Tensor, vectors: torch.Tensor, num_channels: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[E, G, N], dtype: how far each token stands out to each query of q [E, G, D], by vectors of `encode_keys`.

    It is q . (key - mean key), by the codes, over the spread that this would have if the channels were independent. The
    queries of a group differ in length, and so all of them are heard alike.

    The step goes to the query, which is rounded to its dtype again: then every device multiplies the same numbers.
    """
    step, channels, steps = read_codes(vectors, num_channels)
    limit = torch.finfo(q.dtype).max
    scaled = (turn_channels(q, channels) * step).clamp(-limit, limit).to(q.dtype).to(dtype)
    spread = scaled.square().sum(dim=-1, keepdim=True).sqrt()
    return scaled @ steps.to(dtype).transpose(1, 2) / torch.where(spread > 0, spread, 1.0)


def as_plain_score(q: torch.Tensor, chunk_score: str) -> tuple[torch.Tensor, str]:
    """A query and a chunk score that select the same chunks, without "mean_spread": it is "mean_max" of another query.

    The summary of "mean_spread" has the spread of the chunk in place of element 0, and the other query has
    SPREAD_WEIGHT |q| there. Their product is that of all other elements plus the weighted spread. Element 0 turns
    fastest under RoPE, so its mean over a chunk of text says least. M-RoPE does not turn the tokens of an image apart
    there, so for them one element of D is lost.
    """
    if chunk_score != "mean_spread":
        return q, chunk_score
    q = q.clone()
    weighted = SPREAD_WEIGHT * q.norm(dim=-1, dtype=None if q.dtype == torch.float64 else torch.float32)
    q[..., 0] = weighted.clamp(max=torch.finfo(q.dtype).max)
    return q, "mean_max"


def score_chunks(q: torch.Tensor, summaries: torch.Tensor, chunk_score: str) -> torch.Tensor:
    """[E, C], fp32: how much the query group q [E, G, D] may want each chunk, by its summary [E, C, V, D]."""
    return join_group(score_chunks_by_query(q, summaries, chunk_score), chunk_score)


def score_chunks_by_query(q: torch.Tensor, summaries: torch.Tensor, chunk_score: str) -> torch.Tensor:
    """[E, G, C], fp32: how much each query may want each chunk."""
    q, chunk_score = as_plain_score(q, chunk_score)
    if chunk_score == "quest":  # upper bound of q . k over the box of the chunk's keys
        low, high = summaries.unbind(dim=2)
        return q.clamp(min=0) @ high.transpose(1, 2) + q.clamp(max=0) @ low.transpose(1, 2)
    if chunk_score == "arkvale":  # centre of the box plus half its extent seen from the query
        low, high = summaries.unbind(dim=2)
        centre, extent = (high + low) / 2, (high - low).norm(dim=-1) / 2
        return q @ centre.transpose(1, 2) + q.norm(dim=-1, keepdim=True) * extent.unsqueeze(1) / 2
    by_vector = q @ summaries.flatten(1, 2).transpose(1, 2)  # [E, G, C * V]
    return by_vector.unflatten(2, summaries.shape[1:3]).amax(dim=3)


def join_group(by_query: torch.Tensor, chunk_score: str) -> torch.Tensor:
    """[E, C]: what the queries of a group [E, G, C] want together."""
    return by_query.mean(dim=1) if chunk_score == "mean_mean" else by_query.amax(dim=1)


def choose_chunks(scores: torch.Tensor, forced: torch.Tensor, num_selected: torch.Tensor) -> torch.Tensor:
    """[E, C], bool: `forced` chunks and the best of the others, num_selected[e] in all; NaN is the least of all."""
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    return top_chunks(scores.masked_fill(forced, float("inf")), num_selected)


def held_in(
    places: torch.Tensor, num_places: torch.Tensor, held_chunks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks [E, S], int64, at the `places` [E, S] of each buffer, 0 beyond its num_places [E], and which are inside.

    `held_chunks` [slots], int32, is the residency map of the pool.
    """
    in_buffer = torch.arange(places.shape[1], device=places.device) < num_places[:, None]
    return held_chunks[places].to(torch.int64).masked_fill(~in_buffer, 0), in_buffer


def resident_chunks(held: torch.Tensor, in_buffer: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """[E, C], bool: chunks that a buffer holds, by the result of `held_in`."""
    counts = torch.zeros(len(held), num_chunks, dtype=torch.int32, device=held.device)
    return counts.scatter_add_(1, held, in_buffer.to(torch.int32)) > 0


def fetch_chunks(
    selected: torch.Tensor,
    places: torch.Tensor,
    num_places: torch.Tensor,
    held_chunks: torch.Tensor,
    k_chunks: torch.Tensor,
    v_chunks: torch.Tensor,
    host_places: torch.Tensor,
    host_pages: HostPages,
) -> torch.Tensor:
    """Make the buffers of E dynamic heads hold exactly their `selected` chunks; returns how many moved, int64.

    The slots whose chunk nobody wants are paired, head by head, with the chunks that no slot holds.

    Parameters
    ----------
    selected : [E, C], bool. num_places[e] entries of row e are True.
    places : [E, S], int64. Slots of each buffer; columns from num_places[e] on are not read. num_places : [E].
    held_chunks : [slots], int32, in place. k_chunks, v_chunks : [slots, T, D], in place. The pool by chunks.
    host_places : [E, C], int64. Where each chunk lies in the host store, `host_pages`, counted in chunks.

    Notes
    -----
    A chunk that stays keeps its place, so a buffer is not in position order.
    """
    held, in_buffer = held_in(places, num_places, held_chunks)
    resident = resident_chunks(held, in_buffer, selected.shape[1])
    missing_head, missing_chunk = (selected & ~resident).nonzero(as_tuple=True)
    victim_head, victim_place = (in_buffer & ~selected.gather(1, held)).nonzero(as_tuple=True)
    assert torch.equal(missing_head, victim_head), "a buffer must have as many places as its head selects chunks"
    dst = places[victim_head, victim_place]
    chunk_size = k_chunks.shape[1]
    src = host_places[missing_head, missing_chunk].cpu()
    keys, values = host_pages.read(src[:, None] * chunk_size + torch.arange(chunk_size, device=src.device))
    k_chunks[dst], v_chunks[dst] = keys.to(k_chunks.device), values.to(v_chunks.device)
    held_chunks[dst] = missing_chunk.to(torch.int32)
    return torch.tensor(len(missing_head), device=selected.device)
