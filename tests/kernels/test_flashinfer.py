import pytest
import torch

from hybridkv_kernels.decode_attn import flashinfer, naive
from hybridkv_kernels.head_pages import HeadPageLayout, HeadPageTable
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from tests.builders import TinyPool, forced_kernels, fresh_generator, head_page, make_views
from tests.flashinfer_double import BatchDecodeDouble, merge_state
from tests.kernels.shapes import covering_shapes
from tests.kernels.test_decode_attn import Batch

WORKSPACE = torch.empty(64, dtype=torch.uint8)


@pytest.mark.parametrize("page_size", [8, 16, 32])
@pytest.mark.parametrize(("shape", "most"), [((1, 1, 1), 0), ((2, 2, 2), 0), ((3, 2, 2), 3), ((5, 3, 4), 3)])
def test_entries_name_the_pages_of_each_head_and_no_other(shape, most, page_size):
    """The first request is dense; with pages of none, all lists are empty."""
    batch, layers, heads = shape
    counts = torch.randint(0, most + 1, shape, generator=fresh_generator(), dtype=torch.int32)
    counts[0] = 0
    requests = [(8, each.tolist() if i else None, 1) for i, each in enumerate(counts)]
    pool = Batch(requests, num_layers=layers, num_kv_heads=heads, pages=96, page_size=page_size)
    table, rows, views = pool.table, torch.tensor(pool.rows), pool.views
    entries = flashinfer.head_page_entries(table, rows, counts)
    assert entries.indptr.dtype == entries.indices.dtype == entries.last_page_len.dtype == torch.int32
    assert int(entries.indptr[-1, -1]) == len(entries.indices) == int(counts.sum())
    per_page = table.layout.head_pages_per_page
    for layer in range(layers):
        for entry in range(batch * heads):
            request, head = divmod(entry, heads)
            row, count = int(rows[request]), int(counts[request, layer, head])
            start, end = entries.indptr[layer, entry : entry + 2].tolist()
            assert end - start == count
            assert int(entries.last_page_len[layer, entry]) == (page_size if count else 0)
            for place, index in enumerate(entries.indices[start:end].tolist()):
                page, inside = divmod(int(table.first_head_page[row, layer, head]) + place, per_page)
                where = (int(table.pages[row, page]), *divmod(inside, heads), page_size)
                assert torch.equal(views.k_pages[index], head_page(pool.keys, *where))


def make_pool(page_size, group_size, dtype=torch.bfloat16, head_dim=64):
    config = HybridKVConfig(preset="paper", page_size=page_size, budget=0.4, min_prompt_tokens=1, min_head_pages=1)
    pool = TinyPool(fresh_generator(), config, dtype=dtype, head_dim=head_dim, group_size=group_size)
    prompts = [pool.add_prompt(length) for length in (6 * page_size, page_size + 1, 9 * page_size + 3)]
    for prompt in prompts[:1] + prompts[2:]:  # the one between them stays dense
        pool.compress(prompt)
    for prompt in prompts:
        pool.append_token(prompt)
    return pool, prompts


def check_merged(decode, pool, prompts, layer, rows):
    """Head pages merged with what stock FlashInfer computes of [covered, seq_len): pages of one token, all heads in
    one sequence; `rows` may end with padding."""
    q, num_requests = pool.queries(len(rows)), len(prompts)
    with forced_kernels("naive"):
        expected = pool.decode(prompts, layer, q[:num_requests])
    out, lse = decode.run(layer, q, pool.scaling)
    assert (lse[num_requests:] == -float("inf")).all(), "a padding row has no head pages"
    slots = [pool.req_to_token[p.row, int(pool.table.covered[p.row]) : p.seq_len] for p in prompts]
    lens = torch.tensor([0] + [len(s) for s in slots], dtype=torch.int32)
    wrapper, ones = BatchDecodeDouble(WORKSPACE), torch.ones(num_requests, dtype=torch.int32)
    shape = (q.shape[1], pool.layout.num_kv_heads, q.shape[2], 1)
    wrapper.plan(lens.cumsum(0).int(), torch.cat(slots), ones, *shape)
    tail = wrapper.forward_return_lse(q[:num_requests], pool.views.layer_rows(layer), sm_scale=pool.scaling)
    own = out[:num_requests], lse[:num_requests]
    merged = flashinfer.merge(*own, *tail, pool.shape.group_size, merge_state)
    torch.testing.assert_close(merged, expected, atol=2e-2, rtol=2e-2)
    assert merged.dtype == q.dtype


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize(("page_size", "group_size"), [(8, 7), (16, 1), (32, 4)])
def test_merged_with_the_tail_it_is_the_reference(page_size, group_size, in_graph):
    pool, prompts = make_pool(page_size, group_size)
    rows = torch.tensor([p.row for p in prompts] + [0])  # a padding row, as a graph has it
    decode = flashinfer.HeadPageDecode(pool.table, pool.views, group_size, WORKSPACE, BatchDecodeDouble)
    decode.init_graphs(len(pool.table.num_pages))
    decode.plan(rows, pool.table.num_head_pages[rows], in_graph=in_graph)
    for layer in range(pool.layout.num_layers):
        check_merged(decode, pool, prompts, layer, rows)


