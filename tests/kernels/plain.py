"""Scores of chunks, and which are forced, by plain formulas."""

import torch


def coded_keys(keys):
    """Keys [N, D] as their codes tell them: each element one of four values around its mean over the tokens."""
    mean = keys.mean(dim=0)
    step = ((keys - mean) ** 2).mean(dim=0).sqrt()
    levels = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=keys.dtype)
    edges = torch.stack((-step, torch.zeros_like(step), step), dim=1)  # [D, 3]
    codes = torch.searchsorted(edges, (keys - mean).T.contiguous(), right=True).T
    return mean + levels[codes] * step


def plain_scores(keys, q, chunk_score):
    """Score of each chunk of one head, from the keys [C, P, D] themselves, in fp64 and by the published formulas.

    A finer mean is the best mean of a chunk's parts, each scored as a small chunk. The spread of a chunk counts in
    place of the first element of its mean key. Codes are those of all keys.
    """
    keys, q = keys.double(), q.double()
    if chunk_score == "key_codes":
        scores = (q @ coded_keys(keys.flatten(0, 1)).T).unflatten(1, keys.shape[:2])  # [G, C, P]
        return scores.amax(dim=(0, 2)).tolist()
    if chunk_score in ("mean2_max", "mean4_max"):
        parts = int(chunk_score[4])
        scores = plain_scores(keys.unflatten(1, (parts, -1)).flatten(0, 1), q, "mean_max")
        return [max(scores[i : i + parts]) for i in range(0, len(scores), parts)]
    return [plain_score(chunk, q, chunk_score) for chunk in keys]


def plain_score(chunk, q, chunk_score):
    mean, low, high = chunk.mean(0), chunk.amin(0), chunk.amax(0)
    per_query = []
    for query in q:
        if chunk_score == "quest":
            per_query.append(torch.maximum(query * low, query * high).sum())
        elif chunk_score == "arkvale":
            per_query.append(query @ (low + high) / 2 + query.norm() * (high - low).norm() / 4)
        elif chunk_score == "mean_spread":
            spread = 0.5 * ((chunk - mean) ** 2).sum(1).mean().sqrt()
            per_query.append(query[1:] @ mean[1:] + query.norm() * spread)
        else:
            per_query.append(query @ mean)
    return float(torch.stack(per_query).mean() if chunk_score == "mean_mean" else max(per_query))


def plain_forced(num_chunks, count, num_sinks, num_recent):
    """Sinks, then the last chunks, until one place is left; all of it when there is only one."""
    forced = []
    for chunk in [*range(num_sinks), *range(num_chunks - 1, num_chunks - 1 - num_recent, -1)]:
        if 0 <= chunk < num_chunks and chunk not in forced and len(forced) < max(count - 1, 1):
            forced.append(chunk)
    return set(forced)
