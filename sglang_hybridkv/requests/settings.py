"""Settings of requests, in ``custom_params.kv_compressor``, and those an operator changes while the server runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import ValidationError

from sglang_hybridkv.config import (
    CompressorConfig,
    Config,
    did_you_mean,
    in_json_words,
    kind_of,
    legal_values,
    not_allowed,
)

KEY = "kv_compressor"  # in a request's custom_params
NAME = f"custom_params.{KEY}"
WARM_UP = "__hybridkv_warm_up"  # in custom_params of what a server asks itself before it is ready
ENABLED = "enabled"
SETTINGS = "settings"  # of a server, where they are changed
LIMITS = ("request_override", "request_budget_min", "request_budget_max")
_OF_A_REQUEST = ("is set for the whole server only", "a request may set")
_OF_A_CHANGE = ("is set when the server starts", "what may be changed is")


@dataclasses.dataclass(frozen=True)
class RequestSettings:
    """The settings of one request.

    Attributes
    ----------
    config : the server's when its prefill began, with what the request set in place.
    given : names and values that the request set, sorted; empty when it set nothing.
    enabled : False when the request asks to be served dense.
    """

    config: CompressorConfig = dataclasses.field(hash=False)  # whose fields may be of any kind
    given: tuple[tuple[str, Any], ...] = ()
    enabled: bool = True


def params_by_name(custom_params: Any) -> dict[str, Any]:
    """A request's custom parameters; SGLang takes any JSON value there, and what is no object names none."""
    return custom_params if isinstance(custom_params, dict) else {}


def read_settings(given: Any, config: CompressorConfig, source: str = NAME) -> RequestSettings:
    """Settings of a request that has `given` in its `source`, on a server with `config`.

    Raises
    ------
    ValueError
        One sentence that names the field, the value and the legal values.
    """
    legal = (ENABLED, *config.per_request)
    if not isinstance(given, dict):
        raise ValueError(f'{source} must be an object such as {{"budget": 0.2}}, got {kind_of(given)}')
    if not config.request_override:
        raise ValueError(f"{source} is not allowed: this server has request_override = false")
    for name in given:
        if name not in legal:
            raise ValueError(_unknown(name, config, (source, *_OF_A_REQUEST), legal))
    enabled, values = given.get(ENABLED, True), {name: given[name] for name in given if name != ENABLED}
    if not isinstance(enabled, bool):
        raise ValueError(not_allowed(f"{source}.{ENABLED}", enabled, "true or false"))
    if values and not enabled:
        raise ValueError(f"{source}.{next(iter(values))} would change nothing with {ENABLED} = false; leave one out")
    own = _validated(values, config, source, lambda name: _legal(name, config))
    least, most = config.request_budget_min, config.request_budget_max
    is_low, is_high = least is not None and own.budget < least, most is not None and own.budget > most
    if "budget" in values and (is_low or is_high):
        raise ValueError(not_allowed(f"{source}.budget", values["budget"], _legal("budget", config)))
    return RequestSettings(own, tuple(sorted(given.items())), enabled)


def apply_settings(given: dict[str, Any], config: CompressorConfig) -> RequestSettings:
    """The same of a request that `read_settings` has let in, on a server whose limits may be others since then."""
    values = {name: given[name] for name in given if name != ENABLED}
    own = type(config).model_validate({**config.model_dump(), **values})
    return RequestSettings(own, tuple(sorted(given.items())), given.get(ENABLED, True))


def changeable(config: CompressorConfig) -> dict[str, Any]:
    """What an operator may change while the server runs: fields by name, as `config` has them."""
    return {name: getattr(config, name) for name in (*config.per_request, *LIMITS)}


def change_settings(given: Any, config: Config) -> Config:
    """`config` of a server with the fields of `given` in place.

    Raises
    ------
    ValueError
        One sentence that names the field, the value and the legal values.
    """
    legal = changeable(config)
    if not isinstance(given, dict) or not given:
        kind = "an empty one" if given == {} else kind_of(given)
        raise ValueError(f'{SETTINGS} must be an object such as {{"budget": 0.2}}, got {kind}')
    for name in given:
        if name not in legal:
            raise ValueError(_unknown(name, config, (SETTINGS, *_OF_A_CHANGE), legal))
    return _validated(given, config, SETTINGS, lambda name: legal_values(name, type(config)))


def _validated(values: dict[str, Any], config: Config, source: str, legal: Callable[[str], str]) -> Config:
    """`config` with `values` in place; ValueError, one sentence, if one is bad; `legal` has words for a field."""
    try:
        return type(config).model_validate({**config.model_dump(), **values})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if not first["loc"]:
            raise ValueError(f"{source}: {first['msg'].removeprefix('Value error, ')}") from None
        name = str(first["loc"][0])
        raise ValueError(not_allowed(f"{source}.{name}", values[name], legal(name))) from None


def _legal(name: str, config: CompressorConfig) -> str:
    """Legal values in words, for a budget with the limits of this server."""
    limits = {"at least": config.request_budget_min, "at most": config.request_budget_max}
    words = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)
    legal = legal_values(name, type(config))
    return f"{legal}, on this server {words}" if words and name == "budget" else legal


def _unknown(name: Any, config: CompressorConfig, words: tuple[str, str, str], legal: Iterable[str]) -> str:
    """The sentence about a field that is none, or none of the `legal` ones; `words` name its place and say why."""
    source, is_fixed, choice = words
    if name in type(config).model_fields:
        return f"{source}.{name} {is_fixed}; {choice} {', '.join(legal)}"
    hint = did_you_mean(name, legal) if isinstance(name, str) else ""
    return f"{source} has no field {in_json_words(name)}{hint}; {choice} {', '.join(legal)}"
