import pytest
import torch

from hybridkv_kernels.decode_attn import decode_attn
from hybridkv_kernels.head_pages import HeadPageLayout, HeadPageTable
from tests.builders import NAN, fresh_generator, full_attention, head_page, make_views

PAGE = 8


class Batch:
    """Requests whose heads hold different numbers of head pages; everything else in the pool is NaN.

    `requests` : per request (covered pages, head pages of each [L][H] head or None when dense, tail tokens).
    """

    def __init__(self, requests, *, layers=2, heads=2, group=2, head_dim=32, dtype=torch.float32):
        generator = fresh_generator()
        layout = HeadPageLayout(layers, heads, 64, PAGE)
        self.keys, self.values, self.views = make_views(layout, head_dim, dtype)
        self.table = HeadPageTable(len(requests) + 2, 32, 0, layout, "cpu")
        self.req_to_token = torch.zeros(len(requests) + 2, 256, dtype=torch.int32)
        self.rows = (torch.randperm(len(requests), generator=generator) + 1).tolist()
        self.seq_lens, self.expected = [], {}
        free = torch.randperm(64, generator=generator).tolist()
        self.q = torch.randn(len(requests), heads * group, head_dim, generator=generator).to(dtype)
        self.scaling = 0.2
        for i, (row, (chunks, counts, tail)) in enumerate(zip(self.rows, requests, strict=True)):
            covered = chunks * PAGE if counts else 0
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
                    k, v = tail_k[layer, :, head], tail_v[layer, :, head]
                    if counts:
                        first = int(self.table.first_head_page[row, layer, head])
                        for j in range(first, first + counts[layer][head]):
                            page, inside = divmod(j, layout.head_pages_per_page)
                            place = (pages[page], *divmod(inside, heads), PAGE)
                            new_k, new_v = (torch.randn(PAGE, head_dim, generator=generator).to(dtype) for _ in "kv")
                            head_page(self.keys, *place).copy_(new_k)
                            head_page(self.values, *place).copy_(new_v)
                            k, v = torch.cat((new_k, k)), torch.cat((new_v, v))
                    query = self.q[i].view(heads, group, head_dim)[head]
                    mine.append(full_attention(query, k[None], v[None], self.scaling))
                self.expected[i, layer] = torch.cat(mine)

    @staticmethod
    def _tail_slots(free, covered, tail):
        slots = []
        for position in range(covered, covered + tail):
            if position % PAGE == 0 or not slots:
                page = free.pop()
            slots.append(page * PAGE + position % PAGE)
        return torch.tensor(slots)

    def arguments(self, layer):
        return {
            "q": self.q,
            "k_rows": self.keys[layer],
            "v_rows": self.values[layer],
            "k_head_pages": self.views.k_pages,
            "v_head_pages": self.views.v_pages,
            "table": self.table,
            "layer_idx": layer,
            "req_rows": torch.tensor(self.rows),
            "req_to_token": self.req_to_token,
            "seq_lens": torch.tensor(self.seq_lens),
            "scaling": self.scaling,
        }

    def check(self, rtol=1e-4, atol=1e-5):
        for layer in range(self.table.layout.num_layers):
            out = decode_attn(**self.arguments(layer))
            assert out.dtype == self.q.dtype
            for i in range(len(self.rows)):
                torch.testing.assert_close(out[i].double(), self.expected[i, layer], rtol=rtol, atol=atol)


MIXED = [
    (6, [[1, 6], [2, 3]], 1),
    (1, None, 1),
    (5, [[1, 1], [1, 1]], PAGE),
    (1, None, 2 * PAGE + 3),
    (3, [[3, 3], [3, 3]], 2 * PAGE + 1),
]


@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
def test_one_softmax_over_head_pages_and_tail(group):
    Batch(MIXED, group=group).check()


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_head_dims_and_dtypes(head_dim, dtype, tolerance):
    Batch(MIXED, head_dim=head_dim, dtype=dtype).check(rtol=tolerance, atol=tolerance)


def test_one_kv_head_and_one_request():
    Batch([(4, [[2], [1], [4]], 5)], layers=3, heads=1, group=7).check()


def test_a_dense_batch_equals_full_attention():
    Batch([(1, None, 1), (1, None, PAGE), (1, None, 3 * PAGE + 1)]).check()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_and_lengths_of_either_integer_type(dtype):
    batch = Batch(MIXED)
    arguments = batch.arguments(0)
    expected = decode_attn(**arguments)
    for name in ("req_rows", "seq_lens", "req_to_token"):
        arguments[name] = arguments[name].to(dtype)
    assert torch.equal(decode_attn(**arguments), expected)


def test_the_order_of_a_head_s_pages_does_not_matter():
    batch = Batch([(4, [[3, 2], [2, 2]], 3)])
    before = decode_attn(**batch.arguments(0))
    layout, row = batch.table.layout, batch.rows[0]
    ids = layout.head_page_ids(batch.table.pages[row], torch.tensor([0, 2]))
    for pages in (batch.views.k_pages, batch.views.v_pages):
        pages[ids] = pages[ids.flip(0)]
    torch.testing.assert_close(decode_attn(**batch.arguments(0)), before)


def test_inputs_are_only_read():
    batch = Batch(MIXED)
    before = batch.keys.clone(), batch.values.clone(), batch.q.clone()
    decode_attn(**batch.arguments(0))
    for tensor, copy in zip((batch.keys, batch.values, batch.q), before, strict=True):
        assert torch.equal(tensor.nan_to_num(9.0), copy.nan_to_num(9.0))


def test_an_empty_batch_is_refused():
    arguments = Batch(MIXED).arguments(0)
    arguments["q"] = arguments["q"][:0]
    with pytest.raises(ValueError, match="^q: expected at least one request, got an empty batch$"):
        decode_attn(**arguments)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", lambda t: t[0]),
        ("q", lambda t: t.int()),
        ("q", lambda t: t[:, :3]),
        ("k_rows", lambda t: t[:, :1]),
        ("k_rows", lambda t: t[..., :16]),
        ("k_rows", lambda t: t.half()),
        ("v_rows", lambda t: t.to("meta")),
        ("v_rows", lambda t: t[0]),
        ("k_head_pages", lambda t: t[:, :4]),
        ("k_head_pages", lambda t: t.half()),
        ("v_head_pages", lambda t: t[..., :16]),
        ("v_head_pages", lambda t: t.to("meta")),
        ("req_rows", lambda t: t[1:]),
        ("seq_lens", lambda t: t[:, None]),
    ],
)
def test_bad_arguments_are_named(name, change):
    arguments = Batch(MIXED).arguments(0)
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        decode_attn(**arguments | {name: change(arguments[name])})


def test_poison_is_seen_when_it_is_read():
    """The tests above can fail: a head page that belongs to the request reaches its output."""
    batch = Batch([(4, [[3, 2], [2, 2]], 3)])
    layout, row = batch.table.layout, batch.rows[0]
    last_of_layer_0 = layout.head_page_ids(batch.table.pages[row], torch.tensor([4]))
    batch.views.k_pages[last_of_layer_0] = NAN
    assert decode_attn(**batch.arguments(0))[0].isnan().any()
    assert not decode_attn(**batch.arguments(1))[0].isnan().any()
