"""Chunk scores of ours, for the tests."""

import torch

from tests import builders


def coded_keys(keys):
    """Keys [N, D] as their codes tell them: each element one of four values around its mean over the tokens."""
    mean = keys.mean(dim=0)
    step = ((keys - mean) ** 2).mean(dim=0).sqrt()
    levels = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    edges = torch.stack((-step, torch.zeros_like(step), step), dim=1)  # [D, 3]
    codes = torch.searchsorted(edges, (keys - mean).T.contiguous(), right=True).T
    return mean + levels[codes] * step


def plain_scores(keys, q, chunk_score):
    """`builders.plain_scores`; a finer score is the best mean of a chunk's parts, each scored as a small chunk.

    The spread of a chunk counts in place of the first element of its mean key. Codes are those of all keys [C, P, D].
    """
    if chunk_score == "mean_spread":
        mean, queries = keys.mean(dim=1, keepdim=True), q.clone()
        spread = 0.5 * ((keys - mean) ** 2).sum(dim=2).mean(dim=1).sqrt()  # [C]
        queries[:, 0] = 0.0
        scores = queries @ mean[:, 0].T + q.norm(dim=1, keepdim=True) * spread  # [G, C]
        return scores.amax(dim=0).tolist()
    if chunk_score == "key_codes":
        scores = (q @ coded_keys(keys.flatten(0, 1)).T).unflatten(1, keys.shape[:2])  # [G, C, P]
        return scores.amax(dim=(0, 2)).tolist()
    parts = {"mean2_max": 2, "mean4_max": 4}.get(chunk_score)
    if parts is None:
        return builders.plain_scores(keys, q, chunk_score)
    scores = builders.plain_scores(keys.unflatten(1, (parts, -1)).flatten(0, 1), q, "mean_max")
    return [max(scores[i : i + parts]) for i in range(0, len(scores), parts)]
