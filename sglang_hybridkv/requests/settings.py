"""What a request sets for itself, in ``custom_params.kv_compressor``, over the settings of its server."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import ValidationError

from sglang_hybridkv.config import CompressorConfig, did_you_mean, in_json_words, kind_of, legal_values, not_allowed

KEY = "kv_compressor"  # in a request's custom_params
NAME = f"custom_params.{KEY}"
WARM_UP = "__hybridkv_warm_up"  # in custom_params of what a server asks itself before it is ready
ENABLED = "enabled"


@dataclasses.dataclass(frozen=True)
class RequestSettings:
    """The settings of one request; on one server, equal when the requests set the same.

    Attributes
    ----------
    config : the server's, with what the request set in place.
    given : names and values that the request set, sorted; empty when it set nothing.
    enabled : False when the request asks to be served dense.
    """

    config: CompressorConfig = dataclasses.field(compare=False)
    given: tuple[tuple[str, Any], ...] = ()
    enabled: bool = True


def params_by_name(custom_params: Any) -> dict[str, Any]:
    """A request's custom parameters; SGLang takes any JSON value there, and what is no object names none."""
    return custom_params if isinstance(custom_params, dict) else {}


def read_settings(given: Any, config: CompressorConfig) -> RequestSettings:
    """Settings of a request that has `given` under `KEY` in its custom_params, on a server with `config`.

    Raises
    ------
    ValueError
        One sentence that names the field, the value and the legal values.
    """
    legal = (ENABLED, *config.per_request)
    if not isinstance(given, dict):
        raise ValueError(f'{NAME} must be an object such as {{"budget": 0.2}}, got {kind_of(given)}')
    if not config.request_override:
        raise ValueError(f"{NAME} is not allowed: this server has request_override = false")
    for name in given:
        if name not in legal:
            raise ValueError(_unknown(name, legal, config))
    enabled, values = given.get(ENABLED, True), {name: given[name] for name in given if name != ENABLED}
    if not isinstance(enabled, bool):
        raise ValueError(not_allowed(f"{NAME}.{ENABLED}", enabled, "true or false"))
    if values and not enabled:
        raise ValueError(f"{NAME}.{next(iter(values))} would change nothing with {ENABLED} = false; leave one out")
    try:
        own = type(config).model_validate({**config.model_dump(), **values})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if not first["loc"]:
            raise ValueError(f"{NAME}: {first['msg'].removeprefix('Value error, ')}") from None
        name = str(first["loc"][0])
        raise ValueError(not_allowed(f"{NAME}.{name}", values[name], _legal(name, config))) from None
    least, most = config.request_budget_min, config.request_budget_max
    is_low, is_high = least is not None and own.budget < least, most is not None and own.budget > most
    if "budget" in values and (is_low or is_high):
        raise ValueError(not_allowed(f"{NAME}.budget", values["budget"], _legal("budget", config)))
    return RequestSettings(own, tuple(sorted(given.items())), enabled)


def _legal(name: str, config: CompressorConfig) -> str:
    """Legal values in words, for a budget with the limits of this server."""
    limits = {"at least": config.request_budget_min, "at most": config.request_budget_max}
    words = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)
    legal = legal_values(name, type(config))
    return f"{legal}, on this server {words}" if words and name == "budget" else legal


def _unknown(name: Any, legal: tuple[str, ...], config: CompressorConfig) -> str:
    if name in type(config).model_fields:
        return f"{NAME}.{name} is set for the whole server only; a request may set {', '.join(legal)}"
    hint = did_you_mean(name, legal) if isinstance(name, str) else ""
    return f"{NAME} has no field {in_json_words(name)}{hint}; a request may set {', '.join(legal)}"
