"""Sends each answer's compression record along with its tokens, or with the word that there will be none."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.output_sender import SenderWrapper
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from sglang_hybridkv.requests.stats import META_INFO_KEY


class HybridOutputStreamer(SchedulerOutputStreamer):
    """Adds one entry a request to the batch output; the tokenizer manager's hook puts it into `meta_info`."""

    has_additional_customized_info: ClassVar[bool] = True

    def build_additional_customized_info(self, reqs):
        compression = self.tree_cache.compression
        return {META_INFO_KEY: [compression.request_info(req) for req in reqs]}


class HybridSender(SenderWrapper):
    """Adds the record to an AbortReq, which answers a request that ends outside of a batch.

    It has no field for more, so that the record goes along in the finish reason, as text: a value of the type that
    SGLang's encoding allows there.
    """

    def __init__(self, stock: SenderWrapper, scheduler: Any):
        super().__init__(stock.socket)
        self._scheduler = scheduler

    def send_output(self, output, recv_obj=None):
        if isinstance(output, AbortReq) and isinstance(recv_obj, Req):
            compression = self._scheduler.tree_cache.compression
            compression.record_unprefilled(recv_obj)
            record = json.dumps(compression.request_info(recv_obj))
            output.finished_reason = {**(output.finished_reason or {}), META_INFO_KEY: record}
        super().send_output(output, recv_obj)
