"""The HTTP server gets one layer more, settings of requests in, their records out, and a route for the operator."""

from __future__ import annotations

import sys
from typing import Any

from hybridkv_patches.hook import Hook
from sglang_hybridkv.srt.settings import settings_of

_MODULE = "sglang.srt.entrypoints.http_server"


def extend_app(server_args: Any, tokenizer_manager: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE _setup_and_run_http_server: our middleware goes next to the routes, behind decompression and keys."""
    if settings_of(server_args) is None:
        return
    from fastapi import HTTPException, Request
    from starlette.middleware import Middleware

    from sglang_hybridkv.srt import admin
    from sglang_hybridkv.srt.http_exchange import ExchangeMiddleware

    app = sys.modules[_MODULE].app

    async def refuse(scope: Any, sentence: str) -> Any:
        """Each API has its own form of an error; SGLang knows it."""
        return await app.exception_handlers[HTTPException](Request(scope), HTTPException(400, sentence))

    live = admin.LiveSettings(server_args, tokenizer_manager)
    admin.add_routes(app, live, server_args.admin_api_key)
    app.user_middleware.append(Middleware(ExchangeMiddleware, read_config=lambda: live.read().config, refuse=refuse))


ENTRIES = (
    Hook(
        target=f"{_MODULE}._setup_and_run_http_server",
        kind="before",
        function=extend_app,
        why="several APIs drop custom_params and meta_info, and a stream would answer a bad request with status 200",
        until="every API hands custom_params and meta_info on",
    ),
)
