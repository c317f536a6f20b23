from types import SimpleNamespace

import pytest

pytest.importorskip("sglang")

from sglang_hybridkv.srt.output_streamer import HybridOutputStreamer


def test_each_request_that_is_sent_gets_its_own_record():
    """In the order of the batch: SGLang pairs them by position."""
    tree = SimpleNamespace(compression=SimpleNamespace(request_info=lambda req: {"of": req}))
    others = dict.fromkeys(("send_to_detokenizer", "server_args", "spec_algorithm", "disaggregation_mode"))
    streamer = HybridOutputStreamer(tree_cache=tree, is_generation=True, enable_hicache_storage=lambda: False, **others)
    assert streamer.has_additional_customized_info
    assert streamer.should_build_additional_customized_info()
    for reqs in (["a"], ["b", "a", "c"], []):
        assert streamer.build_additional_customized_info(reqs) == {"kv_compressor": [{"of": req} for req in reqs]}
