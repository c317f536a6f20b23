"""Prompts whose dynamic heads may not all fit the host store, through the forward's compression."""

import logging

import pytest
import torch

pytest.importorskip("sglang")

from sglang_hybridkv.cache.compress import ObservedPrompt
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from sglang_hybridkv.requests.settings import RequestSettings
from tests.srt.serving import HEADS, LAYERS, make_compression
from tests.srt.test_compression import NUM_HEADS, P, admit, finish

LENGTH = 10 * P  # a dynamic head takes 10 head pages, and a host page has 4: all heads take 10 host pages
LOW, HIGH = 0.2, 0.8


def prefilled(compression, row, statistic):
    """A request whose last part of prefill has run; `statistic` has a number for each head."""
    req = admit(compression, row, LENGTH)
    compression.prepare(req, None)
    if compression.ledger.get(row) is not None:
        heads = (LAYERS, HEADS)
        observed = ObservedPrompt(
            (), torch.tensor(statistic).view(heads), torch.rand(*heads, LENGTH), torch.rand(*heads, 8)
        )
        slots = (req.row_pages[:, None] * P + torch.arange(P)).flatten()
        compression.cache.compress(row, slots, observed)
    return req


def settled(compression, row, statistic):
    """The same after its commit, or in place of it: what the request holds, and its record."""
    req = prefilled(compression, row, statistic)
    reservation = compression.ledger.get(row)
    if reservation is None:
        return req
    compression.settle(reservation)
    if reservation.failed:
        compression.give_up(req)
    else:
        chunks = reservation.geometry.num_prompt_pages
        compression.allocator.free_page_ids(req.row_pages[:chunks])
        compression.commit(req)
        req.row_pages = torch.cat((reservation.pages[: reservation.num_in_row], req.row_pages[chunks:]))
    compression.check_integrity()
    return req


def nothing_is_held(compression, *requests):
    for req in requests:
        finish(compression, req)
    compression.check_integrity()
    assert compression.allocator.available_size() == compression.allocator.size
    assert compression.store.used_bytes() == 0


def made(host_pages, when_full, theta=0.5, **config):
    return make_compression(120, host_pages, theta=theta, on_host_store_full=when_full, **config)


@pytest.mark.parametrize("when_full", ["dense", "static"])
@pytest.mark.parametrize("host_pages", [0, 3, 9])
def test_a_worst_case_that_does_not_fit_and_does_not_happen_changes_nothing(host_pages, when_full):
    """Of 9 pages three heads get theirs, of 3 one."""
    num_dynamic = host_pages // 3 and 1
    statistic = [HIGH] * (NUM_HEADS - num_dynamic) + [LOW] * num_dynamic
    tight, ample = made(host_pages, when_full), made(40, when_full)
    torch.manual_seed(0)
    req = settled(tight, 1, statistic)
    torch.manual_seed(0)
    expected = ample.request_info(settled(ample, 1, statistic))
    assert expected["compressed"]
    assert expected["dynamic_heads"] == num_dynamic
    assert tight.request_info(req) == expected
    nothing_is_held(tight, req)


@pytest.mark.parametrize("theta", [0.5, 1.01])
def test_heads_that_do_not_fit_are_static_and_those_with_the_lowest_statistic_stay(theta, caplog):
    compression = made(9, "static", theta)
    req = settled(compression, 1, [0.1, 0.3, 0.4, 0.2])
    info = compression.request_info(req)
    assert (info["compressed"], info["static_heads"], info["dynamic_heads"]) == (True, 1, 3)
    table = compression.cache.memory.table
    assert table.is_dynamic[1].flatten().tolist() == [True, True, False, True]
    assert not caplog.records
    nothing_is_held(compression, req)


class Listing(HybridKVConfig):
    """An own compressor's settings, which no dictionary takes as a key."""

    layers: list[int] = [1]


def test_settings_of_any_kind_are_remembered():
    compression = made(40, "static")
    settings = RequestSettings(Listing(**compression.config.model_dump(exclude_unset=True)))
    req = admit(compression, 1, LENGTH)
    compression.set_settings(req, settings)
    compression.prepare(req, None)
    reservation = compression.ledger.get(1)
    assert reservation.most_dynamic == NUM_HEADS
    compression._note_plan(req, reservation, 1)
    assert compression._recent_plans.estimate(settings.config.model_dump_json(), NUM_HEADS) == 2
    nothing_is_held(compression, req)


def test_quest_keeps_as_many_heads_dynamic_as_fit():
    compression = make_compression(120, 9, "quest", on_host_store_full="static")
    req = settled(compression, 1, [0.1, 0.3, 0.4, 0.2])
    assert compression.request_info(req)["dynamic_heads"] == 3
    nothing_is_held(compression, req)


