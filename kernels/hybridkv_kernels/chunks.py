"""Chunks of a dynamic head: the vectors that stand for them on the device, and how their retrieval is set.

A chunk is what a dynamic head retrieves together: some tokens of a prompt, a page of them or a part of it. Its summary
is a few vectors of head_dim beside the kept rows; CODED_SCORES have two bits for elements of each key instead.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from hybridkv_kernels import checks
from hybridkv_kernels.select_tokens.naive import first_of_order

CODED_SCORES = {"key_codes": 1, "half_codes": 2}
"""Scores by codes of every single key, and of how many of its channels one is coded."""
SUMMARY_SCORES = ("mean_max", "mean_mean", "quest", "arkvale", "mean2_max", "mean4_max", "mean_spread")
"""Scores of a chunk as a whole, from a few vectors."""
CHUNK_SCORES = (*SUMMARY_SCORES, *CODED_SCORES)
ESTIMATING_SCORES = ("mean_max", "mean_mean", "mean2_max", "mean4_max")  # their summaries are means, as a row is

CODED_TOKENS = 8
"""Tokens whose 2-bit codes of one channel share a word of 16 bits."""
CODE_HEADER = 2
"""Coded vectors ahead of the words: the step of each turned channel, and which channels of the keys were turned."""

_BOXES = ("quest", "arkvale")
_NUM_VECTORS = dict.fromkeys(SUMMARY_SCORES, 1) | {"quest": 2, "arkvale": 2, "mean2_max": 2, "mean4_max": 4}


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """How dynamic heads retrieve chunks, the same for all of a model.

    Attributes
    ----------
    num_sink_chunks, num_recent_chunks : first and last chunks of a prompt that win over every score, sinks before
        recent. A buffer of two places or more leaves at least one of them to the score.
    chunk_score : one of CHUNK_SCORES. The coded ones take the best token of a chunk, by the codes of `encode_keys`.
    chunk_size : tokens of a chunk, a divisor of the page size. A buffer of n pages holds n * page_size / chunk_size
        chunks.
    estimate : whether chunks that are not retrieved take part in attention through their means. Their summaries then
        carry mean values (`summarize_chunks` with v), each chunk is a page, and the score is in ESTIMATING_SCORES.
    hysteresis : by how much a chunk that is not resident has to beat one that is, in the unit of the coded scores: the
        spread that a query's scores would have if the channels of the keys were independent. 0 with other scores.
    """

    num_sink_chunks: int
    num_recent_chunks: int
    chunk_score: str
    chunk_size: int
    estimate: bool = False
    hysteresis: float = 0.0

    def check(self, page_size: int) -> None:
        """ValueError that names the field unless chunks of this size fill a page and can be scored so."""
        check_score(self.chunk_score, estimate=self.estimate)
        if not (self.hysteresis == 0 or (self.is_coded and self.hysteresis > 0)):
            legal = "a number at least 0" if self.is_coded else f"0 with {self.chunk_score}, whose scores have no unit"
            raise ValueError(f"hysteresis: expected {legal}, got {self.hysteresis!r}")
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
        """Vectors of a chunk's summary that its score reads; 0 with codes, which do not belong to one chunk."""
        return 0 if self.is_coded else summary_vectors(self.chunk_score)

    @property
    def is_coded(self) -> bool:
        """Whether single keys are scored by their codes."""
        return self.chunk_score in CODED_SCORES

    def coded_channels(self, head_dim: int) -> int:
        """Channels of a key that are coded; ValueError where they are no whole share of `head_dim`, or no codes."""
        share = CODED_SCORES[self.chunk_score] if self.is_coded else 0
        if not share or head_dim % share:
            legal = ", ".join(score for score, share in CODED_SCORES.items() if head_dim % share == 0)
            raise ValueError(
                f"chunk_score: expected one of {legal} where keys of head size {head_dim} are coded, "
                f"got {self.chunk_score!r}"
            )
        return head_dim // share

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
            The score is unknown, the tokens are not whole chunks, or codes get no multiple of CODED_TOKENS.
        """
        check_score(self.chunk_score, estimate=self.estimate)
        unit = CODED_TOKENS if self.is_coded else self.chunk_size
        if num_tokens % unit:
            raise ValueError(f"num_tokens: expected a multiple of {unit} for {self.chunk_score}, got {num_tokens}")
        if self.is_coded:
            return -(-(CODE_HEADER + num_tokens // unit) // CODED_SCORES[self.chunk_score])
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


def encode_keys(k: torch.Tensor, query_rms: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Two bits for each of the channels of a key that its head's queries read, to score single tokens by.

    Parameters
    ----------
    k : [E, N, D], bf16 | fp16 | fp32. Keys after RoPE of E heads; N is a multiple of 8.
    query_rms : [E, D], not negative. Root mean square of each element over the observed queries of a head.
    num_channels : C of the D channels are coded, those whose query_rms times standard deviation over the keys is
        largest; D is a multiple of C.

    Returns
    -------
    [E, ceil((2 + N / 8) * C / D), D], dtype of k. Row by row, it holds coded vectors of C numbers: the *step* of each
    turned channel, the numbers of the coded channels in ascending order, and N / 8 vectors of words, whose bits 2 i and
    2 i + 1 are the code of token 8 w + i. The key of a token, turned by `turn_channels` and without its mean over the
    tokens, is about (code - 1.5) step: codes are cut at -1, 0 and 1 steps. The step is the standard deviation.

    Raises
    ------
    ValueError
        A shape or dtype is not as above.

    Notes
    -----
    Per-channel quantization of keys after KIVI (arXiv 2402.02750), of channels chosen as in Double Sparsity
    (arXiv 2408.07092) and turned as in QuaRot (arXiv 2404.00456), here only to rank keys: the rows themselves are
    fetched exactly. Two bits would cut off the outliers of a channel; turning spreads them over all channels. The error
    of the codes is an eighth of the variance where elements are normally distributed. In fp32 the words use half of
    their bits.
    """
    checks.check_shape("k", k, (None, None, None))
    checks.check_dtype("k", k, checks.FLOATS)
    checks.check_shape("query_rms", query_rms, (k.shape[0], k.shape[2]))
    if k.shape[1] % CODED_TOKENS:
        raise ValueError(f"k: expected a multiple of {CODED_TOKENS} tokens, got {k.shape[1]}")
    if num_channels < 1 or k.shape[2] % num_channels:
        raise ValueError(f"num_channels: expected a divisor of the head size {k.shape[2]}, got {num_channels}")
    integer = torch.int32 if k.itemsize == 4 else torch.int16
    keys = k.float()
    reach = query_rms.float().nan_to_num(0.0) * _mean_and_spread(keys)[1].squeeze(1)  # [E, D]
    channels = reach.argsort(dim=1, descending=True, stable=True)[:, :num_channels].sort(dim=1).values  # [E, C]
    turned = turn_channels(keys, channels)  # [E, N, C]
    centre, step = _mean_and_spread(turned)
    step = step.to(k.dtype)
    offset = turned - centre
    codes = (offset >= -step.float()).int() + (offset >= 0) + (offset >= step.float())
    words = (codes.unflatten(1, (-1, CODED_TOKENS)) << _code_shifts(k.device)).sum(dim=2)  # [E, N / 8, C]
    # The element's bits, whatever number they are: fp32 leaves the upper half empty.
    numbers = torch.cat((channels.unsqueeze(1), words), dim=1).to(integer).view(k.dtype)
    vectors = torch.cat((step, numbers), dim=1).flatten(1)
    return torch.nn.functional.pad(vectors, (0, -vectors.shape[1] % k.shape[2])).unflatten(1, (-1, k.shape[2]))


