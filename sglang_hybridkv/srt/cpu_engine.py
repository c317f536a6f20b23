"""What only the CPU engine needs: SGLang's allocator without Triton, and a prefill that computes new tokens only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator, alloc_extend_naive
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.utils import get_num_new_pages

from hybridkv_kernels.extend_attn import extend_attn
from sglang_hybridkv.srt.model_requirements import check_inputs, window_of
from sglang_hybridkv.srt.protocols import Batch


class CpuPagedAllocator(PagedTokenToKVPoolAllocator):
    """On a CPU `alloc_extend` and `alloc_decode` run SGLang's naive version: its Triton kernels need a GPU."""

    free_pages: torch.Tensor

    def alloc_extend(
        self, prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens, num_new_pages=None
    ):
        if torch.device(self.device).type != "cpu":
            return super().alloc_extend(
                prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens, num_new_pages
            )
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        if not self._have(num_new_pages):
            return None
        out = torch.empty(extend_num_tokens, dtype=torch.int64)
        alloc_extend_naive(prefix_lens, seq_lens, last_loc, self.free_pages, out, self.page_size, self.device)
        self.free_pages = self.free_pages[num_new_pages:]
        return out

    def alloc_decode(self, seq_lens, seq_lens_cpu, last_loc):
        if torch.device(self.device).type != "cpu":
            return super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)
        opens_page = (seq_lens_cpu - 1) % self.page_size == 0
        num_new_pages = int(opens_page.sum())
        if not self._have(num_new_pages):
            return None
        out = last_loc.to(torch.int64) + 1
        out[opens_page] = self.free_pages[:num_new_pages] * self.page_size
        self.free_pages = self.free_pages[num_new_pages:]
        return out

    def _have(self, num_pages: int) -> bool:
        if num_pages > len(self.free_pages):
            self.merge_and_sort_free()
        return num_pages <= len(self.free_pages)


class PrefillPart(NamedTuple):
    """What a batch prefills of one request: rows [q_start, q_end) of the batch, tokens [start, end) of its sequence."""

    row: int
    q_start: int
    q_end: int
    start: int
    end: int


def prefill_parts(batch: Batch) -> list[PrefillPart]:
    """Parts of a batch that prefills, one a request, in its order."""
    rows = _on_host(batch.req_pool_indices_cpu, batch.req_pool_indices)
    starts = _on_host(batch.extend_prefix_lens_cpu, batch.extend_prefix_lens)
    lens = _on_host(batch.extend_seq_lens_cpu, batch.extend_seq_lens)
    parts, q_start = [], 0
    for row, start, length in zip(rows, starts, lens, strict=True):
        parts.append(PrefillPart(row, q_start, q_start + length, start, start + length))
        q_start += length
    return parts


def _on_host(copy, tensor) -> list[int]:
    """Values of a batch's `tensor` from SGLang's copy on the CPU; batches that SGLang makes up to warm up have none."""
    return [int(value) for value in (tensor.tolist() if copy is None else copy)]


class CpuPrefillMixin(AttentionBackend):
    """Goes before a concrete backend, which stays what it is on other devices.

    Stock torch_native computes a dummy query for every cached token, too.

    Attributes
    ----------
    prefills_as_stock : the concrete backend's own prefill on every device; the self-test compares with it.
    """

    prefills_as_stock = False
    _parts: list[PrefillPart]

    def forward_extend(self, q, k, v, layer, forward_batch: Batch, save_kv_cache=True, **kwargs):
        if not q.is_cpu or self.prefills_as_stock:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        check_inputs(layer, kwargs)
        self._save(k, v, layer, forward_batch, save_kv_cache)
        pool = self.token_to_kv_pool
        out = extend_attn(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            pool.get_key_buffer(layer.layer_id),
            pool.get_value_buffer(layer.layer_id),
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices,
            [part.start for part in self._parts],
            [part.end - part.start for part in self._parts],
            scaling=layer.scaling,
            window=window_of(layer),
        )
        return out.flatten(1)

    def _save(self, k, v, layer, forward_batch: Batch, save_kv_cache):
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
