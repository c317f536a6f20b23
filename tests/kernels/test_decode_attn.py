import dataclasses
import itertools

import pytest
import torch

from benchmarks.gpu_check.pool import Shape
from hybridkv_kernels import cpu as cpu_kernels
from hybridkv_kernels.decode_attn import cpu, decode_attn, plan_decode
from hybridkv_kernels.head_pages import HeadPageLayout, HeadPageTable
from tests.builders import NAN, fresh_generator, full_attention, head_page, make_views, poisoned_memory
from tests.kernels.shapes import DTYPES, each_model_shape

PAGE = 8
NOWHERE = 2**30  # a page or slot far outside the pool: whoever reads it fails

# Half precision rounds once, at the end: half a unit in the last place, and fp32 noise where numbers cancel. The others
# round the weights, too.
CPP_TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (2**-8, 2e-5), torch.float16: (2**-10, 2e-5)}
TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (2e-2, 2e-2), torch.float16: (3e-3, 3e-3)}

each_implementation = pytest.mark.usefixtures("kernels")
each_instruction_set = pytest.mark.parametrize(
    "twin", [f"cpu {isa}" for isa in cpu_kernels.INSTRUCTION_SETS], indirect=True
)


class Batch:
    """Requests whose heads hold different numbers of head pages; everything else in the pool is NaN.

    `requests` : per request (covered pages, head pages of each [L][H] head or None when dense, tail tokens).
    """

    def __init__(self, requests, *, pages=64, **shape):
        shape = Shape(**{"page_size": PAGE, "head_dim": 32} | shape)
        layers, heads, group, head_dim = shape.num_layers, shape.num_kv_heads, shape.group_size, shape.head_dim
        dtype, page_size = shape.dtype, shape.page_size
        generator, self.page_size = fresh_generator(), page_size
        layout = HeadPageLayout(layers, heads, pages, page_size, shape.windows)
        self.keys, self.values, self.views = make_views(layout, head_dim, dtype)
        self.table = HeadPageTable(len(requests) + 2, pages, 0, layout, torch.get_default_device())
        self.table.pages.fill_(NOWHERE)
        self.table.first_head_page.fill_(NOWHERE)
        longest = max(num_prompt_pages * page_size + tail for num_prompt_pages, _, tail in requests)
        self.req_to_token = torch.full((len(requests) + 2, longest + 1), NOWHERE, dtype=torch.int32)
        self.rows = (torch.randperm(len(requests), generator=generator) + 1).tolist()
        self.seq_lens, self.expected = [], {}
        free = torch.randperm(pages, generator=generator).tolist()
        self.q = torch.randn(len(requests), heads * group, head_dim, generator=generator).to(dtype)
        self.scaling = 0.2
        for i, (row, (num_prompt_pages, counts, tail)) in enumerate(zip(self.rows, requests, strict=True)):
            covered = num_prompt_pages * page_size if counts else 0
            self.seq_lens.append(covered + tail)
            tail_slots = self._tail_slots(free, covered, tail)
            self.req_to_token[row, covered : covered + tail] = tail_slots
            shape = (layers, tail, heads, head_dim)
            tail_k, tail_v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
            self.keys[:, tail_slots], self.values[:, tail_slots] = tail_k, tail_v
            if counts:
                flat = torch.tensor(counts).flatten()
                pages = [free.pop() for _ in range(-(-int(flat.sum()) // layout.head_pages_per_page))]
                self.table.bind(row, torch.tensor(pages), torch.empty(0, dtype=torch.int64), covered)
                self.table.num_head_pages[row] = flat.view(layers, heads)
                self.table.first_head_page[row] = (flat.cumsum(0) - flat).view(layers, heads)
            for layer in range(layers):
                mine = []
                for head in range(heads):
                    k, v = tail_k[layer, :0, head], tail_v[layer, :0, head]
                    if counts:
                        first = int(self.table.first_head_page[row, layer, head])
                        for j in range(first, first + counts[layer][head]):
                            page, inside = divmod(j, layout.head_pages_per_page)
                            place = (pages[page], *divmod(inside, heads), page_size)
                            new_k, new_v = (
                                torch.randn(page_size, head_dim, generator=generator).to(dtype) for _ in "kv"
                            )
                            head_page(self.keys, *place).copy_(new_k)
                            head_page(self.values, *place).copy_(new_v)
                            k, v = torch.cat((k, new_k)), torch.cat((v, new_v))
                    k, v = torch.cat((k, tail_k[layer, :, head])), torch.cat((v, tail_v[layer, :, head]))
                    k, v = k[-layout.window(layer) :], v[-layout.window(layer) :]  # -0: all
                    query = self.q[i].view(heads, group, head_dim)[head]
                    mine.append(full_attention(query, k[None], v[None], self.scaling))
                self.expected[i, layer] = torch.cat(mine)

    def _tail_slots(self, free, covered, tail):
        slots = []
        for position in range(covered, covered + tail):
            if position % self.page_size == 0 or not slots:
                page = free.pop()
            slots.append(page * self.page_size + position % self.page_size)
        return torch.tensor(slots)

    def arguments(self, layer):
        return {
            "q": self.q,
            "views": self.views,
            "table": self.table,
            "layer_idx": layer,
            "req_rows": torch.tensor(self.rows),
            "req_to_token": self.req_to_token,
            "seq_lens": torch.tensor(self.seq_lens),
            "scaling": self.scaling,
        }

    def check(self, tolerances=TOLERANCE):
        """Of every layer; what is read stays as it is."""
        rtol, atol = tolerances[self.q.dtype]
        before = [tensor.clone() for tensor in (self.keys, self.values, self.q)]
        for layer in range(self.table.layout.num_layers):
            with poisoned_memory(integers=(NOWHERE, NOWHERE + 1)):
                out = decode_attn(**self.arguments(layer))
            assert out.dtype == self.q.dtype
            for i in range(len(self.rows)):
                torch.testing.assert_close(out[i].double(), self.expected[i, layer], rtol=rtol, atol=atol)
        for tensor, copy in zip((self.keys, self.values, self.q), before, strict=True):
            torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


MIXED = [
    (6, [[1, 6], [2, 3]], 1),
    (1, None, 1),
    (5, [[1, 1], [1, 1]], PAGE),
    (1, None, 2 * PAGE + 3),
    (3, [[3, 3], [3, 3]], 2 * PAGE + 1),
]


# Kept pages 0 to many beside each other, tails of 1, P - 1, P and P + 1 tokens and long ones, budgets of every size.
RAGGED = [
    (6, [[1, 6], [0, 3]], 1),
    (9, [[0, 0], [0, 9]], PAGE - 1),
    (5, [[5, 5], [5, 5]], PAGE),
    (1, None, PAGE + 1),
    (40, [[40, 1], [3, 17]], PAGE + 1),
    (1, None, 300),
    (1, None, 1),
    (2, [[1, 0], [1, 0]], 33),
    (2, [[1, 0], [1, 0]], 150),
]


def tolerances_of(twin):
    return CPP_TOLERANCE if twin.startswith("cpu") else TOLERANCE


@pytest.mark.parametrize("group", [*range(1, 9), 16])
def test_one_softmax_over_head_pages_and_tail(twin, group):
    Batch(MIXED, group_size=group).check(tolerances_of(twin))


@each_model_shape
def test_model_shapes(twin, shape):
    """One page below, at and above the rows of a block, and tails of a token less and more than a page."""
    sizes = dict(zip(("dtype", "page_size", "group_size", "head_dim"), shape, strict=True))
    page_size = sizes["page_size"]
    requests = [(4, [[4, 1]], page_size - 1), (1, None, page_size + 1), (2, [[0, 2]], page_size)]
    Batch(requests, num_layers=1, pages=16, **sizes).check(tolerances_of(twin))


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_batches(dtype):
    Batch(RAGGED, group_size=3, dtype=dtype, pages=256).check()


@pytest.fixture(params=[1, 7, 100])
def split(request, twin, monkeypatch):
    """Rows are cut finely: splits of this many rows (C++), with as many threads as go, or this many splits (Triton)."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(request.param, 4))
    monkeypatch.setattr(cpu, "SPLIT_ROWS", request.param)
    if twin in ("triton", "cuda"):
        from hybridkv_kernels.decode_attn import triton_plan

        monkeypatch.setattr(triton_plan, "SPLITS_PER_PROCESSOR", 1)
        monkeypatch.setattr(triton_plan.gpu, "num_processors", lambda device: request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_batches_however_they_are_split(twin, dtype):
    Batch(RAGGED, group_size=3, dtype=dtype, pages=256).check(tolerances_of(twin))


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("window", [1, PAGE - 1, PAGE, 3 * PAGE + 2, 1000])
def test_a_layer_with_a_window_attends_to_the_last_rows_of_each_head(twin, window):
    """Within the tail, across its border, and longer than everything; the other layer attends to all."""
    Batch(RAGGED, group_size=3, pages=256, windows=(0, window)).check(tolerances_of(twin))


@each_implementation
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 7), (1, 5, 2), (4, 3, 16)])
def test_numbers_of_layers_and_heads(monkeypatch, kernels, shape):
    """Triton's list of entries is longer than a block of it."""
    if kernels in ("triton", "cuda"):
        from hybridkv_kernels.decode_attn import triton_plan

        monkeypatch.setattr(triton_plan, "BLOCK_ENTRIES", 4)
    layers, heads, group = shape
    counts = [[1 + (layer + head) % 4 for head in range(heads)] for layer in range(layers)]
    requests = [(4, counts, 5), (1, None, 20), (4, counts, 9)]
    Batch(requests, num_layers=layers, num_kv_heads=heads, group_size=group).check()


@each_implementation
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_and_lengths_of_either_integer_type(dtype):
    batch = Batch(MIXED)
    arguments = batch.arguments(0)
    expected = decode_attn(**arguments)
    for name in ("req_rows", "seq_lens"):
        arguments[name] = arguments[name].to(dtype)
    assert torch.equal(decode_attn(**arguments), expected)


@each_implementation
def test_the_order_of_a_head_s_pages_does_not_matter():
    batch = Batch([(4, [[3, 2], [2, 2]], 3)])
    before = decode_attn(**batch.arguments(0))
    layout, row = batch.table.layout, batch.rows[0]
    ids = layout.head_page_ids(batch.table.pages[row], torch.tensor([0, 2]))
    for pages in (batch.views.k_pages, batch.views.v_pages):
        pages[ids] = pages[ids.flip(0)]
    torch.testing.assert_close(decode_attn(**batch.arguments(0)), before)


def test_an_empty_batch_is_refused():
    arguments = Batch(MIXED).arguments(0)
    arguments["q"] = arguments["q"][:0]
    with pytest.raises(ValueError, match="^q: expected at least one request, got an empty batch$"):
        decode_attn(**arguments)


def changed(arguments, name, change):
    """`arguments` of which one, or a field of one, as in "views.k_pages", is changed."""
    owner, _, field = name.partition(".")
    given = arguments[owner]
    new = dataclasses.replace(given, **{field: change(getattr(given, field))}) if field else change(given)
    return arguments | {owner: new}


def strided(tensor):
    """The same values, not contiguous."""
    return torch.stack((tensor, tensor), -1)[..., 0]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", lambda t: t[0]),
        ("q", lambda t: t.int()),
        ("q", lambda t: t.double()),
        ("q", lambda t: t[:, :3]),
        ("q", lambda t: t[:, :0]),
        *itertools.product(
            ("views.k_pages", "views.v_pages"),
            (lambda t: t[:, :4], lambda t: t[..., :16], lambda t: t[1:], torch.Tensor.half, lambda t: t.to("meta")),
        ),
        *itertools.product(
            ("views.k_flat", "views.v_flat"),
            (lambda t: t[1:], lambda t: t[..., :16], torch.Tensor.half, lambda t: t.to("meta")),
        ),
        *itertools.product(("views.k_pages", "views.v_pages", "views.k_flat", "views.v_flat"), (strided,)),
        ("views.held_chunks", lambda t: t[1:]),
        ("views.held_chunks", lambda t: t.long()),
        ("req_rows", lambda t: t[1:]),
        ("seq_lens", lambda t: t[:, None]),
        ("req_to_token", lambda t: t[0]),
        ("req_to_token", lambda t: t.long()),
        ("req_to_token", lambda t: t.t()),
        ("layer_idx", lambda layer: 2),
        ("layer_idx", lambda layer: -1),
    ],
)
def test_bad_arguments_are_named(name, change):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        decode_attn(**changed(Batch(MIXED).arguments(0), name, change))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("table.pages", lambda batch, row: batch.table.pages[row]),
        ("table.first_head_page", lambda batch, row: batch.table.first_head_page[row, 0]),
        ("table.num_head_pages", lambda batch, row: batch.table.num_head_pages[row, 0]),
        ("req_to_token", lambda batch, row: batch.req_to_token[row, batch.table.covered[row] :]),
    ],
)
@pytest.mark.parametrize("value", [-1, 10**6])
def test_debug_mode_names_indices_out_of_range(monkeypatch, name, place, value):
    """Without it they are not read: the forward must not sync."""
    monkeypatch.setenv("HYBRIDKV_DEBUG", "1")
    batch = Batch(MIXED)
    batch.check()
    row = batch.rows[0]
    place(batch, row)[0] = value
    with pytest.raises(ValueError, match=rf"^{name}\[{row}\]: expected 0 to \d+, got .*{value}"):
        decode_attn(**batch.arguments(0))


