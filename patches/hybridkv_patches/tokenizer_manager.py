"""Put the compression record into `meta_info` as one object instead of one value a token."""

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


ENTRIES = (
    Hook(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info",
        kind="around",
        function=add_record,
        why="customized info accumulates lists a token; the record is one object a request",
        until="SGLang has per-request customized info",
    ),
)
