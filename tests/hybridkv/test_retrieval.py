"""Decode steps of dynamic heads below budget 1.0, against brute force over the exact keys."""

import itertools

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sglang_hybridkv.config import CompressorConfig
from tests.builders import LAWS, NAN, TinyPool, fresh_generator, full_attention, plain_forced, plain_scores

P = 8


def check_attention(pool, prompt, layer, q, out):
    """Each head attends exactly to the rows it holds and to the tail."""
    covered = prompt.reservation.geometry.covered
    keep = torch.zeros(pool.layout.num_kv_heads, prompt.seq_len, dtype=torch.bool)
    keep[:, covered:] = True
    for head in range(pool.layout.num_kv_heads):
        keep[head, pool.held_tokens(prompt, layer, head)] = True
    expected = full_attention(q, prompt.keys[layer], prompt.values[layer], pool.scaling, keep)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def check_selection(pool, prompt, layer, q):
    """A dynamic head holds the forced chunks and, of the rest, the best for this query."""
    config, geometry = pool.config, prompt.reservation.geometry
    sinks, recent = -(-config.num_sink_tokens // P), -(-config.recent_window // P)
    grouped = q.view(pool.layout.num_kv_heads, -1, q.shape[-1])
    for head in range(pool.layout.num_kv_heads):
        if not pool.is_dynamic(prompt, layer, head):
            continue
        held = set(pool.mapped_chunks(prompt, layer, head))
        forced = plain_forced(geometry.num_chunks, len(held), sinks, recent)
        assert forced <= held
        chunks = prompt.keys[layer, head, : geometry.covered].view(-1, P, pool.head_dim)
        scores = plain_scores(chunks, grouped[head], config.chunk_score)
        chosen, dropped = held - forced, set(range(geometry.num_chunks)) - held
        if chosen and dropped:
            assert min(scores[c] for c in chosen) >= max(scores[c] for c in dropped) - 1e-4


class DecodeAgainstBruteForce(RuleBasedStateMachine):
    """Two compressed requests and a dense one that decode in turns, with random and with repeated queries."""

    @initialize(
        seed=st.integers(0, 2**31 - 1),
        budget=st.sampled_from([0.15, 0.3, 0.6, 1.0]),
        chunk_score=st.sampled_from(["mean_max", "mean_mean", "quest", "arkvale"]),
        theta=st.sampled_from([0.0, 0.5, 1.01]),
        windows=st.sampled_from([(0, 0), (4, 16), (20, 40)]),
        group_size=st.sampled_from([1, 7]),
    )
    def build(self, seed, budget, chunk_score, theta, windows, group_size):
        config = CompressorConfig(
            budget=budget,
            chunk_score=chunk_score,
            theta=theta,
            num_sink_tokens=windows[0],
            recent_window=windows[1],
            page_size=P,
            min_head_pages=1,
            min_prompt_tokens=1,
        )
        generator = torch.Generator().manual_seed(seed)
        self.pool = TinyPool(generator, config, head_dim=16, group_size=group_size)
        self.prompts = [self.pool.add_prompt(n) for n in (17 * P + 3, 25, 9 * P)]
        for i in (0, 2):
            self.pool.compress(self.prompts[i])
        self.last_q = self.pool.queries(1)[0]

    @rule(which=st.sampled_from([0, 2]), layer=st.integers(0, 1), again=st.booleans())
    def query(self, which, layer, again):
        pool, prompt = self.pool, self.prompts[which]
        if not again:
            self.last_q = pool.queries(1)[0]
        heads = [h for h in range(2) if pool.is_dynamic(prompt, layer, h)]
        before = {h: dict(zip(*self._places(prompt, layer, h), strict=True)) for h in heads}
        counters = pool.counters.clone()
        out = pool.decode([prompt], layer, self.last_q[None])[0]
        chosen, hit = (pool.counters - counters).tolist()
        sinks, recent = -(-pool.config.num_sink_tokens // P), -(-pool.config.recent_window // P)
        expected_chosen = expected_missing = 0
        for h in heads:
            after = dict(zip(*self._places(prompt, layer, h), strict=True))
            forced = plain_forced(prompt.reservation.geometry.num_chunks, len(after), sinks, recent)
            expected_chosen += len(set(after.values()) - forced)
            expected_missing += len(set(after.values()) - set(before[h].values()))
            for place, chunk in before[h].items():
                assert after[place] == chunk or chunk not in after.values(), "what stays does not move"
        assert (chosen, hit) == (expected_chosen, expected_chosen - expected_missing)
        check_selection(pool, prompt, layer, self.last_q)
        check_attention(pool, prompt, layer, self.last_q, out)

    @rule(layer=st.integers(0, 1))
    def query_all(self, layer):
        pool = self.pool
        q = pool.queries(3)
        out = pool.decode(self.prompts, layer, q)
        for i in (0, 2):
            check_selection(pool, self.prompts[i], layer, q[i])
            check_attention(pool, self.prompts[i], layer, q[i], out[i])
        dense = self.prompts[1]
        expected = full_attention(q[1], dense.keys[layer], dense.values[layer], pool.scaling)
        torch.testing.assert_close(out[1].double(), expected, rtol=1e-4, atol=1e-5)

    @rule(which=st.integers(0, 2))
    def append(self, which):
        self.pool.append_token(self.prompts[which])

    @invariant()
    def the_map_says_what_the_buffers_hold(self):
        if not hasattr(self, "pool"):
            return
        for prompt, layer, head in itertools.product((self.prompts[0], self.prompts[2]), range(2), range(2)):
            held = self.pool.held_tokens(prompt, layer, head)
            if self.pool.is_dynamic(prompt, layer, head):
                mapped = self.pool.mapped_chunks(prompt, layer, head)
                assert held == [chunk * P + i for chunk in mapped for i in range(P)]
                assert len(set(mapped)) == len(mapped)

    def _places(self, prompt, layer, head):
        return self.pool.head_pages_of(prompt, layer, head), self.pool.mapped_chunks(prompt, layer, head)


DecodeAgainstBruteForce.TestCase.settings = settings(LAWS, max_examples=30, stateful_step_count=12)
test_decode_against_brute_force = DecodeAgainstBruteForce.TestCase


def dynamic_pool(**config):
    values = {"theta": 1.01, "page_size": P, "min_head_pages": 1, "min_prompt_tokens": 1, "budget": 0.3}
    return TinyPool(fresh_generator(), CompressorConfig(**values | config))


def test_resident_chunks_are_not_read_from_the_host():
    """Poison the host rows of what is resident: a query that wants just that must not notice."""
    pool = dynamic_pool()
    prompt = pool.add_prompt(20 * P)
    pool.compress(prompt)
    q = pool.queries(1)
    before = pool.decode([prompt], 0, q)
    pool.store.k_pages.fill_(NAN)
    pool.store.v_pages.fill_(NAN)
    chosen, hit = pool.counters.tolist()
    assert torch.equal(pool.decode([prompt], 0, q), before)
    assert (pool.counters - torch.tensor([chosen, hit])).unique().numel() == 1, "every chosen chunk was a hit"


def test_static_heads_need_no_retrieval():
    pool = dynamic_pool(theta=0.0)
    prompt = pool.add_prompt(20 * P)
    pool.compress(prompt)
    keys, counters = pool.keys.clone(), pool.counters.clone()
    pool.retrieve(prompt, 0, pool.queries(1)[0])
    assert torch.equal(pool.keys.nan_to_num(7.0), keys.nan_to_num(7.0))
    assert torch.equal(pool.counters, counters)


def test_a_layer_s_retrieval_leaves_the_other_layers_alone():
    pool = dynamic_pool()
    prompt = pool.add_prompt(20 * P)
    pool.compress(prompt)
    before = [pool.held_tokens(prompt, 1, head) for head in range(2)]
    for _ in range(5):
        pool.retrieve(prompt, 0, pool.queries(1)[0])
    assert before == [pool.held_tokens(prompt, 1, head) for head in range(2)]


def test_a_query_that_points_at_a_chunk_finds_it():
    pool = dynamic_pool(num_sink_tokens=0, recent_window=0, budget=0.1)
    prompt = pool.add_prompt(20 * P)
    prompt.keys[0, :, 6 * P : 7 * P] += 3.0
    slots = pool.req_to_token[prompt.row, : prompt.seq_len].long()
    pool.keys[:, slots] = prompt.keys.transpose(1, 2)
    pool.compress(prompt, salience=torch.zeros(2, 2, prompt.seq_len))
    assert all(6 not in pool.mapped_chunks(prompt, 0, head) for head in range(2))
    pool.retrieve(prompt, 0, torch.ones(4, 32))
    assert all(6 in pool.mapped_chunks(prompt, 0, head) for head in range(2))
