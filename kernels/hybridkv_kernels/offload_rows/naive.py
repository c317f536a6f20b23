"""Readable reference of `offload_rows`."""

import torch

from hybridkv_kernels.head_pages import HeadPageViews
from hybridkv_kernels.host_pages import HostPages


def offload_rows(
    views: HeadPageViews, host_pages: HostPages, src_rows: torch.Tensor, host_page_ids: torch.Tensor
) -> None:
    """Arguments as the public function's."""
    page_size = host_pages.page_size
    wanted = host_page_ids >= 0
    src = src_rows.unflatten(1, (-1, page_size))[wanted].flatten()  # [pages * P]
    dst = host_page_ids[wanted][:, None] * page_size + torch.arange(page_size, device=src.device)
    host_pages.write(dst.flatten().cpu(), views.k_flat[src].cpu(), views.v_flat[src].cpu())
