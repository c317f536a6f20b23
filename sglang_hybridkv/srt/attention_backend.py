"""Stock prefill that is observed and compressed; decode over head pages, fetched chunks and the dense tail.

A mixin, not a wrapper: SGLang asks a backend for members of its base class, which a wrapper's `__getattr__`
would never see, and compares backends by name, so the chosen backend stays what it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from hybridkv_kernels.decode_attn import decode_attn
from hybridkv_kernels.extend_attn import extend_attn
from hybridkv_kernels.retrieve_chunks import retrieve_chunks
from sglang_hybridkv.compaction import compress_prompt, forced_chunk_counts


class _Chunk(NamedTuple):
    """Place of one request's prefill chunk: rows [q_start, q_end) of the batch, tokens [start, end) of the prompt."""

    row: int
    q_start: int
    q_end: int
    start: int
    end: int


class HybridAttnMixin(AttentionBackend):
    """Goes before a concrete backend in the class order; `compression` comes from its KV pool."""

    def init_forward_metadata(self, forward_batch):
        super().init_forward_metadata(forward_batch)
        compression, rows = self.token_to_kv_pool.compression, forward_batch.req_pool_indices.tolist()
        self._chunks, self._observed, self._any_compressed = [], [], False
        if forward_batch.forward_mode.is_decode():
            self._any_compressed = any(compression.ledger.get(row) is not None for row in rows)
        elif forward_batch.forward_mode.is_extend():
            self._chunks = _chunks(rows, forward_batch)
            self._observed = [chunk for chunk in self._chunks if compression.observer.is_interested(chunk.row)]

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
            tail = observer.keep_tail(chunk.row, layer_idx, queries[chunk.q_start : chunk.q_end], chunk.start)
            if observer.is_final(chunk.row):
                slots = self.req_to_token_pool.req_to_token[chunk.row, : chunk.end].long()
                keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
                if observer.score(chunk.row, tail, keys, values, slots, layer.scaling):
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
        if not self._any_compressed and not q.is_cpu:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        self._save(k, v, layer, forward_batch, save_kv_cache)
        pool, compression = self.token_to_kv_pool, self.token_to_kv_pool.compression
        layer_idx = layer.layer_id - pool.start_layer
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        if self._any_compressed and compression.compressor.retrieves:
            self._retrieve(queries, layer_idx, forward_batch.req_pool_indices)
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
        return out.view(len(queries), -1)

    def _retrieve(self, queries, layer_idx, req_rows):
        pool, compression = self.token_to_kv_pool, self.token_to_kv_pool.compression
        num_sink_chunks, num_recent_chunks = forced_chunk_counts(compression.config)
        retrieve_chunks(
            queries,
            pool.views,
            compression.table,
            compression.store.k_pages,
            compression.store.v_pages,
            compression.counters,
            layer_idx,
            req_rows,
            num_sink_chunks=num_sink_chunks,
            num_recent_chunks=num_recent_chunks,
            chunk_score=compression.config.chunk_score,
            estimate=compression.config.estimates,
        )


def _chunks(rows, forward_batch) -> list[_Chunk]:
    chunks, q_start = [], 0
    lens = zip(forward_batch.extend_prefix_lens.tolist(), forward_batch.extend_seq_lens.tolist(), strict=True)
    for row, (start, length) in zip(rows, lens, strict=True):
        chunks.append(_Chunk(row, q_start, q_start + length, start, start + length))
        q_start += length
    return chunks


def make_hybrid(backend: AttentionBackend) -> AttentionBackend:
    """A backend with the state of the freshly built `backend` that serves compressed requests, too."""
    stock = type(backend)
    hybrid: Any = object.__new__(type(f"Hybrid{stock.__name__}", (HybridAttnMixin, stock), {}))
    hybrid.__dict__.update(backend.__dict__)
    return hybrid
