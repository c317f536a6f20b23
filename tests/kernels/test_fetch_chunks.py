import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridkv_kernels.fetch_chunks import fetch_chunks
from tests.builders import LAWS, NAN


@dataclasses.dataclass
class Buffers:
    """E heads with buffers of different sizes among foreign head pages, all NaN but what a buffer holds."""

    exact_k: torch.Tensor  # [E, C, P, D]
    exact_v: torch.Tensor
    arguments: dict

    def held(self, head):
        """Chunk by head page of one head, after checking that the page's rows are that chunk's."""
        count = int(self.arguments["num_buffer_pages"][head])
        held = {}
        for page in self.arguments["buffer_page_ids"][head, :count].tolist():
            chunk = int(self.arguments["chunk_of_head_page"][page])
            assert torch.equal(self.arguments["k_head_pages"][page], self.exact_k[head, chunk])
            assert torch.equal(self.arguments["v_head_pages"][page], self.exact_v[head, chunk])
            held[page] = chunk
        assert len(set(held.values())) == count, "a chunk is held twice"
        return held


def make_buffers(seed, counts, num_chunks, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    heads, longest = len(counts), max(counts)
    exact_k, exact_v = (torch.randn(heads, num_chunks, 4, 8, generator=generator).to(dtype) for _ in range(2))
    num_head_pages = heads * longest + 7
    k_pages, v_pages = (torch.full((num_head_pages, 4, 8), NAN, dtype=dtype) for _ in range(2))
    chunk_of = torch.full((num_head_pages,), -1, dtype=torch.int32)
    ids = torch.randperm(num_head_pages, generator=generator)[: heads * longest].view(heads, longest)
    k_host, v_host = (torch.full((heads * num_chunks + 5, 4, 8), NAN, dtype=dtype) for _ in range(2))
    host_ids = torch.randperm(len(k_host), generator=generator)[: heads * num_chunks].view(heads, num_chunks)
    k_host[host_ids], v_host[host_ids] = exact_k, exact_v
    for head, count in enumerate(counts):
        held = torch.randperm(num_chunks, generator=generator)[:count]
        pages = ids[head, :count]
        k_pages[pages], v_pages[pages] = exact_k[head, held], exact_v[head, held]
        chunk_of[pages] = held.int()
        ids[head, count:] = ids[head, 0]
    arguments = {
        "selected": torch.zeros(heads, num_chunks, dtype=torch.bool),
        "buffer_page_ids": ids,
        "num_buffer_pages": torch.tensor(counts),
        "chunk_of_head_page": chunk_of,
        "k_head_pages": k_pages,
        "v_head_pages": v_pages,
        "host_page_ids": host_ids,
        "k_host_pages": k_host,
        "v_host_pages": v_host,
    }
    return Buffers(exact_k, exact_v, arguments)


def choose(buffers, generator):
    selected = buffers.arguments["selected"].zero_()
    for head, count in enumerate(buffers.arguments["num_buffer_pages"].tolist()):
        selected[head, torch.randperm(selected.shape[1], generator=generator)[:count]] = True
    return [set(row.nonzero().flatten().tolist()) for row in selected]


@LAWS
@given(
    st.integers(0, 2**31 - 1),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(0, 12),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_buffers_hold_what_was_selected_and_only_what_was_missing_moved(seed, counts, spare, dtype):
    num_chunks = max(counts) + spare
    buffers = make_buffers(seed, counts, num_chunks, dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(3):
        wanted = choose(buffers, generator)
        before = [buffers.held(head) for head in range(len(counts))]
        arguments = {name: value.clone() for name, value in buffers.arguments.items()}
        missing = 0
        for head, held in enumerate(before):
            missing += len(wanted[head] - set(held.values()))
            # What is resident must not be fetched again: its host copy is poisoned.
            for chunk in held.values():
                buffers.arguments["k_host_pages"][buffers.arguments["host_page_ids"][head, chunk]] = NAN
        moved = fetch_chunks(**buffers.arguments)
        assert moved.dtype == torch.int64
        assert int(moved) == missing
        for name in ("k_host_pages", "v_host_pages"):
            buffers.arguments[name].copy_(arguments[name])
        pages = set()
        for head, held in enumerate(before):
            after = buffers.held(head)
            assert set(after.values()) == wanted[head]
            stays = {page: chunk for page, chunk in held.items() if chunk in wanted[head]}
            assert stays.items() <= after.items(), "a chunk that stays keeps its head page"
            pages |= set(after)
        foreign = [page for page in range(len(buffers.arguments["k_head_pages"])) if page not in pages]
        for name in ("k_head_pages", "v_head_pages"):
            assert buffers.arguments[name][foreign].isnan().all()
        assert (buffers.arguments["chunk_of_head_page"][foreign] == -1).all()


def test_a_second_call_moves_nothing():
    buffers = make_buffers(5, [2, 4, 1], 9)
    choose(buffers, torch.Generator().manual_seed(1))
    fetch_chunks(**buffers.arguments)
    assert int(fetch_chunks(**buffers.arguments)) == 0


def test_a_selection_of_another_size_is_an_error():
    buffers = make_buffers(5, [2, 4, 1], 9)
    buffers.arguments["selected"][:, :3] = True
    with pytest.raises(AssertionError, match="as many pages as its head selects"):
        fetch_chunks(**buffers.arguments)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("selected", torch.zeros(3, 9)),
        ("buffer_page_ids", torch.zeros(2, 4, dtype=torch.int64)),
        ("num_buffer_pages", torch.ones(2, dtype=torch.int64)),
        ("host_page_ids", torch.zeros(3, 8, dtype=torch.int64)),
        ("chunk_of_head_page", torch.zeros(19, dtype=torch.int64)),
        ("chunk_of_head_page", torch.zeros(18, dtype=torch.int32)),
    ],
)
def test_bad_arguments_are_named(name, bad):
    buffers = make_buffers(5, [2, 4, 1], 9)
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        fetch_chunks(**buffers.arguments | {name: bad})


@pytest.mark.parametrize("name", ["v_head_pages", "k_host_pages", "v_host_pages"])
@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_pools_must_be_alike(name, change):
    buffers = make_buffers(5, [2, 4, 1], 9)
    choose(buffers, torch.Generator().manual_seed(1))
    good = buffers.arguments[name]
    bad = good.to(torch.float16) if change == "dtype" else good[..., :4]
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        fetch_chunks(**buffers.arguments | {name: bad})
