"""Summaries of a dynamic head's chunks, and the exact choice of its top chunks for one query."""

import torch

from hybridkv_kernels import checks, dispatch, gpu
from hybridkv_kernels.select_chunks import naive

KEY_CODES = "key_codes"
SUMMARY_SCORES = ("mean_max", "mean_mean", "quest", "arkvale", "mean2_max", "mean4_max", "mean_spread")
"""Scores of a chunk as a whole, from a few vectors; KEY_CODES knows each of its keys."""
CHUNK_SCORES = (*SUMMARY_SCORES, KEY_CODES)
_select_on_gpu = gpu.twin("select_chunks")
ESTIMATING_SCORES = ("mean_max", "mean_mean", "mean2_max", "mean4_max")  # their summaries are means, as a row is


def count_vectors(chunk_score: str, num_tokens: int, chunk_size: int, *, estimate: bool = False) -> int:
    """Vectors of head_dim on the device for all chunks, of `chunk_size` tokens each, of one head's `num_tokens`.

    Raises
    ------
    ValueError
        As `summary_vectors`; or the tokens are not whole chunks, of KEY_CODES not a multiple of CODED_TOKENS.
    """
    check_score("chunk_score", chunk_score, estimate=estimate)
    unit = naive.CODED_TOKENS if chunk_score == KEY_CODES else chunk_size
    if num_tokens % unit:
        raise ValueError(f"num_tokens: expected a multiple of {unit} for {chunk_score}, got {num_tokens}")
    if chunk_score == KEY_CODES:
        return naive.CODE_HEADER + num_tokens // unit
    return num_tokens // unit * summary_vectors(chunk_score, estimate=estimate)


def encode_keys(k: torch.Tensor) -> torch.Tensor:
    """Two bits for each element of each key, from which `retrieve_chunks` scores single tokens.

    Parameters
    ----------
    k : [E, N, D], bf16 | fp16 | fp32. Keys after RoPE of E heads; N is a multiple of 8.

    Returns
    -------
    [E, 2 + N / 8, D], dtype of k: the mean of each element over the tokens, its root mean square distance to it (the
    step), and words whose bits 2 i and 2 i + 1 are the code of token 8 w + i: a key's element is about
    mean + (code - 1.5) step.

    Raises
    ------
    ValueError
        A shape or dtype is not as above.

    Notes
    -----
    Per-channel quantization of keys after KIVI (arXiv 2402.02750), here only to rank them: the rows themselves are
    fetched exactly. A normal variable loses an eighth of its variance. In fp32 the words use half of their bits.
    """
    checks.check_shape("k", k, (None, None, None))
    checks.check_dtype("k", k, checks.FLOATS)
    if k.shape[1] % naive.CODED_TOKENS:
        raise ValueError(f"k: expected a multiple of {naive.CODED_TOKENS} tokens, got {k.shape[1]}")
    return naive.encode_keys(k)


def summary_vectors(chunk_score: str, *, estimate: bool = False) -> int:
    """Vectors of head_dim on the device for one chunk.

    One mean key, with or without the spread around it, a minimum and a maximum, or a mean of each part; with `estimate`
    a mean value beside each mean key.

    Raises
    ------
    ValueError
        `chunk_score` is not one of SUMMARY_SCORES, or with `estimate` not one of ESTIMATING_SCORES.
    """
    _check_summary_score(chunk_score, estimate=estimate)
    return naive.summary_vectors(chunk_score) * (2 if estimate else 1)


def summarize_chunks(k: torch.Tensor, chunk_score: str, v: torch.Tensor | None = None) -> torch.Tensor:
    """Vectors that stand for each chunk of keys, and of values where chunks are estimated.

    Parameters
    ----------
    k : [E, C, P, D], bf16 | fp16 | fp32. Keys after RoPE, E heads, C chunks of P tokens.
    chunk_score : "mean_max" | "mean_mean" (one vector: the mean) | "quest" | "arkvale" (minimum and maximum) |
        "mean2_max" | "mean4_max" (vector i: the mean of the i-th half or quarter of the tokens; P divides) |
        "mean_spread" (one vector: the mean, and in place of its element 0 the root mean square distance to it).
    v : as k, or None. Values of the same tokens, for `decode_attn` with `estimate`; one of ESTIMATING_SCORES only.

    Returns
    -------
    [E, C, V, D], dtype of k; V = `summary_vectors`. With v [E, C, 2 V, D]: the V vectors of the keys, then the mean
    values of the same V parts.

    Raises
    ------
    ValueError
        A shape, dtype, device or name is not as above.
    """
    checks.check_shape("k", k, (None, None, None, None))
    checks.check_dtype("k", k, checks.FLOATS)
    _check_summary_score(chunk_score, estimate=v is not None)
    vectors = summary_vectors(chunk_score)
    if k.shape[2] % vectors:
        raise ValueError(f"k: expected a multiple of {vectors} tokens a chunk for {chunk_score}, got {k.shape[2]}")
    if v is not None:
        checks.check_shape("v", v, tuple(k.shape))
        checks.check_same("v", v, "k", k)
    return naive.summarize_chunks(k, chunk_score, v)


