import json
from types import SimpleNamespace

import pytest
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.server_args import ServerArgs

from hybridkv_patches import tokenizer_manager
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from sglang_hybridkv.requests.settings import WARM_UP
from sglang_hybridkv.requests.stats import META_INFO_KEY
from sglang_hybridkv.srt import http_exchange, settings
from sglang_hybridkv.srt.settings import Settings

STOCK = TokenizerManager.update_request_meta_info


@pytest.fixture
def manager():
    made = object.__new__(TokenizerManager)
    made.server_args = ServerArgs(model_path="m")
    return made


def make_state():
    """SGLang's ReqState, as far as its meta_info reads it; the second field came with 0.5.23."""
    return SimpleNamespace(customized_info_accumulated={}, customized_info_reported_keys=set())


@pytest.mark.parametrize("others", [{}, {"spoken": [[1], [2, 3]]}])
def test_the_record_is_one_object_that_the_last_chunk_replaces(manager, others):
    """What else is sent a token accumulates over the chunks of a stream, as ever."""
    settings.stash(manager.server_args, Settings("hybridkv", HybridKVConfig()))
    state, meta_info = make_state(), {}
    for chunk in ("first", "last"):
        sent = {META_INFO_KEY: [{"of": "another"}, {"of": chunk}], **others}
        meta_info = {}
        tokenizer_manager.add_record(STOCK, manager, meta_info, state, sent, 1, None)
        assert set(sent) == {META_INFO_KEY, *others}
    assert meta_info == {META_INFO_KEY: {"of": "last"}} | {name: values[1] * 2 for name, values in others.items()}


def test_without_compression_the_key_is_like_any_other(manager):
    state, meta_info = make_state(), {}
    tokenizer_manager.add_record(STOCK, manager, meta_info, state, {META_INFO_KEY: [["theirs"]]}, 0, None)
    assert meta_info == {META_INFO_KEY: ["theirs"]}


def tokenized(custom_params=None):
    return SimpleNamespace(sampling_params=SimpleNamespace(custom_params=custom_params))


def test_settings_are_checked_whoever_asks(manager):
    """An Engine has no HTTP; --preferred-sampling-params come in here, too."""
    settings.stash(manager.server_args, Settings("hybridkv", HybridKVConfig()))
    good = tokenized({"kv_compressor": {"budget": 0.2}, "thinking_budget": 7})
    tokenizer_manager.add_settings(good, manager, None)
    assert good.sampling_params.custom_params == {"kv_compressor": {"budget": 0.2}, "thinking_budget": 7}
    with pytest.raises(ValueError, match=r"budget = 2 is not allowed"):
        tokenizer_manager.add_settings(tokenized({"kv_compressor": {"budget": 2}}), manager, None)
    plain = tokenized()
    tokenizer_manager.add_settings(plain, manager, None)
    assert plain.sampling_params.custom_params is None


def test_a_client_cannot_pass_for_a_warm_up(manager):
    settings.stash(manager.server_args, Settings("hybridkv", HybridKVConfig()))
    marked = tokenized({WARM_UP: True, "thinking_budget": 7})
    tokenizer_manager.add_settings(marked, manager, None)
    assert marked.sampling_params.custom_params == {"thinking_budget": 7}


def test_without_compression_custom_params_are_nobodys_business(manager):
    theirs = tokenized({"kv_compressor": {"budget": 2}})
    tokenizer_manager.add_settings(theirs, manager, None)
    assert theirs.sampling_params.custom_params == {"kv_compressor": {"budget": 2}}


@pytest.mark.parametrize("reason", [None, {"type": "abort", "status_code": 503, "message": "full"}])
@pytest.mark.parametrize("compressing", [True, False])
def test_the_record_of_an_abort_goes_to_meta_info_and_leaves_the_reason_as_it_was(manager, reason, compressing):
    if compressing:
        settings.stash(manager.server_args, Settings("hybridkv", HybridKVConfig()))
    state = SimpleNamespace(out_list=[])
    manager.rid_to_state = {"a": state}

    def stock(manager, recv_obj):
        del manager.rid_to_state[recv_obj.rid]
        state.out_list.append({"meta_info": {"finish_reason": recv_obj.finished_reason}})

    sent = {**(reason or {}), META_INFO_KEY: json.dumps({"reason": "not_prefilled"})} if compressing else reason
    tokenizer_manager.add_record_of_abort(stock, manager, AbortReq(rid="a", finished_reason=sent))
    record = {META_INFO_KEY: {"reason": "not_prefilled"}} if compressing else {}
    assert state.out_list == [{"meta_info": {"finish_reason": reason} | record}]


def test_an_abort_of_a_request_that_is_gone_is_stock_s(manager):
    settings.stash(manager.server_args, Settings("hybridkv", HybridKVConfig()))
    manager.rid_to_state, seen = {}, []
    sent = AbortReq(rid="a", finished_reason={META_INFO_KEY: "{}"})
    tokenizer_manager.add_record_of_abort(lambda manager, recv_obj: seen.append(recv_obj), manager, sent)
    assert [one.finished_reason for one in seen] == [None]


def test_score_extraction_is_refused_by_name(manager):
    assert tokenizer_manager.refuse_score_extraction(manager, True, False) is None
    settings.stash(manager.server_args, Settings("hybridkv", HybridKVConfig()))
    with pytest.raises(ValueError, match="^score_extraction_token is not served with --kv-compressor hybridkv; "):
        tokenizer_manager.refuse_score_extraction(manager, True, False)


@pytest.mark.parametrize(
    ("own", "is_in_header", "found"),
    [
        ({}, False, {"budget": 0.2}),
        ({}, True, {"budget": 0.2}),  # beside --preferred-sampling-params, which are not the request's
        ({"kv_compressor": {"budget": 0.2}}, False, {"budget": 0.2}),
        ({"kv_compressor": {"budget": 0.3}}, True, None),
    ],
)
def test_a_requests_own_settings_win_over_preferred_ones(manager, own, is_in_header, found):
    settings.stash(manager.server_args, Settings("hybridkv", HybridKVConfig()))
    exchange = http_exchange.HttpExchange({"budget": 0.2})
    exchange.is_in_header = is_in_header
    merged = tokenized({"kv_compressor": {"budget": 0.3}})  # as SGLang merges them
    token = http_exchange._current.set(exchange)
    try:
        request = SimpleNamespace(sampling_params={"custom_params": own})
        if found is None:
            with pytest.raises(ValueError, match="is given beside the header x-kv-compressor"):
                tokenizer_manager.add_settings(merged, manager, request)
        else:
            tokenizer_manager.add_settings(merged, manager, request)
            assert merged.sampling_params.custom_params == {"kv_compressor": found}
    finally:
        http_exchange._current.reset(token)
