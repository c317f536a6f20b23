import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_hybridkv.cache.host_store import HostStore
from tests.builders import LAWS


def make_store(num_pages=5, heads=4, page_size=8, head_dim=32, dtype=torch.bfloat16, host_dtype="same"):
    return HostStore(num_pages, heads, page_size, head_dim, dtype, False, host_dtype)


class HostStoreAgainstModel(RuleBasedStateMachine):
    """The model: a set of free page numbers and a list of loans."""

    @initialize(num_pages=st.integers(0, 12))
    def build(self, num_pages):
        self.store = make_store(num_pages, heads=1)
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
        assert set(self.store.free_pages.tolist()) == self.free
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
    assert store.pages.data.shape == (5 * 4, 8, record_bytes)
    assert store.page_bytes * store.num_pages == store.pages.data.numel() == 5 * 4 * 8 * record_bytes


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
