"""Settings from anywhere: whatever a flag or a request brings, it is a valid config or one sentence."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sglang_hybridkv.compressors import BUILT_IN
from sglang_hybridkv.config import CompressorConfig, parse_config
from sglang_hybridkv.requests.settings import read_settings
from tests.builders import LAWS

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([10**400, -0.0, 1e308])
ANY_JSON = st.recursive(SCALARS, lambda one: st.lists(one) | st.dictionaries(st.text(), one), max_leaves=8)
CLASSES = sorted({compressor.config_class for compressor in BUILT_IN.values()}, key=lambda one: one.__name__)
LONGEST_SENTENCE = 1000
"""Characters: a client's megabytes do not come back, and the longest list of legal values fits."""


@st.composite
def settings_of(draw: st.DrawFn, config_class: type[CompressorConfig]) -> dict[str, object]:
    """An object with known fields and others, with legal values and any others."""
    fields = st.sampled_from(sorted(config_class.model_fields)) | st.text()
    legal = st.sampled_from(list(config_class.defaults().values()))
    return draw(st.dictionaries(fields, ANY_JSON | legal, max_size=4))


def check_sentence(error: ValueError, named: object) -> None:
    sentence = str(error)
    assert len(sentence.splitlines()) == 1
    assert len(sentence) <= LONGEST_SENTENCE
    if isinstance(named, dict) and named and all(name.isidentifier() for name in named):
        assert any(name[:50] in sentence for name in named) or "--kv-compressor-config" in sentence


@pytest.mark.parametrize("config_class", CLASSES, ids=lambda one: one.__name__)
@LAWS
@given(st.data())
def test_any_settings_are_a_config_or_one_sentence(config_class, data):
    values = data.draw(settings_of(config_class))
    try:
        config = parse_config(values, config_class)
    except ValueError as error:
        check_sentence(error, values)
    else:
        assert parse_config(json.dumps(config.model_dump()), config_class) == config


@LAWS
@given(st.text() | ANY_JSON.map(json.dumps) | st.tuples(st.sampled_from("{@"), st.text()).map("".join))
@example("[" * 100_000)
@example("@a\0b")
@example("a" * 300)
def test_any_text_is_a_config_or_one_sentence(text):
    try:
        parse_config(text, CLASSES[0])
    except ValueError as error:
        check_sentence(error, None)


@LAWS
@given(st.data())
def test_any_settings_of_a_request_are_settings_or_one_sentence(data):
    config_class = data.draw(st.sampled_from([one for one in CLASSES if not one.model_fields["budget"].is_required()]))
    server = config_class(**({"calibration": "scores.json"} if "calibration" in config_class.model_fields else {}))
    own = st.fixed_dictionaries({}, optional=dict.fromkeys((*server.per_request, "enabled", "bugdet"), ANY_JSON))
    given_settings = data.draw(own | ANY_JSON)
    try:
        settings = read_settings(given_settings, server)
    except ValueError as error:
        check_sentence(error, given_settings)
    else:
        assert dict(settings.given) == given_settings
