"""Sends each answer's compression record along with its tokens."""

from __future__ import annotations

from typing import ClassVar

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from sglang_hybridkv.requests.stats import META_INFO_KEY


class HybridOutputStreamer(SchedulerOutputStreamer):
    """Adds one entry a request to the batch output; the tokenizer manager's hook puts it into `meta_info`."""

    has_additional_customized_info: ClassVar[bool] = True

    def build_additional_customized_info(self, reqs):
        compression = self.tree_cache.compression
        return {META_INFO_KEY: [compression.request_info(req) for req in reqs]}
