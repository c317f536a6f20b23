"""Chunk scores of ours, for the tests of select_chunks and retrieve_chunks."""

from tests import builders


def plain_scores(keys, q, chunk_score):
    """`builders.plain_scores`; a finer score is the best mean of a chunk's parts, each scored as a small chunk.

    The spread of a chunk counts in place of the first element of its mean key.
    """
    if chunk_score == "mean_spread":
        mean, queries = keys.mean(dim=1, keepdim=True), q.clone()
        spread = 0.5 * ((keys - mean) ** 2).sum(dim=2).mean(dim=1).sqrt()  # [C]
        queries[:, 0] = 0.0
        scores = queries @ mean[:, 0].T + q.norm(dim=1, keepdim=True) * spread  # [G, C]
        return scores.amax(dim=0).tolist()
    parts = {"mean2_max": 2, "mean4_max": 4}.get(chunk_score)
    if parts is None:
        return builders.plain_scores(keys, q, chunk_score)
    scores = builders.plain_scores(keys.unflatten(1, (parts, -1)).flatten(0, 1), q, "mean_max")
    return [max(scores[i : i + parts]) for i in range(0, len(scores), parts)]
