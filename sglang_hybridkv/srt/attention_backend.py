"""Stock prefill that is observed and compressed; decode over head pages, fetched chunks and the dense tail.

A mixin, not a wrapper: SGLang asks a backend for members of its base class, which a wrapper's `__getattr__`
would never see, and compares backends by name, so the chosen backend stays what it is. Its prefill stays, too; decode
is ours, whatever the backend, except that FlashInfer decodes its own way (`flashinfer_backend.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from hybridkv_kernels.decode_attn import decode_attn
from hybridkv_kernels.extend_attn import extend_attn
from sglang_hybridkv.cache.compress import compress_prompt
from sglang_hybridkv.cache.retrieval import retrieve


class _Chunk(NamedTuple):
    """Place of one request's prefill chunk: rows [q_start, q_end) of the batch, tokens [start, end) of its sequence."""

    row: int
    q_start: int
    q_end: int
    start: int
    end: int


class HybridAttnMixin(AttentionBackend):
    """Goes before a concrete backend in the class order; `compression` comes from its KV pool.

    The backend's own decode metadata is never built: our decode reads the tables, by request row, so that one captured
    graph serves every composition of a batch. Nothing of a decode step waits for the device.
    """

    _any_compressed = False

    def take_over(self):
        """Called once, when the concrete backend's state is here."""

    def init_forward_metadata(self, forward_batch):
        self._chunks, self._observed = [], []
        if forward_batch.forward_mode.is_decode():
            self._begin_decode(forward_batch)
            return
        super().init_forward_metadata(forward_batch)
        if forward_batch.forward_mode.is_extend():
            compression = self.token_to_kv_pool.compression
            self._chunks = _chunks(forward_batch)
            self._observed = [chunk for chunk in self._chunks if compression.observer.is_interested(chunk.row)]

    def _begin_decode(self, forward_batch):
        # Not the batch's own rows: SGLang has them on the device only. Other rows cost a launch, not an answer.
        self._any_compressed = bool(self.token_to_kv_pool.compression.ledger.by_row)

    def init_forward_metadata_out_graph(self, forward_batch, in_capture=False):
        """Before a graph is captured or replayed; see `AttentionBackend`."""
        if forward_batch.forward_mode.is_decode():
            # A graph is captured once: with retrieval, which costs dense requests no more than its launch.
            self._any_compressed = True
        else:
            super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch):
        """Part of the captured graph; a decode step of ours needs nothing here."""
        if not forward_batch.forward_mode.is_decode():
            super().init_forward_metadata_in_graph(forward_batch)

    def init_cuda_graph_state(self, max_bs, max_num_tokens):
        """No buffers: those of the concrete backend are for its own decode, whose metadata is never built."""

    def get_cuda_graph_seq_len_fill_value(self):
        """Length of a padding row; row 0 of the tables is dense, and its one token is slot 0, which is always valid."""
        return 1

    def shared_read_ends(self, forward_mode):
        """Decode reads the request's row and table inside the layers, so the scheduler may rewrite them only
        after the replay; the base default would let a commit race with it on a GPU."""
        return SharedReadEnds.max_of((super().shared_read_ends(forward_mode), SharedReadEnds.POST_REPLAY))

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        if q.is_cpu:
            out = self._extend(q, k, v, layer, forward_batch, save_kv_cache)
        else:
            out = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if not self._observed:
            return out
        pool = self.token_to_kv_pool
        observer, layer_idx = pool.compression.observer, layer.layer_id - pool.start_layer
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        for chunk in self._observed:
            observed = observer.gather(chunk.row, layer_idx, queries[chunk.q_start : chunk.q_end], chunk.start)
            if observer.is_final(chunk.row):
                slots = self.req_to_token_pool.req_to_token[chunk.row, : observer.prompt_len(chunk.row)].long()
                keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
                if observer.score(chunk.row, observed, keys, values, slots, layer.scaling):
                    self._compress(chunk.row, slots)
        return out

    def _extend(self, q, k, v, layer, forward_batch, save_kv_cache):
        """Prefill of new tokens only; stock torch_native computes a dummy query for every cached token, too."""
        self._save(k, v, layer, forward_batch, save_kv_cache)
        pool = self.token_to_kv_pool
        out = extend_attn(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            pool.get_key_buffer(layer.layer_id),
            pool.get_value_buffer(layer.layer_id),
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices,
            [chunk.start for chunk in self._chunks],
            [chunk.end - chunk.start for chunk in self._chunks],
            scaling=layer.scaling,
        )
        return out.view(len(q), -1)

    def _save(self, k, v, layer, forward_batch, save_kv_cache):
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)

    def _compress(self, row, slots):
        pool, compression = self.token_to_kv_pool, self.token_to_kv_pool.compression
        reservation, statistic, salience = compression.observer.finish(row)
        compress_prompt(
            pool.views,
            compression.table,
            compression.store,
            compression.compressor,
            reservation,
            row,
            slots[: reservation.geometry.covered],
            statistic,
            salience,
        )

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        self._save(k, v, layer, forward_batch, save_kv_cache)
        pool, compression = self.token_to_kv_pool, self.token_to_kv_pool.compression
        layer_idx = layer.layer_id - pool.start_layer
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        later = self._retrieve(queries, layer_idx, forward_batch.req_pool_indices)
        out = decode_attn(
            queries,
            pool.views,
            compression.table,
            layer_idx,
            forward_batch.req_pool_indices,
            self.req_to_token_pool.req_to_token,
            forward_batch.seq_lens,
            scaling=layer.scaling,
            estimate=compression.compressor.estimate,
        )
        self._retrieve_ahead(queries, layer_idx, later)
        return out.view(len(queries), -1)

    def _retrieve(self, queries, layer_idx, req_rows):
        """Before a layer attends: all rows, or those that prefetch has to correct; returns the other rows, or None."""
        compression = self.token_to_kv_pool.compression
        if not self._any_compressed or not compression.compressor.retrieves:
            return None
        later = None
        if compression.prefetch is not None:
            req_rows, later = compression.prefetch.split(queries, compression.table, layer_idx, req_rows)
        self._retrieve_rows(queries, layer_idx, req_rows)
        return later

    def _retrieve_ahead(self, queries, layer_idx, later):
        """After a layer has attended: the rows that `_retrieve` left, for the next step."""
        if later is None:
            return
        self.token_to_kv_pool.compression.prefetch.beside(
            lambda: self._retrieve_rows(queries, layer_idx, later),
            queries,
            later,
            is_last=layer_idx == self.token_to_kv_pool.layer_num - 1,
        )

    def _retrieve_rows(self, queries, layer_idx, req_rows):
        pool, compression = self.token_to_kv_pool, self.token_to_kv_pool.compression
        retrieve(
            queries,
            pool.views,
            compression.table,
            compression.store,
            compression.counters,
            layer_idx,
            req_rows,
            compression.config,
        )