def select_chunks(
    q: torch.Tensor,
    summaries: torch.Tensor,
    num_selected: torch.Tensor,
    *,
    num_sink_chunks: int,
    num_recent_chunks: int,
    chunk_score: str,
) -> torch.Tensor:
    """Chunks that a query attends to, exactly num_selected[e] for head e.

    Parameters
    ----------
    q : [E, G, D], bf16 | fp16 | fp32. One query group per dynamic head, after RoPE.
    summaries : [E, C, V, D], same dtype. From `summarize_chunks` with the same `chunk_score`.
    num_selected : [E], integer, in [1, C].
    num_sink_chunks, num_recent_chunks : first and last chunks that win over every score, sinks before recent;
        at least one place is left to the score where num_selected allows.
    chunk_score : one of SUMMARY_SCORES.

    Returns
    -------
    [E, C], bool. True where the chunk is chosen; ties go to the earlier chunk.

    Raises
    ------
    ValueError
        A shape, dtype, device or name is not as above.

    Notes
    -----
    Cost: reads q and the summaries once. Source: HybridKV (arXiv 2604.05887), Quest (arXiv
    2406.10774), ArkVale (NeurIPS 2024). "mean2_max" and "mean4_max" score finer than they move: the mean of 16
    neighbours that have nothing in common says little of any of them. "mean_spread" (ours) expects more of a chunk
    whose keys differ: max over the group of q . mean, without element 0, plus SPREAD_WEIGHT |q| spread, in the memory
    of "mean_max".
    """
    checks.check_shape("q", q, (None, None, None))
    checks.check_dtype("q", q, checks.FLOATS)
    num_heads, _, head_dim = q.shape
    checks.check_shape("summaries", summaries, (num_heads, None, summary_vectors(chunk_score), head_dim))
    checks.check_same("summaries", summaries, "q", q)
    checks.check_shape("num_selected", num_selected, (num_heads,))
    chosen = dispatch.choose(q.device, q.dtype, head_dim, q.shape[1])
    run = _select_on_gpu if chosen == "triton" else naive.select_chunks
    return run(q, summaries, num_selected, num_sink_chunks, num_recent_chunks, chunk_score)


def forced_chunks(num_chunks: int, num_selected: torch.Tensor, num_sink_chunks: int, num_recent_chunks: int):
    """[E, C], bool: chunks that are resident whatever the query; at most num_selected - 1 (but 1 of 1) of a head."""
    return naive.forced_chunks(num_chunks, num_selected, num_sink_chunks, num_recent_chunks)


def top_chunks(scores: torch.Tensor, num_selected: torch.Tensor) -> torch.Tensor:
    """[E, C], bool: the num_selected[e] largest of scores [E, C]; ties go to the earlier chunk."""
    return naive.top_by_score(scores, num_selected)


def check_score(name: str, chunk_score: str, *, estimate: bool) -> None:
    """ValueError that names the argument unless it is a chunk score, with `estimate` one whose summaries are means."""
    _check_one_of(name, chunk_score, ESTIMATING_SCORES if estimate else CHUNK_SCORES, estimate=estimate)


def _check_summary_score(chunk_score: str, *, estimate: bool) -> None:
    _check_one_of("chunk_score", chunk_score, ESTIMATING_SCORES if estimate else SUMMARY_SCORES, estimate=estimate)


def _check_one_of(name: str, chunk_score: str, legal: tuple[str, ...], *, estimate: bool) -> None:
    if chunk_score not in legal:
        where = " where chunks are estimated" if estimate else ""
        raise ValueError(f"{name}: expected one of {', '.join(legal)}{where}, got {chunk_score!r}")


def check_chunk_size(chunk_size: int, page_size: int, chunk_score: str, *, estimate: bool) -> None:
    """ValueError unless chunks of this size fill a page and can be scored so."""
    if chunk_size < 1 or page_size % chunk_size:
        raise ValueError(f"chunk_size: expected a divisor of the page size {page_size}, got {chunk_size}")
    if estimate and chunk_size != page_size:
        raise ValueError(
            f"chunk_size: expected {page_size}, the page size, where chunks are estimated, got {chunk_size}"
        )
    least = 1 if chunk_score == KEY_CODES else 2 * summary_vectors(chunk_score)
    if chunk_size < least:
        where = f"at least {least} for {chunk_score}, whose summaries would take more than a quarter of the rows"
        raise ValueError(f"chunk_size: expected {where}, got {chunk_size}")
