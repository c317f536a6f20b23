"""The passes of `score_heads` over the keys: log-sum-exp, probabilities, and what each query keeps.

The third axis of each grid is the prompt. A prompt's tiles and splits follow from its own sizes, so that its numbers do
not depend on the others. Each pass computes the logits anew, so that scratch is [H, W, N] and not [H * G, W, N].

Slots of a batch may begin anywhere in memory; a kernel that knows them aligned would be compiled once more.

A record of `prompts` has the FIELDS of `triton.py`, int64: rows W, tokens N, splits of the keys, and how many rows,
tokens, pairs of a row and a token, and chunks the prompts before it have.
"""

import triton
import triton.language as tl

from hybridkv_kernels.gpu.head_pages import dot

NUM_FIELDS = tl.constexpr(10)


@triton.jit
def sizes(prompts):
    """Record of the program's prompt, its rows and its tokens."""
    own = prompts + tl.program_id(2) * NUM_FIELDS
    return own, tl.load(own).to(tl.int32), tl.load(own + 1).to(tl.int32)


@triton.jit
def load_queries(
    queries, kv_head, w, num_rows, H: tl.constexpr, D: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BD: tl.constexpr
):
    """[BW * GP, BD]: the group's queries of rows w [BW * GP], which repeats each row GP times; zero beyond."""
    member, d = tl.arange(0, w.shape[0]) % GP, tl.arange(0, BD)
    inside = ((member < G) & (w < num_rows))[:, None] & (d < D)[None, :]
    start = (w.to(tl.int64) * H + kv_head) * G + member
    return tl.load(queries + start[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def load_keys(
    k_rows,
    slots,
    kv_head,
    token,
    num_tokens,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):
    """[BN, BD]: keys of tokens [BN]; zero beyond."""
    slot = token.to(tl.int64)
    if HAS_SLOTS:
        slot = tl.load(slots + token, mask=token < num_tokens, other=0)
    d = tl.arange(0, BD)
    inside = (token < num_tokens)[:, None] & (d < D)[None, :]
    return tl.load(k_rows + ((slot * H + kv_head) * D)[:, None] + d[None, :], mask=inside, other=0.0)


@triton.jit
def logits(q, k, w, token, num_rows, num_tokens, scaling, INTERPRETED: tl.constexpr):
    """[BW * GP, BN], fp32: scaled logits of the tokens; -inf where the row does not see the key."""
    x = dot(q, tl.trans(k), INTERPRETED) * scaling
    is_seen = (token[None, :] <= (num_tokens - num_rows + w)[:, None]) & (w < num_rows)[:, None]
    return tl.where(is_seen, x, -float("inf"))


@triton.jit(do_not_specialize=["num_all_rows"], do_not_specialize_on_alignment=["slots"])
def row_kernel(
    queries,
    k_rows,
    slots,
    prompts,
    partial,
    num_all_rows,
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
    """Partial [splits, rows, H, GP]: log-sum-exp of each query over the program's share of the keys."""
    own, num_rows, num_tokens = sizes(prompts)
    row_tiles, num_splits = tl.cdiv(num_rows, BW), tl.load(own + 2).to(tl.int32)
    kv_head, split = tl.program_id(1), tl.program_id(0) // row_tiles
    if split < num_splits:
        first_row = tl.load(own + 3)
        r = tl.arange(0, BW * GP)
        w = tl.program_id(0) % row_tiles * BW + r // GP
        q = load_queries(queries + first_row * (H * G * D), kv_head, w, num_rows, H, D, G, GP, BD)
        slots += tl.load(own + 4)
        top, total = tl.full([BW * GP], -float("inf"), tl.float32), tl.zeros([BW * GP], tl.float32)
        for tile in range(split, tl.cdiv(num_tokens, BN), num_splits):
            token = tile * BN + tl.arange(0, BN)
            k = load_keys(k_rows, slots, kv_head, token, num_tokens, H, D, BD, HAS_SLOTS)
            x = logits(q, k, w, token, num_rows, num_tokens, scaling, INTERPRETED)
            new_top = tl.maximum(top, tl.max(x, 1))
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
            top = new_top
        lse = top + tl.log(tl.where(total == 0.0, 1.0, total))
        out = ((split.to(tl.int64) * num_all_rows + first_row + w) * H + kv_head) * GP + r % GP
        tl.store(partial + out, lse, mask=w < num_rows)


@triton.jit(do_not_specialize=["num_all_rows"])
def lse_kernel(
    prompts, partial, all_lse, num_all_rows, H: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr
):
    """LSE [rows, H, GP]: `partial` of all splits together."""
    own, num_rows, _ = sizes(prompts)
    num_splits = tl.load(own + 2).to(tl.int32)
    i, s = tl.program_id(0) * BQ + tl.arange(0, BQ), tl.arange(0, BS)  # i counts W * GP
    inside = i < num_rows * GP
    place = ((tl.load(own + 3) + i // GP) * H + tl.program_id(1)) * GP + i % GP
    top, total = tl.full([BQ], -float("inf"), tl.float32), tl.zeros([BQ], tl.float32)
    for start in range(0, num_splits, BS):
        split = (start + s).to(tl.int64)
        mask = (split < num_splits)[:, None] & inside[None, :]
        at = split[:, None] * (num_all_rows * H * GP) + place[None, :]
        x = tl.load(partial + at, mask=mask, other=-float("inf"))  # [BS, BQ]
        new_top = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[None, :]), 0)
        top = new_top
    tl.store(all_lse + place, top + tl.log(tl.where(total == 0.0, 1.0, total)), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def probability_kernel(
    queries,
    k_rows,
    slots,
    prompts,
    all_lse,
    all_probs,
    all_totals,
    all_salience,
    all_counts,
    scaling,
    CHUNK: tl.constexpr,
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
    """Of the mean probability of a group: each row's, NaN made 0; totals over the rows, in double, of those; salience.

    Probabilities are [H, W, N] of each prompt, totals and salience [H, N], and counts [H, chunks], int32, become 0.
    """
    own, num_rows, num_tokens = sizes(prompts)
    kv_head, token = tl.program_id(1), tl.program_id(0) * BN + tl.arange(0, BN)
    if tl.program_id(0) * BN < num_tokens:
        first_row, first_token = tl.load(own + 3), tl.load(own + 4)
        queries += first_row * (H * G * D)
        all_lse += first_row * (H * GP)
        all_probs += tl.load(own + 5) * H + kv_head.to(tl.int64) * num_rows * num_tokens
        k = load_keys(k_rows, slots + first_token, kv_head, token, num_tokens, H, D, BD, HAS_SLOTS)
        r = tl.arange(0, BW * GP)
        salience, total = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float64)
        for start in range(0, num_rows, BW):
            w = start + r // GP
            q = load_queries(queries, kv_head, w, num_rows, H, D, G, GP, BD)
            x = logits(q, k, w, token, num_rows, num_tokens, scaling, INTERPRETED)
            lse = tl.load(all_lse + (w * H + kv_head) * GP + r % GP, mask=w < num_rows, other=0.0)
            p = tl.where(((r % GP < G) & (w < num_rows))[:, None], tl.exp(x - lse[:, None]), 0.0)
            rows = tl.sum(tl.reshape(p, [BW, GP, BN]), 1) / G
            salience += tl.sum(rows, 0)
            finite = tl.where(rows == rows, rows, 0.0)
            total += tl.sum(finite.to(tl.float64), 0)
            w_out = start + tl.arange(0, BW)
            out = w_out[:, None] * num_tokens + token[None, :]
            tl.store(all_probs + out, finite, mask=(w_out < num_rows)[:, None] & (token < num_tokens)[None, :])
        out = first_token * H + kv_head.to(tl.int64) * num_tokens + token
        tl.store(all_salience + out, salience / num_rows, mask=token < num_tokens)
        tl.store(all_totals + out, total, mask=token < num_tokens)
        count = tl.load(own + 6) * H + kv_head * tl.cdiv(num_tokens, CHUNK) + token // CHUNK
        tl.store(all_counts + count, 0, mask=(token < num_tokens) & (token % CHUNK == 0))


@triton.jit(do_not_specialize=["num_all_rows"], do_not_specialize_on_alignment=["slots"])
def captured_kernel(
    queries,
    k_rows,
    slots,
    prompts,
    all_lse,
    all_kept,
    partial,
    num_all_rows,
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
    """Partial [splits, rows, H, GP]: each query's probability on the keys of the program's share that are kept.

    `all_kept` is [H, W, N] of each prompt, not 0 where the row keeps the key.
    """
    own, num_rows, num_tokens = sizes(prompts)
    row_tiles, num_splits = tl.cdiv(num_rows, BW), tl.load(own + 2).to(tl.int32)
    kv_head, split = tl.program_id(1), tl.program_id(0) // row_tiles
    if split < num_splits:
        first_row = tl.load(own + 3)
        r = tl.arange(0, BW * GP)
        w = tl.program_id(0) % row_tiles * BW + r // GP
        q = load_queries(queries + first_row * (H * G * D), kv_head, w, num_rows, H, D, G, GP, BD)
        place = ((first_row + w) * H + kv_head) * GP + r % GP
        lse = tl.load(all_lse + place, mask=w < num_rows, other=0.0)
        slots += tl.load(own + 4)
        all_kept += tl.load(own + 5) * H + kv_head.to(tl.int64) * num_rows * num_tokens
        captured = tl.zeros([BW, GP], tl.float32)
        w_kept = tl.program_id(0) % row_tiles * BW + tl.arange(0, BW)
        for tile in range(split, tl.cdiv(num_tokens, BN), num_splits):
            token = tile * BN + tl.arange(0, BN)
            k = load_keys(k_rows, slots, kv_head, token, num_tokens, H, D, BD, HAS_SLOTS)
            x = logits(q, k, w, token, num_rows, num_tokens, scaling, INTERPRETED)
            p = tl.reshape(tl.exp(x - lse[:, None]), [BW, GP, BN])
            inside = (w_kept < num_rows)[:, None] & (token < num_tokens)[None, :]
            kept = tl.load(all_kept + w_kept[:, None] * num_tokens + token[None, :], mask=inside, other=0)
            captured += tl.sum(tl.where((kept != 0)[:, None, :] & (p == p), p, 0.0), 2)
        out = partial + split.to(tl.int64) * (num_all_rows * H * GP) + place
        tl.store(out, tl.reshape(captured, [BW * GP]), mask=w < num_rows)
