"""Scores of chunks, and which are forced, by plain formulas."""

import torch

from hybridkv_kernels.chunks import CODED_SCORES


def plain_rounded(rows):
    """Rows [..., D] as a host store of int8 gives them back: 255 steps between minus and plus the largest magnitude.

    Each quotient and product is that of exact arithmetic, rounded to fp32.
    """
    wide = rows.double()
    largest = wide.abs().amax(-1, keepdim=True)
    scale = torch.where(largest < 2.0**-100, 0.0, (largest / 127).float().double())
    codes = torch.where(scale > 0, (wide / scale).float().double().round(), 0.0)
    widened = (codes * scale).float().to(rows.dtype)
    return torch.where(wide.isfinite().all(-1, keepdim=True), widened, float("nan"))


def coded_scores(keys, q, query_rms, num_channels):
    """[G, N]: queries [G, D] times the codes of keys [N, D], over the length of what the codes meet.

    Codes are of the channels with the largest query_rms [D] times spread, turned: each one of four values around the
    mean over the tokens.
    """
    reach = query_rms * ((keys - keys.mean(dim=0)) ** 2).mean(dim=0).sqrt()
    channels = sorted(sorted(range(len(reach)), key=lambda d: (-float(reach[d]), d))[:num_channels])
    size = max(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if num_channels % n == 0)
    signs = [
        [(-1) ** bin(i & j).count("1") if i // size == j // size else 0 for j in range(num_channels)]
        for i in range(num_channels)
    ]
    turn = torch.tensor(signs, dtype=keys.dtype) / size**0.5
    turned = keys[:, channels] @ turn
    step = ((turned - turned.mean(dim=0)) ** 2).mean(dim=0).sqrt()
    edges = torch.stack((-step, torch.zeros_like(step), step), dim=1)  # [C, 3]
    codes = torch.searchsorted(edges, (turned - turned.mean(dim=0)).T.contiguous(), right=True).T
    scaled = q[:, channels] @ turn * step
    return scaled @ (codes - 1.5).to(keys.dtype).T / scaled.norm(dim=1, keepdim=True)


def plain_scores(keys, q, chunk_score, query_rms=None):
    """Score of each chunk of one head, from the keys [C, P, D] themselves, in fp64 and by the published formulas.

    A finer mean is the best mean of a chunk's parts, each scored as a small chunk. The spread of a chunk counts in
    place of the first element of its mean key. Codes are those of all keys; they alone look at query_rms [D].
    """
    keys, q = keys.double(), q.double()
    if chunk_score in CODED_SCORES:
        num_channels = keys.shape[2] // CODED_SCORES[chunk_score]
        scores = coded_scores(keys.flatten(0, 1), q, query_rms.double(), num_channels).unflatten(1, keys.shape[:2])
        return scores.amax(dim=(0, 2)).tolist()  # over [G, C, P]
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
