"""Rows on their way to host memory, as records of a host store of each type."""

import pytest
import torch

from hybridkv_kernels import gpu
from hybridkv_kernels.head_pages import HeadPageLayout
from hybridkv_kernels.host_pages import HOST_DTYPES, HostPages
from hybridkv_kernels.offload_rows import naive, offload_rows
from sglang_hybridkv.cache.host_segments import allocate_segment
from tests.builders import NAN, NAN_BYTE, fill_host, fresh_generator, host_bytes, make_views
from tests.kernels.plain import plain_rounded
from tests.kernels.shapes import DTYPES, HEAD_DIMS
from tests.kernels.test_decode_attn import changed

NUM_HEADS, NUM_PAGES, PAGE_SIZE = 3, 4, 8


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So few that each has several tiles."""
    if gpu.is_installed():
        monkeypatch.setattr("hybridkv_kernels.offload_rows.triton._MOST_PROGRAMS", 2)


class Offload:
    """A pool of random rows, a host store that is NaN, and which rows go to which of its pages: no page twice."""

    def __init__(self, generator, host_dtype, dtype=torch.float32, head_dim=32, page_size=PAGE_SIZE):
        layout = HeadPageLayout(2, 2, 20, page_size)
        keys, values, self.views = make_views(layout, head_dim, dtype)
        for rows in (keys, values):
            # Neighbours differ in size, so that a scale of another row is seen.
            sizes = 2.0 ** torch.randint(-8, 9, (*rows.shape[:3], 1), generator=generator)
            rows.copy_(torch.randn(rows.shape, generator=generator) * sizes)
        rows = torch.randperm(len(self.views.k_flat), generator=generator)
        self.src_rows = rows[: NUM_HEADS * NUM_PAGES * page_size].view(NUM_HEADS, -1)
        ids = torch.randperm(20, generator=generator)
        self.host_page_ids = ids[: NUM_HEADS * NUM_PAGES].view(NUM_HEADS, NUM_PAGES)
        self.host = HostPages.empty(20, page_size, head_dim, dtype, host_dtype, torch.get_default_device(), 6)
        for num_pages in (6, 6, 6, 2):
            shape = self.host.segment_shape(num_pages)
            self.host.add(allocate_segment(shape, torch.get_default_device()))

    def arguments(self):
        return {
            "views": self.views,
            "host_pages": self.host,
            "src_rows": self.src_rows,
            "host_page_ids": self.host_page_ids,
        }

    def run(self, function=offload_rows):
        """The bytes that a function leaves in the host store."""
        fill_host(self.host, NAN_BYTE)
        function(**self.arguments())
        if self.src_rows.is_cuda:
            torch.cuda.synchronize()
        return host_bytes(self.host)

    def stored(self):
        """Keys and values [E, N, D] read from where they should be."""
        page_size = self.host.page_size
        ids = self.host_page_ids.cpu()
        records = (ids[..., None] * page_size + torch.arange(page_size, device="cpu")).flatten(1)
        return tuple(rows.to(self.src_rows.device) for rows in self.host.read(records))


def as_stored(rows, host_dtype):
    return rows if host_dtype == "same" else plain_rounded(rows)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("host_dtype", HOST_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 32, *HEAD_DIMS])
def test_records_hold_the_rows_and_nothing_else_is_written(head_dim, dtype, host_dtype):
    offload = Offload(fresh_generator(), host_dtype, dtype, head_dim)
    data = offload.run()
    for got, pool in zip(offload.stored(), (offload.views.k_flat, offload.views.v_flat), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, as_stored(pool[offload.src_rows], host_dtype))
    others = torch.ones(len(data), dtype=torch.bool)
    others[offload.host_page_ids.flatten()] = False
    assert (data[others.cpu()] == NAN_BYTE).all()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("host_dtype", HOST_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 8), (80, 32), (128, 16), (256, 8)])
def test_equals_naive_byte_by_byte(head_dim, page_size, dtype, host_dtype):
    """Rows that are zero, tiny, huge or broken among them, and pages that are left out."""
    offload = Offload(fresh_generator(), host_dtype, dtype, head_dim, page_size)
    largest = torch.finfo(dtype).max
    for pool in (offload.views.k_flat, offload.views.v_flat):
        pool[::7] = 0.0
        pool[1::7] *= torch.finfo(dtype).smallest_normal
        pool[2::7, 0], pool[3::7, -1], pool[4::7, head_dim // 2] = largest, float("inf"), NAN
        pool[5::7] = torch.randint(-254, 255, pool[5::7].shape) / 2  # with halves between two codes
        pool[5::7, 1] = 127.0
    offload.host_page_ids[0, 1] = offload.host_page_ids[2, 3] = -1
    assert torch.equal(offload.run(), offload.run(naive.offload_rows))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rounded_row_is_near_and_a_broken_one_is_broken_alone(dtype):
    offload = Offload(fresh_generator(), "int8", dtype)
    src = offload.src_rows.flatten()
    keys, values = offload.views.k_flat, offload.views.v_flat
    broken = {0: float("inf"), 9: -float("inf"), 17: NAN}
    for i, number in broken.items():
        keys[src[i], 3] = number
    keys[src[1]], keys[src[2]], values[src[3]] = 0.0, 2.0**-120, min(torch.finfo(dtype).max, 2.0**127)
    offload.run()
    stored_keys, stored_values = (rows.flatten(0, 1) for rows in offload.stored())
    assert stored_keys[list(broken)].isnan().all()
    assert not stored_values.isnan().any()
    sound = [i for i in range(len(src)) if i not in broken]
    assert (stored_keys[[1, 2]] == 0).all()
    for got, pool in ((stored_keys[sound], keys[src[sound]]), (stored_values, values[src])):
        exact = pool.double()
        step = exact.abs().amax(-1, keepdim=True) / 127
        # Half a step, and the rounding to the pool's type.
        limit = 0.5001 * step + torch.finfo(dtype).eps * exact.abs().amax(-1, keepdim=True) + 2.0**-100
        assert ((got.double() - exact).abs() <= limit).all()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("sizes", [(0, 0), (0, PAGE_SIZE), (2, 0)])
def test_nothing_to_store(sizes):
    offload = Offload(fresh_generator(), "same")
    num_heads, num_tokens = sizes
    offload.src_rows = offload.src_rows[:num_heads, :num_tokens]
    offload.host_page_ids = offload.host_page_ids[:num_heads, : num_tokens // PAGE_SIZE]
    assert (offload.run() == NAN_BYTE).all()


@pytest.mark.parametrize(
    "change",
    [lambda t: t[:, :4], lambda t: t[..., :16], torch.Tensor.int, lambda t: torch.stack((t, t), -1)[..., 0]],
)
def test_a_segment_of_another_shape_is_refused(change):
    host = Offload(fresh_generator(), "same").host
    with pytest.raises(ValueError, match=r"^segment: expected .*, got "):
        host.add(change(torch.zeros(host.segment_shape(6), dtype=torch.uint8)))


@pytest.mark.parametrize("num_pages", [6, 0, 7])
def test_no_segment_follows_a_shorter_one_or_is_longer(num_pages):
    host = HostPages.empty(20, 8, 32, torch.float32, "same", "cpu", 6)
    host.add(torch.zeros(host.segment_shape(6 if num_pages != 6 else 2), dtype=torch.uint8))
    with pytest.raises(AssertionError, match="segment is"):
        host.add(torch.zeros(host.segment_shape(num_pages), dtype=torch.uint8))


def test_rows_of_an_odd_size_are_refused():
    with pytest.raises(ValueError, match=r"^host_pages.head_dim: expected an even number, got 5"):
        offload_rows(**Offload(fresh_generator(), "same", head_dim=5).arguments())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("host_pages.page_size", lambda page_size: 4),
        ("host_pages.dtype", lambda dtype: torch.float16),
        ("host_pages.head_dim", lambda head_dim: 64),
        ("src_rows", lambda t: t[0]),
        ("src_rows", lambda t: t[:, 1:]),
        ("src_rows", lambda t: t.int()),
        ("src_rows", lambda t: t.to("meta")),
        ("host_page_ids", lambda t: t[:, :1]),
        ("host_page_ids", lambda t: t[:1]),
        ("host_page_ids", lambda t: t.int()),
        ("host_page_ids", lambda t: t.to("meta")),
    ],
)
def test_bad_arguments_are_named(name, change):
    arguments = Offload(fresh_generator(), "int8").arguments()
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        offload_rows(**changed(arguments, name, change))
