"""Keys of two bits an element: what the codes say of a key, and that tokens are found by them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridkv_kernels.chunks import Retrieval, encode_keys, read_codes
from hybridkv_kernels.retrieve_chunks.naive import score_tokens_by_query
from tests.builders import LAWS, fresh_generator
from tests.kernels.plain import coded_keys
from tests.kernels.shapes import DTYPES
from tests.kernels.test_retrieve_chunks import dynamic_pool

CODES = Retrieval(0, 0, "key_codes", 1)


@st.composite
def keys_of(draw):
    """Keys [E, N, D] whose elements differ in mean and spread, some of them constant."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    heads, words, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.sampled_from([1, 8, 64]))
    centre, spread = (torch.randn(heads, 1, head_dim, generator=generator) * 4 for _ in range(2))
    spread[..., ::5] = 0.0
    keys = centre + spread * torch.randn(heads, words * 8, head_dim, generator=generator)
    return keys.to(draw(st.sampled_from(DTYPES)))


@LAWS
@given(keys_of())
def test_a_code_is_the_nearest_of_four_values(keys):
    """Half a step off at most within two steps of the centre, the outermost value beyond."""
    vectors = encode_keys(keys)
    assert vectors.shape == (len(keys), CODES.count_vectors(keys.shape[1]), keys.shape[2])
    assert vectors.dtype == keys.dtype
    centre, step, steps = read_codes(vectors)
    offset = keys.float() - centre
    assert ((steps * step - offset).abs() <= step / 2 + 1e-6 * step).where(offset.abs() < 2 * step, True).all()
    assert torch.equal(steps.sign()[offset != 0], offset.sign()[offset != 0])
    assert steps.abs()[offset.abs() > step].eq(1.5).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_products_with_the_coded_keys(dtype):
    generator = fresh_generator()
    keys, q = (torch.randn(1, n, 64, generator=generator).to(dtype) for n in (48, 3))
    vectors = encode_keys(keys)
    centre, step, steps = read_codes(vectors)
    expected = q[0].double() @ (centre + steps * step)[0].double().T
    # The query times the step is rounded to the pool's dtype, and met by at most 1.5.
    slack = 1.5 * torch.finfo(dtype).eps * (q[0].double().abs() * step[0].double()).sum(1, keepdim=True) + 1e-4
    assert ((score_tokens_by_query(q, vectors)[0].double() - expected).abs() <= slack).all()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_keys_and_queries_and_one_that_is_no_number_leave_the_others_found(dtype):
    """A product beyond fp16's range, and a key of NaN, which only static heads would ever show."""
    pool = dynamic_pool(dtype, budget=0.1, num_sink_tokens=0, recent_window=0)
    prompt = pool.add_prompt(160)
    prompt.keys[0, :, :, 0] *= 300
    prompt.keys[0, :, 33] = float("inf")
    pool.rewrite(prompt)
    pool.compress(prompt, salience=torch.zeros(2, 2, prompt.seq_len))
    query = torch.zeros(1, 4, 32, dtype=dtype)
    query[..., 0] = 320
    pool.retrieve([prompt], 0, query)
    for head in range(2):
        elements = prompt.keys[0, head, :, 0].float()
        finite = elements[elements.isfinite()]
        held = pool.mapped_chunks(prompt, 0, head)
        assert len(set(held)) == 16
        # Of the four values that a code tells apart, the largest: but for rounding it begins a step above the mean.
        assert elements[held].min() > finite.mean() + 0.95 * finite.std()


def test_codes_are_those_of_the_plain_formula():
    keys = torch.randn(1, 48, 64, generator=fresh_generator())
    centre, step, steps = read_codes(encode_keys(keys))
    torch.testing.assert_close((centre + steps * step)[0], coded_keys(keys[0]))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [1, 4, 8])
def test_a_query_finds_the_one_token_that_it_points_at(chunk_size, dtype):
    pool = dynamic_pool(dtype, budget=0.1, chunk_size=chunk_size, num_sink_tokens=0, recent_window=0)
    prompt = pool.add_prompt(160)
    direction = pool.randn(32).sign()
    prompt.keys[0, :, 77] += 2 * direction
    pool.rewrite(prompt)
    pool.compress(prompt, salience=torch.zeros(2, 2, prompt.seq_len))
    assert all(77 not in pool.held_tokens(prompt, 0, head) for head in range(2))
    pool.retrieve([prompt], 0, direction.expand(1, 4, 32))
    for head in range(2):
        held = pool.held_tokens(prompt, 0, head)
        assert 77 in held
        assert len(held) == 16, "two pages of single tokens, or of chunks"


def test_bad_keys_are_named():
    with pytest.raises(ValueError, match="^k: expected a multiple of 8 tokens, got 12"):
        encode_keys(torch.zeros(1, 12, 4))
    with pytest.raises(ValueError, match="^num_tokens: expected a multiple of 8 for key_codes, got 12"):
        CODES.count_vectors(12)
