import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hybridkv import config as config_module
from sglang_hybridkv.compressors import BUILT_IN, get_compressor
from sglang_hybridkv.compressors.hybridkv import PRESETS, HybridKVConfig
from sglang_hybridkv.config import BUDGET_FLAG, CONFIG_FLAG, CompressorConfig, legal_values
from tests.builders import LAWS


def parse_config(text, *, budget=None):
    return config_module.parse_config(text, HybridKVConfig, budget=budget)


def test_no_values_mean_the_defaults():
    assert parse_config(None) == parse_config({}) == parse_config("{}") == HybridKVConfig()


def test_text_dict_and_file_say_the_same(tmp_path):
    values = {"budget": 0.25, "page_size": 32, "host_store_bytes": 1 << 20}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert parse_config(values) == parse_config(json.dumps(values)) == parse_config(f"@{path}")


def test_config_is_frozen():
    with pytest.raises(ValueError):
        HybridKVConfig().budget = 0.5


@LAWS
@given(st.floats(allow_nan=True, allow_infinity=True))
def test_budget_is_legal_exactly_in_its_range(budget):
    if not math.isnan(budget) and 0 < budget <= 1:
        assert parse_config(None, budget=budget).budget == budget
    else:
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            parse_config(None, budget=budget)


BAD_BUDGETS = [0, -1, 1.5, "x", math.nan]


@pytest.mark.parametrize(
    ("flag", "field", "budget"),
    [
        *((CONFIG_FLAG, " budget", budget) for budget in [*BAD_BUDGETS, True, None, [0.1]]),
        *((BUDGET_FLAG, "", budget) for budget in BAD_BUDGETS),
    ],
)
def test_a_bad_budget_is_named(flag, field, budget):
    with pytest.raises(ValueError) as caught:
        parse_config({"budget": budget} if field else None, budget=None if field else budget)
    words = {True: "true", None: "null"}.get(budget, repr(budget)) if isinstance(budget, bool | None) else repr(budget)
    complaint = f"= {words} is not allowed; legal: a number above 0 and at most 1"
    assert str(caught.value) == f"{flag}{field} {complaint}"


def test_an_integer_budget_is_a_number():
    budget = parse_config(None, budget=1).budget
    assert budget == 1.0
    assert isinstance(budget, float)


def test_both_budgets_must_agree():
    assert parse_config({"budget": 0.5}, budget=0.5).budget == 0.5
    with pytest.raises(ValueError, match=f"{BUDGET_FLAG} 0.4 and budget 0.5 of {CONFIG_FLAG} differ"):
        parse_config({"budget": 0.5}, budget=0.4)
    with pytest.raises(ValueError, match=f"{CONFIG_FLAG} budget = true is not allowed"):
        parse_config({"budget": True}, budget=1.0)


@pytest.mark.parametrize(
    "values, legal",
    [
        ({"page_size": 12}, "one of 8, 16, 32, 64"),
        (
            {"statistic": "entropy"},
            'one of "sparsity", "top_mass", "hit_cv", "stability", "capture", "worst_capture", "worst_capture+hit_cv"',
        ),
        ({"chunk_size": 3}, "one of 1, 2, 4, 8, 16, 32, 64 or null"),
        ({"preset": "best"}, 'one of "tuned", "paper"'),
        ({"theta": 2}, "a number at least 0 and at most 1.01"),
        ({"sparsity_fraction": 0}, "a number above 0 and below 1"),
        ({"min_prompt_tokens": "5"}, "an integer at least 1 and at most 2147483647"),
        ({"recent_window": 2.5}, "an integer at least 0 and at most 1024"),
        ({"host_store_bytes": -1}, "an integer at least 0 or null"),
        ({"observation_rows": 257}, "an integer at least 1 and at most 256"),
    ],
)
def test_bad_value_is_answered_with_the_legal_ones(values, legal):
    with pytest.raises(ValueError) as caught:
        parse_config(values)
    assert str(caught.value).endswith(f"legal: {legal}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"page_size": 8, "chunk_size": 16}, "expected a divisor of the page size 8, got 16"),
        ({"chunk_score": "mean2_max", "chunk_size": 1}, "expected at least 4 for mean2_max, whose .*, got 1"),
        (
            {"chunk_score": "mean_max", "unretrieved": "estimate", "chunk_size": 4},
            "expected 8, the page size, where chunks are estimated, got 4",
        ),
    ],
)
def test_chunks_fill_pages(values, complaint):
    with pytest.raises(ValueError, match=f"chunk_size = {values['chunk_size']} is not allowed with .*: {complaint}"):
        parse_config(values)


