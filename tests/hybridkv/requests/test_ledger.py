import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_hybridkv.cache.host_store import HostStore
from sglang_hybridkv.requests.geometry import prompt_geometry
from sglang_hybridkv.requests.ledger import Ledger
from tests.builders import LAWS, make_reservation

PAGE, HEADS = 16, 8


def geometry_of(num_prompt_pages, budget):
    return prompt_geometry(
        num_prompt_pages * PAGE, budget, page_size=PAGE, head_pages_per_page=HEADS, summary_vectors=num_prompt_pages
    )


def reservation_of(pages, host_pages=(), *, num_prompt_pages=10, budget=0.3):
    return make_reservation(geometry_of(num_prompt_pages, budget), pages, host_pages)


class LedgerAgainstModel(RuleBasedStateMachine):
    """Scheduler's view of requests: an allocator and a host store of plain numbers, and who holds each of them.

    Model of a request: [unlisted device pages, device pages in its row, host pages]. A row's pages are freed with
    the row, by SGLang; all others by whoever closes the reservation.
    """

    @initialize(num_host_pages=st.integers(10, 60), budget=st.sampled_from([0.1, 0.5, 1.0]))
    def build(self, num_host_pages, budget):
        self.ledger, self.store = Ledger(PAGE), HostStore(num_host_pages, 1, 8, 8, torch.float32, "cpu")
        self.store.make_first()
        self.free, self.num_host_pages, self.budget = list(range(1, 61)), num_host_pages, budget
        self.model = {}

    @precondition(lambda self: len(self.model) < 6)
    @rule(data=st.data(), num_prompt_pages=st.integers(1, 12))
    def open(self, data, num_prompt_pages):
        row = data.draw(st.sampled_from([row for row in range(1, 7) if row not in self.model]))
        geometry = geometry_of(num_prompt_pages, self.budget)
        if geometry.num_pages > len(self.free):
            return
        host_pages = self.store.alloc(geometry.num_host_pages)
        if host_pages is None:
            return
        pages, self.free = self.free[: geometry.num_pages], self.free[geometry.num_pages :]
        self.ledger.open(row, make_reservation(geometry, pages, host_pages))
        self.model[row] = [set(pages), set(), set(host_pages.tolist())]

    @precondition(lambda self: any(not r.committed for r in self.ledger.by_row.values()))
    @rule(data=st.data())
    def commit(self, data):
        row = data.draw(st.sampled_from([row for row, r in self.ledger.by_row.items() if not r.committed]))
        reservation = self.ledger.get(row)
        num_dynamic = data.draw(st.integers(0, HEADS))
        used = reservation.geometry.pages_used(num_dynamic, HEADS)
        host_used = reservation.geometry.host_pages_used(num_dynamic, HEADS)
        all_pages, all_host = reservation.pages.tolist(), reservation.host_pages.tolist()
        unused, unused_host = self.ledger.commit(row, used, host_used)
        assert (unused.tolist(), unused_host.tolist()) == (all_pages[used:], all_host[host_used:])
        assert (reservation.pages.tolist(), reservation.host_pages.tolist()) == (all_pages[:used], all_host[:host_used])
        self.free += unused.tolist()
        self.store.free(unused_host)
        in_row = min(used, reservation.geometry.num_prompt_pages)
        self.model[row] = [set(all_pages[in_row:used]), set(all_pages[:in_row]), set(all_host[:host_used])]
        assert self.ledger.freed_memory

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def close(self, data):
        row = data.draw(st.sampled_from(sorted(self.model)))
        reservation = self.ledger.close(row)
        unlisted, in_row, host = self.model.pop(row)
        assert set(reservation.unlisted_pages.tolist()) == unlisted
        assert set(reservation.host_pages.tolist()) == host
        self.free += [*reservation.unlisted_pages.tolist(), *in_row]
        self.store.free(reservation.host_pages)

    @invariant()
    def nothing_is_lost_or_held_twice(self):
        if not hasattr(self, "ledger"):
            return
        self.ledger.check_integrity()
        self.store.check_integrity([r.host_pages for r in self.ledger.by_row.values()])
        assert set(self.ledger.by_row) == set(self.model)
        everywhere = self.free + [page for u, in_row, _ in self.model.values() for page in (*u, *in_row)]
        assert sorted(everywhere) == list(range(1, 61))
        assert self.ledger.unlisted_tokens() == PAGE * sum(len(u) for u, _, _ in self.model.values())


LedgerAgainstModel.TestCase.settings = LAWS
test_ledger_against_model = LedgerAgainstModel.TestCase


@pytest.fixture
def ledger():
    return Ledger(PAGE)


def test_a_row_holds_one_reservation(ledger):
    ledger.open(3, reservation_of([1, 2]))
    with pytest.raises(AssertionError, match="row 3 already holds"):
        ledger.open(3, reservation_of([4]))


@pytest.mark.parametrize("row", [None, 4])
def test_a_row_that_holds_nothing(ledger, row):
    ledger.open(3, reservation_of([1, 2]))
    assert ledger.get(row) is None
    assert ledger.close(row) is None
    assert ledger.get(3) is not None


def test_a_second_commit_is_refused(ledger):
    ledger.open(3, reservation_of([1, 2, 3, 4]))
    ledger.commit(3, 2, 0)
    with pytest.raises(AssertionError, match="row 3 is committed twice"):
        ledger.commit(3, 2, 0)


def test_memory_is_reported_freed_by_a_commit_only(ledger):
    ledger.open(1, reservation_of([1, 2]))
    ledger.close(1)
    assert not ledger.freed_memory
    ledger.open(1, reservation_of([1, 2]))
    ledger.commit(1, 1, 0)
    assert ledger.freed_memory


@pytest.mark.parametrize(
    ("one", "other", "name"),
    [
        (([1, 2], [7]), ([2, 3], [8]), "pages held twice"),
        (([1, 2], [7]), ([3, 4], [8, 7]), "host_pages held twice"),
        (([1, 1], []), ([3], []), "pages held twice"),
    ],
)
def test_a_page_held_twice_is_found(ledger, one, other, name):
    ledger.open(1, reservation_of(*one))
    ledger.open(2, reservation_of(*other))
    with pytest.raises(AssertionError, match=name):
        ledger.check_integrity()


@pytest.mark.parametrize("pages", [[1, 2], list(range(1, 9))])
def test_a_reservation_that_does_not_fit_its_geometry_is_found(ledger, pages):
    """10 chunks at 0.3 hold 3 or 4 pages once committed."""
    reservation = reservation_of(pages)
    reservation.committed = True
    ledger.open(1, reservation)
    with pytest.raises(AssertionError):
        ledger.check_integrity()
