import itertools
import math
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridkv_kernels.score_heads import STATISTICS, naive, score_heads, score_heads_batch
from tests.builders import LAWS, NAN, fresh_generator, poisoned_memory, seeded
from tests.kernels.shapes import DTYPES, each_model_shape


@st.composite
def prompts(draw):
    """Queries [W, H * G, D] and keys [N, H, D]; of one row, and of half precision, too."""
    num_tokens = draw(st.integers(1, 70))
    rows, heads = draw(st.integers(1, min(num_tokens, 12))), draw(st.integers(1, 3))
    group, dim = draw(st.sampled_from([1, 2, 7])), 32
    generator = seeded(draw(st.integers(0, 2**31 - 1)))
    sharpness = draw(st.sampled_from([0.05, 0.5, 3.0]))
    q = torch.randn(rows, heads * group, dim, generator=generator) * sharpness
    dtype = draw(st.sampled_from(DTYPES))
    return q.to(dtype), torch.randn(num_tokens, heads, dim, generator=generator).to(dtype)


def plain_probabilities(q, k, scaling):
    """[H][W][N] in Python floats: causal softmax, mean over the group."""
    heads = plain_queries(q, k, scaling)
    return [[[sum(p) / len(p) for p in zip(*row, strict=True)] for row in rows] for rows in heads]


def plain_queries(q, k, scaling):
    """[H][W][G][N]: the same for each query head."""
    num_rows, num_tokens, num_heads = len(q), len(k), k.shape[1]
    group = q.shape[1] // num_heads
    probs = [[[[0.0] * num_tokens for _ in range(group)] for _ in range(num_rows)] for _ in range(num_heads)]
    dots = torch.einsum("wad,nhd->wahn", q.double(), k.double()) * scaling
    for row in range(num_rows):
        last = num_tokens - num_rows + row
        for head in range(num_heads):
            for member in range(group):
                logits = dots[row, head * group + member, head, : last + 1].tolist()
                top = max(logits)
                weights = [math.exp(logit - top) for logit in logits]
                for token, weight in enumerate(weights):
                    probs[head][row][member][token] = weight / sum(weights)
    return probs


def plain_sparsity(rows, fraction):
    below = pairs = 0
    for i, row in enumerate(rows):
        causal = row[: len(row) - len(rows) + i + 1]
        pairs += len(causal)
        below += sum(p < fraction * max(causal) for p in causal)
    return below / pairs


def plain_top_mass(rows, mass):
    shares = []
    for i, row in enumerate(rows):
        causal = sorted(row[: len(row) - len(rows) + i + 1], reverse=True)
        held = needed = 0
        while held < mass and needed < len(causal):
            held += causal[needed]
            needed += 1
        shares.append(1 - needed / len(causal))
    return sum(shares) / len(shares)


