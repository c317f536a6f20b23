"""The Triton twin, interpreted: against attention in fp64, over ragged lengths, shapes, types and ways to split."""

import pytest
import torch

from hybridkv_kernels import gpu
from hybridkv_kernels.decode_attn import decode_attn, naive
from tests.builders import NAN, fresh_generator
from tests.kernels import test_decode_attn as cases
from tests.kernels.test_decode_attn import MIXED, RAGGED, Batch
from tests.kernels.test_estimate import dynamic_pool, mixed_pool

triton = pytest.importorskip("triton")

from hybridkv_kernels.decode_attn import triton as twin  # noqa: E402

TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (2e-2, 2e-2), torch.float16: (3e-3, 3e-3)}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What is not written is NaN, or a number that no index survives."""
    plain = torch.empty

    def poisoned(*size, **options):
        tensor = plain(*size, **options)
        return tensor.fill_(NAN if tensor.is_floating_point() else cases.NOWHERE)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda like: poisoned(like.shape, dtype=like.dtype))


def check(batch, **options):
    rtol, atol = TOLERANCE[batch.q.dtype]
    batch.check(rtol, atol, attend=twin.decode_attn, **options)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_group_sizes(group):
    check(Batch(MIXED[:3], group=group))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
def test_head_dims_and_dtypes(head_dim, dtype):
    check(Batch(MIXED[:3], head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("num_splits", [1, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_batches_however_they_are_split(dtype, num_splits):
    check(Batch(RAGGED, group=3, dtype=dtype, pages=256), num_splits=num_splits)


@pytest.mark.parametrize("page_size", [8, 16, 32, 64])
def test_page_sizes(monkeypatch, page_size):
    """One page below, at and above the rows of a block."""
    monkeypatch.setattr(cases, "PAGE", page_size)
    requests = [(4, [[4, 1]], page_size - 1), (1, None, page_size + 1), (2, [[0, 2]], page_size)]
    check(Batch(requests, layers=1, pages=16))


def test_many_layers_and_more_entries_than_a_block(monkeypatch):
    monkeypatch.setattr(twin, "BLOCK_ENTRIES", 4)
    counts = [[1 + (layer + head) % 2 for head in range(3)] for layer in range(3)]
    check(Batch([(2, counts, 3), (1, None, 5), (2, counts, 9)], layers=3, heads=3))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_and_lengths_of_either_integer_type(dtype):
    arguments = Batch(MIXED).arguments(0)
    expected = twin.decode_attn(**arguments)
    for name in ("req_rows", "seq_lens"):
        arguments[name] = arguments[name].to(dtype)
    assert torch.equal(twin.decode_attn(**arguments), expected)


def test_padding_reads_nothing_and_changes_nothing():
    """A CUDA graph's batch is filled up with row 0, length 0: its first slot is NaN here."""
    batch = Batch(MIXED)
    arguments = batch.arguments(0)
    alone = twin.decode_attn(**arguments)
    for name, padding in (("q", NAN), ("req_rows", 0), ("seq_lens", 0)):
        rows = arguments[name]
        arguments[name] = torch.cat((rows, torch.full_like(rows[:2], padding)))
    padded = twin.decode_attn(**arguments)
    torch.testing.assert_close(padded[:-2], alone)
    assert (padded[-2:] == 0).all()


def test_inputs_are_only_read():
    batch = Batch(MIXED)
    before = batch.keys.clone(), batch.values.clone(), batch.q.clone()
    twin.decode_attn(**batch.arguments(0))
    for tensor, copy in zip((batch.keys, batch.values, batch.q), before, strict=True):
        assert torch.equal(tensor.nan_to_num(9.0), copy.nan_to_num(9.0))


@pytest.mark.parametrize("special", [float("inf"), NAN])
def test_a_broken_key_breaks_its_own_head_only(special):
    batch = Batch([(1, None, 40), (1, None, 9)], layers=1)
    batch.keys[0, int(batch.req_to_token[batch.rows[0], 35]), 1] = special
    out = twin.decode_attn(**batch.arguments(0), num_splits=100)
    assert out[0, 2:].isnan().all()
    torch.testing.assert_close(out[0, :2].double(), batch.expected[0, 0][:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[1].double(), batch.expected[1, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("triton_kernels")
def test_the_public_function_calls_it(monkeypatch):
    called = []
    monkeypatch.setattr(gpu, "load_twin", lambda op: called.append(op) or twin.decode_attn)
    Batch(MIXED[:3]).check(attend=decode_attn)
    assert called == ["decode_attn"] * 2


def test_the_plan_covers_every_row_once_within_its_bound():
    """Splits of an entry are contiguous, whole blocks, as even as blocks allow, and never empty."""
    generator = fresh_generator()
    entries, num_splits = 70, 9
    lens = torch.randint(0, 40 * twin.BLOCK_ROWS, (entries,), generator=generator, dtype=torch.int32)
    lens[::7] = 0
    rows, nothing = torch.arange(entries), torch.zeros(entries, dtype=torch.int32)
    first, most = torch.empty(entries + 1, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    twin._plan[(1,)](
        first,
        most,
        rows,
        lens,
        nothing,
        nothing,
        nothing,
        nothing,
        nothing,
        entries,
        num_splits,
        0,
        L=1,
        H=1,
        P=8,
        V=0,
        BLOCK_ROWS=twin.BLOCK_ROWS,
        BLOCK_ENTRIES=16,
    )
    splits, blocks = first.diff(), -(-lens // twin.BLOCK_ROWS)
    assert first[0] == 0
    assert first[-1] <= num_splits + entries
    assert torch.equal(splits, -(-blocks // most))
    assert torch.equal(splits == 0, lens == 0)
    assert (splits <= blocks).all()


@pytest.mark.parametrize("chunk_score", ["mean_max", "mean4_max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimated_chunks(chunk_score, dtype):
    pool, prompts = mixed_pool(chunk_score=chunk_score, dtype=dtype)
    q = pool.queries(len(prompts))
    pool.retrieve(prompts, 1, q)
    pool.check(prompts, 1, q, attend=twin.decode_attn)
    pool.check(prompts, 1, q, attend=twin.decode_attn, num_splits=100)


def test_nothing_to_estimate_is_no_estimate_bit_for_bit():
    pool, prompt = dynamic_pool(budget=1.0)
    q = pool.queries(1)
    assert not pool.absent(prompt, 0, 0)
    plain = pool.attend([prompt], 0, q, estimate=False, attend=twin.decode_attn, num_splits=5)
    assert torch.equal(pool.attend([prompt], 0, q, attend=twin.decode_attn, num_splits=5), plain)


def test_it_agrees_with_the_reference_when_it_retrieves():
    pool, prompts = mixed_pool()
    for layer in range(pool.layout.num_layers):
        q = pool.queries(len(prompts))
        pool.retrieve(prompts, layer, q)
        for estimate in (False, True):
            mine = pool.attend(prompts, layer, q, estimate, attend=twin.decode_attn)
            expected = pool.attend(prompts, layer, q, estimate, attend=naive.decode_attn)
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
