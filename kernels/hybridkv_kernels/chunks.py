"""Chunks of a dynamic head: the vectors that stand for them on the device, and how their retrieval is set.

A chunk is what a dynamic head retrieves together: some tokens of a prompt, a page of them or a part of it. Its summary
is a few vectors of head_dim beside the kept rows; KEY_CODES have two bits for each element of each key instead.
"""

from __future__ import annotations

import dataclasses

import torch

from hybridkv_kernels import checks

KEY_CODES = "key_codes"
SUMMARY_SCORES = ("mean_max", "mean_mean", "quest", "arkvale", "mean2_max", "mean4_max", "mean_spread")
"""Scores of a chunk as a whole, from a few vectors; KEY_CODES knows each of its keys."""
CHUNK_SCORES = (*SUMMARY_SCORES, KEY_CODES)
ESTIMATING_SCORES = ("mean_max", "mean_mean", "mean2_max", "mean4_max")  # their summaries are means, as a row is

CODED_TOKENS = 8
"""Tokens whose 2-bit codes of one element share a word of 16 bits."""
CODE_HEADER = 2
"""Vectors ahead of the codes: centre and step of each element."""

_BOXES = ("quest", "arkvale")
_NUM_VECTORS = dict.fromkeys(SUMMARY_SCORES, 1) | {"quest": 2, "arkvale": 2, "mean2_max": 2, "mean4_max": 4}


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """How dynamic heads retrieve chunks, the same for all of a model.

    Attributes
    ----------
    num_sink_chunks, num_recent_chunks : first and last chunks of a prompt that win over every score, sinks before
        recent. A buffer of two places or more leaves at least one of them to the score.
    chunk_score : one of CHUNK_SCORES. "key_codes" takes the best token of a chunk, by the codes of `encode_keys`.
    chunk_size : tokens of a chunk, a divisor of the page size. A buffer of n pages holds n * page_size / chunk_size
        chunks.
    estimate : whether chunks that are not retrieved take part in attention through their means. Their summaries then
        carry mean values (`summarize_chunks` with v), each chunk is a page, and the score is in ESTIMATING_SCORES.
    """

    num_sink_chunks: int
    num_recent_chunks: int
    chunk_score: str
    chunk_size: int
    estimate: bool = False

    def check(self, page_size: int) -> None:
        """ValueError that names the field unless chunks of this size fill a page and can be scored so."""
        check_score(self.chunk_score, estimate=self.estimate)
        size = self.chunk_size
        if size < 1 or page_size % size:
            raise ValueError(f"chunk_size: expected a divisor of the page size {page_size}, got {size}")
        if self.estimate and size != page_size:
            raise ValueError(f"chunk_size: expected {page_size}, the page size, where chunks are estimated, got {size}")
        least = max(1, 2 * self.score_vectors)
        if size < least:
            where = (
                f"at least {least} for {self.chunk_score}, whose summaries would take more than a quarter of the rows"
            )
            raise ValueError(f"chunk_size: expected {where}, got {size}")

    @property
    def score_vectors(self) -> int:
        """Vectors of a chunk's summary that its score reads; 0 with key codes, which do not belong to one chunk."""
        return 0 if self.chunk_score == KEY_CODES else summary_vectors(self.chunk_score)

    @property
    def num_means(self) -> int:
        """Mean keys of a chunk, followed by as many mean values, that stand for it while it is not retrieved; or 0."""
        return self.score_vectors if self.estimate else 0

    @property
    def stored_vectors(self) -> int:
        """Vectors of a chunk's summary: those that its score reads, and the mean values."""
        return self.score_vectors + self.num_means

    def count_vectors(self, num_tokens: int) -> int:
        """Vectors of head_dim on the device for all chunks of one head's `num_tokens`.

        Raises
        ------
        ValueError
            The score is unknown, the tokens are not whole chunks, or KEY_CODES get no multiple of CODED_TOKENS.
        """
        check_score(self.chunk_score, estimate=self.estimate)
        unit = CODED_TOKENS if self.chunk_score == KEY_CODES else self.chunk_size
        if num_tokens % unit:
            raise ValueError(f"num_tokens: expected a multiple of {unit} for {self.chunk_score}, got {num_tokens}")
        if self.chunk_score == KEY_CODES:
            return CODE_HEADER + num_tokens // unit
        return num_tokens // unit * self.stored_vectors

    def forced_chunks(self, num_chunks: int, num_selected: torch.Tensor) -> torch.Tensor:
        """[E, C], bool: chunks that are resident whatever the query is.

        Sinks come first, then the most recent chunks: of each head at most num_selected - 1, which leaves one place to
        the score. A head that has a single place gives it to a forced chunk.
        """
        chunks = torch.arange(num_chunks, device=num_selected.device)
        places = (num_selected - 1).clamp(min=1)
        num_sinks = places.clamp(max=self.num_sink_chunks)
        num_recent = (places - num_sinks).clamp(max=self.num_recent_chunks)
        return (chunks < num_sinks[:, None]) | (chunks >= num_chunks - num_recent[:, None])


def check_score(chunk_score: str, *, estimate: bool) -> None:
    """ValueError unless `chunk_score` is one of CHUNK_SCORES, and one whose summaries are means if they `estimate`."""
    _check_one_of(chunk_score, ESTIMATING_SCORES if estimate else CHUNK_SCORES, estimate=estimate)


def _check_one_of(chunk_score: str, legal: tuple[str, ...], *, estimate: bool) -> None:
    if chunk_score not in legal:
        where = " where chunks are estimated" if estimate else ""
        raise ValueError(f"chunk_score: expected one of {', '.join(legal)}{where}, got {chunk_score!r}")


