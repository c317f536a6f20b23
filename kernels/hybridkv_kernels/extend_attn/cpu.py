"""CPU twin of `extend_attn`: torch's flash attention over prefix and new tokens, merged by their log-sum-exp.

The prefix needs no mask, so a group's queries share one pass over its keys; the new tokens are causal among themselves.
"""

import torch

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def extend_attn(
    q: torch.Tensor,
    k_rows: torch.Tensor,
    v_rows: torch.Tensor,
    req_to_token: torch.Tensor,
    req_rows: torch.Tensor,
    prefix_lens: list[int],
    extend_lens: list[int],
    scaling: float,
    window: int = 0,
) -> torch.Tensor:
    """Arguments and result as the public function's."""
    out, start = torch.empty_like(q), 0
    for row, prefix_len, extend_len in zip(req_rows.tolist(), prefix_lens, extend_lens, strict=True):
        if not extend_len:  # torch's flash attention divides by the number of queries
            continue
        queries = q[start : start + extend_len].transpose(0, 1)  # [H * G, T, D]
        slots = req_to_token[row, : prefix_len + extend_len]
        keys, values = k_rows[slots].transpose(0, 1), v_rows[slots].transpose(0, 1)  # [H, N, D]
        if window and keys.shape[1] > window:
            attended = _windowed(queries, keys, values, scaling, window)
        else:
            attended, weight = _new_tokens(queries, keys[:, prefix_len:], values[:, prefix_len:], scaling)
            if prefix_len:
                cached = _prefix(queries, keys[:, :prefix_len], values[:, :prefix_len], scaling)
                attended = _merge(attended, weight, *cached)
        out[start : start + extend_len] = attended.transpose(0, 1)
        start += extend_len
    return out


def _windowed(q, keys, values, scaling, window):
    """Output [Hq, T, D] of the new tokens over the last `window` keys of each; no older key is read."""
    num_queries = q.shape[1]
    keys, values = (rows[:, -(num_queries + window - 1) :] for rows in (keys, values))
    group = q.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
    position = torch.arange(keys.shape[1])
    own = position[-num_queries:, None]
    is_seen = (position <= own) & (position > own - window)
    attend = torch.nn.functional.scaled_dot_product_attention
    # Of four dimensions, for the flash kernel: the plain one would hold all scores.
    return attend(q[None], keys[None], values[None], is_seen, scale=scaling)[0]


def _new_tokens(q, keys, values, scaling):
    """Output [Hq, T, D] and log-sum-exp [Hq, T] of the new tokens over themselves."""
    group = q.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
    out, weight = _flash(q[None], keys[None], values[None], 0.0, True, scale=scaling)
    return out[0], weight[0]


def _prefix(q, keys, values, scaling):
    """Output and log-sum-exp over the prefix: the G queries of a KV head and token are G rows of one long query."""
    packed = q.reshape(keys.shape[0], -1, q.shape[-1])  # [H * G, T, D] -> [H, G * T, D]
    out, weight = _flash(packed[None], keys[None], values[None], 0.0, False, scale=scaling)
    return out[0].reshape(q.shape), weight[0].reshape(q.shape[:2])


def _merge(out, weight, other_out, other_weight):
    share = torch.sigmoid(weight - other_weight).unsqueeze(-1)
    return (share * out.float() + (1.0 - share) * other_out.float()).to(out.dtype)
