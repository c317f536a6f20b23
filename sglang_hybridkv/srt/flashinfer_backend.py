"""FlashInfer decodes: head pages by plans that hold while the batch stays as it is, the dense tail as stock does it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hybridkv_kernels.decode_attn.flashinfer import HeadPageDecode, merge
from hybridkv_kernels.transfer import to_device
from sglang_hybridkv.requests.ledger import Reservation
from sglang_hybridkv.srt.attention_backend import HybridAttnMixin
from sglang_hybridkv.srt.model_requirements import check_inputs
from sglang_hybridkv.srt.protocols import Batch


class _Composition(NamedTuple):
    """A batch as the plans see it: which requests, in which order, through which kind of wrapper."""

    reservations: tuple[Reservation | None, ...]
    in_graph: bool

    def is_same(self, other: _Composition | None) -> bool:
        """Whether plans of `other` serve this one, too; a dense request is like any other."""
        if other is None or self.in_graph != other.in_graph or len(self.reservations) != len(other.reservations):
            return False
        # Identity: a request that was retracted and compressed again has other pages.
        return all(a is b for a, b in zip(self.reservations, other.reservations, strict=True))


class HybridFlashInferMixin(HybridAttnMixin):
    """Goes before FlashInferAttnBackend. Stock's decode metadata is built here, over the dense tails only.

    An uncaptured batch without compressed requests is stock's alone. Every other batch runs both parts and merges
    them: a dense request has no head pages, and its tail is all of it.
    """

    _head_pages: HeadPageDecode | None = None
    _planned: _Composition | None = None
    _noted_rows: list[int] = []
    _covered: torch.Tensor

    def take_over(self):
        """Plan the tails where stock plans whole sequences, captured or not."""
        self.indices_updater_decode.update = self._plan_tails

    def plans_tails(self) -> bool:
        """Whether `take_over` still holds."""
        return self.indices_updater_decode.update == self._plan_tails

    def _begin_decode(self, forward_batch: Batch):
        self._compose(forward_batch, self._launched_rows(), in_graph=False)
        super(HybridAttnMixin, self).init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Batch, in_capture=False):
        """Before a graph is captured, for padding rows only, or replayed."""
        self.token_to_kv_pool.cache.join()
        if forward_batch.forward_mode.is_decode():
            self._compose(forward_batch, [] if in_capture else self._launched_rows(), in_graph=True)
        super(HybridAttnMixin, self).init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def init_cuda_graph_state(self, max_bs, max_num_tokens, **more):
        """Stock's buffers, for the tails, and those of the head pages."""
        super(HybridAttnMixin, self).init_cuda_graph_state(max_bs, max_num_tokens, **more)
        self._head_page_decode().init_graphs(max_bs)

    def note_rows(self, rows: list[int]) -> None:
        """Keep them until that batch is launched, where they are on the device only."""
        self._noted_rows = rows

    def _launched_rows(self) -> list[int]:
        """Rows of the batch that is being launched; none for batches that SGLang makes up to warm up."""
        rows, self._noted_rows = self._noted_rows, []
        return rows

    def _compose(self, forward_batch: Batch, rows: list[int], *, in_graph: bool) -> None:
        """Find out what is compressed, and plan the head pages if that is not what they are planned for."""
        batch_size, cache = forward_batch.batch_size, self.token_to_kv_pool.cache
        assert len(rows) <= batch_size, f"{len(rows)} rows were launched in a batch of {batch_size}"
        padded = rows + [0] * (batch_size - len(rows))
        composition = _Composition(tuple(cache.readable(row) for row in padded), in_graph)
        covered = [0 if held is None else held.geometry.covered for held in composition.reservations]
        self._covered = torch.tensor(covered, dtype=torch.int64)
        self._any_compressed = in_graph or any(held is not None for held in composition.reservations)
        if self._any_compressed and not composition.is_same(self._planned):
            decode = self._head_page_decode()
            decode.plan(forward_batch.req_pool_indices, self._head_counts(composition), in_graph=in_graph)
            self._planned = composition

    def _head_counts(self, composition: _Composition) -> torch.Tensor:
        """[B, L, H], int32, on the CPU. A request that joins was compressed by the forward just launched: its counts
        are waited for, once."""
        layout = self.token_to_kv_pool.cache.memory.layout
        none = torch.zeros(layout.num_layers, layout.num_kv_heads, dtype=torch.int32)
        return torch.stack([none if held is None else held.head_counts_on_host() for held in composition.reservations])

    def _plan_tails(
        self,
        seq_lens,
        seq_lens_cpu,
        seq_lens_sum,
        decode_wrappers,
        encoder_lens,
        spec_info,
        fixed_split_size=None,
        disable_split_kv=None,
        **more,
    ):
        """In place of FlashInferIndicesUpdaterDecode.update, with its parameters: sequences start at `covered`.

        `more` is what differs between SGLang's versions: who is in the batch, and where SGLang looks up its slots.
        """
        starts = None
        if self._covered.any():
            # The host's numbers throughout: FlashInfer plans by them, and sizes its buffers.
            seq_lens_cpu = seq_lens_cpu - self._covered
            seq_lens_sum = int(seq_lens_cpu.sum())
            starts = to_device(self._covered, seq_lens.device).to(seq_lens.dtype)
            seq_lens = seq_lens - starts
        self.indices_updater_decode.call_begin_forward(
            (decode_wrappers or self.decode_wrappers)[0],
            seq_lens,
            seq_lens_sum,
            self.kv_indptr[0],
            starts,
            spec_info,
            seq_lens_cpu,
            fixed_split_size=fixed_split_size,
            disable_split_kv=disable_split_kv,
            **more,
        )

    def forward_decode(self, q, k, v, layer, forward_batch: Batch, save_kv_cache=True, **kwargs):
        if not self._any_compressed:
            return super(HybridAttnMixin, self).forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        check_inputs(layer, kwargs)
        self._save(k, v, layer, forward_batch, save_kv_cache)
        pool, decode = self.token_to_kv_pool, self._head_page_decode()
        layer_idx = layer.layer_id - pool.start_layer
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim).contiguous()
        later = pool.cache.retrieve_first(layer_idx, queries, forward_batch.req_pool_indices)
        out, lse = decode.run(layer_idx, queries, layer.scaling)
        tail, tail_lse = self.forward_metadata.decode_wrappers[0].forward_return_lse(
            queries, pool.get_kv_buffer(layer.layer_id), sm_scale=layer.scaling, logits_soft_cap=layer.logit_cap
        )
        pool.cache.retrieve_ahead(layer_idx, queries, later)
        merged = merge(out, lse, tail, tail_lse, decode.group_size, self._merge_state)
        return merged.view(len(queries), -1)

    def _head_page_decode(self) -> HeadPageDecode:
        if self._head_pages is None:
            # As stock's module has them, which has checked FlashInfer's version.
            from sglang.srt.layers.attention import flashinfer_backend as stock

            memory, updater = self.token_to_kv_pool.cache.memory, self.indices_updater_decode
            group_size = updater.num_qo_heads // updater.num_kv_heads
            wrapper_class = stock.BatchDecodeWithPagedKVCacheWrapper
            self._merge_state = stock.merge_state
            self._head_pages = HeadPageDecode(
                memory.table, memory.views, group_size, self.workspace_buffer, wrapper_class
            )
        return self._head_pages
