import dataclasses
from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_hybridkv.compressors import PromptObservation
from sglang_hybridkv.compressors.hybridkv import HybridKV, HybridKVConfig
from tests.builders import LAWS


@st.composite
def observed(draw):
    """A compressor, an observation, and a legal budget in head pages."""
    config = HybridKVConfig(
        theta=draw(st.sampled_from([0.0, 0.5, 0.9, 1.01])),
        max_dynamic_heads=draw(st.sampled_from([0.0, 0.29, 0.35, 1.0])),
        dynamic_share=draw(st.none() | st.floats(0.0, 1.0)),
        dynamic_ratio=draw(st.sampled_from([0.1, 1.0, 3.0])),
        min_head_pages=draw(st.integers(1, 4)),
        static_weight=draw(st.sampled_from(["sparsity", "density", "uniform"])),
    )
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    num_heads, num_pages = shape[0] * shape[1], draw(st.integers(1, 12))
    values = st.floats(0.0, 1.0, width=32) | st.sampled_from([0.0, 0.5, 1.0])
    statistic = torch.tensor(draw(st.lists(values, min_size=num_heads, max_size=num_heads))).view(shape)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    salience = torch.rand(*shape, num_pages * 16, generator=generator)
    is_text = torch.rand(num_pages * 16, generator=generator) < 0.5
    floor = min(config.min_head_pages, num_pages)
    total = draw(st.integers(num_heads * floor, num_heads * num_pages))
    return HybridKV(config), PromptObservation(statistic, salience, is_text, num_pages), total


@LAWS
@given(observed())
def test_dynamic_are_the_lowest_below_theta_as_many_as_may_be(case):
    compressor, observation, total = case
    statistic, is_dynamic = (
        observation.statistic.flatten(),
        compressor.plan(observation, total, may_retrieve=True).is_dynamic.flatten(),
    )
    most = int(Decimal(str(compressor.config.max_dynamic_heads)) * len(statistic) + Decimal("0.5"))
    below = [
        head for head, value in enumerate(statistic.tolist()) if value < torch.tensor(compressor.config.theta).item()
    ]
    expected = sorted(below, key=lambda head: (statistic[head].item(), head))[:most]
    assert is_dynamic.nonzero().flatten().tolist() == sorted(expected)


@LAWS
@given(observed(), st.data())
def test_of_two_statistics_each_names_its_lowest_heads_in_turn(case, data):
    """Place by place: the lowest head of either statistic first, then the second lowest of either, and so on."""
    compressor, observation, total = case
    one = observation.statistic
    values = data.draw(st.lists(st.floats(0.0, 1.0, width=32), min_size=one.numel(), max_size=one.numel()))
    both = torch.stack((one, torch.tensor(values).view_as(one)), dim=-1)
    plan = compressor.plan(dataclasses.replace(observation, statistic=both), total, may_retrieve=True)
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
@given(observed(), st.booleans())
def test_pages_are_the_budget_whatever_the_types(case, may_retrieve):
    compressor, observation, total = case
    plan = compressor.plan(observation, total, may_retrieve=may_retrieve)
    pages = plan.num_head_pages
    assert pages.shape == plan.is_dynamic.shape == observation.statistic.shape
    assert int(pages.sum()) == total
    assert int(pages.min()) >= min(compressor.config.min_head_pages, observation.num_prompt_pages)
    assert int(pages.max()) <= observation.num_prompt_pages
    assert may_retrieve or not plan.is_dynamic.any()
    if plan.is_dynamic.any():
        dynamic = pages[plan.is_dynamic]
        assert int(dynamic.max() - dynamic.min()) <= 1


@LAWS
@given(observed(), st.data())
def test_a_larger_budget_takes_nothing_from_any_head(case, data):
    compressor, observation, total = case
    more = data.draw(st.integers(total, observation.statistic.numel() * observation.num_prompt_pages))
    small, large = (compressor.plan(observation, t, may_retrieve=True) for t in (total, more))
    assert (large.num_head_pages >= small.num_head_pages).all()
    assert torch.equal(large.is_dynamic, small.is_dynamic)


@LAWS
@given(observed())
def test_the_whole_budget_keeps_everything(case):
    compressor, observation, _ = case
    everything = observation.statistic.numel() * observation.num_prompt_pages
    plan = compressor.plan(observation, everything, may_retrieve=True)
    assert (plan.num_head_pages == observation.num_prompt_pages).all()


@LAWS
@given(observed())
def test_each_head_ranks_every_token_once(case):
    compressor, observation, total = case
    order = compressor.rank_tokens(observation, compressor.plan(observation, total, may_retrieve=True))
    everything = torch.arange(observation.salience.shape[-1]).expand_as(observation.salience)
    assert torch.equal(order.sort(dim=-1).values, everything)


@pytest.mark.parametrize(("theta", "dynamic"), [(0.0, 0), (1.01, 4)])
def test_theta_beyond_the_statistic_makes_all_heads_one_type(theta, dynamic):
    compressor = HybridKV(HybridKVConfig(theta=theta, max_dynamic_heads=1.0))
    observation = PromptObservation(torch.tensor([[0.0, 1.0], [0.5, 0.9]]), torch.rand(2, 2, 64), torch.ones(64), 4)
    assert int(compressor.plan(observation, 8, may_retrieve=True).is_dynamic.sum()) == dynamic


def test_a_budget_below_the_floor_is_refused():
    compressor = HybridKV(HybridKVConfig(min_head_pages=2))
    observation = PromptObservation(torch.rand(2, 2), torch.rand(2, 2, 64), torch.ones(64), 4)
    with pytest.raises(ValueError, match=r"total: expected 8\.\.16 seats, got 7"):
        compressor.plan(observation, 7, may_retrieve=True)
