"""Readable reference of `decode_attn`: one request at a time, all its heads at once."""

import torch

from hybridkv_kernels.head_pages import HeadPageTable, HeadPageViews


def decode_attn(
    q: torch.Tensor,
    views: HeadPageViews,
    table: HeadPageTable,
    layer_idx: int,
    req_rows: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Arguments and result as the public function's."""
    k_rows, v_rows = views.layer_rows(layer_idx)
    out = torch.empty_like(q)
    for i, (row, seq_len) in enumerate(zip(req_rows.tolist(), seq_lens.tolist(), strict=True)):
        tail = req_to_token[row, int(table.covered[row]) : seq_len]
        keys, values = k_rows[tail].transpose(0, 1), v_rows[tail].transpose(0, 1)
        mask = None
        if table.num_pages[row] > 0:
            ids, is_real = layer_head_pages(table, row, layer_idx)
            mask = torch.cat((is_real, is_real.new_ones(len(is_real), keys.shape[1])), dim=1).unsqueeze(1)
            keys = torch.cat((views.k_pages[ids].flatten(1, 2), keys), dim=1)
            values = torch.cat((views.v_pages[ids].flatten(1, 2), values), dim=1)
        grouped = q[i].view(keys.shape[0], -1, q.shape[-1])
        attended = torch.nn.functional.scaled_dot_product_attention(grouped, keys, values, mask, scale=scaling)
        out[i] = attended.reshape(out[i].shape)
    return out


def layer_head_pages(table: HeadPageTable, row: int, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Head pages [H, S] of one request's layer, S being the longest head's, and which rows [H, S * P] are real."""
    first, count = table.first_head_page[row, layer_idx], table.num_head_pages[row, layer_idx]
    places = torch.arange(int(count.max()), device=first.device)
    in_head = places < count[:, None]
    # Masked places repeat a page the request owns: foreign memory may hold NaN, which no mask hides.
    owned = first.where(count > 0, 0)[:, None]
    linear = (first[:, None] + places).where(in_head, owned)
    ids = table.layout.head_page_ids(table.pages[row], linear)
    return ids, in_head.repeat_interleave(table.layout.page_size, dim=1)
