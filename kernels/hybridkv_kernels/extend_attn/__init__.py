"""Prefill attention of new tokens over a cached prefix and themselves."""

import torch

from hybridkv_kernels import checks, dispatch
from hybridkv_kernels.extend_attn import cpu, naive

_IMPLEMENTATIONS = {"naive": naive.extend_attn, "cpu": cpu.extend_attn}


def extend_attn(
    q: torch.Tensor,
    k_rows: torch.Tensor,
    v_rows: torch.Tensor,
    req_to_token: torch.Tensor,
    req_rows: torch.Tensor,
    prefix_lens: list[int],
    extend_lens: list[int],
    *,
    scaling: float,
    window: int = 0,
) -> torch.Tensor:
    """Causal attention of each request's new tokens; keys and values of the new tokens are in the pool already.

    Parameters
    ----------
    q : [T, H * G, D], bf16 | fp16 | fp32. Queries of all requests' new tokens, one request after the other.
    k_rows, v_rows : [slots, H, D], same dtype. One layer of the pool, by token slot.
    req_to_token : [R, max_context], integer. Token slots.
    req_rows : [B], integer. Rows of `req_to_token`.
    prefix_lens, extend_lens : cached and new tokens of each request; the new ones sum to T.
    scaling : factor of q . k before the softmax.
    window : tokens that each query attends to, its own included; 0 for all.

    Returns
    -------
    [T, H * G, D], dtype of q.

    Raises
    ------
    ValueError
        A shape, dtype or device is not as above, or the batch is empty.

    Notes
    -----
    Only the new queries are computed; stock torch_native computes a dummy query for every cached token as well.
    """
    checks.check_shape("q", q, (None, None, None))
    checks.check_dtype("q", q, checks.FLOATS)
    checks.check_shape("k_rows", k_rows, (None, None, q.shape[2]))
    checks.check_group("q", q, k_rows.shape[1])
    checks.check_same("k_rows", k_rows, "q", q)
    checks.check_shape("v_rows", v_rows, tuple(k_rows.shape))
    checks.check_same("v_rows", v_rows, "q", q)
    if not len(req_rows) == len(prefix_lens) == len(extend_lens):
        lens = f"{len(req_rows)}, {len(prefix_lens)} and {len(extend_lens)}"
        raise ValueError(f"req_rows, prefix_lens, extend_lens: expected one entry a request each, got {lens}")
    if sum(extend_lens) != q.shape[0]:
        raise ValueError(f"extend_lens: expected a sum of {q.shape[0]} like the rows of q, got {sum(extend_lens)}")
    # On CUDA the stock attention backend does the prefill, so no server comes here.
    chosen = dispatch.choose(q.device, q.dtype, q.shape[2], q.shape[1] // k_rows.shape[1], has_triton=False)
    extend = _IMPLEMENTATIONS[chosen]
    return extend(q, k_rows, v_rows, req_to_token, req_rows, prefix_lens, extend_lens, scaling, window)
