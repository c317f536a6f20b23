import gc
import threading
import time
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_hybridkv.cache import host_segments, host_store
from sglang_hybridkv.cache.host_store import HostStore
from tests.builders import LAWS


def make_store(num_pages=5, heads=4, page_size=8, head_dim=32, dtype=torch.bfloat16, host_dtype="same", *, grows=False):
    store = HostStore(num_pages, heads, page_size, head_dim, dtype, "cpu", host_dtype)
    (store.make_first if grows else store.make_all)()
    return store


class HostStoreAgainstModel(RuleBasedStateMachine):
    """The model: a set of free page numbers and a list of loans."""

    @initialize(num_pages=st.integers(0, 12), grows=st.booleans())
    def build(self, num_pages, grows):
        self.store = make_store(num_pages, heads=1, grows=grows)
        self.num_pages, self.free, self.loans = num_pages, set(range(num_pages)), []

    @rule(num_pages=st.integers(0, 8))
    def alloc(self, num_pages):
        pages = self.store.alloc(num_pages)
        if num_pages > len(self.free):
            assert pages is None
            return
        taken = set(pages.tolist())
        assert len(taken) == len(pages) == num_pages
        assert taken <= self.free
        self.free -= taken
        self.loans.append(pages)

    @precondition(lambda self: self.loans)
    @rule(data=st.data())
    def give_back(self, data):
        pages = self.loans.pop(data.draw(st.integers(0, len(self.loans) - 1)))
        self.store.free(pages)
        self.free |= set(pages.tolist())

    @precondition(lambda self: self.loans)
    @rule(data=st.data())
    def give_back_a_part(self, data):
        index = data.draw(st.integers(0, len(self.loans) - 1))
        keep = data.draw(st.integers(0, len(self.loans[index])))
        self.store.free(self.loans[index][keep:])
        self.free |= set(self.loans[index][keep:].tolist())
        self.loans[index] = self.loans[index][:keep]

    @precondition(lambda self: len(self.loans) > 2)
    @rule()
    def clear(self):
        self.store.clear()
        self.free, self.loans = set(range(self.num_pages)), []

    @invariant()
    def nothing_is_lost_or_held_twice(self):
        if not hasattr(self, "store"):
            return
        assert set(self.store.free_pages.tolist()) <= self.free
        assert self.store.available() == len(self.free)
        assert self.store.used_bytes() == (self.num_pages - len(self.free)) * self.store.page_bytes
        self.store.check_integrity(self.loans)


HostStoreAgainstModel.TestCase.settings = LAWS
test_host_store_against_model = HostStoreAgainstModel.TestCase


@pytest.mark.parametrize(
    ("host_dtype", "dtype", "head_dim", "record_bytes"),
    [
        ("same", torch.bfloat16, 32, 128),
        ("same", torch.float32, 80, 640),
        ("int8", torch.bfloat16, 128, 272),  # 256 codes and 2 scales, padded
        ("int8", torch.float32, 80, 176),
        ("int8", torch.float16, 8, 32),
    ],
)
def test_page_bytes_are_those_of_the_records(host_dtype, dtype, head_dim, record_bytes):
    store = make_store(dtype=dtype, head_dim=head_dim, host_dtype=host_dtype)
    segments = store.pages.segments
    assert {tuple(segment.shape[1:]) for segment in segments} == {(8, record_bytes)}
    assert store.page_bytes * store.num_pages == sum(map(torch.numel, segments)) == 5 * 4 * 8 * record_bytes
    assert store.limit_bytes() == store.made_bytes() == 5 * store.page_bytes


def test_an_unknown_type_of_rows_is_named():
    with pytest.raises(ValueError, match=r"^host_dtype: expected one of same, int8, got 'fp8'"):
        make_store(host_dtype="fp8")


# Pages by their place among two of this store and two of another.
FAULTS = {
    "lost": ([], [[1]]),
    "held twice": ([], [[0, 1], [0]]),
    "held and free": ([0], [[0, 1]]),
    "freed twice": ([0, 1, 0], []),
    "of another store": ([], [[2, 3]]),
}


