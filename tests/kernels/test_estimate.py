"""Chunks that are not retrieved take part in decode attention through their means, against brute force in fp64."""

import dataclasses
import math
from unittest import mock

import pytest
import torch

from hybridkv_kernels.chunks import ESTIMATING_SCORES, summarize_chunks, summary_vectors
from hybridkv_kernels.decode_attn import cpu
from tests.builders import NAN, TinyPool, eager_config, fresh_generator, full_attention, head_page, poisoned_memory
from tests.kernels.test_decode_attn import DTYPES, NOWHERE, TOLERANCE, each_instruction_set, split  # noqa: F401
from tests.kernels.test_retrieve_chunks import check_selection

P = 8

each_implementation = pytest.mark.usefixtures("kernels")
each_score = pytest.mark.parametrize("chunk_score", ESTIMATING_SCORES)


class EstimatingPool(TinyPool):
    """A pool whose compressed prompts have mean values beside the mean keys of their dynamic heads."""

    def __init__(self, *, budget=0.3, chunk_score="mean_max", **shape):
        config = eager_config(budget=budget, chunk_score=chunk_score, unretrieved="estimate", theta=0.5)
        super().__init__(fresh_generator(), config, **{"pages": 300, "host_pages": 120} | shape)

    def compress(self, prompt, statistic=None, salience=None, **options):
        """Every second head is dynamic, all of them with statistic 0."""
        heads = self.layout.num_layers, self.layout.num_kv_heads
        if statistic is None:
            statistic = (torch.arange(heads[0] * heads[1]) % 2).view(heads).float()
        super().compress(prompt, statistic, salience, **options)

    def dynamic_heads(self, prompt, layer):
        return [head for head in range(self.layout.num_kv_heads) if self.is_dynamic(prompt, layer, head)]

    def chunks(self, prompt, layer, head):
        """Exact keys and values [C, P, D] of one head."""
        covered = prompt.reservation.geometry.covered
        return [rows[layer, head, :covered].view(-1, P, self.shape.head_dim) for rows in (prompt.keys, prompt.values)]

    def summary_row(self, prompt, layer, head, vector):
        """[D]: place of a summary vector, in K page, V page, next K page of the head's summary pages."""
        linear = int(self.table.first_summary_page[prompt.row, layer, head]) + vector // (2 * P)
        page, inside = divmod(linear, self.layout.head_pages_per_page)
        place = (prompt.reservation.pages[page], *divmod(inside, self.layout.num_kv_heads), P)
        return head_page((self.keys, self.values)[vector // P % 2], *place)[vector % P]

    def absent(self, prompt, layer, head):
        """Chunks that a head does not hold; none of a static head."""
        if not self.is_dynamic(prompt, layer, head):
            return []
        held = self.mapped_chunks(prompt, layer, head)
        return [chunk for chunk in range(prompt.reservation.geometry.num_prompt_pages) if chunk not in held]

    def attend(self, prompts, layer, q, estimate=True):
        retrieval = self.cache.retrieval if estimate else None
        with poisoned_memory(integers=(NOWHERE, NOWHERE + 1)), mock.patch.object(self.cache, "retrieval", retrieval):
            return super().attend(prompts, layer, q)

    def expected(self, prompt, layer, q):
        """[H * G, D], fp64: each mean as the rows it stands for, all of them equal."""
        parts = summary_vectors(self.config.chunk_score)
        outputs = []
        for head, query in enumerate(q.view(self.layout.num_kv_heads, self.shape.group_size, self.shape.head_dim)):
            if prompt.reservation is None:
                rows = [prompt.keys[layer, head], prompt.values[layer, head]]
            else:
                covered, absent = prompt.reservation.geometry.covered, self.absent(prompt, layer, head)
                tail = (prompt.keys[layer, head, covered:], prompt.values[layer, head, covered:])
                exact = self.held_rows(prompt, layer, head)
                means = [
                    rows[absent].double().unflatten(1, (parts, -1)).mean(2).to(self.shape.dtype).flatten(0, 1)
                    for rows in self.chunks(prompt, layer, head)
                ]
                rows = [
                    torch.cat((held, mean.repeat_interleave(P // parts, dim=0), own))
                    for held, mean, own in zip(exact, means, tail, strict=True)
                ]
            outputs.append(full_attention(query, rows[0][None], rows[1][None], self.scaling))
        return torch.cat(outputs)

    def check(self, prompts, layer, q):
        rtol, atol = TOLERANCE[self.shape.dtype]
        before = self.keys.clone(), self.values.clone(), self.views.held_chunks.clone()
        out = self.attend(prompts, layer, q)
        for tensor, copy in zip((self.keys, self.values, self.views.held_chunks), before, strict=True):
            torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)
        assert out.dtype == self.shape.dtype
        for mine, prompt, query in zip(out, prompts, q, strict=True):
            torch.testing.assert_close(mine.double(), self.expected(prompt, layer, query), rtol=rtol, atol=atol)


def mixed_pool(**options):
    """Compressed requests of several lengths with static and dynamic heads, and two dense ones, in random order."""
    pool = EstimatingPool(**options)
    prompts = [pool.add_prompt(length) for length in (21 * P + 3, 3 * P, 9 * P, 33 * P + 1, 1)]
    for i in (0, 2, 3):
        pool.compress(prompts[i])
        for _ in range(i + 1):
            pool.append_token(prompts[i])
    order = torch.randperm(len(prompts), generator=pool.generator)
    return pool, [prompts[i] for i in order]


def dynamic_pool(length=24 * P, **options):
    """One compressed request; all its heads are dynamic."""
    pool = EstimatingPool(**options)
    prompt = pool.add_prompt(length)
    pool.compress(prompt, torch.zeros(pool.layout.num_layers, pool.layout.num_kv_heads))
    pool.append_token(prompt)
    return pool, prompt


@each_implementation
@each_score
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_with_every_chunk_resident_nothing_changes_and_no_summary_is_read(dtype, chunk_score):
    pool, prompts = mixed_pool(budget=1.0, chunk_score=chunk_score, dtype=dtype)
    for prompt in prompts:
        for layer in range(2 if prompt.reservation else 0):
            for head in pool.dynamic_heads(prompt, layer):
                for i in range(prompt.reservation.geometry.num_prompt_pages * pool.config.retrieval.stored_vectors):
                    pool.summary_row(prompt, layer, head, i).fill_(NAN)
    for layer in range(2):
        q = pool.queries(len(prompts))
        out = pool.attend(prompts, layer, q)
        assert out.isfinite().all()
        assert torch.equal(out, pool.attend(prompts, layer, q, estimate=False))


@pytest.mark.usefixtures("fast_kernels")
@each_score
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("budget", [0.1, 0.5])
def test_chunks_of_equal_rows_give_full_attention_whatever_is_resident(budget, dtype, chunk_score):
    pool = EstimatingPool(budget=budget, chunk_score=chunk_score, dtype=dtype, group_size=3)
    prompt = pool.add_prompt(24 * P)
    prompt.keys, prompt.values = (x[:, :, ::P].repeat_interleave(P, dim=2) for x in (prompt.keys, prompt.values))
    pool.rewrite(prompt)
    pool.compress(prompt, torch.zeros(2, 2))
    pool.append_token(prompt)
    rtol, atol = TOLERANCE[dtype]
    for step in range(4):
        layer, q = step % 2, pool.queries(1)
        if step:
            pool.retrieve([prompt], layer, pool.queries(1))
        assert all(pool.absent(prompt, layer, head) for head in range(2))
        expected = full_attention(q[0], prompt.keys[layer], prompt.values[layer], pool.scaling)
        torch.testing.assert_close(pool.attend([prompt], layer, q)[0].double(), expected, rtol=rtol, atol=atol)


@pytest.mark.usefixtures("fast_kernels")
@each_score
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_softmax_over_held_rows_means_and_tail(dtype, chunk_score):
    pool, prompts = mixed_pool(chunk_score=chunk_score, dtype=dtype, group_size=3)
    for step in range(4):
        layer, q = step % 2, pool.queries(len(prompts))
        pool.retrieve(prompts, layer, q)
        for prompt, query in zip(prompts, q, strict=True):
            if prompt.reservation and dtype == torch.float32:
                check_selection(pool, prompt, layer, query)  # by the keys of the summaries only
        pool.check(prompts, layer, pool.queries(len(prompts)))


@each_implementation
@each_score
def test_the_summaries_of_resident_chunks_do_not_count(chunk_score):
    pool, prompt = dynamic_pool(chunk_score=chunk_score)
    q, vectors = pool.queries(1), pool.config.retrieval.stored_vectors
    before = pool.attend([prompt], 0, q)
    for head in range(2):
        for chunk in pool.mapped_chunks(prompt, 0, head):
            for i in range(chunk * vectors, (chunk + 1) * vectors):
                pool.summary_row(prompt, 0, head, i).fill_(7.0)
    assert torch.equal(pool.attend([prompt], 0, q), before)


@each_implementation
@pytest.mark.parametrize("vector", [0, 1])
def test_poison_in_an_absent_chunk_is_seen_in_its_own_head(vector):
    """The tests above can fail: its mean key and its mean value reach the output."""
    pool, prompt = dynamic_pool()
    chunk = pool.absent(prompt, 0, 1)[-1]
    pool.summary_row(prompt, 0, 1, 2 * chunk + vector).fill_(NAN)
    out = pool.attend([prompt], 0, pool.queries(1))[0].view(2, -1)
    assert out[0].isfinite().all()
    assert out[1].isnan().any()


@pytest.mark.usefixtures("fast_kernels")
@each_score
def test_a_broad_head_comes_closer_to_full_attention(chunk_score):
    """Small keys, so that all tokens count, and values that drift: what was not retrieved is missed."""
    pool = EstimatingPool(budget=0.1, chunk_score=chunk_score)
    prompt = pool.add_prompt(30 * P)
    prompt.keys *= 0.1
    prompt.values += torch.linspace(-3, 3, 30 * P)[:, None]
    pool.rewrite(prompt)
    pool.compress(prompt, torch.zeros(2, 2))
    pool.append_token(prompt)
    q = pool.queries(1)
    pool.retrieve([prompt], 0, q)
    expected = full_attention(q[0], prompt.keys[0], prompt.values[0], pool.scaling)
    with_means, without = ((pool.attend([prompt], 0, q, estimate)[0] - expected).norm() for estimate in (True, False))
    assert with_means < without / 5


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_score", ["mean_max", "mean4_max"])
def test_one_softmax_however_it_is_split(chunk_score, dtype):
    pool, prompts = mixed_pool(chunk_score=chunk_score, dtype=dtype, group_size=7)
    for layer in range(2):
        pool.retrieve(prompts, layer, pool.queries(len(prompts)))
        pool.check(prompts, layer, pool.queries(len(prompts)))


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize(("head_dim", "group_size"), [(32, 16), (64, 1), (80, 2), (96, 5), (128, 16)])
def test_model_shapes(head_dim, group_size):
    pool, prompts = mixed_pool(head_dim=head_dim, group_size=group_size, chunk_score="mean2_max")
    pool.check(prompts, 1, pool.queries(len(prompts)))


@pytest.mark.usefixtures("fast_kernels")
def test_more_means_than_a_split():
    options = {"chunk_score": "mean4_max", "budget": 0.1, "num_layers": 1, "pages": 1200, "host_pages": 400}
    pool, prompt = dynamic_pool(400 * P + 5, **options)
    assert min(len(pool.absent(prompt, 0, head)) * 4 for head in range(2)) > cpu.SPLIT_ROWS
    pool.check([prompt], 0, pool.queries(1))


@each_instruction_set
def test_the_number_of_threads_changes_nothing(twin, monkeypatch):
    """Of C++, to the last bit: rows of pages and of tails, and means."""
    monkeypatch.setattr(cpu, "SPLIT_ROWS", 16)
    (pool, prompts), outputs = mixed_pool(), []
    q, before = pool.queries(len(prompts)), torch.get_num_threads()
    for num_threads in (1, 2, 4):
        torch.set_num_threads(num_threads)
        outputs.append(pool.attend(prompts, 0, q))
    torch.set_num_threads(before)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("kernels", ["cpu"], indirect=True)
def test_cpp_leaves_static_heads_and_dense_requests_as_they_are(kernels):
    """Bit by bit; other implementations sum the heads of a batch in an order that depends on all of them."""
    pool, prompts = mixed_pool()
    q = pool.queries(len(prompts))
    same = [pool.attend(prompts, 0, q, estimate).view(len(q), 2, -1) for estimate in (True, False)]
    for i, prompt in enumerate(prompts):
        for head in range(2):
            has_absent = prompt.reservation is not None and bool(pool.absent(prompt, 0, head))
            assert torch.equal(same[0][i, head], same[1][i, head]) != has_absent


# Bad input.


@pytest.mark.parametrize("chunk_score", ["quest", "arkvale", "mean", ""])
def test_scores_that_cannot_estimate_are_named(chunk_score):
    pool, prompts = mixed_pool()
    q = pool.queries(len(prompts))
    retrieval = dataclasses.replace(pool.config.retrieval, chunk_score=chunk_score)
    legal = ", ".join(ESTIMATING_SCORES)
    message = f"^chunk_score: expected one of {legal} where chunks are estimated, got '{chunk_score}'$"
    pool.cache.retrieval = retrieval
    for call in (
        lambda: pool.attend(prompts, 0, q),
        lambda: pool.retrieve(prompts, 0, q),
        lambda: retrieval.count_vectors(2 * P),
        lambda: summarize_chunks(torch.zeros(1, 2, P, 4), chunk_score, torch.zeros(1, 2, P, 4)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("value", [-1, 10**6])
def test_debug_mode_names_chunks_and_summaries_out_of_range(monkeypatch, value):
    monkeypatch.setenv("HYBRIDKV_DEBUG", "1")
    pool, prompt = dynamic_pool()
    q = pool.queries(1)
    assert math.isfinite(float(pool.attend([prompt], 0, q).sum()))
    heads = torch.tensor([0])
    buffer = pool.table.buffer_page_ids(prompt.row, 0, heads, pool.table.num_head_pages[prompt.row, 0, heads])[0]
    for name, tensor, place in (
        ("views.held_chunks", pool.views.held_chunks, buffer[-1]),
        ("table.first_summary_page", pool.table.first_summary_page, (prompt.row, 0, 0)),
    ):
        before = tensor[place].clone()
        tensor[place] = value
        with pytest.raises(ValueError, match=rf"^{name}\[{prompt.row}\]: expected 0 to \d+, got .*{value}"):
            pool.attend([prompt], 0, q)
        tensor[place] = before
