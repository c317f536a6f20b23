"""The scheduler process's one owner of everything that compression adds: ledger, tables, host store, proof."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil
import torch
from sglang.srt.mem_cache.common import evict_from_tree_cache

from hybridkv_kernels.head_pages import HeadPageTable
from sglang_hybridkv.cache.host_store import HostStore
from sglang_hybridkv.cache.prefetch import QueryPrefetch
from sglang_hybridkv.compressors import get_compressor
from sglang_hybridkv.config import RetrievalConfig
from sglang_hybridkv.requests.admission import DenseReason, PoolShape, decide
from sglang_hybridkv.requests.geometry import PromptGeometry
from sglang_hybridkv.requests.ledger import Ledger, Reservation
from sglang_hybridkv.requests.spans import VisualSpan, observed_window
from sglang_hybridkv.requests.stats import CompressionStats, HeldBytes, RequestRecord
from sglang_hybridkv.srt.observation import PromptObserver
from sglang_hybridkv.srt.settings import Settings

if TYPE_CHECKING:
    from sglang_hybridkv.srt.allocator import HybridAllocator
    from sglang_hybridkv.srt.memory_pool import HybridTokenToKVPool

_HOST_STORE_FACTOR = 8  # times the device pool's share of dynamic heads: what it holds at a budget of 0.1, some room
_HOST_MEMORY_SHARE = 0.5
_RECORD = "_hybridkv_record"
_HEALTH_CHECK_PREFIX = "HEALTH_CHECK"


class Compression:
    """Life of compressed requests as the scheduler sees it: plan, reserve, commit, release, report.

    Parameters
    ----------
    settings : what the user asked for.
    pool, allocator : ours; this object is hung on both.
    num_rows, max_context : shape of req_to_token.
    """

    def __init__(
        self,
        settings: Settings,
        pool: HybridTokenToKVPool,
        allocator: HybridAllocator,
        num_rows: int,
        max_context: int,
    ):
        layout, config = pool.views.layout, settings.config
        self.settings, self.config, self.pool, self.allocator = settings, config, pool, allocator
        self.compressor = get_compressor(settings.name)(config)
        self.compressor.bind(layout.num_layers, layout.num_kv_heads)
        if isinstance(config, RetrievalConfig):
            pool.views = pool.views.with_chunks(config.tokens_per_chunk)
        self.shape = PoolShape(layout.page_size, layout.head_pages_per_page, allocator.size)
        # No prompt is longer than the pool: kernels take scratch for every token that a row of the table could name.
        max_prompt_pages = -(-min(max_context, allocator.size) // layout.page_size)
        most_vectors = config.summary_vectors(max_prompt_pages * layout.page_size)
        max_pages = max_prompt_pages + -(-most_vectors // (2 * layout.page_size))
        self.table = HeadPageTable(num_rows, max_pages, max_prompt_pages, layout, pool.device)
        self.store = self._host_store()
        self.ledger = Ledger(layout.page_size)
        self.stats = CompressionStats()
        self.counters = torch.zeros(2, dtype=torch.int64, device=pool.device)
        self.prefetch = self._query_prefetch(num_rows)
        self.observer = PromptObserver(self.compressor, layout.num_layers)
        self._kv_by_row: dict[int, Any] = {}
        self.launched_rows: list[int] = []  # of the decode batch that is launched next, while its launch needs them
        self.kernels: str | None = None  # set by the handshake, which knows the model
        pool.compression = allocator.compression = self

    def clear(self) -> None:
        """Forget all requests; the allocator was just cleared, so their pages are free already."""
        self.ledger = Ledger(self.shape.page_size)
        self.table.clear_all()
        self.store.clear()
        self.observer.clear()
        self._kv_by_row.clear()

    def plan(self, req) -> PromptGeometry | DenseReason:
        """Geometry of the request's compressed prompt, or why it is served dense.

        What a retracted request has generated is prefilled again, exactly, but never compressed: it stays dense.
        """
        prompt_len, num_generated = len(req.origin_input_ids), len(req.output_ids)
        left = req.sampling_params.max_new_tokens - num_generated
        return decide(prompt_len, left, self.config, self.shape, num_generated=num_generated)

    def planned(self, req) -> PromptGeometry | None:
        """Geometry of the request's compressed prompt; None when it will be served dense."""
        plan = self.plan(req)
        return plan if isinstance(plan, PromptGeometry) else None

    def window(self, req) -> range:
        """Positions of the request's prompt whose queries are observed."""
        return observed_window(
            self.compressor.observed_rows,
            visual_spans(req.multimodal_inputs),
            len(req.origin_input_ids),
            self.config.observation_rows,
        )

    def prepare(self, req, tree_cache) -> None:
        """Before a prefill chunk of `req` is launched: observe, and on the final one reserve."""
        row = req.kv.req_pool_idx
        if self.planned(req) is not None:
            self.observer.watch(row, self.window(req))
        if req.extend_range.end < len(req.full_untruncated_fill_ids):
            return
        reserved = self._reserve(req, tree_cache)
        if isinstance(reserved, DenseReason):
            self.observer.drop(row)
            self._record_dense(req, reserved)
            return
        self.ledger.open(row, reserved)
        self._kv_by_row[row] = req.kv
        self.table.bind(row, reserved.pages, reserved.host_pages, reserved.geometry.covered)
        self.observer.begin(row, reserved)
        if self.prefetch is not None:
            self.prefetch.forget(row)

    def _reserve(self, req, tree_cache) -> Reservation | DenseReason:
        geometry = self.plan(req)
        if isinstance(geometry, DenseReason):
            return geometry
        host_pages = None
        if isinstance(self.config, RetrievalConfig):
            host_pages = self.store.alloc(geometry.num_host_pages)
            if host_pages is None and self.config.on_host_store_full == "dense":
                return DenseReason.HOST_STORE_FULL
        evict_from_tree_cache(tree_cache, geometry.num_pages * self.shape.page_size)
        pages = self.allocator.alloc_pages(geometry.num_pages)
        if pages is None:
            if host_pages is not None:
                self.store.free(host_pages)
            return DenseReason.NO_FREE_PAGES
        return Reservation(
            geometry=geometry,
            pages=pages,
            host_pages=torch.empty(0, dtype=torch.int64) if host_pages is None else host_pages,
            prefilled=len(req.full_untruncated_fill_ids),
            spans=visual_spans(req.multimodal_inputs),
            retrieval=host_pages is not None,
            outcome=torch.zeros(2, dtype=torch.int64, pin_memory=torch.device(self.pool.device).type == "cuda"),
        )

    def commit(self, req) -> None:
        """The prompt is compressed and its exact form is in the tree; give back what turned out unused."""
        row = req.kv.req_pool_idx
        reservation = self.ledger.by_row[row]
        num_static, num_dynamic = reservation.outcome.tolist()
        assert reservation.digest is not None, "committed before it was compressed"
        assert num_static + num_dynamic == self.shape.head_pages_per_page
        geometry, per_page = reservation.geometry, self.shape.head_pages_per_page
        unused, unused_host = self.ledger.commit(
            row, geometry.pages_used(num_dynamic, per_page), geometry.host_pages_used(num_dynamic, per_page)
        )
        self.allocator.free_page_ids(unused)
        self.store.free(unused_host)
        if not was_compressed(req):
            self.stats.count_compressed()
        held = self._held_by(row)
        record = RequestRecord(
            compressed=True,
            reason=None,
            prompt_tokens=len(req.origin_input_ids),
            budget=self.config.budget,
            resident_ratio=held.device / held.stock,
            host_bytes=held.host,
            static_heads=num_static,
            dynamic_heads=num_dynamic,
            plan=f"{int(reservation.digest) % 2**64:016x}",
        )
        setattr(req, _RECORD, record)
        self.stats.observe(self.held())

    def release(self, req) -> None:
        """The request gives its row back: finished, aborted or retracted."""
        row = req.kv.req_pool_idx
        self.observer.drop(row)
        reservation = self.ledger.close(row)
        self._kv_by_row.pop(row, None)
        if reservation is None:
            return
        self.table.clear(row)
        self.allocator.free_page_ids(reservation.unlisted_pages)
        self.store.free(reservation.host_pages)
        # A retraction before the commit is not an answer: the request comes back.
        if not reservation.committed and req.finished():
            self._record_dense(req, DenseReason.NO_DECODE)

    def held(self) -> HeldBytes:
        """Bytes that committed requests hold now, their dense tails included."""
        rows = (row for row, reservation in self.ledger.by_row.items() if reservation.committed)
        return sum((self._held_by(row) for row in rows), HeldBytes())

    def request_info(self, req) -> dict[str, Any]:
        """`meta_info.kv_compressor` of one request."""
        record = getattr(req, _RECORD, None)
        if record is None:
            record = RequestRecord(False, DenseReason.NOT_PREFILLED, len(req.origin_input_ids), self.config.budget)
        return record.as_dict()

    def server_info(self) -> dict[str, Any]:
        """`kv_compressor` in the internal state of `/server_info`."""
        chosen, hit = self.counters.tolist()
        chunk_bytes = self.pool.page_bytes // self.shape.head_pages_per_page
        if isinstance(self.config, RetrievalConfig):
            chunk_bytes = chunk_bytes * self.config.tokens_per_chunk // self.config.page_size
        return {
            "name": self.settings.name,
            "budget": self.config.budget,
            "config": self.config.model_dump(mode="json"),
            "page_size": self.shape.page_size,
            "kernels": self.kernels,
            "host_store_bytes": self.store.num_pages * self.store.page_bytes,
            **self.stats.as_dict(self.held(), chosen, hit, chunk_bytes),
            **({} if self.prefetch is None else {"prefetch_correction_rate": self.prefetch.correction_rate()}),
        }

    def check_integrity(self) -> None:
        """AssertionError when pages of the ledger, the host store and the table do not fit together."""
        self.ledger.check_integrity()
        self.store.check_integrity([r.host_pages for r in self.ledger.by_row.values()])
        bound = set(self.table.num_pages.nonzero().flatten().tolist())
        assert bound == set(self.ledger.by_row), f"rows bound {bound}, rows reserved {set(self.ledger.by_row)}"

    def _held_by(self, row: int) -> HeldBytes:
        reservation, page_size = self.ledger.by_row[row], self.shape.page_size
        allocated_pages = -(-self._kv_by_row[row].kv_allocated_len // page_size)
        tail_pages = allocated_pages - reservation.geometry.num_chunks
        return HeldBytes(
            device=(len(reservation.pages) + tail_pages) * self.pool.page_bytes,
            stock=allocated_pages * self.pool.page_bytes,
            host=len(reservation.host_pages) * self.store.page_bytes,
        )

    def _record_dense(self, req, reason: DenseReason) -> None:
        if was_compressed(req):
            return  # retracted and prefilled again: part of its answer was computed over compressed context
        prompt_tokens = len(req.origin_input_ids)
        if not hasattr(req, _RECORD) and not req.rid.startswith(_HEALTH_CHECK_PREFIX):
            self.stats.count_dense(reason, prompt_tokens)
        setattr(req, _RECORD, RequestRecord(False, reason, prompt_tokens, self.config.budget))

    def _query_prefetch(self, num_rows: int) -> QueryPrefetch | None:
        config, pool = self.config, self.pool
        if not isinstance(config, RetrievalConfig) or config.prefetch == "off":
            return None
        similarity, layout = config.prefetch_similarity, pool.views.layout
        return QueryPrefetch(similarity, num_rows, layout, pool.head_dim, pool.dtype, pool.device)

    def _host_store(self) -> HostStore:
        layout, pool = self.pool.views.layout, self.pool
        wanted = self.config.host_store_bytes if isinstance(self.config, RetrievalConfig) else 0
        if wanted is None:
            free = int(_HOST_MEMORY_SHARE * psutil.virtual_memory().available)
            pool_bytes, heads = pool.page_bytes * layout.pages_per_layer, layout.head_pages_per_page
            wanted = min(_HOST_STORE_FACTOR * pool_bytes * self.config.most_dynamic_heads(heads) // heads, free)
        return HostStore(
            num_pages=wanted // pool.page_bytes,
            head_pages_per_page=layout.head_pages_per_page,
            page_size=layout.page_size,
            head_dim=pool.head_dim,
            dtype=pool.store_dtype,
            pin=torch.device(pool.device).type == "cuda",
        )


def was_compressed(req) -> bool:
    """Whether any part of the request's answer was computed over compressed context."""
    record = getattr(req, _RECORD, None)
    return record is not None and record.compressed


def visual_spans(multimodal_inputs) -> tuple[VisualSpan, ...]:
    """Images and videos of a request; SGLang's offsets are absolute and inclusive. Audio counts as text."""
    if multimodal_inputs is None:
        return ()
    visual = [item for item in multimodal_inputs.mm_items if not item.is_audio() and item.offsets]
    spans = [VisualSpan(a, b + 1, item.modality.name.lower()) for item in visual for a, b in item.offsets]
    return tuple(sorted(spans, key=lambda span: span.start))
