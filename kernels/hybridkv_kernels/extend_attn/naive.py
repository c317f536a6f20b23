"""Readable reference of `extend_attn`: one softmax a request, under an explicit causal mask."""

import torch


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
        queries = q[start : start + extend_len].transpose(0, 1)  # [H * G, T, D]
        slots = req_to_token[row, : prefix_len + extend_len]
        group = q.shape[1] // k_rows.shape[1]
        # [N, H, D] -> [H, N, D], each head as often as it has queries.
        keys, values = (rows[slots].transpose(0, 1).repeat_interleave(group, dim=0) for rows in (k_rows, v_rows))
        positions = torch.arange(prefix_len + extend_len, device=q.device)
        causal = positions <= positions[prefix_len:, None]
        if window:
            causal &= positions > positions[prefix_len:, None] - window
        attended = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, causal, scale=scaling)
        out[start : start + extend_len] = attended.transpose(0, 1)
        start += extend_len
    return out