@pytest.mark.parametrize("name", ["hybridkv", "quest"])
def test_what_can_never_fit_is_dense_before_anything_is_planned(name):
    config = {"theta": 1.01} if name == "hybridkv" else {}
    compression = make_compression(120, 9, name, **config)
    req = prefilled(compression, 1, [LOW] * NUM_HEADS)
    assert compression.ledger.get(1) is None
    assert compression.request_info(req)["reason"] == "host_store_full"


def test_a_plan_that_needs_more_than_was_reserved_is_dense_for_that_reason_alone(caplog):
    caplog.set_level(logging.INFO)
    compression = made(9, "dense")
    req = prefilled(compression, 1, [LOW] * NUM_HEADS)
    assert compression.ledger.get(1).most_dynamic == 3
    assert compression.cache.readable(1) is None, "decode reads the dense prompt at once"
    compression.settle(compression.ledger.get(1))
    compression.give_up(req)
    info = compression.request_info(req)
    assert (info["compressed"], info["reason"]) == (False, "host_store_full")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    nothing_is_held(compression, req)


def test_a_refusal_that_is_seen_at_the_release_has_the_same_reason():
    compression = made(9, "dense")
    req = prefilled(compression, 1, [LOW] * NUM_HEADS)
    finish(compression, req)
    assert compression.request_info(req)["reason"] == "host_store_full"
    assert compression.store.used_bytes() == 0


@pytest.mark.parametrize("when_full", ["dense", "static"])
def test_beyond_half_of_the_store_recent_prompts_tell_how_much_is_reserved(when_full):
    """Below, and where nothing is known, it is the worst case: a plan depends on its prompt alone as long as it may."""
    compression = made(40, when_full)
    requests = [settled(compression, 1, [LOW, HIGH, HIGH, HIGH])]
    reserved = []
    for row in range(2, 6):
        requests.append(prefilled(compression, row, [LOW, HIGH, HIGH, HIGH]))
        reserved.append(len(compression.ledger.get(row).host_pages))
    # 3 are held by the first. One head of 4, and an eighth of it, are two heads.
    assert reserved == [10, 10, 5, 5]
    for row, req in enumerate(requests[1:], 2):
        compression.settle(compression.ledger.get(row))
        compression.commit(req)
        assert compression.request_info(req)["dynamic_heads"] == 1
        assert len(compression.ledger.get(row).host_pages) == 3
    compression.check_integrity()


def test_a_refused_plan_is_remembered_so_that_the_next_one_fits():
    compression = made(36, "dense")
    requests = [settled(compression, row, [LOW, HIGH, HIGH, HIGH]) for row in range(1, 4)]
    requests.append(prefilled(compression, 4, [HIGH] * NUM_HEADS))  # with it 19 are taken: from here on, an estimate
    wanted = [LOW, LOW, LOW, HIGH]
    requests.append(settled(compression, 5, wanted))
    assert compression.request_info(requests[-1])["reason"] == "host_store_full"
    requests.append(settled(compression, 6, wanted))
    assert compression.request_info(requests[-1])["dynamic_heads"] == 3
    nothing_is_held(compression, *requests)


def test_a_retracted_prompt_has_the_same_plan_again_and_nothing_is_lost():
    compression = made(40, "static")
    torch.manual_seed(0)
    req = settled(compression, 1, [LOW, HIGH, LOW, HIGH])
    plan = compression.request_info(req)["plan"]
    req.finished = lambda: False
    compression.allocator.free_page_ids(req.row_pages)
    compression.release(req)
    assert compression.store.used_bytes() == 0
    torch.manual_seed(0)
    again = settled(compression, 1, [LOW, HIGH, LOW, HIGH])
    assert compression.request_info(again)["plan"] == plan
    nothing_is_held(compression, again)


def test_recent_prompts_never_lower_what_the_settings_fix():
    """A broken statistic makes heads static even where all are to be dynamic; the next prompt has a sound one."""
    compression = made(36, "dense", 1.01)
    requests = [settled(compression, 1, [float("nan")] * NUM_HEADS)]
    assert compression.request_info(requests[0])["dynamic_heads"] == 0
    requests += [prefilled(compression, row, [LOW] * NUM_HEADS) for row in (2, 3)]
    requests.append(settled(compression, 4, [LOW] * NUM_HEADS))
    assert compression.request_info(requests[-1])["dynamic_heads"] == NUM_HEADS
    nothing_is_held(compression, *requests)
