"""Copy the rows of dynamic heads to host memory."""

import torch

from hybridkv_kernels import checks, dispatch, gpu
from hybridkv_kernels.head_pages import HeadPageViews
from hybridkv_kernels.host_pages import HostPages
from hybridkv_kernels.offload_rows import naive

# On the CPU torch copies as fast as memory allows, and a prompt is rounded once.
_IMPLEMENTATIONS = {"naive": naive.offload_rows, "cpu": naive.offload_rows, "triton": gpu.twin("offload_rows")}


def offload_rows(
    views: HeadPageViews, host_pages: HostPages, src_rows: torch.Tensor, host_page_ids: torch.Tensor
) -> None:
    """Store keys and values of rows src_rows[e, i] of the pool as records of host pages, as the store rounds them.

    Parameters
    ----------
    views : of the pool; only read.
    host_pages : the host store; written in place.
    src_rows : [E, N], int64, on the pool's device. Rows of k_flat for the N tokens of E heads, N a multiple of P.
    host_page_ids : [E, N / P], int64, same device. Head pages of the host store, without repeats; a negative one leaves
        its P tokens out, so that a caller who must not wait for the device may list every head.

    Raises
    ------
    ValueError
        Shape, dtype or device differs.

    Notes
    -----
    On CUDA the kernel writes the pinned memory by its address, in the order of the stream: no sync, fixed shapes. Host
    pages may be given to another request only when the stream has come past it. Cost: 2 E N D itemsize bytes of device
    memory, and E N record_bytes over the host link.
    """
    layout = views.layout
    head_dim, dtype = views.k_flat.shape[1], views.k_flat.dtype
    host_pages.check(layout.page_size, head_dim, dtype)
    checks.check_shape("src_rows", src_rows, (None, None))
    if src_rows.shape[1] % layout.page_size:
        raise ValueError(f"src_rows: expected whole pages of {layout.page_size} tokens, got {src_rows.shape[1]}")
    checks.check_shape("host_page_ids", host_page_ids, (src_rows.shape[0], src_rows.shape[1] // layout.page_size))
    for name, rows in (("src_rows", src_rows), ("host_page_ids", host_page_ids)):
        checks.check_dtype(name, rows, (torch.int64,))
        if rows.device != views.k_flat.device:
            raise ValueError(f"{name}: expected device {views.k_flat.device} like views, got {rows.device}")
    _IMPLEMENTATIONS[dispatch.choose_copy(src_rows.device)](views, host_pages, src_rows, host_page_ids)
