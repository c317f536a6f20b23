"""Readable reference of `decode_attn`: one request at a time, all its heads at once."""

import math

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
    num_means: int = 0,
) -> torch.Tensor:
    """As the public function; `num_means` mean keys of a chunk, and as many values, estimate it where it is absent."""
    k_rows, v_rows = views.layer_rows(layer_idx)
    window = table.layout.window(layer_idx)
    out = torch.empty_like(q)
    for i, (row, seq_len) in enumerate(zip(req_rows.tolist(), seq_lens.tolist(), strict=True)):
        tail = req_to_token[row, int(table.covered[row]) : seq_len]
        keys, values = k_rows[tail].transpose(0, 1), v_rows[tail].transpose(0, 1)  # [H, tail, D]
        mask = None
        if table.num_pages[row] > 0:
            ids, is_real = layer_head_pages(table, row, layer_idx)
            mask = torch.cat((is_real, is_real.new_ones(len(is_real), keys.shape[1])), dim=1).unsqueeze(1)  # [H, 1, N]
            # [H, S, P, D] -> [H, S * P, D], then the tail.
            keys = torch.cat((views.k_pages[ids].flatten(1, 2), keys), dim=1)
            values = torch.cat((views.v_pages[ids].flatten(1, 2), values), dim=1)
            if num_means:
                absent = absent_chunks(views, table, row, layer_idx)
                # Nothing is appended where nothing is estimated, so that not even the rounding differs.
                if absent.any():
                    mean_keys, mean_values, bonus = estimated_rows(views, table, row, layer_idx, absent, num_means)
                    exact = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
                    mask = torch.cat((exact, bonus.unsqueeze(1)), dim=2)
                    keys, values = torch.cat((keys, mean_keys), dim=1), torch.cat((values, mean_values), dim=1)
        if window:
            if mask is None:
                mask = torch.ones(keys.shape[0], 1, keys.shape[1], dtype=torch.bool, device=q.device)
            # How many rows of the head follow a row, itself included.
            mask = mask & (mask.flip(-1).cumsum(-1).flip(-1) <= window)
        grouped = q[i].view(keys.shape[0], -1, q.shape[-1])  # [H, G, D]
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


def absent_chunks(views: HeadPageViews, table: HeadPageTable, row: int, layer_idx: int) -> torch.Tensor:
    """[H, C], bool: chunks of the dynamic heads of one request's layer that their buffers do not hold."""
    absent = table.is_dynamic[row, layer_idx][:, None].repeat(1, int(table.num_prompt_pages[row]))
    heads = table.is_dynamic[row, layer_idx].nonzero().squeeze(1)
    if len(heads):
        ids = table.buffer_page_ids(row, layer_idx, heads, table.num_head_pages[row, layer_idx, heads])
        absent[heads[:, None], views.held_chunks[ids, 0].to(torch.int64)] = False
    return absent


def estimated_rows(
    views: HeadPageViews, table: HeadPageTable, row: int, layer_idx: int, absent: torch.Tensor, num_means: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean keys and values [H, C * V, D] of one request's layer, and what each adds to its logit [H, C * V], fp32.

    A mean that stands for n tokens counts as n such rows: log(n). It is -inf for chunks that are not `absent` [H, C].
    """
    num_chunks = absent.shape[1]
    heads = table.is_dynamic[row, layer_idx].nonzero().squeeze(1)
    vectors = table.read_summaries(views, row, layer_idx, heads, num_chunks * 2 * num_means)
    summaries = vectors.unflatten(1, (num_chunks, 2 * num_means))  # [E, C, 2 V, D]
    means = views.k_pages.new_zeros(2, len(absent), num_chunks * num_means, summaries.shape[-1])
    means[0, heads] = summaries[:, :, :num_means].flatten(1, 2)
    means[1, heads] = summaries[:, :, num_means:].flatten(1, 2)
    counted = absent.repeat_interleave(num_means, dim=1)
    bonus = torch.full(counted.shape, math.log(table.layout.page_size / num_means), device=counted.device)
    return means[0], means[1], bonus.masked_fill(~counted, float("-inf"))
