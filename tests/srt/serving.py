"""A batch in SGLang's own pool, allocator and attention backends, on the CPU, decoded step by step.

The backends are SGLang's classes, with the attributes that their decode reads set by hand: their constructors need a
GPU. What they launch on one is replaced: FlashInfer's wrappers by doubles, Triton kernels of SGLang by torch.
"""

import dataclasses
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention import flashinfer_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from hybridkv_kernels import gpu
from hybridkv_kernels.decode_attn import naive
from sglang_hybridkv.cache.compress import ObservedPrompt
from sglang_hybridkv.compressors import get_compressor
from sglang_hybridkv.config import RetrievalConfig
from sglang_hybridkv.srt.allocator import HybridAllocator
from sglang_hybridkv.srt.backends import make_hybrid
from sglang_hybridkv.srt.compression import Compression
from sglang_hybridkv.srt.memory_pool import HybridTokenToKVPool
from sglang_hybridkv.srt.settings import Settings
from tests import flashinfer_double
from tests.builders import NAN, NAN_BYTE, LateSideStream, fill_host, fresh_generator

# Where both are, the kernels of a decode step run interpreted.
HAS_TRITON_TWINS = gpu.is_installed() and all(
    importlib.util.find_spec(f"hybridkv_kernels.{op}.triton") for op in ("decode_attn", "retrieve_chunks")
)
needs_twins = pytest.mark.skipif(not HAS_TRITON_TWINS, reason="Triton or a Triton kernel is not here")

LAYERS, HEADS, PAGES, ROWS, MAX_CONTEXT = 2, 2, 120, 7, 400
BACKENDS = ("torch_native", "triton", "flashinfer")


def make_pool(**changes):
    """SGLang's KV pool made ours, on the CPU."""
    arguments = {"layer_num": LAYERS, "head_num": HEADS, "device": "cpu"}
    return HybridTokenToKVPool(**arguments | {"enable_memory_saver": False, "enable_alt_stream": False} | changes)


def make_compression(
    num_pages=60, host_pages=40, name="hybridkv", *, page_size=8, head_dim=8, dtype=torch.float32, **config
):
    """Over a pool and an allocator of its own; every head may be dynamic, and retrieves chunks of a page."""
    pool = make_pool(size=num_pages * page_size, page_size=page_size, dtype=dtype, head_dim=head_dim)
    allocator = HybridAllocator(num_pages * page_size, page_size, dtype, "cpu", pool, False)
    values = {"budget": 0.4, "page_size": page_size, "min_prompt_tokens": 2 * page_size, "min_head_pages": 1}
    config_class = get_compressor(name).config_class
    if issubclass(config_class, RetrievalConfig):
        values |= {"host_store_bytes": host_pages * pool.page_bytes, "chunk_score": "mean_max"}
    values |= {"max_dynamic_heads": 1.0} if name == "hybridkv" else {}
    settings = Settings(name, config_class(**values | config))
    allocator.compression = Compression(settings, pool, allocator, ROWS, MAX_CONTEXT)
    return allocator.compression


def make_request(row, prompt_len, *, max_new_tokens=8, rid="r", chunk_end=None, custom_params=None, **more):
    """SGLang's request, as far as `Compression` reads it."""
    tokens = list(range(prompt_len))
    return SimpleNamespace(
        rid=rid,
        kv=SimpleNamespace(req_pool_idx=row, kv_allocated_len=prompt_len),
        sampling_params=SimpleNamespace(max_new_tokens=max_new_tokens, n=1, custom_params=custom_params),
        output_ids=[],
        origin_input_ids=tokens,
        full_untruncated_fill_ids=tokens,
        extend_range=SimpleNamespace(end=prompt_len if chunk_end is None else chunk_end),
        multimodal_inputs=None,
        to_finish=None,
        **more,
    )