def test_debug_mode_names_rows_out_of_range(monkeypatch):
    monkeypatch.setenv("HYBRIDKV_DEBUG", "1")
    arguments = Batch(MIXED).arguments(0)
    arguments["req_rows"] = arguments["req_rows"] + 100
    with pytest.raises(ValueError, match="^req_rows: expected 0 to "):
        decode_attn(**arguments)


@each_implementation
def test_poison_is_seen_when_it_is_read():
    """The tests above can fail: a head page that belongs to the request reaches its output."""
    batch = Batch([(4, [[3, 2], [2, 2]], 3)])
    layout, row = batch.table.layout, batch.rows[0]
    last_of_layer_0 = layout.head_page_ids(batch.table.pages[row], torch.tensor([4]))
    batch.views.k_pages[last_of_layer_0] = NAN
    assert decode_attn(**batch.arguments(0))[0].isnan().any()
    assert not decode_attn(**batch.arguments(1))[0].isnan().any()


@each_implementation
def test_padding_changes_nothing(kernels):
    """A CUDA graph's batch is filled up with row 0, of length 0: Triton reads nothing of it, its first slot is NaN."""
    if kernels in ("naive", "cpu"):
        pytest.skip("graphs are captured on CUDA devices only")
    arguments = Batch(MIXED).arguments(0)
    alone = decode_attn(**arguments)
    for name, padding in (("q", NAN), ("req_rows", 0), ("seq_lens", 0)):
        rows = arguments[name]
        arguments[name] = torch.cat((rows, torch.full_like(rows[:2], padding)))
    padded = decode_attn(**arguments)
    torch.testing.assert_close(padded[:-2], alone)
    assert (padded[-2:] == 0).all()


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("special", [float("inf"), NAN])
def test_a_broken_key_breaks_its_own_head_only(special):
    batch = Batch([(1, None, 40), (1, None, 9)], num_layers=1)
    batch.keys[0, int(batch.req_to_token[batch.rows[0], 35]), 1] = special
    out = decode_attn(**batch.arguments(0))
    assert out[0, 2:].isnan().all()
    torch.testing.assert_close(out[0, :2].double(), batch.expected[0, 0][:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[1].double(), batch.expected[1, 0], rtol=1e-4, atol=1e-5)


def test_the_plan_of_the_splits_covers_every_row_once_within_its_bound(monkeypatch):
    """Splits of an entry are contiguous, whole blocks, as even as blocks allow, and empty only where an entry is."""
    pytest.importorskip("triton")
    from hybridkv_kernels.decode_attn import triton, triton_plan

    block, window = triton.BLOCK_ROWS, 5 * triton.BLOCK_ROWS + 3
    generator, num_requests = fresh_generator(), 35
    lens = torch.randint(0, 40 * block, (num_requests,), generator=generator, dtype=torch.int32)
    lens[::7] = 0
    monkeypatch.setattr(triton_plan, "BLOCK_ENTRIES", 16)
    layout = HeadPageLayout(3, 2, 1, 8, windows=(0, window, 0))
    table = HeadPageTable(num_requests, 1, 0, layout, "cpu")
    plan = triton.plan_decode(table, torch.arange(num_requests), lens)
    num_entries, most = 2 * num_requests, plan.splits.shape[2]
    for layer_idx in range(3):
        splits, entries = plan.of_layer(layer_idx, num_entries, 0)
        used = splits[0, splits[0, :, 0] >= 0]
        assert (splits[0, len(used) :, 0] == -1).all()
        assert most - num_entries == triton_plan.SPLITS_PER_PROCESSOR * 4, "of an interpreted device's processors"
        assert (entries[:, 0] == 0).all()
        for entry, length in enumerate(lens.repeat_interleave(2).tolist()):
            mine = used[used[:, 0] == entry]
            first, count = entries[entry, 1:3].tolist()
            assert torch.equal(mine, used[first : first + count])
            assert (mine[:, 1] == entry // 2).all()
            assert (mine[:, 7] == count).all()
            begin, end = mine[:, 2], mine[:, 3]
            counted = min(length, window) if layer_idx == 1 else length
            assert (int(begin[0]), int(end[-1])) == (length - counted, length)
            assert torch.equal(begin[1:], end[:-1])
            sizes = (end - begin)[:-1]
            assert (sizes % block == 0).all()
            assert not len(sizes) or int(sizes.max() - sizes.min()) <= block
            assert ((end > begin) | (count == 1)).all()


@each_implementation
def test_a_plan_of_all_layers_is_that_of_each_one(kernels):
    """And it may be used again: a counter that a launch left behind would leave the second output unwritten."""
    if kernels in ("naive", "cpu"):
        pytest.skip("they need no plan")
    batch = Batch(MIXED)
    arguments = [batch.arguments(layer_idx) for layer_idx in range(batch.table.layout.num_layers)]
    q, rows, lens = (arguments[0][name] for name in ("q", "req_rows", "seq_lens"))
    plan = plan_decode(q, batch.table, rows, lens)
    for given in arguments:
        expected = decode_attn(**given)
        for _ in range(2):
            assert torch.equal(decode_attn(**given, plan=plan), expected)
    assert not plan.entries[:, :, 0].any()
    with pytest.raises(ValueError, match=r"^plan: expected \d+ entries, 0 means and layer 1"):
        decode_attn(**arguments[1], plan=plan_decode(q[:1], batch.table, rows[:1], lens[:1]))


# C++ alone: its splits, and its own conversion of 16-bit numbers.


@each_instruction_set
def test_cpp_over_more_rows_than_a_split(twin):
    requests = [(300, [[300, 2]], 3 * PAGE), (1, None, 2 * cpu.SPLIT_ROWS + 1), (1, None, cpu.SPLIT_ROWS)]
    Batch(requests, num_layers=1, pages=800).check(CPP_TOLERANCE)


def attend_to_values(values_TD):
    """The plain mean of each request's values [B, T, D] of one head: all its keys are zero."""
    num_requests, num_tokens, head_dim = values_TD.shape
    layout = HeadPageLayout(1, 1, num_requests * num_tokens, 1)
    keys, values, views = make_views(layout, head_dim, values_TD.dtype)
    keys.zero_()
    values.copy_(values_TD.reshape(values.shape))
    return decode_attn(
        q=torch.zeros(num_requests, 1, head_dim, dtype=values_TD.dtype),
        views=views,
        table=HeadPageTable(num_requests, 1, 0, layout, "cpu"),
        layer_idx=0,
        req_rows=torch.arange(num_requests),
        req_to_token=torch.arange(num_requests * num_tokens, dtype=torch.int32).view(num_requests, num_tokens),
        seq_lens=torch.full((num_requests,), num_tokens),
        scaling=1.0,
    )


def every_half(dtype):
    """[65536]: all bit patterns of a 16-bit type: subnormals, infinities, NaNs, both zeros."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@each_instruction_set
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number_survives_load_and_store(twin, dtype):
    numbers = every_half(dtype)
    out = attend_to_values(numbers.view(-1, 1, 128)).flatten()
    assert torch.equal(out.isnan(), numbers.isnan())
    assert torch.equal(out[~out.isnan()], numbers[~out.isnan()])


@each_instruction_set
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("partner", ["neighbour", "random"])
def test_stores_round_like_torch(twin, partner, dtype):
    """Means of two numbers: of neighbours every one is a tie, of random ones hardly any is."""
    numbers = every_half(dtype)
    other = numbers.roll(1) if partner == "neighbour" else numbers[torch.randperm(2**16, generator=fresh_generator())]
    expected = ((numbers.float() + other.float()) / 2).to(dtype)
    out = attend_to_values(torch.stack((numbers, other), 1).view(-1, 128, 2).transpose(1, 2)).flatten()
    torch.testing.assert_close(out, expected, rtol=0.0, atol=0.0, equal_nan=True)


@each_instruction_set
@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_queries_and_keys_count(twin, dtype):
    """The smallest numbers of a type are not flushed to zero: they decide this softmax."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    layout = HeadPageLayout(1, 1, 2, 1)
    keys, values, views = make_views(layout, 32, dtype)
    keys[0, 0], keys[0, 1] = 0.0, tiny
    values[0, 0], values[0, 1] = 0.0, 1.0
    q = torch.full((1, 1, 32), 1.0, dtype=dtype)
    table, req_to_token = HeadPageTable(1, 1, 0, layout, "cpu"), torch.tensor([[0, 1]], dtype=torch.int32)
    scaling = min(1 / (32 * float(tiny)), 3e38)  # a score of 1, or what fp32 can make of it
    out = decode_attn(q, views, table, 0, torch.tensor([0]), req_to_token, torch.tensor([2]), scaling=scaling)
    expected = torch.sigmoid(torch.tensor(32 * float(tiny) * scaling, dtype=torch.float64))
    torch.testing.assert_close(out.double(), expected.expand(1, 1, 32), rtol=2**-8, atol=0.0)
