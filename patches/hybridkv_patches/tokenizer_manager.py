"""Put the compression record into `meta_info` as one object instead of one value a token."""

import json

from hybridkv_patches.hook import Hook
from sglang_hybridkv.requests.stats import META_INFO_KEY
from sglang_hybridkv.srt.settings import settings_of


def add_record(original, manager, meta_info, state, customized_info, index, finish_reason):
    """AROUND update_request_meta_info: SGLang concatenates lists, one element a token."""
    if settings_of(manager.server_args) is None or META_INFO_KEY not in customized_info:
        return original(manager, meta_info, state, customized_info, index, finish_reason)
    meta_info[META_INFO_KEY] = customized_info[META_INFO_KEY][index]
    rest = {key: values for key, values in customized_info.items() if key != META_INFO_KEY}
    return original(manager, meta_info, state, rest, index, finish_reason)


def add_record_of_abort(original, manager, recv_obj):
    """AROUND _handle_abort_req: the record came in the finish reason, as text."""
    reason = recv_obj.finished_reason or {}
    if settings_of(manager.server_args) is None or META_INFO_KEY not in reason:
        return original(manager, recv_obj)
    record = json.loads(reason[META_INFO_KEY])
    recv_obj.finished_reason = {key: value for key, value in reason.items() if key != META_INFO_KEY} or None
    state = manager.rid_to_state.get(recv_obj.rid)
    original(manager, recv_obj)
    if state is not None:
        state.out_list[-1]["meta_info"][META_INFO_KEY] = record


_TOKENIZER_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"

ENTRIES = (
    Hook(
        target=f"{_TOKENIZER_MANAGER}.update_request_meta_info",
        kind="around",
        function=add_record,
        why="customized info accumulates lists a token; the record is one object a request",
        until="SGLang has per-request customized info",
    ),
    Hook(
        target=f"{_TOKENIZER_MANAGER}._handle_abort_req",
        kind="around",
        function=add_record_of_abort,
        why="SGLang builds the meta_info of such an answer from fields that it knows",
        until="SGLang has per-request customized info, also of requests that end in a queue",
    ),
)
