"""Triton twin of `score_heads`: two passes over the keys, and a third for the statistics of single query heads.

1. Log-sum-exp of each query; programs share the keys. 2. Probabilities of each row, averaged over the group, and the
salience. 3. "capture" and "worst_capture" only: each query's probability on the kept keys of its row. The logits are
computed anew in each pass, so that scratch is [H, W, N] and not [H * G, W, N]. The functions of `naive` then compute
the statistics from the probabilities, in torch; none of it waits for the device.
"""

import torch
import triton
import triton.language as tl

from hybridkv_kernels import gpu
from hybridkv_kernels.gpu.head_pages import dot
from hybridkv_kernels.gpu.top import top_images
from hybridkv_kernels.score_heads import naive

_TARGET_PROGRAMS = 512
_SIGN, _NOT_SIGN = -(2**63), 2**63 - 1


@triton.jit
def _load_queries(
    queries, kv_head, w, num_rows, H: tl.constexpr, D: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BD: tl.constexpr
):
    """[BW * GP, BD]: the group's queries of rows w [BW * GP], which repeats each row GP times; zero beyond."""
    member, d = tl.arange(0, w.shape[0]) % GP, tl.arange(0, BD)
    inside = ((member < G) & (w < num_rows))[:, None] & (d < D)[None, :]
    start = (w.to(tl.int64) * H + kv_head) * G + member
    return tl.load(queries + start[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def _logits(
    q,
    k_rows,
    slots,
    kv_head,
    w,
    token,
    num_rows,
    num_tokens,
    scaling,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """[BW * GP, BN], fp32: scaled logits of the tokens; -inf where the row does not see the key."""
    slot = token.to(tl.int64)
    if HAS_SLOTS:
        slot = tl.load(slots + token, mask=token < num_tokens, other=0)
    d = tl.arange(0, BD)
    inside = (token < num_tokens)[:, None] & (d < D)[None, :]
    k = tl.load(k_rows + ((slot * H + kv_head) * D)[:, None] + d[None, :], mask=inside, other=0.0)
    x = dot(q, tl.trans(k), INTERPRETED) * scaling
    is_seen = (token[None, :] <= (num_tokens - num_rows + w)[:, None]) & (w < num_rows)[:, None]
    return tl.where(is_seen, x, -float("inf"))


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def _row_kernel(
    queries,
    k_rows,
    slots,
    all_lse,
    num_rows,
    num_tokens,
    scaling,
    H: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """LSE [splits, H, W, GP]: log-sum-exp of each query over the program's share of the keys."""
    kv_head, split = tl.program_id(0), tl.program_id(2)
    r = tl.arange(0, BW * GP)
    w = tl.program_id(1) * BW + r // GP
    q = _load_queries(queries, kv_head, w, num_rows, H, D, G, GP, BD)
    top, total = tl.full([BW * GP], -float("inf"), tl.float32), tl.zeros([BW * GP], tl.float32)
    for tile in range(split, tl.cdiv(num_tokens, BN), tl.num_programs(2)):
        token = tile * BN + tl.arange(0, BN)
        x = _logits(
            q, k_rows, slots, kv_head, w, token, num_rows, num_tokens, scaling, H, D, BD, HAS_SLOTS, INTERPRETED
        )
        new_top = tl.maximum(top, tl.max(x, 1))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
        top = new_top
    lse = top + tl.log(tl.where(total == 0.0, 1.0, total))
    out = ((split.to(tl.int64) * H + kv_head) * num_rows + w) * GP + r % GP
    tl.store(all_lse + out, lse, mask=w < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def _probability_kernel(
    queries,
    k_rows,
    slots,
    all_lse,
    all_probs,
    all_salience,
    num_rows,
    num_tokens,
    scaling,
    H: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Probabilities [H, W, N], averaged over the group, and salience [H, N], averaged over the rows, too."""
    kv_head = tl.program_id(0)
    r, token = tl.arange(0, BW * GP), tl.program_id(1) * BN + tl.arange(0, BN)
    salience = tl.zeros([BN], tl.float32)
    for start in range(0, num_rows, BW):
        w = start + r // GP
        q = _load_queries(queries, kv_head, w, num_rows, H, D, G, GP, BD)
        x = _logits(
            q, k_rows, slots, kv_head, w, token, num_rows, num_tokens, scaling, H, D, BD, HAS_SLOTS, INTERPRETED
        )
        lse = tl.load(all_lse + (kv_head * num_rows + w) * GP + r % GP, mask=w < num_rows, other=0.0)
        p = tl.where(((r % GP < G) & (w < num_rows))[:, None], tl.exp(x - lse[:, None]), 0.0)
        rows = tl.sum(tl.reshape(p, [BW, GP, BN]), 1) / G
        salience += tl.sum(rows, 0)
        w_out = start + tl.arange(0, BW)
        out = (kv_head * num_rows + w_out).to(tl.int64)[:, None] * num_tokens + token[None, :]
        tl.store(all_probs + out, rows, mask=(w_out < num_rows)[:, None] & (token < num_tokens)[None, :])
    out = kv_head.to(tl.int64) * num_tokens + token
    tl.store(all_salience + out, salience / num_rows, mask=token < num_tokens)


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def _captured_kernel(
    queries,
    k_rows,
    slots,
    all_lse,
    all_kept,
    all_captured,
    num_rows,
    num_tokens,
    scaling,
    H: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """[splits, H, W, GP]: each query's probability on the kept [H, W, N] keys of the program's share."""
    kv_head, split = tl.program_id(0), tl.program_id(2)
    r = tl.arange(0, BW * GP)
    w = tl.program_id(1) * BW + r // GP
    q = _load_queries(queries, kv_head, w, num_rows, H, D, G, GP, BD)
    lse = tl.load(all_lse + (kv_head * num_rows + w) * GP + r % GP, mask=w < num_rows, other=0.0)
    captured = tl.zeros([BW * GP], tl.float32)
    for tile in range(split, tl.cdiv(num_tokens, BN), tl.num_programs(2)):
        token = tile * BN + tl.arange(0, BN)
        x = _logits(
            q, k_rows, slots, kv_head, w, token, num_rows, num_tokens, scaling, H, D, BD, HAS_SLOTS, INTERPRETED
        )
        p = tl.exp(x - lse[:, None])
        inside = (w < num_rows)[:, None] & (token < num_tokens)[None, :]
        kept = (kv_head * num_rows + w).to(tl.int64)[:, None] * num_tokens + token[None, :]
        is_kept = tl.load(all_kept + kept, mask=inside, other=0) != 0
        captured += tl.sum(tl.where(is_kept & (p == p), p, 0.0), 1)
    out = ((split.to(tl.int64) * H + kv_head) * num_rows + w) * GP + r % GP
    tl.store(all_captured + out, captured, mask=w < num_rows)


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
    """Arguments and result as the public function's.

    No sync. A broken key makes the salience of its head NaN, as in `naive`; for the statistics NaN counts as 0.
    Scratch: two times H * W * N fp32; a sorted copy of them for "top_mass" and "hit_cv", or 17 bytes for each of them
    for "capture" and "worst_capture".
    """
    num_tokens, num_rows = len(k if slots is None else slots), len(q)
    passes = _Passes(q, k, slots, scaling)
    lse = passes.row_lse()
    probs, salience = passes.probabilities(lse)
    finite, values = probs.nan_to_num(0.0), []
    for name in statistic.split("+"):
        if name not in naive.OF_QUERIES:
            causal = naive.causal_mask(num_rows, num_tokens, k.device)
            values.append(naive.row_statistic(name, finite, causal, sparsity_fraction, mass_fraction, chunk_size))
        elif num_rows == 1:
            values.append(probs.new_zeros(len(probs)))
        else:
            kept = _kept_keys(finite, naive.num_captured(num_tokens, capture_fraction), num_sinks, num_recent)
            values.append(naive.captured_statistic(name, passes.captured(lse, kept)))
    return naive.join_statistics(values), salience


def _kept_keys(probs: torch.Tensor, num_kept: int, num_sinks: int, num_recent: int) -> torch.Tensor:
    """[H, W, N], bool: the `num_kept` keys of `naive.capture` for each row; ties go to the earlier key."""
    bits = naive.wanted_keys(probs, num_sinks, num_recent).flatten(0, 1).view(torch.int64)  # [H * W, N]
    # Larger numbers get larger images: the sign bit is flipped, and of negative numbers all others, too.
    images = bits ^ ((bits >> 63) & _NOT_SIGN) ^ _SIGN
    counts = torch.full((len(images),), num_kept, dtype=torch.int32, device=probs.device)
    return top_images(images, counts).view(probs.shape)


class _Passes:
    """The three launches over one prompt."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, slots: torch.Tensor | None, scaling: float):
        self.num_rows, self.num_kv_heads, head_dim = len(q), k.shape[1], k.shape[2]
        self.num_tokens = len(k if slots is None else slots)
        self.k = k.contiguous()
        self.inputs = (q.contiguous(), self.k, self.k if slots is None else slots.contiguous())
        self.sizes = (self.num_rows, self.num_tokens, scaling)
        self.group = q.shape[1] // self.num_kv_heads
        self.constants = score_constants(q.dtype, head_dim, self.group, self.num_kv_heads) | {
            "HAS_SLOTS": slots is not None
        }

    def row_lse(self) -> torch.Tensor:
        """[H, W, GP], fp32: log-sum-exp of each query."""
        partial = self._partial()
        _row_kernel[self._grid(partial)](*self.inputs, partial, *self.sizes, **self.constants)
        return partial.logsumexp(dim=0)

    def probabilities(self, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities [H, W, N], averaged over the group, and salience [H, N]."""
        salience = torch.empty(self.num_kv_heads, self.num_tokens, dtype=torch.float32, device=self.k.device)
        probs = salience.new_empty(self.num_kv_heads, self.num_rows, self.num_tokens)
        grid = (self.num_kv_heads, triton.cdiv(self.num_tokens, self.constants["BN"]))
        _probability_kernel[grid](*self.inputs, lse, probs, salience, *self.sizes, **self.constants)
        return probs, salience

    def captured(self, lse: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """[H, W, G]: each query's probability on the `kept` [H, W, N] keys."""
        partial = self._partial()
        arguments = (*self.inputs, lse, kept.view(torch.uint8), partial, *self.sizes)
        _captured_kernel[self._grid(partial)](*arguments, **self.constants)
        return partial.sum(dim=0)[..., : self.group].clamp(max=1.0)

    def _partial(self) -> torch.Tensor:
        tiles = triton.cdiv(self.num_tokens, self.constants["BN"])
        splits = max(1, min(tiles, _TARGET_PROGRAMS // (self.num_kv_heads * self._row_tiles())))
        shape = (splits, self.num_kv_heads, self.num_rows, self.constants["GP"])
        return torch.empty(shape, dtype=torch.float32, device=self.k.device)

    def _grid(self, partial: torch.Tensor) -> tuple[int, int, int]:
        return self.num_kv_heads, self._row_tiles(), len(partial)

    def _row_tiles(self) -> int:
        return triton.cdiv(self.num_rows, self.constants["BW"])


def score_constants(dtype: torch.dtype, head_dim: int, group: int, num_kv_heads: int) -> dict[str, int | bool]:
    """Constants of the three kernels: tiles of BW rows of GP >= G queries, by BN keys."""
    padded = triton.next_power_of_2(group)
    tile = 32 if dtype == torch.float32 else 64
    return {
        "H": num_kv_heads,
        "D": head_dim,
        "G": group,
        "GP": padded,
        "BW": tile // padded,
        "BN": tile,
        "BD": triton.next_power_of_2(head_dim),
        "INTERPRETED": gpu.is_interpreted(),
    }
