"""The scheduler process's one owner of everything that compression adds: ledger, tables, host store, proof."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.common import evict_from_tree_cache

from hybridkv_kernels.host_pages import record_bytes
from sglang_hybridkv.cache.compressed_cache import CompressedCache
from sglang_hybridkv.cache.host_segments import available_host_bytes
from sglang_hybridkv.compressors import get_compressor
from sglang_hybridkv.config import CompressorConfig, RetrievalConfig
from sglang_hybridkv.requests.admission import DenseReason, PoolShape, decide
from sglang_hybridkv.requests.geometry import PromptGeometry
from sglang_hybridkv.requests.host_room import RecentPlans, heads_to_reserve
from sglang_hybridkv.requests.ledger import Agreed, Ledger, Reservation
from sglang_hybridkv.requests.plan_events import PlanPublisher
from sglang_hybridkv.requests.settings import (
    KEY,
    WARM_UP,
    RequestSettings,
    apply_settings,
    change_settings,
    changeable,
    params_by_name,
)
from sglang_hybridkv.requests.spans import VisualSpan, observed_window
from sglang_hybridkv.requests.stats import CompressionStats, HeldBytes, RequestRecord
from sglang_hybridkv.srt.allocator import HybridAllocator
from sglang_hybridkv.srt.memory_pool import HybridTokenToKVPool
from sglang_hybridkv.srt.metrics import CompressionMetrics, DeviceTotals
from sglang_hybridkv.srt.protocols import Request
from sglang_hybridkv.srt.ranks import Ranks
from sglang_hybridkv.srt.settings import Settings
from sglang_hybridkv.srt.sglang_versions import extend_end

logger = logging.getLogger(__name__)

_HOST_STORE_FACTOR = 8  # times the device pool's share of dynamic heads: what it holds at a budget of 0.1, some room
_HOST_MEMORY_SHARE = 0.5
_REMEMBERED_PLANS = 4096
_OVERFLOWED = 2  # what a rank says of a prompt in place of 1, failed, or 0
_RECORD = "_hybridkv_record"
_SETTINGS = "_hybridkv_settings"
_EXACT_TOKENS = "_hybridkv_exact_tokens"
_HEALTH_CHECK_PREFIX = "HEALTH_CHECK"


class Compression:
    """Life of compressed requests as the scheduler sees it: plan, reserve, commit, release, report.

    Parameters
    ----------
    settings : what the user asked for.
    pool, allocator : ours; who builds all three hangs `cache` on the pool and this object on the allocator.
    num_rows, max_context : shape of req_to_token.
    ranks : that share the model; this one has `pool.head_num` KV heads of it.
    num_kv_heads : of the whole model; None is those of the pool.
    """

    def __init__(
        self,
        settings: Settings,
        pool: HybridTokenToKVPool,
        allocator: HybridAllocator,
        num_rows: int,
        max_context: int,
        *,
        ranks: Ranks | None = None,
        num_kv_heads: int | None = None,
    ):
        self.settings, self.config, self.allocator = settings, settings.config, allocator
        self.ranks = ranks or Ranks()
        self.page_bytes = pool.page_bytes * self.ranks.size
        compressor = get_compressor(settings.name)(settings.config)
        num_kv_heads = num_kv_heads or pool.head_num
        compressor.bind(pool.layer_num, num_kv_heads)
        compressor.take_heads(self.ranks.heads(num_kv_heads, pool.head_num))
        self.cache = CompressedCache.create(
            pool.keys,
            pool.values,
            compressor,
            num_rows=num_rows,
            # No prompt is longer than the pool: kernels take scratch for every token that a row could name.
            max_prompt_tokens=min(max_context, allocator.size),
            num_host_pages=_num_host_pages(settings.config, pool, self.ranks),
            windows=pool.windows,
        )
        self.store = self.cache.memory.store
        self.store.make_first()
        self.store.least_of_ranks = lambda own: int(self.ranks.gather(own).min())
        layout = self.cache.memory.layout
        compressor.take_layers(layout.full_layers)
        self.shape = PoolShape(layout.page_size, layout.head_pages_per_page, allocator.size, layout.head_windows)
        self.ledger = Ledger(layout.page_size)
        self.stats = CompressionStats()
        self._recent_plans = RecentPlans()
        self.server_settings = RequestSettings(self.config)
        self._decide = functools.lru_cache(maxsize=_REMEMBERED_PLANS)(self._decide_by_lengths)
        self._kv_by_row: dict[int, Any] = {}
        self._chunk_totals = DeviceTotals(self.cache.counters)
        self.metrics: CompressionMetrics | None = None
        events = self.config.events
        self.publisher = PlanPublisher(events, self.ranks.index, pool.windows) if events else None
        self.self_test: Any = None

    def clear(self) -> None:
        """Forget all requests; the allocator was just cleared, so their pages are free already."""
        self.ledger = Ledger(self.shape.page_size)
        self.cache.clear()
        self._kv_by_row.clear()

    def forget_counts(self) -> None:
        """As if nothing had been compressed yet; before anybody is served."""
        self.stats = CompressionStats()
        self.cache.forget_counts()

    def plan(self, req: Request) -> PromptGeometry | DenseReason:
        """Geometry of the request's compressed prompt, or why it is served dense.

        What a retracted request has generated is prefilled again, exactly, but never compressed: it stays dense.
        """
        lengths = len(req.origin_input_ids), req.sampling_params.max_new_tokens, len(req.output_ids)
        return self._decide(*lengths, self.settings_of(req))

    def change_settings(self, given: dict[str, Any]) -> None:
        """From now on, for requests whose prefill has not begun; others keep what they have.

        The HTTP server's process has checked what is `given`.
        """
        before, config = self.config, change_settings(given, self.config)
        self.settings, self.config = dataclasses.replace(self.settings, config=config), config
        self.server_settings = RequestSettings(config)
        if self.metrics is not None:
            self.metrics.show_settings(changeable(config))
        changes = ", ".join(f"{name} from {getattr(before, name)} to {getattr(config, name)}" for name in given)
        logger.info("KV compressor: changed %s, for requests whose prefill begins from now on.", changes)

    def set_settings(self, req: Request, settings: RequestSettings) -> None:
        """In place of what its custom_params say, and for as long as it lives."""
        setattr(req, _SETTINGS, (settings, None))

    def settings_of(self, req: Request) -> RequestSettings:
        """The server's settings with what the request set itself, as they were when its prefill began.

        The tokenizer's process has checked what it set.
        """
        settings, config = getattr(req, _SETTINGS, (None, None))
        if settings is None or config not in (None, self.config):
            custom_params = params_by_name(req.sampling_params.custom_params)
            settings = self.server_settings
            if KEY in custom_params:
                settings = apply_settings(custom_params[KEY], self.config)
            setattr(req, _SETTINGS, (settings, self.config))  # until its prefill begins
        return settings

    def _decide_by_lengths(
        self, prompt_len: int, max_new_tokens: int, num_generated: int, settings: RequestSettings
    ) -> PromptGeometry | DenseReason:
        if not settings.enabled:
            return DenseReason.REQUEST_DISABLED
        left = max_new_tokens - num_generated
        return decide(prompt_len, left, settings.config, self.shape, num_generated=num_generated)

    def planned(self, req: Request) -> PromptGeometry | None:
        """Geometry of the request's compressed prompt; None when it will be served dense."""
        plan = self.plan(req)
        return plan if isinstance(plan, PromptGeometry) else None

    def window(self, req: Request) -> range:
        """Positions of the request's prompt whose queries are observed."""
        return observed_window(
            self.cache.compressor.observed_rows,
            visual_spans(req.multimodal_inputs),
            len(req.origin_input_ids),
            self.config.observation_rows,
        )

    def prepare(self, req: Request, tree_cache) -> None:
        """Before a part of the prefill of `req` is launched: observe, and on the final one reserve."""
        row = req.kv.req_pool_idx
        assert row is not None, "prefilled without a row"
        # SGLang keeps the prompt of a bootstrap request out of the tree. Without disaggregation, which is refused, that
        # loses its pages; the tokenizer's process refuses such requests, but the scheduler has no other way to know.
        req.skip_radix_cache_insert = False
        if req.to_finish is not None:
            # Refused, and then one token stands for the prompt, or aborted in the queue: nothing is decoded.
            self.cache.observer.drop(row)
            self.record_unprefilled(req)
            return
        self.set_settings(req, self.settings_of(req))
        if self.planned(req) is not None:
            self.cache.observer.watch(row, self.window(req))
        if extend_end(req) < len(req.full_untruncated_fill_ids):
            return
        setattr(req, _EXACT_TOKENS, None)  # all that it had before a retraction is computed again
        reserved = self._reserve(req, tree_cache)
        if isinstance(reserved, DenseReason):
            self.cache.observer.drop(row)
            self._record_dense(req, reserved)
            return
        self.ledger.open(row, reserved)
        self._kv_by_row[row] = req.kv
        config, compressor = self.settings_of(req).config, self.cache.compressor
        self.cache.bind(row, reserved, None if config == compressor.config else compressor.with_config(config))

    def _reserve(self, req: Request, tree_cache) -> Reservation | DenseReason:
        geometry = self.plan(req)
        if isinstance(geometry, DenseReason):
            return geometry
        config = self.settings_of(req).config
        caps_plan = not (isinstance(config, RetrievalConfig) and config.on_host_store_full == "dense")
        most_dynamic, host_pages = self._reserve_host_pages(config, geometry, caps_plan)
        if host_pages is None:
            return DenseReason.HOST_STORE_FULL
        evict_from_tree_cache(tree_cache, geometry.num_pages * self.shape.page_size)
        pages = self.allocator.alloc_pages(geometry.num_pages)
        if pages is None:
            self.store.free(host_pages)
            return DenseReason.NO_FREE_PAGES
        return Reservation(
            geometry=geometry,
            pages=pages,
            host_pages=host_pages,
            prefilled=len(req.full_untruncated_fill_ids),
            spans=visual_spans(req.multimodal_inputs),
            most_dynamic=most_dynamic,
            outcome=torch.zeros(2, dtype=torch.int64, pin_memory=self.cache.counters.is_cuda),
            caps_plan=caps_plan,
        )

    def _reserve_host_pages(
        self, config: CompressorConfig, geometry: PromptGeometry, caps_plan: bool
    ) -> tuple[int, torch.Tensor | None]:
        """Host pages, and for how many dynamic heads they are; None where all plans of these settings need more."""
        per_page = self.shape.head_pages_per_page
        fewest = config.fewest_dynamic_heads(self.shape.num_compressed_heads, geometry.covered)
        estimate = 0
        if geometry.max_dynamic_heads > 0:
            estimate = max(fewest, self._recent_plans.estimate(config.model_dump_json(), geometry.max_dynamic_heads))
        while True:
            most = heads_to_reserve(
                geometry,
                estimate,
                free_pages=self.store.available(),
                num_pages=self.store.num_pages,
                head_pages_per_page=per_page,
            )
            if most < fewest and not caps_plan:
                return most, None
            host_pages = self.store.alloc(geometry.host_pages_used(most, per_page))
            if host_pages is not None:
                return most, host_pages
            # What was available has just become less, because the system gives no more memory.

    def _note_plan(self, req: Request, reservation: Reservation, most_dynamic: int) -> None:
        if reservation.geometry.max_dynamic_heads > 0:
            # In words: fields of an own compressor's config may be of any kind, lists among them.
            settings = self.settings_of(req).config.model_dump_json()
            self._recent_plans.note(settings, reservation, most_dynamic)

    def settle(self, reservation: Reservation) -> None:
        """Before what the forward has done with a prompt is looked at: the ranks agree on it.

        All of them keep as many pages as the one with the most dynamic heads needs, and where one has failed the prompt
        is dense on all.
        """
        self.heed_refusal(reservation)
        digest = 0 if reservation.digest is None else int(reservation.digest)
        num_static, num_dynamic = reservation.outcome.tolist()
        fault = _OVERFLOWED if reservation.overflowed else int(reservation.failed)
        num_dynamic = reservation.overflow() or num_dynamic
        faults, static, dynamic, digests = self.ranks.gather(fault, num_static, num_dynamic, digest).unbind(1)
        reservation.failed = bool(faults.any())
        reservation.was_read = reservation.failed and not bool(faults.all())
        reservation.overflowed = reservation.failed and bool(((faults == 0) | (faults == _OVERFLOWED)).all())
        reservation.agreed = Agreed(int(static.sum()), int(dynamic.sum()), int(dynamic.max()), digests.tolist())

    def heed_refusal(self, reservation: Reservation) -> None:
        """A plan that the forward has refused is a prompt that it could not compress, or has too few host pages."""
        refusal = None if reservation.failed else reservation.refusal()
        if refusal is None:
            return
        reservation.failed, reservation.overflowed = True, reservation.overflow() is not None
        if not reservation.overflowed:
            sentence = f"KV compressor {self.settings.name!r}: {refusal}"
            logger.error(
                "KV compressor: a prompt of %d tokens could not be compressed: %s", reservation.prefilled, sentence
            )

    def commit(self, req: Request) -> None:
        """The prompt is compressed and its exact form is in the tree; give back what turned out unused."""
        row = req.kv.req_pool_idx
        assert row is not None, "committed without a row"
        reservation = self.ledger.by_row[row]
        agreed = reservation.agreed
        assert agreed is not None, "committed before the ranks agreed"
        assert reservation.digest is not None, "committed before it was compressed"
        geometry, per_page = reservation.geometry, self.shape.head_pages_per_page
        num_heads = agreed.num_static + agreed.num_dynamic
        assert num_heads == self.shape.num_compressed_heads * self.ranks.size, "committed before it was compressed"
        most = agreed.most_dynamic
        self._note_plan(req, reservation, most)
        unused, unused_host = self.ledger.commit(
            row, geometry.pages_used(most, per_page), geometry.host_pages_used(most, per_page)
        )
        self.allocator.free_page_ids(unused)
        self.store.free(unused_host)
        held = self._held_by(row)
        record = dataclasses.replace(
            self._dense_record(req, None),
            compressed=True,
            resident_ratio=held.device / held.stock,
            host_bytes=held.host,
            static_heads=agreed.num_static,
            dynamic_heads=agreed.num_dynamic,
            plan=f"{agreed.digest:016x}",
        )
        if not hasattr(req, _RECORD) and _is_from_a_user(req):
            self.stats.count_compressed()
            if self.metrics is not None:
                self.metrics.count_compressed(record)
        setattr(req, _RECORD, record)
        if self.publisher is not None and _is_from_a_user(req):
            self.publisher.publish(req.rid, record.prompt_tokens, record.budget, reservation)
        self.stats.observe(self.held())
        seconds = reservation.seconds()
        if self.metrics is not None and seconds is not None:
            self.metrics.observe_compression(seconds)
        self.update_metrics()

    def give_up(self, req: Request) -> None:
        """In place of a commit, when the forward could not compress: the request goes on as a dense one."""
        row = req.kv.req_pool_idx
        assert row is not None, "given up without a row"
        reservation = self._give_back(row)
        assert reservation is not None, "given up without a reservation"
        if reservation.overflowed and reservation.agreed is not None:
            self._note_plan(req, reservation, reservation.agreed.most_dynamic)
        if reservation.was_read:
            setattr(req, _EXACT_TOKENS, reservation.prefilled)
        self.ledger.freed_memory = True
        self._record_dense(req, _reason_of_failure(reservation))

    def exact_tokens(self, req: Request) -> int | None:
        """How many tokens of a request have exact KV, where it was given up when some had none; None elsewhere."""
        return getattr(req, _EXACT_TOKENS, None)

    def release(self, req: Request) -> None:
        """The request gives its row back: finished, aborted or retracted."""
        row = req.kv.req_pool_idx
        if row is None:
            return
        reservation = self._give_back(row)
        if reservation is not None and not reservation.committed:
            self.heed_refusal(reservation)
        # A retraction is not an answer: the request comes back.
        if not req.finished() or (reservation is not None and reservation.committed):
            return
        if reservation is None:
            self.record_unprefilled(req)
        elif reservation.failed:
            self._record_dense(req, _reason_of_failure(reservation))
        else:
            aborted = isinstance(req.finished_reason, FINISH_ABORT)
            self._record_dense(req, DenseReason.ABORTED if aborted else DenseReason.NO_DECODE)

    def _give_back(self, row: int) -> Reservation | None:
        """Free what the ledger holds for `row`, and forget it."""
        self.cache.release(row)
        self._kv_by_row.pop(row, None)
        reservation = self.ledger.close(row)
        if reservation is not None:
            self.allocator.free_page_ids(reservation.unlisted_pages)
            self.store.free(reservation.host_pages)
        return reservation

    def record_unprefilled(self, req: Request) -> None:
        """The request ends in a queue or between two parts of its prefill; what it was before a retraction stays."""
        if not hasattr(req, _RECORD):
            self._record_dense(req, DenseReason.NOT_PREFILLED)

    def held(self) -> HeldBytes:
        """Bytes that committed requests hold now, their dense tails included."""
        rows = (row for row, reservation in self.ledger.by_row.items() if reservation.committed)
        return sum((self._held_by(row) for row in rows), HeldBytes())

    def publish_metrics(self, labels: dict[str, Any]) -> None:
        """From now on SGLang's /metrics has those of compression, with SGLang's own `labels`."""
        self.metrics = CompressionMetrics(
            labels,
            pool_bytes=self.shape.num_tokens // self.shape.page_size * self.page_bytes,
            chunk_bytes=self._chunk_bytes,
        )
        self.metrics.show_settings(changeable(self.config))
        self.update_metrics()

    def update_metrics(self) -> None:
        """Show what is held now; after each commit and release, and where SGLang logs its decode batches."""
        if self.metrics is not None:
            held, size = self.held(), self.ranks.size
            self.metrics.observe_held(held, self.num_committed())
            limit, pinned = self.store.limit_bytes() * size, self.store.made_bytes() * size
            self.metrics.observe_host_store(limit, pinned, self.store.used_bytes() * size - held.host)
            self.metrics.observe_chunks(*self._chunk_totals.read())

    def num_committed(self) -> int:
        """Compressed requests that run now."""
        return sum(reservation.committed for reservation in self.ledger.by_row.values())

    def tokens_saved(self) -> int:
        """Tokens' worth of pages that they would hold beyond what they hold."""
        held = self.held()
        return (held.stock - held.device) // self.page_bytes * self.shape.page_size

    @property
    def _chunk_bytes(self) -> int:
        head_page_bytes = self.store.page_bytes // self.shape.head_pages_per_page
        return head_page_bytes * self.config.tokens_per_chunk // self.config.page_size

    def request_info(self, req: Request) -> dict[str, Any]:
        """`meta_info.kv_compressor` of one request."""
        record = getattr(req, _RECORD, None)
        if record is None:
            record = self._dense_record(req, DenseReason.NOT_PREFILLED)
        return record.as_dict()

    def server_info(self) -> dict[str, Any]:
        """`kv_compressor` in the internal state of `/server_info`; on all ranks at once."""
        chosen, hit = self.ranks.gather(*self.cache.counters.tolist()).sum(0).tolist()
        prefetch, host_store = self.cache.prefetch, self._host_store_state()
        return {
            "name": self.settings.name,
            "budget": self.config.budget,
            "config": self.config.model_dump(mode="json"),
            "page_size": self.shape.page_size,
            "host_store_bytes": host_store["limit_bytes"],
            "host_store": host_store,
            **self.stats.as_dict(self.held(), chosen, hit, self._chunk_bytes),
            "ranks": self._of_ranks(),
            **({} if prefetch is None else {"prefetch_correction_rate": prefetch.correction_rate()}),
        }

    def _host_store_state(self) -> dict[str, int]:
        """Bytes of the host stores of all ranks.

        They may grow to the limit, and are pinned so far, on a GPU host; used by compressed prompts, and reserved by
        those whose prefill has not been committed.
        """
        of_ranks = self.ranks.gather(self.store.limit_bytes(), self.store.made_bytes())
        used = self.held().host
        return {
            "limit_bytes": int(of_ranks[:, 0].min()) * self.ranks.size,
            "pinned_bytes": int(of_ranks[:, 1].sum()),
            "used_bytes": used,
            "reserved_bytes": self.store.used_bytes() * self.ranks.size - used,
        }

    def _of_ranks(self) -> list[dict[str, int]]:
        """What each rank holds, which has to be the same on all."""
        used_host = self.store.used_bytes() // self.store.page_bytes * self.shape.page_size
        held = self.ranks.gather(len(self.ledger.by_row), self.allocator.available_size(), used_host)
        return [dict(zip(("requests", "free_tokens", "used_host_tokens"), row, strict=True)) for row in held.tolist()]

    def check_integrity(self) -> None:
        """AssertionError when pages of the ledger, the host store and the table do not fit together."""
        self.ledger.check_integrity()
        self.cache.check_integrity()
        bound, reserved = self.cache.bound, self.ledger.by_row
        assert bound.keys() == reserved.keys(), f"rows bound {set(bound)}, rows reserved {set(reserved)}"
        assert all(bound[row] is reserved[row] for row in bound), "a row was bound with another reservation"

    def _held_by(self, row: int) -> HeldBytes:
        reservation, page_size = self.ledger.by_row[row], self.shape.page_size
        allocated_pages = -(-self._kv_by_row[row].kv_allocated_len // page_size)
        tail_pages = allocated_pages - reservation.geometry.num_prompt_pages
        return HeldBytes(
            device=(len(reservation.pages) + tail_pages) * self.page_bytes,
            stock=allocated_pages * self.page_bytes,
            host=len(reservation.host_pages) * self.store.page_bytes * self.ranks.size,
        )

    def _record_dense(self, req: Request, reason: DenseReason) -> None:
        if was_compressed(req):
            return  # retracted and prefilled again: part of its answer was computed over compressed context
        if not hasattr(req, _RECORD) and _is_from_a_user(req):
            self.stats.count_dense(reason, len(req.origin_input_ids))
            if self.metrics is not None:
                self.metrics.count_dense(reason.value)
        setattr(req, _RECORD, self._dense_record(req, reason))

    def _dense_record(self, req: Request, reason: DenseReason | None) -> RequestRecord:
        settings = self.settings_of(req)
        budget, given = settings.config.budget, dict(settings.given) or None
        return RequestRecord(False, reason, len(req.origin_input_ids), budget, request_settings=given)


def _reason_of_failure(reservation: Reservation) -> DenseReason:
    return DenseReason.HOST_STORE_FULL if reservation.overflowed else DenseReason.COMPRESSOR_FAILED


def _num_host_pages(config: CompressorConfig, pool: HybridTokenToKVPool, ranks: Ranks) -> int:
    """Host pages of each rank, for as many tokens as a device page."""
    token_bytes = record_bytes(pool.head_dim, pool.store_dtype.itemsize, config.stored_dtype) * ranks.size
    page_bytes = pool.layer_num * pool.head_num * pool.page_size * token_bytes
    return _host_store_bytes(config, pool, ranks) // page_bytes


def _host_store_bytes(config: CompressorConfig, pool: HybridTokenToKVPool, ranks: Ranks) -> int:
    """Of all ranks: what the user asked for, or what dynamic heads need beside full device pools, if that is free.

    ValueError when the user asks for more than can be page-locked.
    """
    wanted = config.host_store_bytes if isinstance(config, RetrievalConfig) else 0
    is_pinned = torch.device(pool.device).type == "cuda"
    free = int(ranks.gather(available_host_bytes()).min())
    if wanted is not None:
        if is_pinned and wanted > free:
            # Page-locked memory beyond that has the system end the process, without a word.
            raise ValueError(
                f"host_store_bytes: {wanted:,}; legal: at most {free:,}, which this machine, or the container, has "
                "free and can page-lock"
            )
        return wanted
    compressed_heads = (pool.layer_num - sum(map(bool, pool.windows))) * pool.head_num
    heads, pool_bytes = pool.layer_num * pool.head_num, pool.pool_bytes * ranks.size
    rows_bytes = _HOST_STORE_FACTOR * pool_bytes * config.most_dynamic_heads(compressed_heads, 0) // heads
    plain, stored = (
        record_bytes(pool.head_dim, pool.store_dtype.itemsize, one) for one in ("same", config.stored_dtype)
    )
    for_dynamic_heads = rows_bytes * stored // plain
    return min(for_dynamic_heads, int(_HOST_MEMORY_SHARE * free))


def was_compressed(req: Request) -> bool:
    """Whether any part of the request's answer was computed over compressed context."""
    record = getattr(req, _RECORD, None)
    return record is not None and record.compressed


def _is_from_a_user(req: Request) -> bool:
    """Whether it is not a health check, a warm-up, or SGLang's own prefill of a prompt before its `n` samples."""
    params = req.sampling_params
    is_prefill_of_samples = params.max_new_tokens == 0 and params.n > 1
    is_warm_up = WARM_UP in params_by_name(params.custom_params)
    return not (is_warm_up or is_prefill_of_samples or req.rid.startswith(_HEALTH_CHECK_PREFIX))


def visual_spans(multimodal_inputs) -> tuple[VisualSpan, ...]:
    """Images and videos of a request; SGLang's offsets are absolute and inclusive. Audio counts as text."""
    if multimodal_inputs is None:
        return ()
    visual = [item for item in multimodal_inputs.mm_items if not item.is_audio() and item.offsets]
    spans = [VisualSpan(a, b + 1, item.modality.name.lower()) for item in visual for a, b in item.offsets]
    return tuple(sorted(spans, key=lambda span: span.start))
