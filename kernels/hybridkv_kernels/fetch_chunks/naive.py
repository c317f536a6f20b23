"""Readable reference of `fetch_chunks`."""

import torch


def fetch_chunks(
    selected: torch.Tensor,
    buffer_page_ids: torch.Tensor,
    num_buffer_pages: torch.Tensor,
    chunk_of_head_page: torch.Tensor,
    k_head_pages: torch.Tensor,
    v_head_pages: torch.Tensor,
    host_page_ids: torch.Tensor,
    k_host_pages: torch.Tensor,
    v_host_pages: torch.Tensor,
) -> torch.Tensor:
    """Pair, head by head, the pages whose chunk nobody wants with the chunks that no page holds."""
    places = torch.arange(buffer_page_ids.shape[1], device=selected.device)
    in_buffer = places < num_buffer_pages[:, None]
    held = chunk_of_head_page[buffer_page_ids].to(torch.int64).masked_fill(~in_buffer, 0)
    resident = torch.zeros_like(selected, dtype=torch.int32).scatter_add_(1, held, in_buffer.to(torch.int32)) > 0
    missing_head, missing_chunk = (selected & ~resident).nonzero(as_tuple=True)
    victim_head, victim_place = (in_buffer & ~selected.gather(1, held)).nonzero(as_tuple=True)
    assert torch.equal(missing_head, victim_head), "a buffer must have as many pages as its head selects chunks"
    dst = buffer_page_ids[victim_head, victim_place]
    src = host_page_ids[missing_head, missing_chunk].to(k_host_pages.device)
    k_head_pages[dst] = k_host_pages[src].to(k_head_pages.device)
    v_head_pages[dst] = v_host_pages[src].to(v_head_pages.device)
    chunk_of_head_page[dst] = missing_chunk.to(torch.int32)
    return torch.tensor(len(missing_head), device=selected.device)
