"""Stock prefill that is observed and compressed; decode over head pages, fetched chunks and the dense tail.

A mixin, not a wrapper: SGLang asks a backend for members of its base class, which a wrapper's `__getattr__`
would never see, and compares backends by name, so the chosen backend stays what it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from hybridkv_kernels.decode_attn import decode_attn
from sglang_hybridkv.compaction import compress_prompt
from sglang_hybridkv.retrieval import retrieve_chunks


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
        self._observed, self._compressed = [], []
        if forward_batch.forward_mode.is_decode():
            self._compressed = [(i, row) for i, row in enumerate(rows) if compression.ledger.get(row) is not None]
        elif forward_batch.forward_mode.is_extend():
            self._observed = _chunks(compression.observer, rows, forward_batch)

    def shared_read_ends(self, forward_mode):
        """Decode reads the request's row and table inside the layers, so the scheduler may rewrite them only
        after the replay; the base default would let a commit race with it on a GPU."""
        return SharedReadEnds.max_of((super().shared_read_ends(forward_mode), SharedReadEnds.POST_REPLAY))

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
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
                if observer.score(chunk.row, tail, pool.get_key_buffer(layer.layer_id)[slots], layer.scaling):
                    self._compress(chunk.row, slots)
        return out

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
        if not self._compressed:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        pool, compression = self.token_to_kv_pool, self.token_to_kv_pool.compression
        if save_kv_cache and k is not None:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        layer_idx = layer.layer_id - pool.start_layer
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        for i, row in self._compressed:
            retrieve_chunks(
                pool.views,
                compression.table,
                compression.store,
                compression.config,
                row,
                layer_idx,
                queries[i],
                compression.counters,
            )
        out = decode_attn(
            queries,
            pool.get_key_buffer(layer.layer_id),
            pool.get_value_buffer(layer.layer_id),
            pool.views.k_pages,
            pool.views.v_pages,
            compression.table,
            layer_idx,
            forward_batch.req_pool_indices,
            self.req_to_token_pool.req_to_token,
            forward_batch.seq_lens,
            scaling=layer.scaling,
        )
        return out.view(len(queries), -1)


def _chunks(observer, rows, forward_batch) -> list[_Chunk]:
    chunks, q_start = [], 0
    lens = zip(forward_batch.extend_prefix_lens.tolist(), forward_batch.extend_seq_lens.tolist(), strict=True)
    for row, (start, length) in zip(rows, lens, strict=True):
        if observer.is_interested(row):
            chunks.append(_Chunk(row, q_start, q_start + length, start, start + length))
        q_start += length
    return chunks


def make_hybrid(backend: AttentionBackend) -> AttentionBackend:
    """A backend with the state of the freshly built `backend` that serves compressed requests, too."""
    stock = type(backend)
    hybrid: Any = object.__new__(type(f"Hybrid{stock.__name__}", (HybridAttnMixin, stock), {}))
    hybrid.__dict__.update(backend.__dict__)
    return hybrid
