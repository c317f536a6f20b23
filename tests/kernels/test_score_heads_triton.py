"""The Triton twin, interpreted, against the reference; few rows and keys, for the interpreter is slow."""

import pytest
import torch

pytest.importorskip("triton")

from hybridkv_kernels.score_heads import STATISTICS, naive, score_heads
from hybridkv_kernels.score_heads import triton as twin
from tests.builders import NAN, fresh_generator

pytestmark = pytest.mark.usefixtures("triton_kernels")

# A probability may sit on a threshold: two (row, key) pairs, keys of a row, or rows of a chunk.
SLACK = {"hit_cv": 0.02, "capture": 0.02, "worst_capture": 0.05, "stability": 1e-5}


def check_equals_naive(q, pool, slots, statistic, forced=(0, 0)):
    arguments = (q, pool, slots, 0.2, statistic, 0.1, 0.9, 16, 0.1, *forced)
    value, salience = twin.score_heads(*arguments)
    expected_value, expected = naive.score_heads(*arguments)
    torch.testing.assert_close(salience, expected, rtol=1e-4, atol=1e-7)
    num_tokens = len(pool if slots is None else slots)
    assert (value - expected_value).abs().max() <= SLACK.get(statistic, 2 / num_tokens)


def poisoned_pool(generator, num_tokens, num_kv_heads, head_dim, dtype):
    """Keys on random slots; every other slot is NaN."""
    pool = torch.full((num_tokens + 20, num_kv_heads, head_dim), NAN, dtype=dtype)
    slots = torch.randperm(num_tokens + 20, generator=generator)[:num_tokens]
    pool[slots] = torch.randn(num_tokens, num_kv_heads, head_dim, generator=generator).to(dtype)
    return pool, slots


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """What the kernels are to write is NaN before."""
    plain = torch.empty

    def poisoned(*shape, **options):
        made = plain(*shape, **options)
        return made.fill_(NAN) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 63, 64, 65, 200])
def test_equals_naive_over_lengths(num_tokens, statistic):
    generator = fresh_generator()
    for num_rows in {1, min(num_tokens, 9)}:
        q = torch.randn(num_rows, 4, 32, generator=generator)
        check_equals_naive(
            q, *poisoned_pool(generator, num_tokens, 2, 32, torch.float32), statistic, (num_rows % 5, num_rows // 2)
        )


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize(
    ("group", "head_dim", "dtype"),
    [
        (1, 128, torch.float32),
        (2, 64, torch.bfloat16),
        (3, 80, torch.float16),
        (4, 96, torch.float32),
        (5, 128, torch.bfloat16),
        (6, 64, torch.float16),
        (7, 128, torch.bfloat16),
        (8, 80, torch.float32),
        (16, 96, torch.bfloat16),
    ],
)
def test_equals_naive_for_model_shapes(group, head_dim, dtype):
    generator = fresh_generator()
    q = torch.randn(5, 3 * group, head_dim, generator=generator).to(dtype)
    pool, slots = poisoned_pool(generator, 70, 3, head_dim, dtype)
    for statistic in ("capture", "sparsity"):
        check_equals_naive(q, pool, slots, statistic, (2, 3))


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("num_programs", [1, 10_000])
@pytest.mark.parametrize("num_rows", [31, 33])
def test_equals_naive_however_the_keys_are_shared(monkeypatch, num_rows, num_programs):
    """More rows than a tile has, keys by slot and in order."""
    monkeypatch.setattr(twin, "_TARGET_PROGRAMS", num_programs)
    generator = fresh_generator()
    q, k = torch.randn(num_rows, 3, 32, generator=generator), torch.randn(130, 1, 32, generator=generator)
    check_equals_naive(q, k, None, "worst_capture")
    check_equals_naive(q, k, torch.randperm(130, generator=generator), "capture", (4, 16))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_statistics_lie_in_the_unit_interval_and_salience_sums_to_one(statistic):
    generator = fresh_generator()
    q, k = torch.randn(6, 4, 32, generator=generator) * 5, torch.randn(50, 2, 32, generator=generator)
    value, salience = score_heads(q, k, scaling=0.4, statistic=statistic, chunk_size=8)
    assert value.dtype == salience.dtype == torch.float32
    assert value.shape == (2,)
    assert ((value >= 0) & (value <= 1)).all()
    torch.testing.assert_close(salience.sum(-1), torch.ones(2))


@pytest.mark.parametrize("statistic", ["capture", "worst_capture"])
def test_capture_gives_ties_to_the_earlier_key(statistic):
    """Uniform rows: each key is as good as the next for the ranking, and the first three are kept."""
    q, k = torch.zeros(3, 1, 32), torch.zeros(30, 1, 32)
    arguments = (q, k, None, 1.0, statistic, 0.1, 0.9, 16, 0.1)
    torch.testing.assert_close(twin.score_heads(*arguments)[0], naive.score_heads(*arguments)[0])


def test_keys_that_other_rows_want_are_ranked_in_double():
    """A key that only its own row wants is worth nothing to it, to the last bit."""
    probs = torch.full((1, 2, 40), 1e-9)
    probs[0, 0, 7] = 1.0
    kept = twin._kept_keys(probs, 39, 0, 0)
    assert kept.sum(-1).tolist() == [[39, 39]]
    others = probs.double().sum(1, keepdim=True) - probs.double()
    order = others.argsort(dim=-1, descending=True, stable=True)[..., :39]
    assert torch.equal(kept, torch.zeros_like(kept).scatter_(-1, order, True))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("broken", [NAN, float("inf"), -float("inf")])
def test_broken_keys_break_no_other_head(broken, statistic):
    generator = fresh_generator()
    q, k = torch.randn(4, 2, 32, generator=generator), torch.randn(70, 2, 32, generator=generator)
    arguments = (None, 0.2, statistic, 0.1, 0.9, 16, 0.1)
    expected_value, expected = twin.score_heads(q, k, *arguments)
    k[30::20, 1, 3] = broken
    value, salience = twin.score_heads(q, k, *arguments)
    assert torch.equal(salience[0], expected[0])
    assert value[0] == expected_value[0]
    assert 0.0 <= value[1] <= 1.0


def test_strided_queries_and_keys_are_legal():
    generator = fresh_generator()
    fused, k = torch.randn(5, 12, 32, generator=generator), torch.randn(20, 4, 32, generator=generator)
    check_equals_naive(fused[:, 2:10:2], k[:, ::2], None, "sparsity")
