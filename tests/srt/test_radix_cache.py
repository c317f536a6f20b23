"""The tree of a running server, with real requests, pools and tree core, and the forward played by the test."""

from array import array

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.managers.schedule_batch import FINISH_LENGTH, MM_PAD_SHIFT_VALUE, Req
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_hybridkv.srt import sglang_versions
from sglang_hybridkv.srt.radix_cache import HybridRadixCache
from tests.srt.serving import make_compression
from tests.srt.test_compression import NUM_HEADS, P

PROMPT, WINDOW = 10 * P + 3, 8


class Tree:
    """A tree over a fresh pool, and requests that go through it as the scheduler takes them."""

    def __init__(self):
        self.compression = make_compression(num_pages=100, observation_rows=WINDOW)
        self.rows = ReqToTokenPool(4, 400, "cpu", False)
        params = CacheInitParams(False, self.rows, self.compression.allocator, P, tree_components=(ComponentType.FULL,))
        self.cache = HybridRadixCache(params)

    def request(self, rid, prompt_len, num_generated=0, *, max_new_tokens=50, pad_value=None, **keys):
        """A request in the waiting queue; with generated tokens, one that was retracted.

        With `pad_value`, that number of SGLang's stands for an image from token 4 P + 1 to 6 P.
        """
        ids = array("q", range(prompt_len))
        if pad_value is not None:
            ids[4 * P + 1 : 6 * P] = array("q", [pad_value] * (2 * P - 1))
        req = Req(rid, "", ids, SamplingParams(max_new_tokens=max_new_tokens), **keys)
        req.output_ids.extend(range(1000, 1000 + num_generated))
        req.sampling_params.max_new_tokens += num_generated
        return req

    def prefill(self, req, *chunk_ends):
        """Match the prefix, then compute and insert chunk after chunk; the last one reaches the end."""
        req.init_next_round_input(self.cache)
        hit = sglang_versions.prefix_len(req)
        sglang_versions.take_lock(self.cache, req)
        [row] = self.rows.alloc([req])
        found = req.prefix_indices if hasattr(req, "prefix_indices") else self.cache.prefix_device_indices(req)
        self.rows.write((row, slice(0, hit)), found.int())
        start, end = hit, len(req.full_untruncated_fill_ids)
        for stop in (*chunk_ends, end):
            self._compute(req, row, start, stop)
            self.compression.prepare(req, self.cache)
            if stop == end and self.compression.ledger.get(row) is not None:
                self._compress(row)
            self.cache.checkpoint(req, up_to=stop)
            self._set_prefix(req, row, stop)
            start = stop
        return hit

    def _compute(self, req, row, start, stop):
        last = self.rows.req_to_token[row, start - 1 : start] if start else torch.tensor([-1])
        lens = [torch.tensor([length]) for length in (start, start, stop, stop)]
        slots = self.compression.allocator.alloc_extend(*lens, last.long(), stop - start)
        self.rows.write((row, slice(start, stop)), slots.int())
        sglang_versions.set_extend_end(req, stop)
        req.kv.kv_allocated_len = req.kv.kv_committed_len = stop

    def _set_prefix(self, req, row, length):
        """As SGLang's tree does in 0.5.21, and `checkpoint_kv_cache` since."""
        if not hasattr(req, "prefix_indices"):
            req.prefix_len = length

    def _compress(self, row):
        reservation = self.compression.ledger.get(row)
        reservation.outcome.copy_(torch.tensor([NUM_HEADS, 0]))
        reservation.digest = torch.tensor(0)

    def decode(self, req, num_tokens):
        for token in range(num_tokens):
            row, length = req.kv.req_pool_idx, req.kv.kv_allocated_len
            last = self.rows.req_to_token[row, length - 1 : length].long()
            slot = self.compression.allocator.alloc_decode(*[torch.tensor([length + 1])] * 2, last)
            self.rows.write((row, slice(length, length + 1)), slot.int())
            req.output_ids.append(1000 + token)
            req.kv.kv_allocated_len = req.kv.kv_committed_len = length + 1

    def retract(self, req):
        """As SGLang's `release_kv_cache` without an insert, and what it does around."""
        self._give_back(req, is_inserted=False)
        self.rows.free(req)
        req.kv.mark_kv_released()
        req.reset_for_retract()

    def release(self, req):
        """As SGLang's `release_kv_cache`, which asks for a running server."""
        req.finished_reason = FINISH_LENGTH(length=len(req.output_ids))
        self.cache.checkpoint(req, up_to=req.kv.kv_committed_len)
        self._give_back(req, is_inserted=True)

    def _give_back(self, req, *, is_inserted):
        self.cache.free_kv_row(req.kv, [(req.kv.cache_protected_len, req.kv.kv_committed_len)])
        sglang_versions.drop_lock(self.cache, req)
        word = "inserted" if hasattr(self.cache, "insert_req") else "checkpointed"
        self.cache.on_release(req, **{word: is_inserted})

    def evict_all(self):
        self.cache.evict(EvictParams(num_tokens=100 * P))

    def is_whole(self, req):
        """Whether each page is free, in the tree, `req`'s own or in the ledger, as SGLang's leak check counts them."""
        own = -(-req.kv.kv_allocated_len // P) * P - req.kv.cache_protected_len
        in_tree = self.cache.evictable_size() + self.cache.protected_size()
        free, unlisted = self.compression.allocator.available_size(), self.compression.ledger.unlisted_tokens()
        return free + in_tree + own + unlisted == 100 * P


@pytest.mark.parametrize("num_generated", [1, P, 3 * P + 1])
@pytest.mark.parametrize("chunk_ends", [(), (4 * P,), (10 * P, 11 * P), (11 * P,)])
def test_the_tree_never_owns_what_a_retracted_request_goes_on_to_read(num_generated, chunk_ends):
    """After its commit the tree may evict what it holds; tokens behind the compressed prompt are no part of that."""
    tree = Tree()
    req = tree.request("again", PROMPT, num_generated)
    end = PROMPT + num_generated
    tree.prefill(req, *(stop for stop in chunk_ends if stop < end))
    covered = tree.compression.ledger.get(req.kv.req_pool_idx).geometry.covered
    assert covered == 10 * P
    assert (tree.cache.evictable_size(), tree.cache.protected_size()) == (covered, 0)
    assert tree.is_whole(req)
    tree.evict_all()
    assert tree.is_whole(req)
    tail = tree.rows.req_to_token[req.kv.req_pool_idx, covered:end].tolist()
    free = set(tree.compression.allocator.get_all_free_pages().tolist())
    assert len(set(tail)) == num_generated + 3
    assert not free & {slot // P for slot in tail}
    tree.release(req)
    assert tree.compression.allocator.available_size() == 100 * P


@pytest.mark.parametrize("num_tokens", [1, P, 3 * P + 1])
@pytest.mark.parametrize("is_evicted", [False, True])
def test_a_retracted_request_gives_all_back_and_returns_to_its_plan(num_tokens, is_evicted):
    """Twice, with or without its prompt in the tree; what it has generated meanwhile changes nothing."""
    tree = Tree()
    req = tree.request("r", PROMPT, max_new_tokens=99)
    tree.prefill(req)
    geometry = tree.compression.ledger.get(req.kv.req_pool_idx).geometry
    for _ in range(2):
        tree.decode(req, num_tokens)
        assert tree.is_whole(req)
        tree.retract(req)
        assert not tree.compression.ledger.by_row
        assert tree.compression.allocator.available_size() + tree.cache.evictable_size() == 100 * P
        assert tree.cache.evictable_size() == geometry.covered
        if is_evicted:
            tree.evict_all()
        hit = tree.prefill(req)
        assert (hit > 0) == (not is_evicted)
        assert tree.compression.ledger.get(req.kv.req_pool_idx).geometry == geometry
        assert tree.is_whole(req)
    tree.release(req)
    tree.evict_all()
    assert tree.compression.allocator.available_size() == 100 * P


@pytest.mark.parametrize("was_read", [False, True])
def test_of_a_prompt_that_was_given_up_the_tree_keeps_what_is_exact(was_read, monkeypatch):
    """All of it, unless another rank has read compressed pages meanwhile: then no token behind the prompt."""
    tree = Tree()
    settle = tree.compression.settle

    def fails(reservation):
        settle(reservation)
        reservation.failed, reservation.was_read = True, was_read

    monkeypatch.setattr(tree.compression, "settle", fails)
    req = tree.request("r", PROMPT, max_new_tokens=99)
    tree.prefill(req)
    tree.decode(req, 3 * P)
    assert tree.is_whole(req)
    tree.release(req)
    in_tree = tree.cache.evictable_size()
    assert in_tree == (PROMPT if was_read else PROMPT + 3 * P) // P * P
    assert tree.compression.allocator.available_size() + in_tree == 100 * P


@pytest.mark.parametrize("num_generated", [0, 5])
def test_a_hit_ends_before_the_observed_rows(num_generated):
    tree = Tree()
    tree.prefill(tree.request("first", PROMPT + 20))
    assert tree.prefill(tree.request("again", PROMPT, num_generated)) == (PROMPT - WINDOW) // P * P


def test_a_request_that_is_served_dense_finds_all_that_stock_finds():
    tree = Tree()
    tree.prefill(tree.request("first", PROMPT + 20))
    assert tree.prefill(tree.request("one-token", 10 * P + 1, max_new_tokens=1)) == 10 * P


@pytest.mark.parametrize("max_new_tokens", [50, 1])
@pytest.mark.parametrize("name", ["extra_key", "cache_salt"])
def test_nothing_is_found_under_another_key(name, max_new_tokens):
    """Compressed or served dense, and while the first request still runs, too."""
    tree = Tree()
    tree.prefill(tree.request("first", PROMPT, **{name: "a"}))
    for place, keys in enumerate(({name: "b"}, {}, {"extra_key": "a", "cache_salt": "a"})):
        assert tree.prefill(tree.request(f"other {place}", PROMPT, max_new_tokens=max_new_tokens, **keys)) == 0
        assert len(tree.compression.ledger.by_row) == 1 + (place + 1) * (max_new_tokens > 1)


@pytest.mark.parametrize("bit", range(30))
def test_an_image_is_told_apart_by_every_bit_of_its_number(bit):
    """SGLang keeps 30 bits of an image's hash, and none of them is lost here: a hit ends where the image begins."""
    pad_value = MM_PAD_SHIFT_VALUE + 0x2AAAAAAA
    tree = Tree()
    tree.prefill(tree.request("first", PROMPT, pad_value=pad_value))
    assert tree.prefill(tree.request("same", PROMPT, pad_value=pad_value)) == (PROMPT - WINDOW) // P * P
    other = MM_PAD_SHIFT_VALUE + (0x2AAAAAAA ^ (1 << bit))
    assert tree.prefill(tree.request("other", PROMPT, pad_value=other)) == 4 * P
