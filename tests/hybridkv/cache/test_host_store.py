import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_hybridkv.cache.host_store import HostStore
from tests.builders import LAWS


def make_store(num_pages=5, heads=4, page_size=8, head_dim=32, dtype=torch.bfloat16):
    return HostStore(num_pages, heads, page_size, head_dim, dtype, False)


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


def test_page_bytes_are_those_of_the_tensors():
    store = make_store()
    both = store.k_pages.numel() + store.v_pages.numel()
    assert store.page_bytes * store.num_pages == both * store.k_pages.element_size()
    assert store.k_pages.shape == store.v_pages.shape == (5 * 4, 8, 32)


@pytest.mark.parametrize("wanted", [1, 6])
def test_a_refused_alloc_takes_nothing(wanted):
    store = make_store(5 if wanted == 6 else 0)
    available = store.available()
    assert store.alloc(wanted) is None
    assert store.available() == available


def test_a_lost_page_is_found():
    store = make_store()
    held = [store.alloc(3)]
    store.check_integrity(held)
    with pytest.raises(AssertionError, match="lost or held twice"):
        store.check_integrity([held[0][1:]])


def test_a_page_held_twice_is_found():
    store = make_store()
    pages = store.alloc(2)
    with pytest.raises(AssertionError, match="lost or held twice"):
        store.check_integrity([pages, pages[:1]])


def test_a_page_both_held_and_free_is_found():
    store = make_store()
    pages = store.alloc(2)
    store.free(pages[:1])
    with pytest.raises(AssertionError, match="lost or held twice"):
        store.check_integrity([pages])


def test_a_page_freed_twice_is_found():
    store = make_store()
    pages = store.alloc(2)
    store.free(pages)
    store.free(pages[:1])
    with pytest.raises(AssertionError, match="lost or held twice"):
        store.check_integrity([])


def test_a_page_of_another_store_is_found():
    store = make_store()
    pages = store.alloc(2)
    with pytest.raises(AssertionError, match="lost or held twice"):
        store.check_integrity([pages + 5])
