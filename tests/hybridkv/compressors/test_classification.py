import dataclasses
from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_hybridkv.compressors.hybridkv import HybridKV, HybridKVConfig
from tests.builders import ALL_HEADS, LAWS
from tests.hybridkv.compressors.test_compressors import HYBRIDKV_SETTINGS, observed


@LAWS
@given(observed(), HYBRIDKV_SETTINGS)
def test_dynamic_are_the_lowest_below_theta_as_many_as_may_be(case, settings):
    compressor, (observation, total) = HybridKV(HybridKVConfig(**settings)), case
    statistic = observation.statistic.flatten()
    is_dynamic = compressor.plan(observation, total, most_dynamic=ALL_HEADS).is_dynamic.flatten()
    most = int(Decimal(str(compressor.config.max_dynamic_heads)) * len(statistic) + Decimal("0.5"))
    below = [
        head for head, value in enumerate(statistic.tolist()) if value < torch.tensor(compressor.config.theta).item()
    ]
    expected = sorted(below, key=lambda head: (statistic[head].item(), head))[:most]
    assert is_dynamic.nonzero().flatten().tolist() == sorted(expected)


@LAWS
@given(observed(), HYBRIDKV_SETTINGS, st.data())
def test_of_two_statistics_each_names_its_lowest_heads_in_turn(case, settings, data):
    """Place by place: the lowest head of either statistic first, then the second lowest of either, and so on."""
    compressor, (observation, total) = HybridKV(HybridKVConfig(**settings)), case
    one = observation.statistic
    values = data.draw(st.lists(st.floats(0.0, 1.0, width=32), min_size=one.numel(), max_size=one.numel()))
    both = torch.stack((one, torch.tensor(values).view_as(one)), dim=-1)
    plan = compressor.plan(dataclasses.replace(observation, statistic=both), total, most_dynamic=ALL_HEADS)
    orders = [sorted(range(one.numel()), key=lambda head: (x[head].item(), head)) for x in both.flatten(0, 1).T]
    taken: list[int] = []
    for place in zip(*orders, strict=True):
        taken += sorted(set(place) - set(taken))
    most = int(Decimal(str(compressor.config.max_dynamic_heads)) * one.numel() + Decimal("0.5"))
    theta = torch.tensor(compressor.config.theta).item()
    expected = [head for head in taken[:most] if both.flatten(0, 1)[head].min().item() < theta]
    assert plan.is_dynamic.flatten().nonzero().flatten().tolist() == sorted(expected)
    assert int(plan.num_head_pages.sum()) == total


@LAWS
@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(1, 4096), st.integers(1, 90), st.integers(0, 10**6))
def test_longer_prompts_have_fewer_dynamic_heads_and_no_more_rows_to_fetch(most, least, tokens, num_heads, covered):
    config = HybridKVConfig(max_dynamic_heads=most, long_prompt_dynamic_heads=least, long_prompt_tokens=tokens)
    count = config.most_dynamic_heads(num_heads, covered)
    rows = most * min(covered, tokens)  # of one head, on average, up to long_prompt_tokens
    exact = max(min(least, most) * covered, rows) * num_heads
    assert count * covered == pytest.approx(exact, abs=0.5001 * covered)
    assert config.most_dynamic_heads(num_heads, covered + 1) <= count
