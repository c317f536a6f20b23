"""What SGLang's /metrics says of compression: prometheus_client in the scheduler process, as SGLang's own metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sglang_hybridkv.requests.admission import DenseReason

if TYPE_CHECKING:
    from sglang_hybridkv.requests.stats import HeldBytes, RequestRecord

PREFIX = "sglang:kv_compressor_"
_RATIO_BUCKETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
_SECONDS_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class CompressionMetrics:
    """Written when a request is compressed, served dense or released; never by a decode step.

    Parameters
    ----------
    labels : those that SGLang gives its own metrics of this scheduler.
    pool_bytes : limit of what requests may hold on the device.
    chunk_bytes : K and V of one chunk of one head.
    """

    def __init__(self, labels: dict[str, Any], *, pool_bytes: int, chunk_bytes: int):
        # Not before SGLang has chosen the folder through which its processes share metrics.
        from prometheus_client import Counter, Gauge, Histogram

        def make(kind: Any, name: str, text: str, more: tuple[str, ...] = (), **options: Any) -> Any:
            if kind is Gauge:
                options["multiprocess_mode"] = "mostrecent"
            made = kind(PREFIX + name, text, [*labels, *more], **options)
            return made if more else made.labels(**labels)

        self._labels, self._chunk_bytes = labels, chunk_bytes
        self._requests = make(
            Counter,
            "requests",
            "Requests by outcome, compressed or dense; reason says why dense, and is empty otherwise.",
            ("outcome", "reason"),
        )
        # From the start with 0: Prometheus sees no increase of what begins with 1.
        self._requests.labels(**labels, outcome="compressed", reason="")
        for reason in DenseReason:
            self._requests.labels(**labels, outcome="dense", reason=reason.value)
        self._held = {
            "device": make(Gauge, "device_bytes", "Device bytes that compressed requests hold now."),
            "stock": make(Gauge, "stock_bytes", "Device bytes that they would hold now without compression."),
            "host": make(Gauge, "host_bytes", "Bytes of the host store that they hold now."),
        }
        make(Gauge, "device_limit_bytes", "Bytes of the KV pool, which dense requests and the radix tree share.").set(
            pool_bytes
        )
        self._host_store = (
            make(Gauge, "host_limit_bytes", "Bytes that the host store may grow to."),
            make(Gauge, "host_pinned_bytes", "Bytes that it has grown to, page-locked on a GPU host."),
            make(Gauge, "host_reserved_bytes", "Bytes of it that prompts in prefill have reserved."),
        )
        self._running = make(Gauge, "running_requests", "Compressed requests that run now.")
        self._beyond = make(
            Gauge, "requests_beyond_stock", "Those of them that would not fit the pool without compression."
        )
        self._pool_bytes = pool_bytes
        self._ratio = make(
            Histogram,
            "resident_ratio",
            "Device bytes of a compressed request, as a share of those without compression.",
            buckets=_RATIO_BUCKETS,
        )
        self._heads = make(Counter, "heads", "Heads of compressed requests by type, static or dynamic.", ("type",))
        for kind in ("static", "dynamic"):
            self._heads.labels(**labels, type=kind)
        self._seconds = make(
            Histogram,
            "compress_seconds",
            "Time from the scores of the last layer to the compressed prompt: to plan and to compact.",
            buckets=_SECONDS_BUCKETS,
        )
        self._chosen = make(Counter, "chunks_chosen", "Chunks that queries of dynamic heads chose.")
        self._hit = make(Counter, "chunks_hit", "Chunks that were chosen and on the device already.")
        self._fetched = make(Counter, "chunk_fetch_bytes", "Bytes of chunks that were fetched from the host store.")
        self._setting = make(
            Gauge, "setting", "Settings that an operator may change, by name; 1 and 0 are true and false.", ("name",)
        )
        self._seen_chunks = (0, 0)

    def show_settings(self, settings: dict[str, Any]) -> None:
        """Settings by name, as they are now, but texts; a limit that is not set is NaN."""
        for name, value in settings.items():
            if isinstance(value, str):
                continue
            self._setting.labels(**self._labels, name=name).set(float("nan") if value is None else value)

    def count_dense(self, reason: str) -> None:
        """One more request served dense."""
        self._requests.labels(**self._labels, outcome="dense", reason=reason).inc()

    def count_compressed(self, record: RequestRecord) -> None:
        """One more request compressed."""
        self._requests.labels(**self._labels, outcome="compressed", reason="").inc()
        self._ratio.observe(record.resident_ratio)
        for kind, count in (("static", record.static_heads), ("dynamic", record.dynamic_heads)):
            self._heads.labels(**self._labels, type=kind).inc(count)

    def observe_compression(self, seconds: float) -> None:
        """A prompt was compressed; also of a request that was retracted and comes again."""
        self._seconds.observe(seconds)

    def observe_held(self, held: HeldBytes, num_running: int) -> None:
        """What compressed requests hold now."""
        for name, gauge in self._held.items():
            gauge.set(getattr(held, name))
        self._running.set(num_running)
        self._beyond.set(held.beyond_stock(num_running, self._pool_bytes))

    def observe_host_store(self, limit: int, pinned: int, reserved: int) -> None:
        """Bytes of the host store: what it may grow to, has grown to, and what prompts in prefill have reserved."""
        for gauge, num_bytes in zip(self._host_store, (limit, pinned, reserved), strict=True):
            gauge.set(num_bytes)

    def observe_chunks(self, chosen: int, hit: int) -> None:
        """The totals so far of chunks that were chosen, and of those that were on the device."""
        more_chosen, more_hit = chosen - self._seen_chunks[0], hit - self._seen_chunks[1]
        self._seen_chunks = (chosen, hit)
        self._chosen.inc(more_chosen)
        self._hit.inc(more_hit)
        self._fetched.inc((more_chosen - more_hit) * self._chunk_bytes)


class DeviceTotals:
    """A small tensor of totals, read without waiting for its device: what it was when it was last asked, or later.

    Parameters
    ----------
    totals : [n], int64, on any device; only ever grows.
    """

    def __init__(self, totals: torch.Tensor):
        self._totals = totals
        self._copy = torch.zeros_like(totals, device="cpu", pin_memory=totals.is_cuda)
        self._known = self._copy.tolist()
        self._copied: torch.cuda.Event | None = None

    def read(self) -> list[int]:
        """The totals."""
        if self._copied is None or self._copied.query():
            self._known = self._copy.tolist()
            self._copy.copy_(self._totals, non_blocking=True)
            if self._totals.is_cuda:
                self._copied = torch.cuda.Event()
                self._copied.record()
            else:
                self._known = self._copy.tolist()
        return self._known
