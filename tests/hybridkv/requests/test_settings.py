import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hybridkv.compressors import BUILT_IN
from sglang_hybridkv.compressors.full import FullConfig
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from sglang_hybridkv.requests.settings import (
    RequestSettings,
    apply_settings,
    change_settings,
    changeable,
    read_settings,
)
from tests.builders import LAWS

SERVER = HybridKVConfig(preset="paper", budget=0.3, dynamic_share=0.2)
LIMITED = SERVER.model_copy(update={"request_budget_min": 0.2, "request_budget_max": 0.5})


def test_what_a_request_leaves_open_is_the_servers():
    own = read_settings({"budget": 0.7, "theta": 0.2}, SERVER)
    assert own.config == SERVER.model_copy(update={"budget": 0.7, "theta": 0.2})
    assert read_settings({}, SERVER).config == SERVER


@LAWS
@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_budget_is_legal_exactly_within_field_and_limits(budget):
    for config, low, high in ((SERVER, math.ulp(0.0), 1.0), (LIMITED, 0.2, 0.5)):
        if low <= budget <= high:
            assert read_settings({"budget": budget}, config).config.budget == budget
        else:
            with pytest.raises(ValueError, match=r"^custom_params.kv_compressor.budget = .* is not allowed; legal: "):
                read_settings({"budget": budget}, config)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (None, 'must be an object such as {"budget": 0.2}, got null'),
        ([0.2], 'must be an object such as {"budget": 0.2}, got a list'),
        ({"budget": True}, ".budget = true is not allowed; legal: a number above 0 and at most 1"),
        (
            {"budget": "20%"},
            ".budget = '20%' is not allowed; legal: a number above 0 and at most 1; 20 % is written 0.2",
        ),
        ({"budget": [0] * 999}, "0, 0... is not allowed"),
        ({"theta": 1.5}, ".theta = 1.5 is not allowed; legal: a number at least 0 and at most 1.01"),
        ({"min_prompt_tokens": 2**63}, "legal: an integer at least 1 and at most 2147483647"),
        ({"min_prompt_tokens": 5.0}, ".min_prompt_tokens = 5.0 is not allowed; legal: an integer at least 1"),
        ({"page_size": 8}, ".page_size is set for the whole server only; a request may set enabled, budget, min_"),
        ({"request_budget_max": 1.0}, ".request_budget_max is set for the whole server only"),
        ({"Budget": 0.2}, " has no field 'Budget' (did you mean 'budget'?); a request may set enabled, budget, min_"),
        ({"enabled": 1}, ".enabled = 1 is not allowed; legal: true or false"),
        ({"enabled": False, "theta": 0.1}, ".theta would change nothing with enabled = false; leave one out"),
    ],
)
def test_a_bad_setting_is_one_sentence(given, complaint):
    with pytest.raises(ValueError) as caught:
        read_settings(given, SERVER)
    sentence = str(caught.value)
    assert sentence.startswith("custom_params.kv_compressor")
    assert complaint in sentence
    assert "\n" not in sentence
    assert len(sentence) < 400


def test_a_server_that_allows_no_settings_refuses_all():
    config = SERVER.model_copy(update={"request_override": False})
    for asked in ({}, {"budget": 0.3}, {"enabled": False}):
        with pytest.raises(ValueError, match="is not allowed: this server has request_override = false"):
            read_settings(asked, config)


def test_legal_budgets_of_a_compressor_hold_for_requests():
    assert read_settings({"budget": 1}, FullConfig()).config.budget == 1.0
    with pytest.raises(ValueError, match="legal: a number equal to 1$"):
        read_settings({"budget": 0.5}, FullConfig())


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_setting_of_a_request_shapes_memory_or_kernels(name):
    config_class = BUILT_IN[name].config_class
    assert {"budget", "min_prompt_tokens"} <= set(config_class.per_request) <= {"budget", "min_prompt_tokens", "theta"}
    assert ("theta" in config_class.per_request) == (name == "hybridkv")


def test_requests_that_set_the_same_are_equal():
    """What was remembered for one may be given to the other, and to nobody else."""
    same = [read_settings(asked, SERVER) for asked in ({"budget": 0.4, "theta": 0}, {"theta": 0.0, "budget": 0.4})]
    assert same[0] == same[1]
    assert hash(same[0]) == hash(same[1])
    others = [{"budget": 0.4}, {"theta": 0}, {"enabled": False}, {"enabled": True}]
    assert len({*same, RequestSettings(SERVER), *(read_settings(asked, SERVER) for asked in others)}) == 6


def test_what_was_let_in_is_applied_whatever_the_limits_are_now():
    asked = {"budget": 0.7, "min_prompt_tokens": 9}
    strict = change_settings({"request_override": False, "request_budget_max": 0.1, "theta": 0.5}, SERVER)
    applied = apply_settings(asked, strict)
    assert (applied.config.budget, applied.config.min_prompt_tokens, applied.config.theta) == (0.7, 9, 0.5)
    assert applied.given == read_settings(asked, SERVER).given
    assert apply_settings({"enabled": False}, strict) == RequestSettings(strict, (("enabled", False),), False)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in ("full", "sparsemm")])
def test_an_operator_changes_what_requests_set_and_their_limits(name):
    config = BUILT_IN[name].config_class()
    limits = {"request_override": False, "request_budget_min": 0.2, "request_budget_max": 0.3}
    given = {"budget": 0.25, "min_prompt_tokens": 7, **limits}
    changed = change_settings(given, config)
    assert changeable(changed).items() >= given.items()
    assert changeable(changed).keys() == {*config.per_request, *limits}
    assert changed.model_dump() == {**config.model_dump(), **given}
    assert change_settings(changeable(config), changed) == config


@pytest.mark.parametrize(
    "given, sentence",
    [
        (None, 'settings must be an object such as {"budget": 0.2}, got null'),
        ({}, 'settings must be an object such as {"budget": 0.2}, got an empty one'),
        ({"budget": 0}, "settings.budget = 0 is not allowed; legal: a number above 0 and at most 1"),
        ({"events": None}, "settings.events is set when the server starts; what may be changed is budget, .*_max"),
        ({"budgets": 1}, r"settings has no field 'budgets' \(did you mean 'budget'\?\); what may be changed is budget"),
        ({"request_budget_min": 0.6}, "settings: request_budget_min = 0.6 is not allowed with request_budget_max"),
    ],
)
def test_a_bad_change_is_one_sentence(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        change_settings(given, SERVER.model_copy(update={"request_budget_max": 0.5}))
