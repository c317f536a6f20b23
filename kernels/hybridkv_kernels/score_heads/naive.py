"""Readable reference of `score_heads`."""

import math
from fractions import Fraction

import torch

HIT_LEVEL = 0.6  # CateKV: a key is hit when it lies above vmin + 0.6 (vmax - vmin) of its row
_HIT_QUANTILES = (0.005, 0.995)
OF_QUERIES = ("capture", "worst_capture")  # statistics of single query heads; the others are of the group's mean


def score_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    slots: torch.Tensor | None,
    scaling: float,
    statistic: str,
    sparsity_fraction: float,
    mass_fraction: float,
    chunk_size: int,
    capture_fraction: float,
    num_sinks: int = 0,
    num_recent: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and result as the public function's."""
    queries, causal = query_attention(q, k if slots is None else k[slots], scaling)
    probs, values = queries.mean(dim=1), []
    for name in statistic.split("+"):
        if name in OF_QUERIES:
            captured = capture(queries, num_captured(probs.shape[-1], capture_fraction), num_sinks, num_recent)
            values.append(captured_statistic(name, captured))
        else:
            values.append(row_statistic(name, probs, causal, sparsity_fraction, mass_fraction, chunk_size))
    return join_statistics(values), probs.mean(dim=1)


def join_statistics(values: list[torch.Tensor]) -> torch.Tensor:
    """[H] of one statistic, [H, S] of S."""
    return values[0] if len(values) == 1 else torch.stack(values, dim=-1)


def row_statistic(
    statistic: str,
    probs: torch.Tensor,
    causal: torch.Tensor,
    sparsity_fraction: float,
    mass_fraction: float,
    chunk_size: int,
) -> torch.Tensor:
    """[H]: a statistic of the group's mean probabilities [H, W, N], one that is not among OF_QUERIES."""
    if statistic == "sparsity":
        return sparsity(probs, causal, sparsity_fraction)
    if statistic == "top_mass":
        return top_mass(probs, causal, mass_fraction)
    if statistic == "hit_cv":
        return hit_cv(probs, causal, chunk_size)
    assert statistic == "stability", f"{statistic} is no statistic of rows"
    return stability(probs)


def captured_statistic(statistic: str, captured: torch.Tensor) -> torch.Tensor:
    """[H]: one of OF_QUERIES, from what each query keeps, [H, G, W] in any order of the last two."""
    return captured.mean(dim=(1, 2)) if statistic == "capture" else captured.amin(dim=(1, 2))


def causal_mask(num_rows: int, num_tokens: int, device: torch.device) -> torch.Tensor:
    """[W, N], bool: the keys that each of the last `num_rows` tokens sees."""
    positions = torch.arange(num_tokens, device=device)
    return positions <= positions[num_tokens - num_rows :, None]


