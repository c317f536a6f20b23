import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hybridkv.requests.geometry import prompt_geometry
from sglang_hybridkv.requests.host_room import RecentPlans, heads_to_reserve
from tests.builders import LAWS, make_reservation

PAGE, HEADS = 16, 8


def geometry_of(num_prompt_pages, most):
    sizes = {"page_size": PAGE, "head_pages_per_page": HEADS, "summary_vectors": num_prompt_pages}
    return prompt_geometry(num_prompt_pages * PAGE, 0.3, **sizes, max_dynamic_heads=most)


def reservation_of(most, reserved, *, caps_plan):
    reservation = make_reservation(geometry_of(10, most), [], [])
    return dataclasses.replace(reservation, most_dynamic=reserved, caps_plan=caps_plan)


@LAWS
@given(st.integers(1, 40), st.integers(0, HEADS), st.integers(0, HEADS), st.integers(0, 60), st.integers(0, 60))
def test_what_is_reserved_fits_and_is_the_worst_case_the_estimate_or_all_that_is_free(
    num_prompt_pages, most, estimate, free, taken
):
    geometry = geometry_of(num_prompt_pages, most)
    sizes = {"free_pages": free, "num_pages": free + taken, "head_pages_per_page": HEADS}
    heads = heads_to_reserve(geometry, estimate, **sizes)
    pages = geometry.host_pages_used(heads, HEADS)
    assert 0 <= heads <= most
    assert pages <= free
    wanted = most if taken < free else min(estimate, most)
    assert heads <= wanted
    if heads < wanted:
        assert geometry.host_pages_used(heads + 1, HEADS) > free, "there was room for one more"


@LAWS
@given(st.lists(st.integers(0, 100), min_size=1, max_size=100), st.integers(1, 100))
def test_an_estimate_covers_the_last_prompts_and_little_more(counts, most):
    recent = RecentPlans()
    for count in counts:
        recent.note("mine", reservation_of(100, 100, caps_plan=True), count)
        recent.note("another", reservation_of(100, 100, caps_plan=True), 100)
    largest = max(counts[-64:]) * most / 100
    assert min(largest, most) <= recent.estimate("mine", most) <= min(most, largest * 9 / 8 + 1)


def test_nothing_known_is_the_worst_case():
    recent = RecentPlans()
    recent.note("mine", reservation_of(0, 0, caps_plan=True), 0)  # no head may be dynamic: it says nothing
    recent.note("another", reservation_of(8, 8, caps_plan=True), 1)
    assert recent.estimate("mine", 8) == 8
    assert recent.estimate("another", 8) == 2


@pytest.mark.parametrize(
    ("caps_plan", "reserved", "count", "expected"),
    [
        (True, 20, 19, 22),  # it wanted no more
        (True, 20, 20, 45),  # it may have wanted more, and counts twice
        (True, 60, 60, 100),
        (True, 0, 0, 100),  # it says nothing
        (True, 100, 100, 100),
        (False, 20, 20, 23),  # the plan was made as if there was room for all
        (False, 20, 30, 34),  # and was refused
    ],
)
def test_a_plan_that_was_capped_may_have_wanted_more(caps_plan, reserved, count, expected):
    recent = RecentPlans()
    recent.note("mine", reservation_of(100, reserved, caps_plan=caps_plan), count)
    assert recent.estimate("mine", 100) == expected


def test_settings_that_nobody_uses_any_more_are_forgotten():
    recent = RecentPlans()
    for settings in ("old", "used", *range(62), "used", 62):
        recent.note(settings, reservation_of(100, 100, caps_plan=True), 0)
    assert [recent.estimate(settings, 8) for settings in ("old", "used", 0)] == [8, 1, 1]