@pytest.mark.parametrize(("freed", "held"), FAULTS.values(), ids=FAULTS)
def test_a_page_that_is_not_held_or_free_exactly_once_is_found(freed, held):
    store = make_store()
    mine = store.alloc(2)
    store.check_integrity([mine])
    pages = torch.cat((mine, mine + store.num_pages))
    for place in freed:
        store.free(pages[place : place + 1])
    with pytest.raises(AssertionError, match="lost or held twice"):
        store.check_integrity([pages[places] for places in held])


def test_memory_that_cannot_be_had_is_one_sentence():
    with pytest.raises(
        RuntimeError, match=r"^host_store_bytes: 2,\d{3},\d{3},\d{3},\d{3},\d{3} bytes of host memory cannot"
    ):
        make_store(num_pages=2**39)


class System:
    """Gives a store its memory: so many host pages, and while `is_open`."""

    def __init__(self, num_pages=32):
        self.left, self.is_open, self.num_asked = num_pages, threading.Event(), 0
        self.is_open.set()

    def allocate(self, shape, _device):
        self.num_asked += 1
        assert self.is_open.wait(60)
        if shape[0] > self.left:
            raise RuntimeError("the system is full\nand says why")
        self.left -= shape[0]
        return torch.zeros(shape, dtype=torch.uint8)


def growing(system, num_pages=32):
    """A store of segments of four pages, of which those of a quarter are there."""
    with mock.patch.object(host_store, "allocate_segment", system.allocate):
        store = make_store(num_pages, heads=1, grows=True)
    assert {len(segment) for segment in store.pages.segments} == {4}
    return store