def test_single_tokens_are_retrieved_by_codes_and_pages_otherwise():
    assert parse_config(None).tokens_per_chunk == 1
    assert parse_config({"chunk_score": "mean_max"}).tokens_per_chunk == 8
    assert parse_config({"preset": "paper"}).tokens_per_chunk == 16


def test_unknown_key_is_answered_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"has no field 'bugdet' \(did you mean 'budget'\?\); known fields: budget, page_size, "
    ):
        parse_config({"bugdet": 0.1})


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("{", "is not valid JSON"),
        ("0.1", "must be a JSON object, got a number"),
        ("[1]", "must be a JSON object, got a list"),
        ("null", "must be a JSON object, got null"),
        ('{"budget": 0.1, "budget": 0.2}', "gives 'budget' twice; give it once"),
        ("good.json", "to read a file, write @good.json"),
        ("@/no/such/file", "file '/no/such/file' cannot be read: No such file"),
        ("@/", "file '/' cannot be read: Is a directory"),
        (7, "must be a JSON object, @file or a dict, got a number"),
    ],
)
def test_unreadable_config_is_one_sentence(text, complaint):
    with pytest.raises(ValueError) as caught:
        parse_config(text)
    assert complaint in str(caught.value)
    assert CONFIG_FLAG in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"budget": 0.5}', encoding="utf-8-sig")
    assert parse_config(f"@{path}").budget == 0.5
    assert parse_config(path.read_text()).budget == 0.5


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"host_store_bytes": "4GB"}, "4GB is written 4000000000"),
        ({"host_store_bytes": "1.5 GiB"}, "1.5 GiB is written 1610612736"),
        ({"budget": "10%"}, "10 % is written 0.1"),
    ],
)
def test_a_text_with_a_unit_is_answered_with_the_number(values, hint):
    with pytest.raises(ValueError, match="is not allowed; legal: ") as caught:
        parse_config(values)
    assert str(caught.value).endswith(f"; {hint}")


def test_limits_of_requests_must_leave_a_budget():
    with pytest.raises(ValueError, match="request_budget_min = 0.5 is not allowed with request_budget_max = 0.2"):
        parse_config({"request_budget_min": 0.5, "request_budget_max": 0.2})


def test_file_that_is_not_text_is_one_sentence(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        parse_config(f"@{path}")


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_field_has_a_description_and_legal_values(name):
    config_class = get_compressor(name).config_class
    for field in config_class.model_fields:
        assert config_class.model_fields[field].description
        assert legal_values(field, config_class)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", BUILT_IN)
def test_true_and_false_are_no_numbers(name, value):
    config_class = get_compressor(name).config_class
    required = {"calibration": "x"} if "calibration" in config_class.model_fields else {}
    for field in config_class.model_fields.keys() - {"request_override", "unverified_model"}:
        with pytest.raises(ValueError) as caught:
            config_module.parse_config(required | {field: value}, config_class)
        complaint = f"{field} = {json.dumps(value)} is not allowed; legal: {legal_values(field, config_class)}"
        assert str(caught.value) == f"{CONFIG_FLAG} {complaint}"


def test_a_field_of_an_own_method_may_be_true_or_false():
    class OwnConfig(CompressorConfig):
        fast: bool | None = None

    assert config_module.parse_config('{"fast": true}', OwnConfig).fast is True


def test_a_preset_fills_what_the_user_leaves_open():
    for preset, values in PRESETS.items():
        config = HybridKVConfig(preset=preset)
        assert {name: getattr(config, name) for name in values} == values
        assert HybridKVConfig(preset=preset, theta=0.123).theta == 0.123
        assert HybridKVConfig.model_validate_json(config.model_dump_json()) == config
    assert HybridKVConfig() == HybridKVConfig(preset="tuned")
    assert HybridKVConfig().model_dump() == HybridKVConfig.defaults()


def test_the_paper_preset_is_the_method_as_published():
    """Chosen before anything was measured; a sweep must not move it."""
    config = HybridKVConfig(preset="paper")
    chosen = (config.statistic, config.theta, config.dynamic_share, config.static_weight, config.chunk_score)
    assert chosen == ("sparsity", 0.9, 0.32, "sparsity", "mean_max")
    rest = (config.text_share, config.observation_rows, config.num_sink_tokens, config.recent_window)
    assert (*rest, config.pool_kernel, config.pool_mode) == (1.0, 32, 4, 16, 5, "average")
    assert config.max_dynamic_heads == 1.0


def test_a_field_of_another_compressor_is_refused():
    with pytest.raises(ValueError, match="has no field 'theta'; known fields: budget, page_size, ") as caught:
        config_module.parse_config({"theta": 0.5}, CompressorConfig)
    assert "chunk_score" not in str(caught.value)
