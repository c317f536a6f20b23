import json
from array import array
from types import SimpleNamespace

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import AbortReq, FlushCacheReqOutput
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_hybridkv.srt.output_streamer import HybridOutputStreamer, HybridSender


def test_each_request_that_is_sent_gets_its_own_record():
    """In the order of the batch: SGLang pairs them by position."""
    tree = SimpleNamespace(compression=SimpleNamespace(request_info=lambda req: {"of": req}))
    others = dict.fromkeys(("send_to_detokenizer", "server_args", "spec_algorithm", "disaggregation_mode"))
    streamer = HybridOutputStreamer(tree_cache=tree, is_generation=True, enable_hicache_storage=lambda: False, **others)
    assert streamer.has_additional_customized_info
    assert streamer.should_build_additional_customized_info()
    for reqs in (["a"], ["b", "a", "c"], []):
        assert streamer.build_additional_customized_info(reqs) == {"kv_compressor": [{"of": req} for req in reqs]}


@pytest.mark.parametrize("reason", [None, {"type": "abort", "status_code": 503, "message": "full"}])
@pytest.mark.parametrize("pickles", [True, False])
def test_an_abort_carries_the_record_of_its_request_through_both_encodings(monkeypatch, reason, pickles):
    monkeypatch.setattr(io_struct, "_USE_PICKLE_IPC", pickles)
    sent, recorded = [], []
    compression = SimpleNamespace(record_unprefilled=recorded.append, request_info=lambda req: {"of": req.rid})
    scheduler = SimpleNamespace(tree_cache=SimpleNamespace(compression=compression))
    socket = SimpleNamespace(
        send=lambda data, flags: sent.append(io_struct.msgpack_decode(data)),
        send_pyobj=lambda output, flags, protocol: sent.append(output),
    )
    sender = HybridSender(SimpleNamespace(socket=socket), scheduler)
    req = Req("a", "", array("q", [1]), SamplingParams(), vocab_size=8)
    sender.send_output(AbortReq(rid="a", finished_reason=reason), req)
    sender.send_output(FlushCacheReqOutput(success=True, message=""), None)
    assert recorded == [req]
    received, other = sent
    assert json.loads(received.finished_reason.pop("kv_compressor")) == {"of": "a"}
    assert received.finished_reason == (reason or {})
    assert other == FlushCacheReqOutput(success=True, message="")
    assert reason is None or "kv_compressor" not in reason, "the reason is also the caller's"