def _chunks(forward_batch) -> list[_Chunk]:
    rows = _on_host(forward_batch.req_pool_indices_cpu, forward_batch.req_pool_indices)
    starts = _on_host(forward_batch.extend_prefix_lens_cpu, forward_batch.extend_prefix_lens)
    lens = _on_host(forward_batch.extend_seq_lens_cpu, forward_batch.extend_seq_lens)
    chunks, q_start = [], 0
    for row, start, length in zip(rows, starts, lens, strict=True):
        chunks.append(_Chunk(row, q_start, q_start + length, start, start + length))
        q_start += length
    return chunks


def _on_host(copy, tensor) -> list[int]:
    """Values of a batch's `tensor` from SGLang's copy on the CPU; batches that SGLang makes up to warm up have none."""
    return [int(value) for value in (tensor.tolist() if copy is None else copy)]


def make_hybrid(backend: AttentionBackend) -> AttentionBackend:
    """A backend with the state of the freshly built `backend` that serves compressed requests, too."""
    from sglang_hybridkv.srt.flashinfer_backend import HybridFlashInferMixin, is_flashinfer

    stock = type(backend)
    mixin = HybridFlashInferMixin if is_flashinfer(stock) else HybridAttnMixin
    hybrid: Any = object.__new__(type(f"Hybrid{stock.__name__}", (mixin, stock), {}))
    hybrid.__dict__.update(backend.__dict__)
    hybrid.take_over()
    return hybrid
