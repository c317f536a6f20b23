"""Answers of the OpenAI APIs carry the record in their `metadata`."""

from __future__ import annotations

import json
from typing import Any

from hybridkv_patches.hook import Hook
from sglang_hybridkv.requests.stats import META_INFO_KEY
from sglang_hybridkv.srt.http_exchange import current_exchange


def add_to_metadata(metadata: dict[str, Any], meta_info: dict[str, Any]) -> dict[str, Any] | None:
    """AFTER build_endpoint_weight_version_metadata, of chat and completions: the record of the first choice."""
    if META_INFO_KEY not in meta_info:
        return None
    return {**metadata, META_INFO_KEY: meta_info[META_INFO_KEY]}


def add_to_response(response: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ResponsesResponse.from_request: the final one, streamed or not, has a record.

    In the Responses API values of metadata are texts, and its events check that.
    """
    exchange = current_exchange()
    if exchange is not None and exchange.record is not None:
        response.metadata = {**(response.metadata or {}), META_INFO_KEY: json.dumps(exchange.record)}


ENTRIES = (
    Hook(
        target="sglang.srt.utils.weight_versions.build_endpoint_weight_version_metadata",
        kind="after",
        function=add_to_metadata,
        why="chat and completions drop meta_info unless return_meta_info is set",
        until="every API hands meta_info on",
    ),
    Hook(
        target="sglang.srt.entrypoints.openai.protocol.ResponsesResponse.from_request",
        kind="after",
        function=add_to_response,
        why="/v1/responses drops meta_info",
        until="every API hands meta_info on",
    ),
)
