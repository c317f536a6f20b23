"""``hybridkv config explain``: the fields of a compressor in words."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator

from sglang_hybridkv.compressors import get_compressor
from sglang_hybridkv.config import CompressorConfig, did_you_mean, legal_values

_WIDTH = 100


def explain(name: str, field: str | None) -> Iterator[str]:
    """Lines about one field, or all fields, of the compressor `name`; ValueError when there is no such thing."""
    config_class = get_compressor(name).config_class
    fields = config_class.model_fields
    if field is not None and field not in fields:
        raise ValueError(f"{name} has no field {field!r}{did_you_mean(field, fields)}; its fields: {', '.join(fields)}")
    for one in fields if field is None else (field,):
        yield from _about(one, config_class)


def _about(field: str, config_class: type[CompressorConfig]) -> Iterator[str]:
    defaults = config_class.defaults()
    default = f"default {json.dumps(defaults[field])}" if field in defaults else "required"
    by_request = "; a request may set it" if field in config_class.per_request else ""
    text = (
        f"{legal_values(field, config_class)}; {default}{by_request}. {config_class.model_fields[field].description}."
    )
    yield field
    yield from textwrap.wrap(text, _WIDTH, initial_indent="    ", subsequent_indent="    ")
