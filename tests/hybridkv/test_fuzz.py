"""Whatever stands in a configuration or in a request gives settings or one sentence, and nothing else."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sglang")

from sglang_hybridkv.compressors import BUILT_IN
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from sglang_hybridkv.config import BUDGET_FLAG, CONFIG_FLAG, parse_config
from sglang_hybridkv.requests.settings import NAME, read_settings
from sglang_hybridkv.srt.http_exchange import settings_in_body
from tests.builders import LAWS

FUZZ = settings(LAWS, max_examples=int(os.environ.get("HYBRIDKV_EXAMPLES", 80)))  # of each kind
LIMITED = HybridKVConfig(request_budget_min=0.2, request_budget_max=0.5)
FIELDS = sorted({name for compressor in BUILT_IN.values() for name in compressor.config_class.model_fields})
PREFIXES = (BUDGET_FLAG, CONFIG_FLAG, NAME, "kv_compressor belongs")
LONGEST_SENTENCE = 1200  # characters; a configuration names all known fields
DEEP = 100_000

texts = st.text(st.characters(exclude_categories=()), max_size=20)
numbers = st.one_of(
    st.integers(-10, 80),
    st.floats(),
    st.sampled_from([2**31 - 1, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, 5e-324, -0.0]),
)
words = texts | st.sampled_from(["50%", "9" * 400 + "GiB", "9" * 60 + "TiB", "1..5%", "x" * 300, "x" * 2000, "\0", ""])
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(st.sampled_from(FIELDS) | texts, values, max_size=4)
asked = st.dictionaries(st.sampled_from(["enabled", *HybridKVConfig.per_request]) | texts, values, max_size=3)


def settings_or_a_sentence(parse, *args, **kwargs):
    """The settings, or None where they are refused."""
    try:
        return parse(*args, **kwargs)
    except ValueError as error:
        caught = error
    sentence = str(caught)
    assert type(caught) is ValueError
    assert sentence.startswith(PREFIXES), sentence
    assert "\n" not in sentence
    assert len(sentence) < LONGEST_SENTENCE
    sentence.encode()  # it goes to a log, or into an answer
    return None


def body_of(given):
    return json.dumps({"custom_params": {"kv_compressor": given}}).encode()


@FUZZ
@given(objects, st.sampled_from(sorted(BUILT_IN)), st.none() | values)
def test_a_configuration(given, name, budget):
    config_class = BUILT_IN[name].config_class
    config = settings_or_a_sentence(parse_config, given, config_class, budget=budget)
    assert config is None or config == config_class.model_validate_json(config.model_dump_json())
    assert settings_or_a_sentence(parse_config, json.dumps(given), config_class, budget=budget) == config


@FUZZ
@given(st.sampled_from(["", "@", "{", '{"budget": ']), words | values | st.binary())
def test_a_configuration_that_is_no_object(start, rest):
    given = start + rest if isinstance(rest, str) else rest
    if not isinstance(given, dict):
        settings_or_a_sentence(parse_config, given, HybridKVConfig)


@FUZZ
@given(asked | values, st.sampled_from([HybridKVConfig(), LIMITED]))
def test_a_request(given, config):
    own = settings_or_a_sentence(read_settings, given, config)
    if own is not None:
        assert (own.config.request_budget_min or 0) <= own.config.budget <= (own.config.request_budget_max or 1) or (
            "budget" not in given
        )
        hash(own)  # it is a key of what is remembered
    assert (settings_or_a_sentence(settings_in_body, body_of(given), config) is None) == (own is None)


@pytest.mark.parametrize("shape", ["[%s]", '{"budget": %s}', '{"a": %s}'])
@pytest.mark.parametrize("inner", ["[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "9" * 5000])
def test_what_python_does_not_read(shape, inner):
    """Nesting beyond its stack, and integers of too many digits."""
    text = shape % inner
    assert settings_or_a_sentence(parse_config, text, HybridKVConfig) is None
    body = f'{{"custom_params": {{"kv_compressor": {text}}}}}'.encode()
    with pytest.raises(ValueError, match=f"^{NAME}"):
        settings_in_body(body, HybridKVConfig())


def test_an_integer_that_python_does_not_write():
    for parse in (parse_config, lambda given, _: read_settings(given, LIMITED)):
        assert settings_or_a_sentence(parse, {"budget": 10**5000}, HybridKVConfig) is None
        assert settings_or_a_sentence(parse, {10**5000: 1}, HybridKVConfig) is None


@pytest.mark.parametrize(
    "given",
    ['{"%s": 1}' % ("x" * 2**20), '{"budget": "%s"}' % ("9" * 2**20), '{"budget": [%s1]}' % ("0, " * 2**18)],
    ids=["name", "text", "list"],
)
def test_a_megabyte_is_refused_shortly(given):
    with pytest.raises(ValueError, match=f"^{NAME}") as caught:
        settings_in_body(f'{{"custom_params": {{"kv_compressor": {given}}}}}'.encode(), HybridKVConfig())
    assert len(str(caught.value)) < LONGEST_SENTENCE


def test_an_object_of_many_keys_is_read_in_time():
    """It holds up the server's one event loop; with a test of each key against all it was an hour, beyond any limit."""
    keys = ",".join(f'"k{number}": 1' for number in range(200_000))
    settings_in_body(f'{{"custom_params": {{"kv_compressor": {{}}}}, "x": {{{keys}, "k1": 2}}}}'.encode(), LIMITED)
