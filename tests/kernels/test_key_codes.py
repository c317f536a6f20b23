"""Keys of two bits a channel: what the codes say of a key, and that tokens are found by them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridkv_kernels.chunks import CODED_SCORES, Retrieval, encode_keys, read_codes, rotation, turn_channels
from hybridkv_kernels.retrieve_chunks.naive import score_tokens_by_query
from tests.builders import LAWS, TinyPool, eager_config, fresh_generator
from tests.kernels.plain import coded_scores
from tests.kernels.shapes import DTYPES
from tests.kernels.test_retrieve_chunks import dynamic_pool

each_score = pytest.mark.parametrize("chunk_score", CODED_SCORES)


def codes_of(keys, query_rms, chunk_score):
    """Vectors of `encode_keys`, and how many channels they code."""
    num_channels = keys.shape[2] // CODED_SCORES[chunk_score]
    return encode_keys(keys, query_rms, num_channels), num_channels


@st.composite
def keys_of(draw):
    """Keys [E, N, D] whose elements differ in mean and spread, some of them constant, and query_rms [E, D]."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    heads, words, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.sampled_from([4, 8, 64, 80]))
    centre, spread = (torch.randn(heads, 1, head_dim, generator=generator) * 4 for _ in range(2))
    spread[..., ::5] = 0.0
    keys = centre + spread * torch.randn(heads, words * 8, head_dim, generator=generator)
    return keys.to(draw(st.sampled_from(DTYPES))), torch.rand(heads, head_dim, generator=generator)


@LAWS
@given(keys_of(), st.sampled_from([*CODED_SCORES]))
def test_a_code_is_the_nearest_of_four_values(keys_and_rms, chunk_score):
    """Half a step off at most within two steps of the mean, the outermost value beyond."""
    keys, query_rms = keys_and_rms
    vectors, num_channels = codes_of(keys, query_rms, chunk_score)
    assert vectors.shape == (len(keys), Retrieval(0, 0, chunk_score, 1).count_vectors(keys.shape[1]), keys.shape[2])
    assert vectors.dtype == keys.dtype
    step, channels, steps = read_codes(vectors, num_channels)
    steps = steps[:, : keys.shape[1]]
    turned = turn_channels(keys, channels)
    offset = turned - turned.mean(dim=1, keepdim=True)
    noise = 1e-5 * turned.abs().amax()
    assert ((steps * step - offset).abs() <= step / 2 + noise).where(offset.abs() < 2 * step, True).all()
    assert torch.equal(steps.sign()[offset.abs() > noise], offset.sign()[offset.abs() > noise])
    assert steps.abs()[offset.abs() > step + noise].eq(1.5).all()


@pytest.mark.parametrize("num_channels", [1, 2, 16, 32, 40, 48, 64, 80, 96, 128, 256])
def test_a_rotation_keeps_angles_and_is_its_own_transpose(num_channels):
    turn = rotation(num_channels, torch.device("cpu")).double()
    assert torch.equal(turn, turn.T)
    product = turn @ turn
    assert product[0, 0] in (0.5, 1.0)
    assert torch.equal(product, product[0, 0] * torch.eye(num_channels, dtype=torch.float64))


def test_the_channels_that_queries_read_are_coded():
    """Neither a channel that varies and is not read, nor one that is read and does not vary."""
    keys = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0))
    keys[..., [1, 4]] *= 0.01
    query_rms = torch.tensor([[1.0, 1.0, 0.1, 1.0, 1.0, 0.1, 1.0, 1.0]])
    _, channels, _ = read_codes(encode_keys(keys, query_rms, 4), 4)
    assert channels.tolist() == [[0, 3, 6, 7]]


@each_score
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_those_of_the_plain_formula(dtype, chunk_score):
    generator = fresh_generator()
    keys, q = (torch.randn(1, n, 64, generator=generator).to(dtype) for n in (56, 3))
    query_rms = torch.rand(1, 64, generator=generator)
    vectors, num_channels = codes_of(keys, query_rms, chunk_score)
    expected = coded_scores(keys[0].double(), q[0].double(), query_rms[0].double(), num_channels)
    scores = score_tokens_by_query(q, vectors, num_channels)[0, :, :56].double()
    # Step, and the query times the step, are rounded to the pool's dtype; few codes lie where rounding changes them.
    far = (scores - expected).abs() > 0.02 + 8 * torch.finfo(dtype).eps * num_channels**0.5
    assert far.float().mean() < 0.05


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@each_score
def test_large_keys_and_queries_and_one_that_is_no_number_leave_the_others_found(chunk_score, dtype):
    """A product beyond fp16's range, and a key of NaN, which only static heads would ever show."""
    config = {"chunk_score": chunk_score, "num_sink_tokens": 0, "recent_window": 0}
    pool = dynamic_pool(dtype, budget=0.1, **config)
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


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [1, 4, 8])
@each_score
def test_a_query_finds_the_one_token_that_it_points_at(chunk_score, chunk_size, dtype):
    how = {"chunk_score": chunk_score, "chunk_size": chunk_size, "num_sink_tokens": 0, "recent_window": 0}
    pool = TinyPool(fresh_generator(), eager_config(budget=0.1, **how), head_dim=128, dtype=dtype)
    prompt = pool.add_prompt(160)
    direction = pool.randn(128)
    prompt.keys[0, :, 77] += 3 * direction
    pool.rewrite(prompt)
    pool.compress(prompt, salience=torch.zeros(2, 2, prompt.seq_len))
    assert all(77 not in pool.held_tokens(prompt, 0, head) for head in range(2))
    pool.retrieve([prompt], 0, direction.expand(1, 4, 128))
    for head in range(2):
        held = pool.held_tokens(prompt, 0, head)
        assert 77 in held
        assert len(held) == 16, "two pages of single tokens, or of chunks"


def test_bad_keys_are_named():
    with pytest.raises(ValueError, match=r"^k: expected a multiple of 8 tokens, got 12"):
        encode_keys(torch.zeros(1, 12, 4), torch.ones(1, 4), 4)
    with pytest.raises(ValueError, match=r"^query_rms: expected "):
        encode_keys(torch.zeros(1, 8, 4), torch.ones(4), 4)
    with pytest.raises(ValueError, match=r"^num_channels: expected a divisor of the head size 4, got 3"):
        encode_keys(torch.zeros(1, 8, 4), torch.ones(1, 4), 3)
    with pytest.raises(ValueError, match=r"^num_tokens: expected a multiple of 8 for key_codes, got 12"):
        Retrieval(0, 0, "key_codes", 1).count_vectors(12)
    with pytest.raises(
        ValueError, match=r"^chunk_score: expected one of key_codes where keys of head size 5 are coded"
    ):
        Retrieval(0, 0, "half_codes", 1).coded_channels(5)