def observed_attention(q: torch.Tensor, k: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [H, W, N] averaged over the group, and the causal mask [W, N]."""
    queries, causal = query_attention(q, k, scaling)
    return queries.mean(dim=1), causal


def query_attention(q: torch.Tensor, k: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [H, G, W, N], and the causal mask [W, N]."""
    num_rows, num_tokens, num_kv_heads = q.shape[0], k.shape[0], k.shape[1]
    q_HGWD = q.float().view(num_rows, num_kv_heads, -1, q.shape[-1]).permute(1, 2, 0, 3)
    logits = q_HGWD @ k.float().permute(1, 2, 0).unsqueeze(1) * scaling  # [H, G, W, D] @ [H, 1, D, N]
    causal = causal_mask(num_rows, num_tokens, k.device)
    return logits.masked_fill(~causal, float("-inf")).softmax(dim=-1), causal


def sparsity(probs: torch.Tensor, causal: torch.Tensor, fraction: float) -> torch.Tensor:
    """[H]: share of causal (row, key) pairs below `fraction` of the row's largest probability."""
    below = (probs < fraction * probs.amax(dim=-1, keepdim=True)) & causal
    return below.sum(dim=(1, 2)).float() / causal.sum()


def top_mass(probs: torch.Tensor, causal: torch.Tensor, mass: float) -> torch.Tensor:
    """[H]: 1 - the share of keys that hold `mass` of a row's probability, mean over rows."""
    ordered = probs.sort(dim=-1, descending=True).values
    needed = (ordered.cumsum(dim=-1) < mass).sum(dim=-1) + 1
    share = needed.float() / causal.sum(dim=-1)
    return (1.0 - share.clamp(max=1.0)).mean(dim=-1)


def hit_cv(probs: torch.Tensor, causal: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """[H]: cv / (1 + cv), where cv is the coefficient of variation over chunks of the rows that hit a chunk.

    A head whose rows all hit the same few chunks has a high variation: it is stable. The map to [0, 1) is ours.
    """
    num_kv_heads, num_rows, num_tokens = probs.shape
    ordered = probs.sort(dim=-1).values
    low, high = (ordered[..., rank : rank + 1] for rank in hit_ranks(num_tokens))
    hits = (probs >= low + HIT_LEVEL * (high - low)) & causal & (probs > 0)
    pad = -num_tokens % chunk_size
    chunks = torch.nn.functional.pad(hits, (0, pad)).view(num_kv_heads, num_rows, -1, chunk_size)  # [H, W, C, T]
    rows_per_chunk = chunks.any(dim=-1).sum(dim=1).float()  # [H, C]
    cv = rows_per_chunk.std(dim=-1, correction=0) / rows_per_chunk.mean(dim=-1).clamp(min=1e-9)
    return cv / (1.0 + cv)


def stability(probs: torch.Tensor) -> torch.Tensor:
    """[H]: what two consecutive rows have in common, the mean over pairs of the sum of min(p_i, p_i+1); 0 with one row.

    Histogram intersection: 1 when the attention stays where it is, 0 when it moves altogether.
    """
    if probs.shape[1] == 1:
        return probs.new_zeros(len(probs))
    return torch.minimum(probs[:, :-1], probs[:, 1:]).sum(dim=-1).mean(dim=-1).clamp(max=1.0)


def capture(queries: torch.Tensor, num_kept: int, num_sinks: int, num_recent: int) -> torch.Tensor:
    """[H, G, W]: each query's probability on `num_kept` keys: sinks, recent ones, and those the other rows want most.

    This is what a pruned head would keep of a query that it has not seen; it is 0 with one row. Ties go to the earlier
    key, and NaN counts as 0.
    """
    if queries.shape[2] == 1:
        return queries.new_zeros(queries.shape[:3])
    probs, queries = queries.mean(dim=1).nan_to_num(0.0), queries.nan_to_num(0.0)
    kept = wanted_keys(probs, num_sinks, num_recent).argsort(dim=-1, descending=True, stable=True)[..., :num_kept]
    # kept [H, W, num_kept] -> [H, G, W, num_kept], the same keys for all queries of a group.
    return queries.gather(-1, kept.unsqueeze(1).expand(-1, queries.shape[1], -1, -1)).sum(dim=-1).clamp(max=1.0)


def wanted_keys(probs: torch.Tensor, num_sinks: int, num_recent: int) -> torch.Tensor:
    """[H, W, N], double: how much the other rows of finite probs [H, W, N] want a key; inf for what is always kept."""
    # The sum of the other rows ranks as their mean does. In double, a row that is subtracted leaves no trace.
    others = probs.double().sum(dim=1, keepdim=True) - probs.double()
    key = torch.arange(probs.shape[2], device=probs.device)
    own = key[probs.shape[2] - probs.shape[1] :, None]
    is_forced = (key < num_sinks) | ((key <= own) & (key > own - num_recent))
    return others.masked_fill_(is_forced, float("inf"))


def num_captured(num_tokens: int, fraction: float) -> int:
    """Number of keys that `capture` keeps, rounded up; 0.1 of 30 is 3."""
    return math.ceil(Fraction(repr(fraction)) * num_tokens)


def hit_ranks(num_tokens: int) -> tuple[int, int]:
    """Nearest ranks of the two quantiles among `num_tokens` values (torch.quantile refuses long rows)."""
    low, high = (round(fraction * (num_tokens - 1)) for fraction in _HIT_QUANTILES)
    return low, high
