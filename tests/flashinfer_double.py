"""FlashInfer's decode wrapper as its documentation describes it, in plain torch on the CPU, counting its plans.

It stands in where there is no GPU. What it adds to the documentation: `run` fails when the page lists it finds are not
the ones that were planned, and when a captured wrapper's buffers move. It proves which calls are made and what the
arrays say; it proves nothing about FlashInfer's kernels, nor that a plan of another composition can be replayed.
"""

import math

import torch


class BatchDecodeDouble:
    """flashinfer.BatchDecodeWithPagedKVCacheWrapper; `made` lists all of them, `plans` what each was planned with."""

    made: list["BatchDecodeDouble"] = []

    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        use_tensor_cores=False,
        paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None,
        backend="auto",
    ):
        assert kv_layout == "NHD"
        self.is_cuda_graph_enabled, self.use_tensor_cores = use_cuda_graph, use_tensor_cores
        self._paged_kv_indptr_buf = paged_kv_indptr_buffer
        self._paged_kv_indices_buf = paged_kv_indices_buffer
        self._paged_kv_last_page_len_buf = paged_kv_last_page_len_buffer
        if use_cuda_graph:
            assert len(paged_kv_indptr_buffer) == len(paged_kv_last_page_len_buffer) + 1
        self.workspaces = (float_workspace_buffer, None)
        self.plans = []
        self.made.append(self)

    def reset_workspace_buffer(self, float_workspace_buffer, int_workspace_buffer):
        assert int_workspace_buffer.dtype == torch.uint8
        self.workspaces = (float_workspace_buffer, int_workspace_buffer)

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *,
        q_data_type="float16",
        kv_data_type=None,
        data_type=None,
        sm_scale=None,
        non_blocking=True,
        fixed_split_size=None,
        disable_split_kv=False,
    ):
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert len(indptr) == len(last_page_len) + 1
        assert num_qo_heads % num_kv_heads == 0
        if self.is_cuda_graph_enabled:
            assert len(last_page_len) == len(self._paged_kv_last_page_len_buf), "the batch size of a graph is fixed"
            assert len(indices) <= len(self._paged_kv_indices_buf)
            self._paged_kv_indptr_buf.copy_(indptr)
            self._paged_kv_last_page_len_buf.copy_(last_page_len)
            self._paged_kv_indices_buf[: len(indices)].copy_(indices)
        else:
            self._paged_kv_indptr_buf, self._paged_kv_indices_buf = indptr, indices
            self._paged_kv_last_page_len_buf = last_page_len
        self._planned(indptr, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, sm_scale)

    begin_forward = plan

    def _planned(self, indptr, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, sm_scale):
        lens = _lens(indptr, last_page_len, page_size)
        self.plans.append((lens, num_qo_heads, num_kv_heads, head_dim, page_size))
        self._sm_scale = sm_scale

    def run(self, q, paged_kv_cache, *, q_scale=None, k_scale=None, v_scale=None, return_lse=False):
        lens, num_qo_heads, num_kv_heads, head_dim, page_size = self.plans[-1]
        assert q.shape == (len(lens), num_qo_heads, head_dim)
        assert k_scale is None
        assert v_scale is None
        found = _lens(self._paged_kv_indptr_buf, self._paged_kv_last_page_len_buf, page_size)
        assert found == lens, "the page lists changed after the plan"
        scale = (head_dim**-0.5 if self._sm_scale is None else self._sm_scale) * (1.0 if q_scale is None else q_scale)
        keys, values = (cache if cache.ndim == 4 else cache.unsqueeze(1) for cache in paged_kv_cache)
        assert keys.shape[1:] == (page_size, num_kv_heads, head_dim)
        out = torch.full(q.shape, float("nan"), dtype=q.dtype)
        lse = torch.full(q.shape[:2], float("nan"))
        for e, length in enumerate(lens):
            pages = self._paged_kv_indices_buf[self._paged_kv_indptr_buf[e] : self._paged_kv_indptr_buf[e + 1]].long()
            rows_k, rows_v = (c[pages].flatten(0, 1)[:length].transpose(0, 1).double() for c in (keys, values))
            logits = q[e].double().view(num_kv_heads, -1, head_dim) @ rows_k.transpose(1, 2) * scale
            lse[e] = (logits.logsumexp(-1) / math.log(2)).flatten()
            # Nothing is read for a sequence without rows; FlashInfer gives it weight 0.
            out[e] = (logits.softmax(-1) @ rows_v).flatten(0, 1).to(q.dtype) if length else 0.0
        return (out, lse) if return_lse else out

    def forward_return_lse(self, q, paged_kv_cache, *, sm_scale=None, logits_soft_cap=None):
        assert not logits_soft_cap
        self._sm_scale = sm_scale
        return self.run(q, paged_kv_cache, return_lse=True)

    def forward(self, q, paged_kv_cache, *, sm_scale=None, logits_soft_cap=None, k_scale=None, v_scale=None):
        assert not logits_soft_cap
        self._sm_scale = sm_scale
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale)


def fast_decode_plan(
    wrapper,
    indptr,
    indices,
    last_page_len,
    num_qo_heads,
    num_kv_heads,
    head_dim,
    page_size,
    *,
    data_type=None,
    q_data_type=None,
    non_blocking=True,
    fixed_split_size=None,
    disable_split_kv=False,
    global_override_indptr_cpu=None,
):
    """FlashInfer's function of that name: the caller has filled the buffers of the graph, and knows indptr."""
    assert wrapper.is_cuda_graph_enabled
    assert wrapper.plans, "the first plan must be a whole one"
    assert global_override_indptr_cpu is not None, "without it FlashInfer waits for the device"
    assert len(indices) <= len(wrapper._paged_kv_indices_buf)
    assert len(last_page_len) == len(wrapper._paged_kv_last_page_len_buf)
    wrapper._planned(
        global_override_indptr_cpu,
        torch.ones_like(last_page_len),
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        None,
    )


def merge_state(v_a, s_a, v_b, s_b):
    """flashinfer.merge_state: two attention results and their log-sum-exps, base 2, [tokens, heads, D]."""
    assert v_a.ndim == 3
    assert s_a.dtype == s_b.dtype == torch.float32
    top = torch.maximum(s_a, s_b)
    weight_a, weight_b = torch.exp2(s_a - top)[..., None], torch.exp2(s_b - top)[..., None]
    merged = (v_a.float() * weight_a + v_b.float() * weight_b) / (weight_a + weight_b)
    return merged.to(v_a.dtype), top + torch.log2(weight_a + weight_b)[..., 0]


def _lens(indptr, last_page_len, page_size):
    pages = [b - a for a, b in zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True)]
    return [max(n - 1, 0) * page_size + last for n, last in zip(pages, last_page_len.tolist(), strict=True)]