class Serving:
    """Requests of one tiny model; `backend` is one of BACKENDS, made ours as SGLang makes it."""

    heads, head_dim, dtype = HEADS, 64, torch.bfloat16

    def __init__(self, backend, monkeypatch, *, compressor="hybridkv", group=2, page_size=8, **config):
        self.generator, self.group, self.page_size = fresh_generator(), group, page_size
        values = {"preset": "paper", "theta": 0.5} if compressor == "hybridkv" else {}
        sizes = {"page_size": page_size, "head_dim": self.head_dim, "dtype": self.dtype}
        config = values | {"min_prompt_tokens": page_size} | config
        self.compression = make_compression(PAGES, 60, compressor, **sizes, **config)
        self.pool = self.compression.allocator.get_kvcache()
        self.pool.keys.fill_(NAN)
        self.pool.values.fill_(NAN)
        # Slot 0 is where padding rows write and read; SGLang zeroes the pool.
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer[:page_size] = 0
        self.cache = self.pool.cache = self.compression.cache
        self.cache.memory = dataclasses.replace(self.cache.memory, side=LateSideStream())
        self.compression.store.make_all()
        fill_host(self.compression.store.pages, NAN_BYTE)
        self.req_to_token = torch.zeros(ROWS, MAX_CONTEXT, dtype=torch.int32)
        self.lens: dict[int, int] = {}
        shape = (HEADS * group, self.head_dim, self.head_dim**-0.5, HEADS)
        self.layers = [RadixAttention(*shape, layer_id) for layer_id in range(LAYERS)]
        self.backend = make_hybrid(_STOCK[backend](self, monkeypatch))

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def add(self, row, prompt_len, *, compressed=True, custom_params=None):
        """A request whose prompt was prefilled and, if `compressed`, committed: its own slots are NaN, once joined."""
        pages = self.compression.allocator.alloc_pages(-(-prompt_len // self.page_size))
        slots = (pages[:, None] * self.page_size + torch.arange(self.page_size)).flatten()
        self.req_to_token[row, : len(slots)] = slots.int()
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer[slots[:prompt_len]] = self.randn(prompt_len, self.heads, self.head_dim)
        self.lens[row] = prompt_len
        if not compressed:
            return
        self.compression.prepare(make_request(row, prompt_len, max_new_tokens=99, custom_params=custom_params), None)
        reservation = self.compression.ledger.get(row)
        heads, covered = (len(self.layers), self.heads), reservation.geometry.covered
        statistic = torch.rand(heads, generator=self.generator)
        salience = torch.rand(*heads, prompt_len, generator=self.generator) / prompt_len
        query_rms = torch.rand(*heads, self.head_dim, generator=self.generator)
        self.cache.compress(row, slots, ObservedPrompt((), statistic, salience, query_rms))
        self.cache.memory.side.run(lambda: self._poison(slots[:covered]))
        self.req_to_token[row, :covered] = 0

    def _poison(self, slots):
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer[slots] = NAN

    def commit(self, row):
        """The ledger's part of a commit; the request's row is as `add` left it."""
        reservation = self.compression.ledger.by_row[row]
        num_dynamic = int(reservation.outcome[1])
        per_page = self.compression.shape.head_pages_per_page
        geometry = reservation.geometry
        self.compression.ledger.commit(
            row, geometry.pages_used(num_dynamic, per_page), geometry.host_pages_used(num_dynamic, per_page)
        )

    def leave(self, row):
        """The request ends and gives its row back."""
        reservation = self.compression.ledger.close(row)
        if reservation is not None:
            self.cache.release(row)
        del self.lens[row]

    def next_batch(self, rows):
        """The decode batch that SGLang launches next for `rows`: one more token each."""
        for row in rows:
            if self.lens[row] % self.page_size == 0:
                page = self.compression.allocator.alloc_pages(1)
                self.req_to_token[row, self.lens[row] : self.lens[row] + self.page_size] = (
                    page * self.page_size + torch.arange(self.page_size)
                ).int()
            self.lens[row] += 1
        slots = [int(self.req_to_token[row, self.lens[row] - 1]) for row in rows]
        self.backend.note_rows(list(rows))  # by the hook on ForwardBatch.init_new
        return _decode_batch(rows, [self.lens[row] for row in rows], slots)

    def queries(self, count):
        """Of each layer q, k and v of `count` new tokens, as the model hands them over."""
        q_shape, kv_shape = (count, self.heads * self.group * self.head_dim), (count, self.heads, self.head_dim)
        return [(self.randn(*q_shape), self.randn(*kv_shape), self.randn(*kv_shape)) for _ in self.layers]

    def forward(self, batch, queries):
        """Attention of all layers, as the model calls it."""
        return [
            self.backend.forward_decode(q, k, v, layer, batch)
            for layer, (q, k, v) in zip(self.layers, queries, strict=True)
        ]

    def expected(self, batch, queries):
        """The same by the reference, from what the pool holds after the step."""
        retrieval = self.cache.compressor.config.retrieval
        return [
            naive.decode_attn(
                q.view(len(q), -1, self.head_dim),
                self.cache.memory.views,
                self.cache.memory.table,
                layer_idx,
                batch.req_pool_indices,
                self.req_to_token,
                batch.seq_lens,
                self.head_dim**-0.5,
                retrieval.num_means if retrieval is not None else 0,
            ).view(len(q), -1)
            for layer_idx, (q, _, _) in enumerate(queries)
        ]


class Graph:
    """SGLang's decode graph of one batch size: static inputs, captured on padding rows, replayed on any batch."""

    def __init__(self, serving, size, monkeypatch):
        self.serving, self.size = serving, size
        self.view = _decode_batch([0] * size, [1] * size, [0] * size, num_padding=size)
        self.queries = serving.queries(size)
        fill = serving.backend.get_cuda_graph_seq_len_fill_value()
        assert fill == 1
        serving.backend.init_forward_metadata_out_graph(self.view, in_capture=True)
        head_pages = getattr(serving.backend, "_head_pages", None)
        self._state = [(serving.backend, "forward_metadata"), (serving.backend, "_any_compressed")]
        self._state += [] if head_pages is None else [(head_pages, "_wrappers")]
        self._state = [(owner, name, getattr(owner, name)) for owner, name in self._state]
        self.captured = self.run()

    def run(self):
        """What a graph records, and a replay does again: with the Python objects of the capture."""
        for owner, name, value in self._state:
            setattr(owner, name, value)
        self.serving.backend.init_forward_metadata_in_graph(self.view)
        return self.serving.forward(self.view, self.queries)

    def load(self, batch, queries):
        """Before a replay: the batch goes to the static inputs, padded."""
        count, view = len(batch.seq_lens), self.view
        for name, fill in (("req_pool_indices", 0), ("seq_lens", 1), ("seq_lens_cpu", 1), ("out_cache_loc", 0)):
            getattr(view, name).fill_(fill)
            getattr(view, name)[:count] = getattr(batch, name)
        view.num_padding, view.seq_lens_sum = self.size - count, batch.seq_lens_sum + self.size - count
        for static, given in zip(self.queries, queries, strict=True):
            for mine, new in zip(static, given, strict=True):
                mine[:count] = new
        self.serving.backend.init_forward_metadata_out_graph(view)


def _decode_batch(rows, lens, slots, num_padding=0):
    seq_lens = torch.tensor(lens)
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        batch_size=len(rows),
        req_pool_indices=torch.tensor(rows),
        seq_lens=seq_lens,
        seq_lens_cpu=seq_lens.clone(),
        seq_lens_sum=sum(lens),
        out_cache_loc=torch.tensor(slots),
        encoder_lens=None,
        spec_info=None,
        kv_loc_plan=None,
        out_cache_loc_is_physical=True,
        positions=seq_lens - 1,
        num_padding=num_padding,
    )


def _blank(kind, serving):
    backend = object.__new__(kind)
    backend.token_to_kv_pool = serving.pool
    backend.req_to_token_pool = SimpleNamespace(req_to_token=serving.req_to_token)
    backend.forward_metadata = None
    return backend


def _flashinfer(serving, monkeypatch):
    for name, double in (
        ("BatchDecodeWithPagedKVCacheWrapper", flashinfer_double.BatchDecodeDouble),
        ("fast_decode_plan", flashinfer_double.fast_decode_plan),
        ("merge_state", flashinfer_double.merge_state),
    ):
        monkeypatch.setattr(flashinfer_backend, name, double, raising=False)
    monkeypatch.setattr(flashinfer_backend, "torch", _TorchWithoutCuda())
    flashinfer_double.BatchDecodeDouble.made.clear()
    backend = _blank(flashinfer_backend.FlashInferAttnBackend, serving)
    backend.kv_index_translator = _Translator(serving.req_to_token)
    backend.workspace_buffer = torch.empty(64, dtype=torch.uint8)
    backend.max_context_len = MAX_CONTEXT
    backend.num_wrappers, backend.dispatch_reason = 1, None
    backend.skip_prefill = True
    backend.use_sliding_window_kv_pool = backend.decode_uses_dequant_workspace = False
    backend._swa_kv_pool = backend.decode_split_tile_size = None
    backend.disable_cuda_graph_kv_split, backend.decode_use_tensor_cores = False, serving.group >= 4
    backend.decode_backend = "fa2"
    backend.flashinfer_kv_cache_dtype = serving.dtype
    backend.kv_cache_quant_method = SimpleNamespace(needs_global_scale=lambda: True)
    backend.kv_indptr = [torch.zeros(ROWS + 1, dtype=torch.int32)]
    backend.kv_last_page_len = torch.ones(ROWS, dtype=torch.int32)
    backend.decode_cuda_graph_metadata = {}
    backend.decode_wrappers = [
        flashinfer_double.BatchDecodeDouble(backend.workspace_buffer, "NHD", use_tensor_cores=True)
    ]
    updater = object.__new__(flashinfer_backend.FlashInferIndicesUpdaterDecode)
    updater.num_qo_heads, updater.num_kv_heads = serving.heads * serving.group, serving.heads
    updater.head_dim, updater.data_type, updater.q_data_type = serving.head_dim, serving.dtype, serving.dtype
    updater.sliding_window_size, updater._swa_kv_pool, updater.attn_backend = None, None, backend
    updater.kv_indptr, updater.kv_last_page_len = backend.kv_indptr, backend.kv_last_page_len
    updater.update = updater.update_single_wrapper
    backend.indices_updater_decode = updater
    return backend


_STOCK = {
    "torch_native": lambda serving, monkeypatch: _blank(TorchNativeAttnBackend, serving),
    "triton": lambda serving, monkeypatch: _blank(TritonAttnBackend, serving),
    "flashinfer": _flashinfer,
}


class _TorchWithoutCuda:
    """torch as SGLang's FlashInfer backend sees it, with its buffers on the CPU instead of "cuda"."""

    def __getattr__(self, name):
        function = getattr(torch, name)
        if name not in ("empty", "zeros"):
            return function
        return lambda *args, device=None, **kwargs: function(*args, **kwargs)


class _Translator:
    """SGLang's KVIndexTranslator for a plain pool; its gather is a Triton kernel there."""

    is_translating = reads_are_translated = False

    def __init__(self, req_to_token):
        self.req_to_token = req_to_token

    def fill_packed_read_stream(
        self, *, req_pool_indices, seq_lens, indptr, total_tokens, out, kv_start_idx=None, sliding_window=False
    ):
        longest = self.req_to_token.shape[1]
        position = torch.arange(longest)
        start = torch.zeros_like(seq_lens) if kv_start_idx is None else kv_start_idx
        columns = (start[:, None] + position).clamp(max=longest - 1)
        slots = self.req_to_token[req_pool_indices[: len(seq_lens)][:, None], columns]
        # Beyond a request's length, one spare place at the end takes what no request reads.
        place = torch.where(position < seq_lens[:, None], indptr[:-1, None] + position, len(out))
        padded = torch.cat((out, out.new_zeros(1))).scatter_(0, place.flatten().long(), slots.flatten().to(out.dtype))
        out.copy_(padded[:-1])
        return False

    def pack_read_stream(self, plan, *, kind, **named):
        """Its name since 0.5.22; a plain pool's plan and kind say nothing."""
        return self.fill_packed_read_stream(total_tokens=None, **named)
