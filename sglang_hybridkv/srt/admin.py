"""Settings that an operator changes while the server runs, behind SGLang's admin key: GET and PUT of PATH.

A change rides to the scheduler in SGLang's own message for such things, in order with the requests. Every rank gets it
at the same point.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from sglang.srt.managers.io_struct import SetInternalStateReq
from sglang.srt.utils.auth import AuthLevel, auth_level

from sglang_hybridkv.config import load_json, unique_keys
from sglang_hybridkv.requests.settings import SETTINGS, change_settings, changeable
from sglang_hybridkv.srt import settings as settings_module

PATH = "/kv_compressor/settings"
_MOST_BYTES = 4096  # of a body


def read_body(body: bytes) -> Any:
    """The JSON value of a request's body; ValueError, one sentence, when it is none or too large."""
    if len(body) > _MOST_BYTES:
        raise ValueError(f"the body has {len(body)} bytes; legal: at most {_MOST_BYTES}")
    try:
        return load_json(body, unique_keys)
    except RecursionError:
        raise ValueError("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f'the body is not valid JSON ({error}); expected an object such as {{"budget": 0.2}}'
        ) from None
    except UnicodeDecodeError:
        raise ValueError("the body is not valid JSON: it is not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{SETTINGS} {error}; give it once") from None


class LiveSettings:
    """The settings as the HTTP server's process knows them; what reads them of `server_args` sees each change.

    Parameters
    ----------
    server_args : of this process; they carry the settings.
    manager : SGLang's tokenizer manager.
    """

    def __init__(self, server_args: Any, manager: Any):
        self._server_args, self._manager = server_args, manager
        self._lock = asyncio.Lock()

    def read(self) -> settings_module.Settings:
        """As they are now."""
        settings = settings_module.settings_of(self._server_args)
        assert settings is not None, "compression is on"
        return settings

    def show(self) -> dict[str, Any]:
        """Name of the compressor, and what may be changed, as it is."""
        settings = self.read()
        return {"name": settings.name, "settings": changeable(settings.config)}

    async def change(self, given: Any) -> dict[str, Any]:
        """Have the schedulers change what is `given`, then show it; ValueError, one sentence, when it is bad."""
        # A client that leaves must not part what the schedulers know from what this process knows.
        return await asyncio.shield(self._change(given))

    async def _change(self, given: Any) -> dict[str, Any]:
        async with self._lock:
            settings = self.read()
            config = change_settings(given, settings.config)
            self._manager.auto_create_handle_loop()
            message = SetInternalStateReq(server_args=settings_module.encode_change(given))
            answers = await self._manager.set_internal_state_communicator(message)
            if not all(answer.updated for answer in answers):
                raise RuntimeError("a scheduler has not changed its settings; its log says why")
            changed = settings_module.Settings(settings.name, config)
            for server_args in (self._server_args, self._manager.server_args):
                settings_module.stash(server_args, changed)
            return self.show()


def add_routes(app: FastAPI, live: LiveSettings, admin_key: str | None) -> None:
    """Give the HTTP server's `app` the two routes; on a server without an admin key they are refused."""

    def check_key(request: Request) -> None:
        if not admin_key:
            raise HTTPException(400, f"{PATH} needs an admin key, and this server runs without --admin-api-key")
        # SGLang's middleware has asked for it, where it took this path for what it is.
        given = request.headers.get("authorization", "")
        if not secrets.compare_digest(given.encode(), f"Bearer {admin_key}".encode()):
            raise HTTPException(401, "Unauthorized")

    @app.get(PATH)
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def show_settings(request: Request) -> dict[str, Any]:
        check_key(request)
        return live.show()

    @app.put(PATH)
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def put_settings(request: Request) -> dict[str, Any]:
        check_key(request)
        try:
            return await live.change(read_body(await request.body()))
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
