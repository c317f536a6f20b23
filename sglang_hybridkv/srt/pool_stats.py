"""SGLang's figures of the pool, in whose words the log line of a decode batch speaks."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.scheduler_components.pool_stats_observer import PoolStats


class HybridPoolStats(PoolStats):
    """PoolStats that knows of compressed requests."""

    compression: Any

    @classmethod
    def of(cls, stats: PoolStats, compression: Any) -> HybridPoolStats:
        """The same figures."""
        own = object.__new__(cls)
        own.__dict__.update(stats.__dict__)
        own.compression = compression
        return own

    def get_decode_usage_msg_parts(self) -> list[str]:
        """As stock, and what compression saves now; SGLang asks each time that it logs."""
        self.compression.update_metrics()
        words = f"#compressed-req: {self.compression.num_committed()}, tokens saved: {self.compression.tokens_saved()}"
        return [*super().get_decode_usage_msg_parts(), words]