def test_a_plan_holds_while_chunks_are_swapped():
    """The same pages, other chunks: the order of pages does not matter, and nothing is planned again."""
    pool, prompts = make_pool(8, 2)
    rows = pool.rows(prompts)
    decode = flashinfer.HeadPageDecode(pool.table, pool.views, 2, WORKSPACE, BatchDecodeDouble)
    decode.plan(rows, pool.table.num_head_pages[rows], in_graph=False)
    for _ in range(3):
        check_merged(decode, pool, prompts, 0, rows)
    assert decode.num_plans == pool.layout.num_layers
    assert int(pool.counters[0]) > int(pool.counters[1]), "nothing was swapped: the test shows nothing"


def test_plans_of_captured_sizes_share_memory_and_are_made_once():
    pool, prompts = make_pool(8, 2)
    decode = flashinfer.HeadPageDecode(pool.table, pool.views, 2, WORKSPACE, BatchDecodeDouble)
    decode.init_graphs(4)
    BatchDecodeDouble.made.clear()
    rows = torch.tensor([prompts[0].row, 0])
    for size in (1, 2, 1, 2):
        decode.plan(rows[:size], pool.table.num_head_pages[rows[:size]], in_graph=True)
    assert len(BatchDecodeDouble.made) == 2 * pool.layout.num_layers
    assert decode.num_plans == 4 * pool.layout.num_layers
    starts = {(w._paged_kv_indptr_buf.data_ptr(), w.workspaces[1].data_ptr()) for w in BatchDecodeDouble.made}
    assert len(starts) == pool.layout.num_layers


@pytest.mark.parametrize(
    ("dtype", "head_dim", "words"),
    [(torch.float32, 64, "bfloat16 and float16, not float32"), (torch.bfloat16, 80, "64, 128, 256, not 80")],
)
def test_what_flashinfer_cannot_serve_is_refused(dtype, head_dim, words):
    assert words in flashinfer.shape_obstacle(dtype, head_dim)
    _, _, views = make_views(HeadPageLayout(1, 1, 2, 8), head_dim, dtype)
    table = HeadPageTable(2, 2, 0, views.layout, "cpu")
    with pytest.raises(ValueError, match=words):
        flashinfer.HeadPageDecode(table, views, 1, WORKSPACE, BatchDecodeDouble)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", flashinfer.HEAD_DIMS)
def test_what_flashinfer_serves_is_not(dtype, head_dim):
    assert flashinfer.shape_obstacle(dtype, head_dim) is None


def test_more_rows_than_the_table_has_are_refused():
    pool, _ = make_pool(8, 2)
    decode = flashinfer.HeadPageDecode(pool.table, pool.views, 2, WORKSPACE, BatchDecodeDouble)
    with pytest.raises(ValueError, match="max_batch_size: expected at most 9, got 10"):
        decode.init_graphs(10)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
@pytest.mark.parametrize("shape", [s for s in covering_shapes() if flashinfer.shape_obstacle(s[0], s[3]) is None])
def test_flashinfer_s_own_kernels_attend_to_the_head_pages(kernels, shape):
    """Each compressed request without its tail; a dense one and padding are beside it."""
    wrapper_class = pytest.importorskip("flashinfer").BatchDecodeWithPagedKVCacheWrapper
    dtype, page_size, group_size, head_dim = shape
    pool, prompts = make_pool(page_size, group_size, dtype, head_dim)
    rows = torch.tensor([p.row for p in prompts] + [0])
    workspace = torch.zeros(256 << 20, dtype=torch.uint8)
    with torch.device("cpu"):  # a server has no other default
        decode = flashinfer.HeadPageDecode(pool.table, pool.views, group_size, workspace, wrapper_class)
        decode.plan(rows, pool.table.num_head_pages[rows].cpu(), in_graph=False)
    compressed = pool.table.num_pages[rows].nonzero().squeeze(1)
    covered = pool.table.covered[rows[compressed]]
    for layer in range(pool.layout.num_layers):
        q = pool.queries(len(rows))
        out, lse = decode.run(layer, q, pool.scaling)
        assert lse[compressed].isfinite().all()
        where = (pool.views, pool.table, layer, rows[compressed], pool.req_to_token, covered)
        expected = naive.decode_attn(q[compressed], *where, pool.scaling)
        torch.testing.assert_close(out[compressed], expected, atol=2e-2, rtol=2e-2)
