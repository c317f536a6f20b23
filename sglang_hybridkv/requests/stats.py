"""Proof that compression ran: counters of the server and the record of each request."""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

from sglang_hybridkv.requests.admission import EXPLANATIONS, DenseReason

logger = logging.getLogger(__name__)

META_INFO_KEY = "kv_compressor"  # of a request's record in meta_info
_LOG_INTERVAL_S = 60.0


@dataclasses.dataclass(frozen=True)
class HeldBytes:
    """Bytes that compressed requests hold now: on the device, what stock would hold there, and on the host."""

    device: int = 0
    stock: int = 0
    host: int = 0

    def __add__(self, other: HeldBytes) -> HeldBytes:
        return HeldBytes(self.device + other.device, self.stock + other.stock, self.host + other.host)

    def beyond_stock(self, num_requests: int, pool_bytes: int) -> int:
        """How many of these `num_requests`, taken as equally large, stock could not hold in `pool_bytes` at once."""
        return num_requests - num_requests * pool_bytes // self.stock if self.stock > pool_bytes else 0


@dataclasses.dataclass
class RequestRecord:
    """`meta_info.kv_compressor` of one request.

    Attributes
    ----------
    budget : that was used, or would have been: the request's own, else the server's.
    request_settings : what the request set itself, as it wrote it; None when it set nothing.
    resident_ratio : device bytes of the request's pages (kept rows, chunk buffers, summaries, rounding, dense
        tail) / bytes that stock SGLang would hold for it; 1.0 when dense.
    plan : 16 hexadecimal digits that stand for types, pages and kept tokens of all heads; None when dense. The same
        prompt has the same ones under the same settings, whatever is cached or running beside it.
    """

    compressed: bool
    reason: str | None
    prompt_tokens: int
    budget: float
    resident_ratio: float = 1.0
    host_bytes: int = 0
    static_heads: int = 0
    dynamic_heads: int = 0
    plan: str | None = None
    request_settings: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for msgpack and JSON."""
        return dataclasses.asdict(self)


class CompressionStats:
    """Totals of one scheduler process; each request counts once, also when it is retracted and prefilled again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_compressed = 0
        self.num_dense: collections.Counter[str] = collections.Counter()
        self.peak = HeldBytes()
        self._clock = clock
        self._last_logged: dict[DenseReason, float] = {}

    def count_compressed(self) -> None:
        """One more request whose prompt was compressed."""
        self.num_compressed += 1

    def count_dense(self, reason: DenseReason, prompt_len: int) -> None:
        """One more request served dense; says so in the log, at most once a minute for each reason."""
        self.num_dense[reason.value] += 1
        now = self._clock()
        if now - self._last_logged.get(reason, float("-inf")) >= _LOG_INTERVAL_S:
            self._last_logged[reason] = now
            logger.warning(
                "KV compressor: a request with %d prompt tokens is served dense, %s: %s (%d so far for this reason).",
                prompt_len,
                reason.value,
                EXPLANATIONS[reason],
                self.num_dense[reason.value],
            )

    def observe(self, held: HeldBytes) -> None:
        """Keep the moment with the most device bytes as the peak."""
        if held.stock > self.peak.stock:
            self.peak = held

    def as_dict(
        self, held: HeldBytes, chunks_chosen: int = 0, chunks_hit: int = 0, chunk_bytes: int = 0
    ) -> dict[str, Any]:
        """Counters for `/server_info`; the hit rate is None until a dynamic head has decoded.

        Parameters
        ----------
        chunks_chosen, chunks_hit : chunks that queries chose, and those of them that were resident already.
        chunk_bytes : K and V of one chunk of one head.
        """
        return {
            "compressed_requests": self.num_compressed,
            "dense_requests": dict(self.num_dense),
            "device_kv_bytes": held.device,
            "stock_kv_bytes": held.stock,
            "host_kv_bytes": held.host,
            "peak_device_kv_bytes": self.peak.device,
            "peak_stock_kv_bytes": self.peak.stock,
            "peak_host_kv_bytes": self.peak.host,
            "chunk_fetch_hit_rate": chunks_hit / chunks_chosen if chunks_chosen else None,
            "chunk_fetch_bytes": (chunks_chosen - chunks_hit) * chunk_bytes,
        }
