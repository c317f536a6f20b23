"""What tensor-parallel ranks agree on; tests/e2e/test_tensor_parallel.py runs two."""

import pytest
import torch

pytest.importorskip("sglang")

from sglang_hybridkv.compressors.sparsemm import SparseMM
from sglang_hybridkv.srt.ranks import Ranks
from tests.srt.serving import make_compression
from tests.srt.test_compression import NUM_HEADS, P, admit, commit, finish


class WithPeer(Ranks):
    """This rank, and another one that says what the test wants."""

    def __init__(self, *of_peer):
        super().__init__()
        self.size, self.of_peer = 2, of_peer

    def gather(self, *values):
        return torch.tensor([values, self.of_peer[: len(values)]])


def committed(num_dynamic, *of_peer):
    compression = make_compression()
    req = admit(compression, 1, 10 * P)
    compression.prepare(req, None)
    if of_peer:
        compression.ranks = WithPeer(*of_peer)
    commit(compression, req, num_dynamic)
    return compression, req


def test_a_commit_counts_the_heads_of_all_ranks_and_keeps_the_pages_that_the_neediest_wants():
    alone, alone_req = committed(3)
    compression, req = committed(1, 0, NUM_HEADS - 3, 3, 7)
    info = compression.request_info(req)
    assert (info["static_heads"], info["dynamic_heads"]) == (2 * NUM_HEADS - 4, 4)
    for name in ("pages", "host_pages"):
        mine, neediest = (getattr(one.ledger.get(1), name) for one in (compression, alone))
        assert len(mine) == len(neediest)
    assert info["host_bytes"] == 2 * alone.request_info(alone_req)["host_bytes"]
    assert info["plan"] != alone.request_info(alone_req)["plan"]
    _, changed_peer = committed(1, 0, NUM_HEADS - 3, 3, 8)
    assert compression.request_info(changed_peer)["plan"] != info["plan"]


@pytest.mark.parametrize(
    ("mine", "theirs", "reason"),
    [
        (None, 1, "compressor_failed"),
        (None, 2, "host_store_full"),
        (3, 0, "host_store_full"),
        (3, 1, "compressor_failed"),
        (5, 2, "compressor_failed"),
    ],
)
def test_a_prompt_that_another_rank_could_not_compress_is_dense_here_too(mine, theirs, reason):
    """With `mine` dynamic heads, where two fit of four; 1 is a fault of the other rank, and 2 an overflow."""
    compression = make_compression(host_pages=5, theta=0.5)
    req = admit(compression, 1, 10 * P)
    compression.prepare(req, None)
    compression.ranks = WithPeer(theirs, 0, 0, 0)
    reservation = compression.ledger.get(1)
    assert reservation.most_dynamic == 2
    if mine is not None:
        reservation.figures = torch.tensor([reservation.geometry.budget_head_pages, 1, 1, mine, 0])
    compression.settle(reservation)
    assert reservation.failed
    compression.give_up(req)
    assert compression.request_info(req)["reason"] == reason
    # Where one rank had compressed it, a decode step may have read its pages, and what follows the prompt is not exact.
    was_read = mine is None or theirs == 0
    assert compression.exact_tokens(req) == (10 * P if was_read else None)
    finish(compression, req)
    assert compression.allocator.available_size() == compression.shape.num_tokens
    assert compression.store.used_bytes() == 0


@pytest.mark.parametrize(
    ("size", "num_total", "num_own", "expected"),
    [(1, 4, 4, [(0, 4)]), (2, 4, 2, [(0, 2), (2, 4)]), (4, 2, 1, [(0, 1), (0, 1), (1, 2), (1, 2)])],
)
def test_each_rank_has_its_own_heads_or_shares_one(size, num_total, num_own, expected):
    ranks = Ranks()
    ranks.size, found = size, []
    for ranks.index in range(size):
        heads = ranks.heads(num_total, num_own)
        found.append((heads.start, heads.stop))
    assert found == expected


def test_calibrated_scores_are_those_of_the_ranks_heads():
    compressor = SparseMM.__new__(SparseMM)
    compressor.scores = torch.arange(8.0).view(2, 4)
    compressor.take_heads(range(2, 4))
    assert compressor.scores.tolist() == [[2.0, 3.0], [6.0, 7.0]]
    compressor.take_layers((1,))
    assert compressor.scores.tolist() == [[6.0, 7.0]]


def _gather(index, place, queue):
    torch.distributed.init_process_group("gloo", init_method=place, rank=index, world_size=2)
    ranks = Ranks(torch.distributed.group.WORLD)
    queue.put((ranks.index, ranks.size, ranks.gather(index, -(2**60) + index).tolist()))
    torch.distributed.destroy_process_group()


def test_two_processes_hear_of_each_other(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    place = f"file://{tmp_path}/store"
    processes = [context.Process(target=_gather, args=(index, place, queue)) for index in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        assert process.exitcode == 0
    heard = sorted(queue.get() for _ in processes)
    assert heard == [(index, 2, [[0, -(2**60)], [1, -(2**60) + 1]]) for index in range(2)]
