import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridkv_kernels.head_pages import HeadPageLayout, HeadPageTable
from tests.builders import LAWS, head_page, make_views


@st.composite
def requests(draw):
    """A small pool's layout and one request's pages in it, in any order."""
    layout = HeadPageLayout(
        num_layers=draw(st.integers(1, 4)),
        num_kv_heads=draw(st.integers(1, 4)),
        pages_per_layer=draw(st.integers(2, 9)),
        page_size=draw(st.sampled_from([2, 8])),
    )
    order = draw(st.permutations(range(layout.pages_per_layer)))
    return layout, torch.tensor(order[: draw(st.integers(1, len(order)))], dtype=torch.int32)


@LAWS
@given(requests())
def test_a_request_s_head_pages_are_its_own_pages_each_once(request_):
    """Written through the head-page view, seen in the plain [L, slots, H, D] layout."""
    layout, pages = request_
    keys, values, views = make_views(layout, head_dim=3)
    count = len(pages) * layout.head_pages_per_page
    ids = layout.head_page_ids(pages, torch.arange(count))
    assert ids.dtype == torch.int64
    assert len(ids.unique()) == count, "injective"
    views.k_pages[ids] = torch.arange(count, dtype=torch.float32)[:, None, None].expand(-1, layout.page_size, 3)
    own = torch.zeros(layout.pages_per_layer, dtype=torch.bool)
    own[pages.long()] = True
    own_slots = own.repeat_interleave(layout.page_size)
    assert keys[:, ~own_slots].isnan().all(), "nothing outside the request's pages"
    assert not keys[:, own_slots].isnan().any(), "every element of them"
    assert values.isnan().all()
    for linear in range(count):
        page, inside = divmod(linear, layout.head_pages_per_page)
        place = (int(pages[page]), *divmod(inside, layout.num_kv_heads))
        assert (head_page(keys, *place, layout.page_size) == linear).all()


@LAWS
@given(requests(), st.data())
def test_ids_follow_the_shape_of_the_indices(request_, data):
    layout, pages = request_
    count = len(pages) * layout.head_pages_per_page
    linear = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=6, max_size=6))).view(2, 3)
    flat = layout.head_page_ids(pages, torch.arange(count))
    assert torch.equal(layout.head_page_ids(pages, linear), flat[linear])
    assert torch.equal(layout.head_page_ids(pages, linear.int()), flat[linear]), "int32 indices"


@LAWS
@given(requests())
def test_host_pages_keep_their_head_pages_side_by_side(request_):
    layout, pages = request_
    per_page = layout.head_pages_per_page
    ids = layout.host_page_ids(pages, torch.arange(len(pages) * per_page))
    expected = [page * per_page + i for page in pages.tolist() for i in range(per_page)]
    assert ids.tolist() == expected
    assert len(set(expected)) == len(expected)


@LAWS
@given(requests(), st.data())
def test_token_rows_are_rows_of_the_plain_layout(request_, data):
    layout, _ = request_
    keys, _, views = make_views(layout, head_dim=3)
    layer = data.draw(st.integers(0, layout.num_layers - 1))
    head = data.draw(st.integers(0, layout.num_kv_heads - 1))
    slots = torch.randperm(layout.pages_per_layer * layout.page_size)[:3]
    keys.copy_(torch.arange(keys.numel(), dtype=torch.float32).view_as(keys))
    rows = views.token_rows(torch.tensor(layer), slots, torch.tensor(head))
    assert torch.equal(views.k_flat[rows], keys[layer, slots, head])


@pytest.fixture
def table():
    return HeadPageTable(4, 6, 5, HeadPageLayout(2, 3, 10, 8), "cpu")


def test_a_new_table_is_dense(table):
    assert not table.num_pages.any()
    assert not table.is_dynamic.any()


def test_bind_and_clear_touch_one_row(table):
    table.num_head_pages[2] = 7  # left over from an earlier request
    table.bind(2, torch.tensor([4, 1, 9]), torch.tensor([3]), covered=40)
    assert table.pages[2, :3].tolist() == [4, 1, 9]
    assert table.host_pages[2, :1].tolist() == [3]
    assert (int(table.num_pages[2]), int(table.covered[2]), int(table.num_prompt_pages[2])) == (3, 40, 5)
    assert not table.num_head_pages[2].any(), "heads are empty until the forward has compressed"
    table.is_dynamic[2] = True
    table.bind(3, torch.tensor([5]), torch.tensor([], dtype=torch.int64), covered=8)
    table.clear(2)
    for tensor in (table.num_pages, table.covered, table.num_prompt_pages, table.num_head_pages, table.is_dynamic):
        assert not tensor[2].any()
    assert int(table.num_pages[3]) == 1
    table.clear_all()
    assert not table.num_pages.any()
