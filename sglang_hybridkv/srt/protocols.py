"""What the adapters read and write of SGLang's objects: the fields that a new version of SGLang has to keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class RequestKV(Protocol):
    """`Req.kv`: the request's row of req_to_token, None before it has one, and how much of it is filled."""

    req_pool_idx: int | None
    kv_allocated_len: int
    cache_protected_len: int

    @property
    def holds_kv(self) -> bool:
        """Whether the request holds a row."""


class _SamplingParams(Protocol):
    max_new_tokens: int
    n: int
    custom_params: dict[str, Any] | None


class Request(Protocol):
    """SGLang's `Req`; what differs between its versions is in `sglang_versions.py`.

    Attributes
    ----------
    origin_input_ids, output_ids : prompt, and what has been generated.
    full_untruncated_fill_ids : what prefill computes in all, after a retraction more than the prompt.
    to_finish, finished_reason : how it will end, when that is decided early, and how it has ended; else None.
    skip_radix_cache_insert : whether the tree is kept from adopting what is computed.
    """

    rid: str
    kv: RequestKV
    origin_input_ids: Sequence[int]
    output_ids: Sequence[int]
    full_untruncated_fill_ids: Sequence[int]
    to_finish: Any
    finished_reason: Any
    sampling_params: _SamplingParams
    multimodal_inputs: Any
    skip_radix_cache_insert: bool

    def finished(self) -> bool:
        """Whether it has ended."""


class Batch(Protocol):
    """SGLang's `ForwardBatch`, or the view of it that a captured graph is replayed with.

    Attributes
    ----------
    req_pool_indices : [B], integer, on the device. Rows of the requests.
    seq_lens : [B], integer, on the device; seq_lens_cpu its copy, seq_lens_sum their sum.
    out_cache_loc : [tokens], integer. Slots of the new tokens.
    extend_prefix_lens, extend_seq_lens : [B], integer. Of a prefill: cached and new tokens. Their copies on the CPU,
        and that of req_pool_indices, are None in batches that SGLang makes up to warm up.
    """

    forward_mode: Any
    batch_size: int
    req_pool_indices: torch.Tensor
    req_pool_indices_cpu: torch.Tensor | None
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor
    seq_lens_sum: int
    out_cache_loc: torch.Tensor
    extend_prefix_lens: torch.Tensor
    extend_prefix_lens_cpu: Sequence[int] | None
    extend_seq_lens: torch.Tensor
    extend_seq_lens_cpu: Sequence[int] | None
