"""A request's settings on their way to the scheduler, and its compression record on the way back."""

from __future__ import annotations

import json
import sys
from typing import Any

from hybridkv_patches.hook import Hook
from sglang_hybridkv.requests.settings import KEY, NAME, WARM_UP, params_by_name, read_settings
from sglang_hybridkv.requests.stats import META_INFO_KEY
from sglang_hybridkv.srt.http_exchange import HEADER, current_exchange
from sglang_hybridkv.srt.refusals import SCORE_EXTRACTION, refused_request
from sglang_hybridkv.srt.settings import is_change, settings_of

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_HTTP_SERVER = "sglang.srt.entrypoints.http_server"


def add_settings(tokenized: Any, manager: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER _create_tokenized_object: ValueError, which is the client's answer, when its settings are bad.

    Some APIs drop custom_params; what stood in the body of the HTTP request goes in here.
    """
    settings = settings_of(manager.server_args)
    if settings is None:
        return
    sampling, exchange = tokenized.sampling_params, current_exchange()
    theirs = params_by_name(sampling.custom_params)
    own = {name: value for name, value in theirs.items() if name != WARM_UP}  # or a client would not be counted
    if exchange is not None and exchange.given is not None:
        # One prompt of several may have settings of its own; then a header for all is one too many.
        if exchange.is_in_header and _sets_its_own(request):
            raise ValueError(f"{NAME} is given beside the header {HEADER}; give one of them")
        own[KEY] = exchange.given  # which was checked when it arrived
    elif KEY in own:
        read_settings(own[KEY], settings.config)
    if is_warming_up(manager):
        own[WARM_UP] = True
    if own or theirs:
        sampling.custom_params = own


def _sets_its_own(request: Any) -> bool:
    """Whether a request, one prompt of several, has settings in its sampling_params."""
    sampling = getattr(request, "sampling_params", None)
    return isinstance(sampling, dict) and KEY in params_by_name(sampling.get("custom_params"))


def is_warming_up(manager: Any) -> bool:
    """Whether the HTTP server still asks itself; an Engine, which has none, never does."""
    state = getattr(sys.modules.get(_HTTP_SERVER), "_global_state", None)
    if state is None or state.tokenizer_manager is not manager:
        return False
    return manager.server_status.name == "Starting"


def note_records(original: Any, manager: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND generate_request: what the answers of an HTTP request say of their compression."""
    answers, exchange = original(manager, *args, **kwargs), current_exchange()
    if exchange is None or settings_of(manager.server_args) is None:
        return answers
    return exchange.noting(answers)


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


def refuse_score_extraction(manager: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE _validate_score_extraction, which would hint at flags that are refused; ValueError is the answer."""
    settings = settings_of(manager.server_args)
    if settings is not None:
        raise refused_request(SCORE_EXTRACTION, settings)


def refuse_internal_state(manager: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE set_internal_state: settings of the compressor are changed at a route of their own."""
    if settings_of(manager.server_args) is not None and is_change(obj.server_args):
        from fastapi import HTTPException

        raise HTTPException(400, "settings of the KV compressor are changed by PUT /kv_compressor/settings")


ENTRIES = (
    Hook(
        target="sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.set_internal_state",
        kind="before",
        function=refuse_internal_state,
        why="the message that carries settings to the schedulers is one that SGLang lets anybody write",
        until="plugins have messages of their own",
    ),
    Hook(
        target="sglang.srt.managers.tokenizer_manager_score_mixin.TokenizerManagerScoreMixin._validate_score_extraction",
        kind="before",
        function=refuse_score_extraction,
        why="SGLang's sentence asks for flags that are refused",
        until="plugins can refuse a request",
    ),
    Hook(
        target=f"{_MANAGER}._create_tokenized_object",
        kind="after",
        function=add_settings,
        why="custom_params is not checked, and several APIs drop it",
        until="every API hands custom_params on, and plugins can check a request",
    ),
    Hook(
        target=f"{_MANAGER}.generate_request",
        kind="around",
        function=note_records,
        why="chat, completions, responses and messages drop meta_info",
        until="every API hands meta_info on",
    ),
    Hook(
        target=f"{_MANAGER}.update_request_meta_info",
        kind="around",
        function=add_record,
        why="customized info accumulates lists a token; the record is one object a request",
        until="SGLang has per-request customized info",
    ),
    Hook(
        target=f"{_MANAGER}._handle_abort_req",
        kind="around",
        function=add_record_of_abort,
        why="SGLang builds the meta_info of such an answer from fields that it knows",
        until="SGLang has per-request customized info, also of requests that end in a queue",
    ),
)