def plain_hit_cv(rows, chunk_size):
    num_tokens = len(rows[0])
    counts = [0] * -(-num_tokens // chunk_size)
    for i, row in enumerate(rows):
        ordered = sorted(row)
        low, high = (ordered[round(f * (num_tokens - 1))] for f in (0.005, 0.995))
        last = num_tokens - len(rows) + i
        hit = {t // chunk_size for t in range(last + 1) if row[t] >= low + 0.6 * (high - low) and row[t] > 0}
        for chunk in hit:
            counts[chunk] += 1
    mean = sum(counts) / len(counts)
    cv = math.sqrt(sum((c - mean) ** 2 for c in counts) / len(counts)) / mean
    return cv / (1 + cv)


def plain_stability(rows):
    common = [sum(min(p, q) for p, q in zip(row, after, strict=True)) for row, after in itertools.pairwise(rows)]
    return sum(common) / len(common) if common else 0.0


def plain_capture(rows, queries, fraction, num_sinks, num_recent):
    if len(rows) == 1:
        return [0.0]
    num_kept, captured = math.ceil(fraction * len(rows[0])), []
    for i in range(len(rows)):
        others = [sum(column) for column in zip(*rows[:i], *rows[i + 1 :], strict=True)]
        own = len(rows[0]) - len(rows) + i
        forced = [token < num_sinks or own - num_recent < token <= own for token in range(len(rows[0]))]
        wanted = [math.inf if kept else mass for kept, mass in zip(forced, others, strict=True)]
        ranked = sorted(range(len(wanted)), key=lambda token: (-wanted[token], token))
        captured += [sum(query[token] for token in ranked[:num_kept]) for query in queries[i]]
    return captured


@pytest.mark.usefixtures("fast_kernels")
@LAWS
@given(
    prompts(),
    st.sampled_from(STATISTICS),
    st.sampled_from([0.01, 0.3, 0.99]),
    st.sampled_from([0.5, 0.9]),
    st.sampled_from([(0, 0), (1, 2), (4, 16)]),
)
def test_equals_the_plain_loops(prompt, statistic, fraction, mass, forced):
    """Each head by itself, in fp32 at least, and no row sees a later key."""
    q, k = prompt
    num_sinks, num_recent = forced
    value, salience = score_heads(
        q,
        k,
        scaling=0.4,
        statistic=statistic,
        sparsity_fraction=fraction,
        mass_fraction=mass,
        chunk_size=8,
        capture_fraction=fraction,
        num_sinks=num_sinks,
        num_recent=num_recent,
    )
    assert value.dtype == salience.dtype == torch.float32
    assert ((value >= 0) & (value <= 1)).all()
    torch.testing.assert_close(salience.sum(-1), torch.ones(len(value)))
    probs = plain_probabilities(q, k, 0.4)
    expected = [[sum(column) / len(rows) for column in zip(*rows, strict=True)] for rows in probs]
    torch.testing.assert_close(salience, torch.tensor(expected))
    exact_fraction = Fraction(str(fraction))
    plain = {
        "sparsity": lambda rows, _: plain_sparsity(rows, fraction),
        "top_mass": lambda rows, _: plain_top_mass(rows, mass),
        "hit_cv": lambda rows, _: plain_hit_cv(rows, 8),
        "stability": lambda rows, _: plain_stability(rows),
        "capture": lambda rows, queries: statistics.fmean(plain_capture(rows, queries, exact_fraction, *forced)),
        "worst_capture": lambda rows, queries: min(plain_capture(rows, queries, exact_fraction, *forced)),
    }[statistic]
    # A probability may sit on a threshold: at most one key per head may fall on the other side.
    one_key = {
        "sparsity": 1 / len(k),
        "top_mass": 1 / (len(k) - len(q) + 1),
        "hit_cv": 0.2,
        "stability": 0.0,
        "capture": 0.2,
        "worst_capture": 0.5,
    }[statistic]
    expected = [plain(*head) for head in zip(probs, plain_queries(q, k, 0.4), strict=True)]
    difference = (value - torch.tensor(expected)).abs()
    assert difference.max() <= one_key + 1e-5
    assert difference.median() <= 1e-5 or len(difference) == 1


@pytest.mark.usefixtures("fast_kernels")
@LAWS
@given(prompts(), st.data())
def test_a_row_sees_no_later_key(prompt, data):
    """Whatever stands after a row's own position, its share of the salience does not change."""
    q, k = (tensor.float() for tensor in prompt)
    row = data.draw(st.integers(0, len(q) - 1))
    position = len(k) - len(q) + row
    _, alone = score_heads(q[: row + 1], k[: position + 1], scaling=0.4)
    changed = k.clone()
    changed[position + 1 :] = 50.0
    _, full = score_heads(q, changed, scaling=0.4)
    assert (full[:, position + 1 :].sum(-1) <= (len(q) - row - 1) / len(q) + 1e-5).all()
    _, others = score_heads(q[row + 1 :], changed, scaling=0.4) if row + 1 < len(q) else (None, 0.0)
    torch.testing.assert_close(
        full[:, : position + 1] * len(q),
        alone * (row + 1) + (others[:, : position + 1] * (len(q) - row - 1) if row + 1 < len(q) else 0.0),
    )


@pytest.mark.usefixtures("fast_kernels")
@LAWS
@given(prompts())
def test_a_shift_of_all_keys_and_a_scale_of_all_queries_change_nothing(prompt):
    q, k = (tensor.float() for tensor in prompt)
    _, salience = score_heads(q, k, scaling=0.4)
    torch.testing.assert_close(score_heads(q, k + 0.5, scaling=0.4)[1], salience, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score_heads(q * 2, k, scaling=0.2)[1], salience)


@pytest.mark.usefixtures("fast_kernels")
@LAWS
@given(prompts(), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_more_keys_capture_no_less(prompt, fraction, other):
    few, many = (
        score_heads(*prompt, scaling=0.4, statistic="capture", capture_fraction=f)[0] for f in sorted((fraction, other))
    )
    assert (few <= many + 1e-6).all()


@pytest.mark.usefixtures("kernels")
def test_all_keys_capture_all_of_it():
    generator = fresh_generator()
    q, k = torch.randn(6, 4, 32, generator=generator), torch.randn(40, 2, 32, generator=generator)
    value, _ = score_heads(q, k, scaling=0.4, statistic="capture", capture_fraction=0.99)
    torch.testing.assert_close(value, torch.ones(2))


# Triton sums in another order, 1.5e-6 away from 1; its equality with the reference has a tolerance of its own.
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kernels", ["naive", "cpu"], indirect=True)
@pytest.mark.parametrize("statistic", ["capture", "worst_capture"])
def test_sinks_and_recent_keys_are_captured_whatever_other_rows_want(statistic):
    # Every query wants its own key, the one before it and the first of the prompt; only the last is wanted by others.
    q, k = torch.zeros(8, 1, 32), torch.zeros(100, 1, 32)
    k[0, 0, 31] = k[91, 0, 30] = 1.0
    for row in range(8):
        k[92 + row, 0, row] = 1.0
        q[row, 0, [row, (row - 1) % 31, 31]] = 40.0

    def captured(num_sinks, num_recent):
        value, _ = score_heads(
            q,
            k,
            scaling=1.0,
            statistic=statistic,
            capture_fraction=0.03,
            num_sinks=num_sinks,
            num_recent=num_recent,
        )
        return value.item()

    assert captured(1, 2) == pytest.approx(1.0)
    assert captured(1, 2) > captured(1, 1) >= captured(0, 0)
    assert captured(0, 0) < 0.9


@pytest.mark.usefixtures("fast_kernels")
@pytest.mark.parametrize("statistic", ["sparsity", "top_mass"])
def test_a_peaked_head_scores_higher_than_a_uniform_one(statistic):
    generator = fresh_generator()
    direction = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    q = (direction + torch.randn(8, 1, 32, generator=generator) * 0.05).repeat_interleave(2, dim=1)
    k = torch.randn(100, 2, 32, generator=generator) * 0.01
    k[10, 0] = direction * 200
    peaked, uniform = score_heads(q, k, scaling=1.0, statistic=statistic)[0].tolist()
    assert peaked > 0.9
    assert uniform < 0.2


@pytest.mark.usefixtures("kernels")
def test_rows_that_hit_the_same_chunk_vary_more_than_rows_that_spread():
    """hit_cv: chunk 0 hit by all rows against each row with a chunk of its own."""
    k = torch.zeros(72, 2, 32)
    q = torch.zeros(8, 2, 32)
    k[3, 0, 0] = 20.0
    q[:, 0, 0] = 1.0
    for row in range(8):
        k[row * 8, 1, row] = 20.0
        q[row, 1, row] = 1.0
    same, spread = score_heads(q, k, scaling=1.0, statistic="hit_cv", chunk_size=8)[0].tolist()
    assert same > 0.7 > 0.4 > spread


def walking_heads(num_rows=8, num_tokens=400):
    """Head 0 looks at one key in all rows, head 1 at another key in each row; both are equally sparse."""
    q, k = torch.zeros(num_rows, 2, 32), torch.zeros(num_tokens, 2, 32)
    k[33, 0, 0] = q[:, 0, 0] = 10.0
    for row in range(num_rows):
        k[300 - 16 * row, 1, row] = q[row, 1, row] = 10.0
    return q, k


@pytest.mark.usefixtures("fast_kernels")
@pytest.mark.parametrize("statistic", ["stability", "capture", "worst_capture"])
def test_a_sparse_head_that_moves_is_told_from_one_that_stays(statistic):
    q, k = walking_heads()
    sparse = score_heads(q, k, scaling=1.0, statistic="sparsity")[0]
    torch.testing.assert_close(sparse[0], sparse[1])
    assert sparse.min() > 0.99
    # The seven other rows hold seven keys of head 1; the fraction asks for no eighth, which a tie would give away.
    stays, moves = score_heads(q, k, scaling=1.0, statistic=statistic, capture_fraction=7 / 400)[0].tolist()
    assert stays > 0.999
    assert moves < 0.001


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("statistic", ["stability", "capture", "worst_capture"])
def test_one_row_says_nothing_of_drift(statistic):
    q, k = walking_heads()
    assert score_heads(q[:1], k, scaling=1.0, statistic=statistic)[0].tolist() == [0.0, 0.0]


@pytest.mark.usefixtures("kernels")
def test_one_moving_member_of_a_group_is_enough_for_the_worst():
    q, k = walking_heads()
    # One KV head with both keys; its two query heads are the one that stays and the one that moves.
    both = k.sum(dim=1, keepdim=True)
    mean, worst = (
        score_heads(q, both, scaling=1.0, statistic=name, capture_fraction=8 / 400)[0].item()
        for name in ("capture", "worst_capture")
    )
    assert mean > 0.4
    assert worst < 0.001


@pytest.mark.usefixtures("kernels")
def test_capture_gives_ties_to_the_earlier_key():
    """Uniform rows: each kept key holds the same mass, but a key that only later rows see comes last."""
    value, _ = score_heads(torch.zeros(3, 1, 32), torch.zeros(30, 1, 32), scaling=1.0, statistic="capture")
    expected = sum(3 / causal for causal in (28, 29, 30)) / 3
    torch.testing.assert_close(value, torch.tensor([expected]))
    k = torch.zeros(30, 1, 32)
    k[5:, 0, 0] = 1.0
    q = torch.zeros(2, 1, 32)
    q[:, 0, 0] = torch.tensor([0.0, 100.0])
    # Row 0 spreads over 29 keys; row 1 over the last 25, of which the three earliest are kept for row 0 and, all keys
    # of row 0 being equal, the first three of the prompt, which hold nothing, for row 1.
    value, _ = score_heads(q, k, scaling=1.0, statistic="capture", capture_fraction=0.1)
    torch.testing.assert_close(value, torch.tensor([3 / 29 / 2]))


@pytest.mark.parametrize(
    ("num_tokens", "fraction", "expected"), [(30, 0.1, 3), (31, 0.1, 4), (1, 0.001, 1), (100, 0.29, 29), (7, 0.99, 7)]
)
def test_captured_keys_are_rounded_up_from_what_the_user_wrote(num_tokens, fraction, expected):
    assert naive.num_captured(num_tokens, fraction) == expected


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("q", torch.zeros(3, 4, 4)),
        ("q", torch.zeros(3, 3, 8)),
        ("q", torch.zeros(0, 4, 8)),
        ("q", torch.zeros(11, 4, 8)),
        ("q", torch.zeros(3, 4, 8, dtype=torch.bfloat16)),
        ("q", torch.zeros(3, 4, 8, device="meta")),
        ("q", torch.zeros(4, 8)),
        ("k", torch.zeros(10, 8)),
        ("k", torch.zeros(10, 2, 8, dtype=torch.int64)),
        ("slots", torch.zeros(10, dtype=torch.int32)),
        ("slots", torch.zeros(10, 1, dtype=torch.int64)),
        ("statistic", "entropy"),
        ("statistic", "capture+"),
        ("chunk_size", 0),
        ("capture_fraction", 0.0),
        ("capture_fraction", 1.0),
        ("capture_fraction", -0.1),
        ("capture_fraction", NAN),
        ("num_sinks", -1),
        ("num_recent", -1),
    ],
)
def test_bad_arguments_are_named(name, bad):
    arguments = {"q": torch.zeros(3, 4, 8), "k": torch.zeros(10, 2, 8), "scaling": 1.0}
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        score_heads(**arguments | {name: bad})


@pytest.mark.usefixtures("kernels")
def test_keys_by_token_slot_equal_the_gathered_keys():
    """Slots in any order, some of them shared by two tokens; the rest of the layer is NaN."""
    statistic = "+".join(STATISTICS)
    generator = fresh_generator()
    q, pool = torch.randn(6, 4, 32, generator=generator), torch.full((200, 2, 32), NAN)
    slots = torch.randperm(200, generator=generator)[:77]
    slots[3] = slots[50]
    pool[slots] = torch.randn(77, 2, 32, generator=generator)
    got = score_heads(q, pool, slots, scaling=0.3, statistic=statistic)
    expected = score_heads(q, pool[slots], scaling=0.3, statistic=statistic)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("kernels")
def test_several_statistics_are_those_of_one_at_a_time():
    generator = fresh_generator()
    q, k = torch.randn(6, 4, 32, generator=generator), torch.randn(77, 2, 32, generator=generator)
    together, salience = score_heads(q, k, scaling=0.3, statistic="+".join(STATISTICS))
    for got, name in zip(together.T, STATISTICS, strict=True):
        alone, alone_salience = score_heads(q, k, scaling=0.3, statistic=name)
        assert torch.equal(got, alone)
        assert torch.equal(salience, alone_salience)


@pytest.mark.parametrize("num_rows", [0, 6])
def test_more_rows_than_slots_are_refused(num_rows):
    q, pool = torch.zeros(num_rows, 4, 32), torch.zeros(200, 2, 32)
    with pytest.raises(ValueError, match=r"^q: expected 1..5 rows of a multiple of 2 heads, got "):
        score_heads(q, pool, torch.arange(5), scaling=1.0)


# The fast implementations against the reference; few rows and keys, for the interpreter is slow.


def arguments_of(statistic, forced=(0, 0)):
    """Settings of a call, by name and in the order of the reference."""
    names = ("scaling", "statistic", "sparsity_fraction", "mass_fraction", "chunk_size", "capture_fraction")
    return dict(zip((*names, "num_sinks", "num_recent"), (0.2, statistic, 0.1, 0.9, 16, 0.1, *forced), strict=True))


def check_equals_naive(q, pool, slots, statistic, forced=(0, 0)):
    arguments = arguments_of(statistic, forced)
    expected_value, expected = naive.score_heads(q, pool, slots, *arguments.values())
    with poisoned_memory():
        value, salience = score_heads(q, pool, slots, **arguments)
    torch.testing.assert_close(salience, expected, rtol=1e-4, atol=1e-7)
    # A probability may sit on a threshold: two (row, key) pairs, keys of a row, or rows of a chunk.
    num_tokens = len(pool if slots is None else slots)
    slack = {"hit_cv": 0.02, "capture": 0.02, "worst_capture": 0.05, "stability": 1e-5}
    allowed = torch.tensor([slack.get(name, 2 / num_tokens) for name in statistic.split("+")])
    assert value.shape == expected_value.shape
    assert ((value - expected_value).view(-1, len(allowed)).abs() <= allowed).all()


def poisoned_pool(generator, num_tokens, num_kv_heads, head_dim, dtype=torch.float32):
    """Keys on random slots; every other slot is NaN."""
    pool = torch.full((num_tokens + 20, num_kv_heads, head_dim), NAN, dtype=dtype)
    slots = torch.randperm(num_tokens + 20, generator=generator)[:num_tokens]
    pool[slots] = torch.randn(num_tokens, num_kv_heads, head_dim, generator=generator).to(dtype)
    return pool, slots


@pytest.mark.parametrize("statistic", ["sparsity+top_mass+stability", "hit_cv", "capture+worst_capture"])
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 63, 64, 65, 200])
def test_equals_naive_over_lengths(twin, num_tokens, statistic):
    generator = fresh_generator()
    for num_rows in {1, min(num_tokens, 9)} if twin == "triton" else {1, min(num_tokens, 16), min(num_tokens, 33)}:
        q = torch.randn(num_rows, 4, 32, generator=generator)
        forced = (num_rows % 5, num_rows // 2)
        check_equals_naive(q, *poisoned_pool(generator, num_tokens, 2, 32), statistic, forced)


@each_model_shape
def test_equals_naive_for_model_shapes(twin, shape):
    dtype, _, group, head_dim = shape
    generator = fresh_generator()
    q = torch.randn(5, 3 * group, head_dim, generator=generator).to(dtype)
    pool, slots = poisoned_pool(generator, 70, 3, head_dim, dtype)
    check_equals_naive(q, pool, slots, "capture+sparsity", (2, 3))


@pytest.mark.usefixtures("shared_work")
@pytest.mark.parametrize("more", [-1, 1])
def test_equals_naive_however_the_keys_are_shared(twin, more):
    """More rows than a tile has, which has 8 in Triton, keys by slot and in order."""
    generator, num_rows = fresh_generator(), (8 if twin == "triton" else 32) + more
    q, k = torch.randn(num_rows, 3, 32, generator=generator), torch.randn(130, 1, 32, generator=generator)
    check_equals_naive(q, k, None, "worst_capture")
    check_equals_naive(q, k, torch.randperm(130, generator=generator), "capture", (4, 16))


@pytest.fixture(params=[1, 10_000])
def shared_work(request, twin, monkeypatch):
    """The keys of a head shared by this many programs, or by one to four threads."""
    before = torch.get_num_threads()
    if twin in ("triton", "cuda"):
        from hybridkv_kernels.score_heads import triton

        monkeypatch.setattr(triton, "_TARGET_PROGRAMS", request.param)
    torch.set_num_threads(min(request.param, 4))
    yield
    torch.set_num_threads(before)


# Kernels of Triton by themselves, interpreted and on a GPU.
by_triton = pytest.mark.parametrize(
    "kernels", ["triton", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True, scope="class"
)
WANTED = {
    # A key that only its own row wants is worth nothing to it, to the last bit.
    "own": lambda: torch.full((3, 40), 1e-9).index_put_((torch.tensor(0), torch.tensor(7)), torch.tensor(1.0)),
    # Equal in fp32, another order in double for the first two rows, and none for the third.
    "close": lambda: torch.stack((torch.zeros(40), torch.randperm(40) * 1e-9, torch.full((40,), 0.5))),
    "ties": lambda: torch.randint(3, (3, 40)) / 4,
    "subnormal": lambda: torch.randint(9, (3, 40)) * 2.0**-149,
}


@by_triton
@pytest.mark.parametrize("probs", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize(("num_kept", "forced"), [(39, (0, 0)), (7, (4, 3))])
def test_keys_that_other_rows_want_are_ranked_in_double(kernels, probs, num_kept, forced):
    from hybridkv_kernels.score_heads.triton_statistics import keep_kernel

    probs = probs()
    record = torch.tensor([3, 40, 1, 0, 0, 0, 0, 0, 0, num_kept])
    kept = torch.full((3, 40), -1, dtype=torch.int32)
    keep_kernel[(3, 1, 1)](record, probs.view(torch.int32), probs.double().sum(0), kept, *forced, H=1, BLOCK=32)
    order = naive.wanted_keys(probs[None], *forced)[0].argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(kept, torch.zeros_like(kept).scatter_(-1, order[:, :num_kept], 1))


@by_triton
@pytest.mark.parametrize("make", [torch.rand, lambda *sizes: torch.randint(4, sizes) / 7], ids=["many", "few"])
@pytest.mark.parametrize(("ranks", "chunk_size"), [((0, 39), 3), ((5, 30), 1), ((7, 7), 64)])
def test_a_row_hits_what_lies_above_the_level_between_two_ranks(kernels, make, ranks, chunk_size):
    from hybridkv_kernels.score_heads.triton_statistics import hit_kernel

    probs = make(2, 40)
    record, num_chunks = torch.tensor([2, 40, 1, 0, 0, 0, 0, *ranks, 0]), -(-40 // chunk_size)
    counts = torch.zeros(num_chunks, dtype=torch.int32)
    sizes = {"CHUNK": chunk_size, "BC": 4, "BT": 2 ** (chunk_size - 1).bit_length(), "BLOCK": 32}
    hit_kernel[(2, 1, 1)](record, probs.view(torch.int32), counts, H=1, **sizes)
    low, high = (probs.sort(dim=-1).values[:, rank : rank + 1] for rank in ranks)
    hits = (probs >= low + naive.HIT_LEVEL * (high - low)) & (probs > 0)
    padded = torch.nn.functional.pad(hits, (0, num_chunks * chunk_size - 40)).view(2, num_chunks, chunk_size)
    assert torch.equal(counts, padded.any(-1).sum(0).int())


def ragged(generator, lens, num_kv_heads=2):
    """Keys of a layer, and (q, slots) of a prompt for each (rows, tokens) in `lens`."""
    pool = torch.randn(100, num_kv_heads, 32, generator=generator)
    return pool, [
        (
            torch.randn(rows, 2 * num_kv_heads, 32, generator=generator),
            torch.randperm(100, generator=generator)[:tokens],
        )
        for rows, tokens in lens
    ]


def check_each_is_what_it_is_alone(pool, prompts, **settings):
    with poisoned_memory():
        together = score_heads_batch(prompts, pool, scaling=0.3, **settings)
    assert len(together) == len(prompts)
    for (q, slots), scores in zip(prompts, together, strict=True):
        for got, alone in zip(scores, score_heads(q, pool, slots, scaling=0.3, **settings), strict=True):
            assert torch.equal(got, alone)


lens = st.integers(1, 100).flatmap(lambda tokens: st.tuples(st.integers(1, min(tokens, 40)), st.just(tokens)))


@pytest.mark.usefixtures("fast_kernels")
@LAWS
@given(st.lists(lens, min_size=1, max_size=5), st.lists(st.sampled_from(STATISTICS), min_size=1, unique=True))
def test_a_prompt_s_scores_are_the_same_to_the_bit_whatever_others_there_are(lens, names):
    generator = seeded(len(lens))
    check_each_is_what_it_is_alone(*ragged(generator, lens), statistic="+".join(names), num_sinks=1, num_recent=2)


@by_triton
@pytest.mark.parametrize("scratch", [2**28, 400])
def test_so_they_are_in_triton_s_launches(kernels, scratch, monkeypatch):
    """Also where the prompts take more scratch than there is for all of them."""
    from hybridkv_kernels.score_heads import triton

    monkeypatch.setattr(triton, "_MOST_SCRATCH_BYTES", scratch)
    pool, prompts = ragged(fresh_generator(), [(3, 70), (1, 5), (2, 100)], num_kv_heads=1)
    check_each_is_what_it_is_alone(pool, prompts, statistic="worst_capture+hit_cv", num_sinks=1, num_recent=2)
    joined = torch.cat([slots for _, slots in prompts]).split([len(slots) for _, slots in prompts])
    adjacent = [(q, slots) for (q, _), slots in zip(prompts, joined, strict=True)]
    check_each_is_what_it_is_alone(pool, adjacent, statistic="sparsity")


@pytest.mark.usefixtures("twin")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("broken", [NAN, float("inf"), -float("inf")])
def test_broken_keys_break_no_other_head(broken):
    generator, arguments = fresh_generator(), arguments_of("+".join(STATISTICS))
    q, k = torch.randn(4, 4, 32, generator=generator), torch.randn(70, 2, 32, generator=generator)
    expected_value, expected = score_heads(q, k, **arguments)
    k[30::20, 1, 3] = broken
    value, salience = score_heads(q, k, **arguments)
    assert torch.equal(salience[0], expected[0])
    assert torch.equal(value[0], expected_value[0])
    assert ((value[1] >= 0.0) & (value[1] <= 1.0)).all()


@pytest.mark.usefixtures("twin")
def test_strided_queries_and_keys_are_legal():
    """The backend hands over a slice of a fused projection."""
    generator = fresh_generator()
    fused, k = torch.randn(5, 12, 32, generator=generator), torch.randn(20, 4, 32, generator=generator)
    check_equals_naive(fused[:, 2:10:2], k[:, ::2], None, "sparsity")
