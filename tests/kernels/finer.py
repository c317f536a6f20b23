"""Chunk scores that are finer than the chunks that move, for the tests of select_chunks and retrieve_chunks."""

from tests import builders


def plain_scores(keys, q, chunk_score):
    """`builders.plain_scores`; a finer score is the best mean of a chunk's parts, each scored as a small chunk."""
    parts = {"mean2_max": 2, "mean4_max": 4}.get(chunk_score)
    if parts is None:
        return builders.plain_scores(keys, q, chunk_score)
    scores = builders.plain_scores(keys.unflatten(1, (parts, -1)).flatten(0, 1), q, "mean_max")
    return [max(scores[i : i + parts]) for i in range(0, len(scores), parts)]
