"""Stock prefill that is observed and compressed; decode over head pages, fetched chunks and the dense tail.

A mixin, not a wrapper: SGLang asks a backend for members of its base class, which a wrapper's `__getattr__`
would never see, and compares backends by name, so the chosen backend stays what it is. Its prefill stays, too; decode
is ours, whatever the backend, except that FlashInfer decodes its own way (`flashinfer_backend.py`).
"""

from __future__ import annotations

from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds

from sglang_hybridkv.cache.observation import QueryPart
from sglang_hybridkv.srt.cpu_engine import CpuPrefillMixin, prefill_parts
from sglang_hybridkv.srt.model_requirements import check_inputs
from sglang_hybridkv.srt.protocols import Batch


class HybridAttnMixin(CpuPrefillMixin):
    """Goes before a concrete backend in the class order; the compressed cache comes from its KV pool.

    The backend's own decode metadata is never built: our decode reads the tables, by request row, so that one captured
    graph serves every composition of a batch. Nothing of a decode step waits for the device.
    """

    _any_compressed = False

    def take_over(self):
        """Called once, when the concrete backend's state is here."""

    def note_rows(self, rows: list[int]) -> None:
        """Rows of the decode batch that is launched next; FlashInfer plans by them, our kernels need no plan."""

    def init_forward_metadata(self, forward_batch: Batch):
        self.token_to_kv_pool.cache.join()
        self._parts, self._observed = [], []
        if forward_batch.forward_mode.is_decode():
            self._begin_decode(forward_batch)
            return
        super().init_forward_metadata(forward_batch)
        if forward_batch.forward_mode.is_extend():
            observer = self.token_to_kv_pool.cache.observer
            self._parts = prefill_parts(forward_batch)
            self._observed = [part for part in self._parts if observer.is_interested(part.row)]

    def _begin_decode(self, forward_batch: Batch):
        # SGLang has the batch's own rows on the device only. When just other rows are bound, retrieval is launched for
        # nothing, and changes nothing.
        self._any_compressed = bool(self.token_to_kv_pool.cache.bound)

    def init_forward_metadata_out_graph(self, forward_batch: Batch, in_capture=False):
        """Before a graph is captured or replayed; see `AttentionBackend`."""
        self.token_to_kv_pool.cache.join()
        if forward_batch.forward_mode.is_decode():
            # A graph is captured once: with retrieval, which costs dense requests no more than its launch.
            self._any_compressed = True
        else:
            super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Batch):
        """Part of the captured graph; a decode step of ours needs nothing here."""
        if not forward_batch.forward_mode.is_decode():
            super().init_forward_metadata_in_graph(forward_batch)

    def init_cuda_graph_state(self, max_bs, max_num_tokens, **more):
        """No buffers: those of the concrete backend are for its own decode, whose metadata is never built."""

    def get_cuda_graph_seq_len_fill_value(self):
        """Length of a padding row; row 0 of the tables is dense, and its one token is slot 0, which is always valid."""
        return 1

    def shared_read_ends(self, forward_mode):
        """Decode reads the request's row and table inside the layers, so the scheduler may rewrite them only
        after the replay; the base default would let a commit race with it on a GPU."""
        return SharedReadEnds.max_of((super().shared_read_ends(forward_mode), SharedReadEnds.POST_REPLAY))

    def forward_extend(self, q, k, v, layer, forward_batch: Batch, save_kv_cache=True, **kwargs):
        out = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if not self._observed:
            return out
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        slots, pool = self.req_to_token_pool.req_to_token, self.token_to_kv_pool
        parts = [
            QueryPart(part.row, queries[part.q_start : part.q_end], part.start, slots[part.row])
            for part in self._observed
        ]
        pool.cache.observe(layer.layer_id - pool.start_layer, parts, layer.scaling)
        return out

    def forward_decode(self, q, k, v, layer, forward_batch: Batch, save_kv_cache=True, **kwargs):
        check_inputs(layer, kwargs)
        self._save(k, v, layer, forward_batch, save_kv_cache)
        pool, rows = self.token_to_kv_pool, forward_batch.req_pool_indices
        layer_idx = layer.layer_id - pool.start_layer
        # Once: q is a part of the rows of qkv, and each kernel would copy it.
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim).contiguous()
        later = pool.cache.retrieve_first(layer_idx, queries, rows) if self._any_compressed else None
        req_to_token = self.req_to_token_pool.req_to_token
        out = pool.cache.attend(layer_idx, queries, rows, req_to_token, forward_batch.seq_lens, layer.scaling)
        pool.cache.retrieve_ahead(layer_idx, queries, later)
        return out.view(len(queries), -1)