def summary_vectors(chunk_score: str) -> int:
    """Vectors of head_dim that score one chunk.

    One mean key, with or without the spread around it, a minimum and a maximum, or a mean of each part.

    Raises
    ------
    ValueError
        `chunk_score` is not one of SUMMARY_SCORES.
    """
    _check_one_of(chunk_score, SUMMARY_SCORES, estimate=False)
    return _NUM_VECTORS[chunk_score]


def summarize_chunks(k: torch.Tensor, chunk_score: str, v: torch.Tensor | None = None) -> torch.Tensor:
    """Vectors that stand for each chunk of keys, and of values where chunks are estimated.

    Parameters
    ----------
    k : [E, C, T, D], bf16 | fp16 | fp32. Keys after RoPE, E heads, C chunks of T tokens.
    chunk_score : "mean_max" | "mean_mean" (one vector: the mean) | "quest" | "arkvale" (minimum and maximum) |
        "mean2_max" | "mean4_max" (vector i: the mean of the i-th half or quarter of the tokens; T divides) |
        "mean_spread" (one vector: the mean, and in place of its element 0 the root mean square distance to it).
    v : as k, or None. Values of the same tokens, for `decode_attn` to estimate; one of ESTIMATING_SCORES only.

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
    _check_one_of(chunk_score, SUMMARY_SCORES if v is None else ESTIMATING_SCORES, estimate=v is not None)
    vectors = summary_vectors(chunk_score)
    if k.shape[2] % vectors:
        raise ValueError(f"k: expected a multiple of {vectors} tokens a chunk for {chunk_score}, got {k.shape[2]}")
    if v is not None:
        checks.check_shape("v", v, tuple(k.shape))
        checks.check_same("v", v, "k", k)
    if chunk_score in _BOXES:
        return torch.stack((k.amin(dim=2), k.amax(dim=2)), dim=2)  # [E, C, 2, D]
    rows = (k,) if v is None else (k, v)
    means = [row.float().unflatten(2, (vectors, -1)).mean(dim=3) for row in rows]  # [E, C, V, D] each
    if chunk_score == "mean_spread":
        means[0][..., 0] = (k.float() - means[0]).square().sum(dim=3).mean(dim=2, keepdim=True).sqrt()
    return torch.cat(means, dim=2).to(k.dtype)


def encode_keys(k: torch.Tensor) -> torch.Tensor:
    """Two bits for each element of each key, from which `retrieve_chunks` scores single tokens.

    Parameters
    ----------
    k : [E, N, D], bf16 | fp16 | fp32. Keys after RoPE of E heads; N is a multiple of 8.

    Returns
    -------
    [E, 2 + N / 8, D], dtype of k: the mean of each element over the tokens, its root mean square distance to it (the
    step), and words whose bits 2 i and 2 i + 1 are the code of token 8 w + i: a key's element is about
    mean + (code - 1.5) step. Codes are cut at -1, 0 and 1 steps from the mean.

    Raises
    ------
    ValueError
        A shape or dtype is not as above.

    Notes
    -----
    Per-channel quantization of keys after KIVI (arXiv 2402.02750), here only to rank them: the rows themselves are
    fetched exactly. The error of the codes is an eighth of the variance where elements are normally distributed. In
    fp32 the words use half of their bits.
    """
    checks.check_shape("k", k, (None, None, None))
    checks.check_dtype("k", k, checks.FLOATS)
    if k.shape[1] % CODED_TOKENS:
        raise ValueError(f"k: expected a multiple of {CODED_TOKENS} tokens, got {k.shape[1]}")
    keys = k.float()
    # One key that is not a finite number must not spoil the mean of all others.
    finite = keys.isfinite()
    count = finite.sum(dim=1, keepdim=True).clamp(min=1)
    centre = (keys.where(finite, 0.0).sum(dim=1, keepdim=True) / count).to(k.dtype)  # [E, 1, D], as step
    offset = keys - centre.float()
    step = (offset.where(finite, 0.0).square().sum(dim=1, keepdim=True) / count).sqrt().to(k.dtype)
    codes = (offset >= -step.float()).int() + (offset >= 0) + (offset >= step.float())
    words = (codes.unflatten(1, (-1, CODED_TOKENS)) << _code_shifts(k.device)).sum(dim=2)  # [E, N / 8, D]
    # The element's bits, whatever number they are: fp32 leaves the upper half empty.
    stored = words.to(torch.int32 if k.itemsize == 4 else torch.int16).view(k.dtype)
    return torch.cat((centre, step, stored), dim=1)


def read_codes(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centre and step [E, 1, D] and steps from the centre [E, N, D], all fp32, of vectors of `encode_keys`."""
    centre, step = vectors[:, :CODE_HEADER].float().split(1, dim=1)
    words = vectors[:, CODE_HEADER:].contiguous().view(torch.int32 if vectors.itemsize == 4 else torch.int16).int()
    codes = ((words.unsqueeze(2) >> _code_shifts(vectors.device)) & 3).flatten(1, 2)  # [E, N / 8, 8, D] -> [E, N, D]
    return centre, step, codes - 1.5


def _code_shifts(device: torch.device) -> torch.Tensor:
    return 2 * torch.arange(CODED_TOKENS, dtype=torch.int32, device=device)[:, None]


def top_chunks(scores: torch.Tensor, num_selected: torch.Tensor) -> torch.Tensor:
    """[E, C], bool: the num_selected[e] largest of scores [E, C]; ties go to the earlier chunk."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return rank < num_selected[:, None]
