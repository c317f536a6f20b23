"""HybridAllocator on the CPU against what SGLang's paged allocator promises."""

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

pytest.importorskip("sglang")

from sglang_hybridkv.srt.allocator import HybridAllocator
from tests.builders import LAWS

PAGE = 4


def make_allocator(num_pages=12, need_sort=False, page_size=PAGE):
    return HybridAllocator(num_pages * page_size, page_size, torch.bfloat16, "cpu", None, need_sort)


class AllocatorAgainstModel(RuleBasedStateMachine):
    """The model: a set of free pages, the slots of each request in order, and compressed pages."""

    @initialize(need_sort=st.booleans(), num_pages=st.integers(1, 14))
    def build(self, need_sort, num_pages):
        self.allocator, self.num_pages = make_allocator(num_pages, need_sort), num_pages
        self.free, self.requests, self.reserved = set(range(1, num_pages + 1)), [], []

    def extend(self, requests, lengths):
        before = [len(slots) for slots in requests]
        after = [a + b for a, b in zip(before, lengths, strict=True)]
        last = [slots[-1] if slots else -1 for slots in requests]
        needed = sum(-(-b // PAGE) - -(-a // PAGE) for a, b in zip(before, after, strict=True))
        prefix_lens, seq_lens = torch.tensor(before), torch.tensor(after)
        out = self.allocator.alloc_extend(
            prefix_lens, prefix_lens, seq_lens, seq_lens, torch.tensor(last), sum(lengths)
        )
        if needed > len(self.free):
            assert out is None
            return
        assert out.dtype == torch.int64
        for slots, new in zip(requests, out.split(lengths), strict=True):
            self.take(slots, new.tolist())

    def take(self, slots, new):
        """Law: a token follows its predecessor in the page; a new page is a free one, from its first slot."""
        for slot in new:
            if len(slots) % PAGE:
                assert slot == slots[-1] + 1
            else:
                assert slot % PAGE == 0
                self.free.remove(slot // PAGE)
            slots.append(slot)

    @rule(lengths=st.lists(st.integers(1, 11), min_size=1, max_size=3))
    def prefill_new_requests(self, lengths):
        requests = [[] for _ in lengths]
        self.extend(requests, lengths)
        self.requests += [slots for slots in requests if slots]

    @precondition(lambda self: self.requests)
    @rule(lengths=st.lists(st.integers(0, 11), min_size=1, max_size=3))
    def prefill_next_chunks(self, lengths):
        requests = self.requests[: len(lengths)]
        self.extend(requests, lengths[: len(requests)])

    @precondition(lambda self: self.requests)
    @rule()
    def decode_all(self):
        seq_lens = torch.tensor([len(slots) + 1 for slots in self.requests])
        last = torch.tensor([slots[-1] for slots in self.requests])
        needed = sum(len(slots) % PAGE == 0 for slots in self.requests)
        out = self.allocator.alloc_decode(seq_lens, seq_lens, last)
        if needed > len(self.free):
            assert out is None
            return
        assert out.dtype == torch.int64
        for slots, slot in zip(self.requests, out.tolist(), strict=True):
            self.take(slots, [slot])

    @rule(num_pages=st.integers(0, 5))
    def reserve_compressed_pages(self, num_pages):
        pages = self.allocator.alloc_pages(num_pages)
        if num_pages > len(self.free):
            assert pages is None
            return
        assert pages.dtype == torch.int64
        assert len(set(pages.tolist())) == num_pages
        assert set(pages.tolist()) <= self.free
        self.free -= set(pages.tolist())
        self.reserved.append(pages)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data):
        slots = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        self.allocator.free(torch.tensor(slots))
        self.free |= {slot // PAGE for slot in slots}

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def release_compressed_pages(self, data):
        pages = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        self.allocator.free_page_ids(pages)
        self.free |= set(pages.tolist())

    @precondition(lambda self: len(self.requests) + len(self.reserved) > 4)
    @rule()
    def clear(self):
        self.allocator.clear()
        self.free, self.requests, self.reserved = set(range(1, self.num_pages + 1)), [], []

    @invariant()
    def free_pages_are_the_model_s(self):
        if not hasattr(self, "allocator"):
            return
        assert sorted(self.allocator.get_all_free_pages().tolist()) == sorted(self.free)
        assert self.allocator.available_size() == len(self.free) * PAGE


AllocatorAgainstModel.TestCase.settings = LAWS
test_allocator_against_model = AllocatorAgainstModel.TestCase


def test_staged_pages_are_found_when_the_free_list_is_short():
    """With need_sort freed pages wait in a second list."""
    allocator = make_allocator(4, need_sort=True)
    pages = allocator.alloc_pages(4)
    allocator.free_page_ids(pages.flip(0))
    zero, full = torch.tensor([0]), torch.tensor([4 * PAGE])
    slots = allocator.alloc_extend(zero, zero, full, full, torch.tensor([-1]), 4 * PAGE)
    assert slots.tolist() == list(range(PAGE, 5 * PAGE))
    allocator.free_page_ids(pages[:1])
    assert allocator.alloc_decode(torch.tensor([1]), torch.tensor([1]), torch.tensor([-1])).tolist() == [PAGE]