def read_codes(vectors: torch.Tensor, num_channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Step [E, 1, C], fp32, channels [E, C], int64, and steps from the mean [E, >= N, C], fp32, of `encode_keys`.

    With an odd number of words in half rows, the last 8 tokens are padding.
    """
    coded = vectors.flatten(1).unflatten(1, (-1, num_channels))
    numbers = coded[:, 1:].contiguous().view(torch.int32 if vectors.itemsize == 4 else torch.int16).int()
    codes = ((numbers[:, 1:].unsqueeze(2) >> _code_shifts(vectors.device)) & 3).flatten(1, 2)  # [E, N / 8, 8, C]
    return coded[:, :1].float(), numbers[:, 0].long(), codes - 1.5


def turn_channels(x: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """[E, N, C], fp32: channels [E, C] of vectors x [E, N, D], turned by `rotation`."""
    chosen = x.gather(2, channels.unsqueeze(1).expand(-1, x.shape[1], -1))
    return chosen.float() @ rotation(channels.shape[1], x.device)


@functools.lru_cache
def rotation(num_channels: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[C, C], dtype: a Hadamard matrix, symmetric, of the largest power of two in C, repeated along the diagonal.

    A power of two makes it a rotation, but for a factor of the square root of two where that is none: so a product with
    numbers of 16 bits rounds nothing, and the factor falls out of a score.
    """
    size = num_channels & -num_channels
    block = torch.ones(1, 1, device="cpu")
    while len(block) < size:
        block = torch.cat((torch.cat((block, block), dim=1), torch.cat((block, -block), dim=1)))
    return torch.block_diag(*[block / 2 ** (size.bit_length() // 2)] * (num_channels // size)).to(device, dtype)


def _mean_and_spread(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[E, 1, D] twice: mean and standard deviation of x [E, N, D] over those N that are finite numbers."""
    # One key that is not a finite number must not spoil the mean of all others.
    finite = x.isfinite()
    count = finite.sum(dim=1, keepdim=True).clamp(min=1)
    mean = x.where(finite, 0.0).sum(dim=1, keepdim=True) / count
    return mean, ((x - mean).where(finite, 0.0).square().sum(dim=1, keepdim=True) / count).sqrt()


def _code_shifts(device: torch.device) -> torch.Tensor:
    return 2 * torch.arange(CODED_TOKENS, dtype=torch.int32, device=device)[:, None]


def top_chunks(scores: torch.Tensor, num_selected: torch.Tensor) -> torch.Tensor:
    """[E, C], bool: the num_selected[e] largest of scores [E, C]; ties go to the earlier chunk."""
    return first_of_order(scores.argsort(dim=-1, descending=True, stable=True), num_selected)