def in_background(function, *arguments):
    """A thread that runs it, and the list that its result goes to."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*arguments)), daemon=True)
    thread.start()
    return thread, found


def test_what_is_there_is_given_without_waiting():
    system = System()
    store = growing(system)
    system.is_open.clear()
    assert len(store.alloc(8)) == 8
    assert store.available() == 24
    assert system.num_asked == 2, "nothing more was begun"


def test_who_wants_more_waits_and_gets_it():
    system = System()
    store = growing(system)
    system.is_open.clear()
    first = store.alloc(5)
    thread, found = in_background(store.alloc, 20)
    thread.join(0.1)
    assert thread.is_alive()
    system.is_open.set()
    thread.join(60)
    pages = found[0]
    assert len(set(pages.tolist()) | set(first.tolist())) == 25
    store.check_integrity([first, pages])
    assert store.alloc(8) is None
    last = store.alloc(7)
    store.check_integrity([first, pages, last])
    assert store.used_bytes() == store.made_bytes() == store.limit_bytes() == 32 * store.page_bytes


def test_the_device_knows_each_segment_whose_pages_are_given():
    store = growing(System(34), 34)
    table = store.pages.addresses
    assert (table != 0).tolist() == [True] * 3 + [False] * 6
    pages = store.alloc(34)
    assert table.data_ptr() == store.pages.addresses.data_ptr(), "captured graphs read the table where it was"
    assert table.tolist() == [segment.data_ptr() for segment in store.pages.segments]
    assert [len(segment) for segment in store.pages.segments] == [4] * 8 + [2]
    assert pages.sort().values.tolist() == list(range(34))


def test_pages_are_numbered_on_the_host_whatever_the_default_device_is():
    with torch.device("meta"):
        store = make_store(32, grows=True)
        pages = store.alloc(20)
        store.check_integrity([pages])
        store.free(pages)
        store.clear()
        store.check_integrity([])
    assert pages.device.type == "cpu"


def test_it_grows_while_nobody_waits():
    system = System()
    store = growing(system)
    store.grow()
    store.grow()
    deadline = time.monotonic() + 60
    while store.made_bytes() < store.limit_bytes() and time.monotonic() < deadline:
        time.sleep(0.01)
    system.is_open.clear()
    assert len(store.alloc(32)) == 32
    assert system.num_asked == 8


def test_who_captures_a_graph_waits_until_nothing_grows():
    system = System()
    store = growing(system)
    store.finish_growing()
    assert system.num_asked == 2, "nothing had begun to grow"
    system.is_open.clear()
    store.grow()
    thread, _ = in_background(store.finish_growing)
    thread.join(0.1)
    assert thread.is_alive()
    system.is_open.set()
    thread.join(60)
    assert store.made_bytes() == store.limit_bytes()


def test_memory_that_ends_half_way_is_the_limit_and_is_said_once(caplog):
    system = System(22)
    store = growing(system)
    first = store.alloc(7)
    assert store.alloc(20) is None
    assert store.num_pages == 20
    assert store.limit_bytes() == store.made_bytes() == 20 * store.page_bytes
    assert store.alloc(14) is None
    rest = store.alloc(13)
    store.check_integrity([first, rest])
    store.free(rest)
    store.clear()
    assert len(store.alloc(20)) == 20
    asked, there = (f"{count * store.page_bytes:,}" for count in (32, 20))
    sentence = f"host_store_bytes: {asked} bytes of host memory were asked for on this rank"
    said = f"{sentence}, and the system gives no more than {there}, which are the limit now: the system is full"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("ERROR", said)]


def test_the_limit_is_known_before_anybody_meets_it(caplog):
    store = growing(System(22))
    store.grow()
    deadline = time.monotonic() + 60
    while store.limit_bytes() > 20 * store.page_bytes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.limit_bytes() == 20 * store.page_bytes
    assert len(caplog.records) == 1


class Ranks:
    """Two stores whose users take and give back alike, each in a thread of its own."""

    def __init__(self, *systems):
        self.barrier, self.said = threading.Barrier(len(systems)), {}
        self.stores = [growing(system) for system in systems]
        for i, store in enumerate(self.stores):
            store.least_of_ranks = lambda own, i=i: self.least(i, own)

    def least(self, i, own):
        self.said[i] = own
        self.barrier.wait(60)
        least = min(self.said.values())
        self.barrier.wait(60)
        return least

    def alloc(self, num_pages):
        """What all get; how many pages, or None, which has to be the same."""
        started = [in_background(store.alloc, num_pages) for store in self.stores]
        for thread, _ in started:
            thread.join(60)
            assert not thread.is_alive(), "one waits for the others, which do not come"
        got = {None if found[0] is None else len(found[0]) for _, found in started}
        assert len(got) == 1
        return got.pop()


@pytest.mark.parametrize("left", [(32, 22), (22, 32), (14, 22)])
def test_ranks_have_the_limit_of_the_one_with_the_least(left, caplog):
    ranks = Ranks(*map(System, left))
    least = min(left) // 4 * 4
    assert [ranks.alloc(num_pages) for num_pages in (5, least - 6, 12, 2, 1)] == [5, least - 6, None, None, 1]
    assert [store.num_pages for store in ranks.stores] == [least, least]
    assert len(caplog.records) == 2, "each says it once"


def test_ranks_that_grow_at_different_speeds_get_the_same():
    fast, slow = System(), System()
    ranks = Ranks(fast, slow)
    slow.is_open.clear()
    threading.Timer(0.2, slow.is_open.set).start()
    ranks.stores[0].grow()
    assert [ranks.alloc(num_pages) for num_pages in (8, 1, 20, 4, 3)] == [8, 1, 20, None, 3]


def test_a_store_that_is_dropped_grows_no_more():
    system = System()
    store = growing(system)
    system.is_open.clear()
    store.grow()
    threading.Timer(0.2, system.is_open.set).start()
    del store
    gc.collect()
    asked = system.num_asked
    assert asked <= 3
    time.sleep(0.1)
    assert system.num_asked == asked


def test_a_store_whose_first_segments_cannot_be_had_is_not_made():
    with pytest.raises(RuntimeError, match=r"^host_store_bytes: 32,768 bytes of host memory cannot be had"):
        growing(System(3))


def test_pinned_memory_beyond_what_is_there_is_not_asked_for(monkeypatch):
    """The system would end the process; torch rounds what it pins up to a power of two."""
    monkeypatch.setattr(host_segments, "available_host_bytes", lambda: 1023)
    with pytest.raises(RuntimeError, match=r"^this machine, or the container, has 1,023 bytes left$"):
        host_segments.allocate_segment((3, 2, 100), torch.device("cuda"))


@pytest.mark.parametrize(
    ("num_pages", "page_bytes", "expected"),
    [(8000, 458_752, 585), (64, 8192, 8), (5, 1 << 30, 1), (0, 100, 1), (10**6, 1 << 20, 256), (30, 1000, 2)],
)
def test_segments_have_whole_pages_and_little_is_lost_to_a_power_of_two(num_pages, page_bytes, expected):
    assert host_segments.pages_of_segment(num_pages, page_bytes) == expected
