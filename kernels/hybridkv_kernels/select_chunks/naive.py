"""Readable reference of `summarize_chunks`, `encode_keys` and `select_chunks`."""

import torch

CODED_TOKENS = 8
"""Tokens whose 2-bit codes of one element share a word of 16 bits."""
CODE_HEADER = 2
"""Vectors ahead of the codes: centre and step of each element."""

SPREAD_WEIGHT = 0.5  # of a chunk's spread along the query, beside q . mean key
_SUMMARY_VECTORS = {
    "mean_max": 1,
    "mean_mean": 1,
    "quest": 2,
    "arkvale": 2,
    "mean2_max": 2,
    "mean4_max": 4,
    "mean_spread": 1,
}
_BOXES = ("quest", "arkvale")


def summary_vectors(chunk_score: str) -> int:
    """Vectors that stand for one chunk."""
    return _SUMMARY_VECTORS[chunk_score]


def summarize_chunks(k: torch.Tensor, chunk_score: str, v: torch.Tensor | None) -> torch.Tensor:
    """Minimum and maximum over the P tokens of each chunk, or the means of its equal parts."""
    if chunk_score in _BOXES:
        return torch.stack((k.amin(dim=2), k.amax(dim=2)), dim=2)
    rows = (k,) if v is None else (k, v)
    means = [row.float().unflatten(2, (summary_vectors(chunk_score), -1)).mean(dim=3) for row in rows]
    if chunk_score == "mean_spread":
        means[0][..., 0] = (k.float() - means[0]).square().sum(dim=3).mean(dim=2, keepdim=True).sqrt()
    return torch.cat(means, dim=2).to(k.dtype)


def encode_keys(k: torch.Tensor) -> torch.Tensor:
    """Codes 0 to 3 of (k - centre) / step, cut at -1, 0 and 1, that stand for -1.5, -0.5, 0.5 and 1.5 steps."""
    keys = k.float()
    # One key that is no number must not blind the head to all others.
    finite = keys.isfinite()
    count = finite.sum(dim=1, keepdim=True).clamp(min=1)
    centre = (keys.where(finite, 0.0).sum(dim=1, keepdim=True) / count).to(k.dtype)
    offset = keys - centre.float()
    step = (offset.where(finite, 0.0).square().sum(dim=1, keepdim=True) / count).sqrt().to(k.dtype)
    codes = (offset >= -step.float()).int() + (offset >= 0) + (offset >= step.float())
    words = (codes.unflatten(1, (-1, CODED_TOKENS)) << _code_shifts(k.device)).sum(dim=2)
    # The element's bits, whatever number they are: fp32 leaves the upper half empty.
    stored = words.to(torch.int32 if k.itemsize == 4 else torch.int16).view(k.dtype)
    return torch.cat((centre, step, stored), dim=1)


def _code_shifts(device: torch.device) -> torch.Tensor:
    return 2 * torch.arange(CODED_TOKENS, dtype=torch.int32, device=device)[:, None]


def read_codes(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centre and step [E, 1, D] and steps from the centre [E, N, D], all fp32, of vectors of `encode_keys`."""
    centre, step = vectors[:, :CODE_HEADER].float().split(1, dim=1)
    words = vectors[:, CODE_HEADER:].contiguous().view(torch.int32 if vectors.itemsize == 4 else torch.int16).int()
    codes = ((words.unsqueeze(2) >> _code_shifts(vectors.device)) & 3).flatten(1, 2)
    return centre, step, codes - 1.5


def score_tokens_by_query(q: torch.Tensor, vectors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[E, G, N], dtype: q [E, G, D] times the keys that `encode_keys` made vectors [E, 2 + N / 8, D] of.

    The step goes to the query, which is rounded to its dtype again: then every device multiplies the same numbers.
    """
    centre, step, steps = read_codes(vectors)
    limit = torch.finfo(q.dtype).max
    scaled = (q.float() * step).clamp(-limit, limit).to(q.dtype).to(dtype)
    return (q.to(dtype) * centre).sum(dim=-1, keepdim=True) + scaled @ steps.to(dtype).transpose(1, 2)


def score_coded_chunks(
    q: torch.Tensor, vectors: torch.Tensor, chunk_size: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[E, C], dtype: the best q . key of any query of the group and any of the `chunk_size` tokens of each chunk."""
    scores = score_tokens_by_query(q, vectors, dtype)
    return scores.masked_fill(scores.isnan(), float("-inf")).unflatten(2, (-1, chunk_size)).amax(dim=(1, 3))


def as_plain_score(q: torch.Tensor, chunk_score: str) -> tuple[torch.Tensor, str]:
    """The query and the chunk score that select the same chunks, where "mean_spread" is "mean_max" of another query.

    Its summary carries the spread of the chunk in place of element 0, and so does this query SPREAD_WEIGHT |q|: the
    product is that of all other elements plus the weighted spread. Element 0 is the fastest of RoPE, whose mean over a
    chunk of text says least; the tokens of an image, which M-RoPE does not tell apart there, lose one element of D.
    """
    if chunk_score != "mean_spread":
        return q, chunk_score
    q = q.clone()
    weighted = SPREAD_WEIGHT * q.norm(dim=-1, dtype=None if q.dtype == torch.float64 else torch.float32)
    q[..., 0] = weighted.clamp(max=torch.finfo(q.dtype).max)
    return q, "mean_max"


def select_chunks(
    q: torch.Tensor,
    summaries: torch.Tensor,
    num_selected: torch.Tensor,
    num_sink_chunks: int,
    num_recent_chunks: int,
    chunk_score: str,
) -> torch.Tensor:
    """Mask [E, C] of the chosen chunks; arguments as the public function's."""
    q, chunk_score = as_plain_score(q, chunk_score)
    scores = score_chunks(q.float(), summaries.float(), chunk_score)
    return choose_chunks(scores, num_selected, num_sink_chunks, num_recent_chunks)


def choose_chunks(
    scores: torch.Tensor, num_selected: torch.Tensor, num_sink_chunks: int, num_recent_chunks: int
) -> torch.Tensor:
    """Mask [E, C] of the forced chunks and the best of the others, num_selected[e] in all; NaN is the least of all."""
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    forced = forced_chunks(scores.shape[1], num_selected, num_sink_chunks, num_recent_chunks)
    return top_by_score(scores.masked_fill(forced, float("inf")), num_selected)


def score_chunks(q: torch.Tensor, summaries: torch.Tensor, chunk_score: str) -> torch.Tensor:
    """[E, C], fp32: how much the query group may want each chunk."""
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
    return (q @ summaries.flatten(1, 2).transpose(1, 2)).unflatten(2, summaries.shape[1:3]).amax(dim=3)


def join_group(by_query: torch.Tensor, chunk_score: str) -> torch.Tensor:
    """[E, C]: what the queries of a group [E, G, C] want together."""
    return by_query.mean(dim=1) if chunk_score == "mean_mean" else by_query.amax(dim=1)


def forced_chunks(
    num_chunks: int, num_selected: torch.Tensor, num_sink_chunks: int, num_recent_chunks: int
) -> torch.Tensor:
    """Sinks first, then the most recent, as many as leave one place to the score."""
    chunks = torch.arange(num_chunks, device=num_selected.device)
    places = (num_selected - 1).clamp(min=1)
    num_sinks = places.clamp(max=num_sink_chunks)
    num_recent = (places - num_sinks).clamp(max=num_recent_chunks)
    return (chunks < num_sinks[:, None]) | (chunks >= num_chunks - num_recent[:, None])


def top_by_score(scores: torch.Tensor, num_selected: torch.Tensor) -> torch.Tensor:
    """Mask of the num_selected[e] largest entries of each row; ties go to the earlier column."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return rank < num_selected[:, None]
