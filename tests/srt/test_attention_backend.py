"""Decode through SGLang's backends made ours, eager and as graphs are captured and replayed; see serving.py for what
that does not prove."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_hybridkv.srt.attention_backend import HybridAttnMixin
from sglang_hybridkv.srt.backends import decodes_by_flashinfer, make_hybrid
from sglang_hybridkv.srt.cpu_engine import CpuPrefillMixin
from sglang_hybridkv.srt.flashinfer_backend import HybridFlashInferMixin
from tests.builders import forced_kernels
from tests.flashinfer_double import BatchDecodeDouble
from tests.srt.serving import BACKENDS, ROWS, Graph, Serving, make_request, needs_twins

CLOSE = {"atol": 2e-2, "rtol": 2e-2}


@pytest.fixture(autouse=True)
def naive_kernels():
    """Unless a test asks for others."""
    with forced_kernels("naive"):
        yield


def step(serving, rows):
    """One eager decode step, checked; returns the outputs."""
    batch = serving.next_batch(rows)
    queries = serving.queries(batch.batch_size)
    serving.backend.init_forward_metadata(batch)
    outputs = serving.forward(batch, queries)
    for output, expected in zip(outputs, serving.expected(batch, queries), strict=True):
        torch.testing.assert_close(output, expected, **CLOSE)
    return outputs


def replay(graph, rows):
    """One replayed decode step, checked."""
    serving = graph.serving
    batch = serving.next_batch(rows)
    queries = serving.queries(batch.batch_size)
    graph.load(batch, queries)
    outputs = graph.run()
    for output, expected in zip(outputs, serving.expected(batch, queries), strict=True):
        torch.testing.assert_close(output[: len(rows)], expected, **CLOSE)
        assert not output.isnan().any(), "a padding row must not be NaN: what follows in the graph sees it"


def three_requests(serving):
    """Rows 3 and 5 compressed, row 2 dense."""
    serving.add(3, 9 * serving.page_size + 3)
    serving.add(2, 2 * serving.page_size, compressed=False)
    serving.add(5, 6 * serving.page_size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compressor", ["hybridkv", "snapkv"])
def test_eager_steps_of_mixed_batches(backend, compressor, monkeypatch):
    # Heads of both types in either request, but for one draw in a few hundred thousand.
    config = {"theta": 0.8} if compressor == "hybridkv" else {}
    serving = Serving(backend, monkeypatch, compressor=compressor, **config)
    three_requests(serving)
    for rows in ([3], [3, 2], [2, 5, 3], [2], [5, 3]):
        step(serving, rows)
    if compressor == "hybridkv":
        assert int(serving.cache.counters[0]) > 0, "nothing was retrieved"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("page_size", "group"), [(8, 7), (16, 1), (32, 4)])
def test_a_captured_graph_serves_every_composition(backend, page_size, group, monkeypatch):
    serving = Serving(backend, monkeypatch, page_size=page_size, group=group, theta=1.01)
    serving.backend.init_cuda_graph_state(ROWS, ROWS)
    graphs = {size: Graph(serving, size, monkeypatch) for size in (4, 1)}
    assert not any(output.isnan().any() for graph in graphs.values() for output in graph.captured)
    serving.add(2, page_size, compressed=False)
    replay(graphs[1], [2])
    serving.add(3, 9 * page_size + 3)
    serving.add(5, 8 * page_size)
    for rows in ([3, 2], [2, 5, 3], [5]):
        replay(graphs[4], rows)
    replay(graphs[1], [3])
    assert int(serving.cache.counters[0]) > 0, "nothing was retrieved in a graph captured without requests"
    step(serving, [5, 3])  # a batch that no graph fits runs eagerly, on other wrappers
    replay(graphs[4], [5, 3])
    replay(graphs[1], [5])
    step(serving, [3])
    replay(graphs[1], [3])


@needs_twins
@pytest.mark.parametrize("backend", ["triton", "flashinfer"])
@pytest.mark.parametrize("group", [2, 7])
def test_our_triton_kernels_in_a_captured_graph(backend, group, monkeypatch):
    monkeypatch.setenv("HYBRIDKV_KERNELS", "triton")
    serving = Serving(backend, monkeypatch, group=group, theta=1.01)
    serving.backend.init_cuda_graph_state(ROWS, ROWS)
    graph = Graph(serving, 3, monkeypatch)
    serving.add(2, serving.page_size, compressed=False)
    serving.add(3, 10 * serving.page_size + 3)
    for rows in ([3, 2], [3]):
        replay(graph, rows)
    assert int(serving.cache.counters[0]) > 0, "nothing was retrieved"


def num_plans(serving):
    """Plans of head pages so far; the tail's, planned in each step, is the wrapper of page size 1."""
    return sum(plan[-1] == serving.page_size for wrapper in BatchDecodeDouble.made for plan in wrapper.plans)


@pytest.mark.parametrize("in_graph", [False, True])
def test_plans_follow_the_composition_only(in_graph, monkeypatch):
    """0 a step without change, 1 a layer for a request that joins or leaves; a commit changes nothing."""
    serving = Serving("flashinfer", monkeypatch)
    serving.backend.init_cuda_graph_state(ROWS, ROWS)
    graph = Graph(serving, 4, monkeypatch) if in_graph else None
    three_requests(serving)

    def plans_of(rows):
        before = num_plans(serving)
        replay(graph, rows) if in_graph else step(serving, rows)
        return num_plans(serving) - before

    a_layer = len(serving.layers)
    assert plans_of([3]) == a_layer, "joins"
    assert [plans_of([3]) for _ in range(9)] == [0] * 9, "also where a page of the tail fills up"
    assert plans_of([3, 2, 5]) == a_layer, "two join"
    serving.commit(3)
    serving.commit(5)
    assert plans_of([3, 2, 5]) == 0, "commits"
    assert plans_of([3, 2]) == a_layer, "leaves"
    serving.leave(3)
    serving.add(3, 5 * serving.page_size)
    assert plans_of([3, 2]) == a_layer, "another request on the same row"
    assert [plans_of([3, 2]) for _ in range(3)] == [0] * 3


def test_a_dense_batch_is_stock_flashinfer_s(monkeypatch):
    serving = Serving("flashinfer", monkeypatch)
    serving.add(2, 20, compressed=False)
    serving.add(3, 30, compressed=False)
    step(serving, [2, 3])
    assert num_plans(serving) == 0
    assert [len(wrapper.plans) for wrapper in BatchDecodeDouble.made] == [1]


def test_flashinfer_reads_tails_only(monkeypatch):
    serving = Serving("flashinfer", monkeypatch)
    serving.add(3, 9 * 8 + 3)
    serving.add(2, 17, compressed=False)
    step(serving, [3, 2])
    tail = next(plan for wrapper in BatchDecodeDouble.made for plan in wrapper.plans if plan[-1] == 1)
    assert tail[0] == [4, 18]


def test_a_request_must_be_compressed_before_flashinfer_decodes_it(monkeypatch):
    serving = Serving("flashinfer", monkeypatch)
    serving.add(3, 80)
    serving.compression.ledger.by_row[3].head_counts = None
    with pytest.raises(AssertionError, match="decoded before it was compressed"):
        step(serving, [3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_whose_compression_failed_is_decoded_as_a_dense_one(backend, monkeypatch):
    serving = Serving(backend, monkeypatch)
    serving.add(5, 6 * 8)
    serving.add(3, 80, compressed=False)
    serving.compression.prepare(make_request(3, 80, max_new_tokens=99), None)
    serving.cache.give_up(3)
    serving.compression.check_integrity()
    step(serving, [3, 5])


def test_flashinfer_waits_once_for_a_request_that_joins(monkeypatch):
    class Event:
        waits = 0

        def synchronize(self):
            self.waits += 1

    serving, event = Serving("flashinfer", monkeypatch), Event()
    three_requests(serving)
    serving.compression.ledger.by_row[3].written = event
    for rows, waits in (([2, 5], 0), ([3], 1), ([3], 1), ([3, 5], 1)):
        step(serving, rows)
        assert event.waits == waits


@pytest.mark.parametrize("backend", BACKENDS)
def test_stock_builds_no_decode_metadata_that_nobody_reads(backend, monkeypatch):
    serving = Serving(backend, monkeypatch)
    three_requests(serving)
    step(serving, [3, 2])
    assert (serving.backend.forward_metadata is None) == (backend != "flashinfer")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backend_stays_what_it_is(backend, monkeypatch):
    serving = Serving(backend, monkeypatch)
    stock = type(serving.backend).__mro__
    assert isinstance(serving.backend, HybridAttnMixin)
    assert decodes_by_flashinfer(serving.backend) == (backend == "flashinfer")
    assert any(base.__name__ == type(serving.backend).__name__.removeprefix("Hybrid") for base in stock)
    decode, extend = (serving.backend.shared_read_ends(mode) for mode in (ForwardMode.DECODE, ForwardMode.EXTEND))
    assert decode.value >= SharedReadEnds.POST_REPLAY.value
    assert extend.value >= SharedReadEnds.POST_REPLAY.value


def test_fa3_and_others_keep_their_prefill_and_decode_with_our_kernels():
    class FlashAttentionBackend(AttentionBackend):
        def forward_extend(self):
            return "stock"

    hybrid = make_hybrid(FlashAttentionBackend())
    assert isinstance(hybrid, HybridAttnMixin)
    assert not isinstance(hybrid, HybridFlashInferMixin)
    assert type(hybrid).forward_decode is HybridAttnMixin.forward_decode


def test_parts_of_a_prefill_batch_are_observed_in_one_call(monkeypatch):
    """Of rows that are watched, after stock's attention."""
    seen = mock.Mock()
    seen.observer.is_interested = lambda row: row != 4
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        req_pool_indices_cpu=torch.tensor([7, 4, 2]),
        extend_prefix_lens_cpu=[10, 0, 3],
        extend_seq_lens_cpu=[5, 6, 7],
        **dict.fromkeys(("req_pool_indices", "extend_prefix_lens", "extend_seq_lens")),
    )
    hybrid = make_hybrid(SimpleBackend())
    hybrid.token_to_kv_pool = SimpleNamespace(cache=seen, start_layer=3)
    hybrid.req_to_token_pool = SimpleNamespace(req_to_token=torch.arange(80).view(8, 10))
    monkeypatch.setattr(CpuPrefillMixin, "forward_extend", lambda *_, **__: seen.attend() and "out")
    hybrid.init_forward_metadata(batch)
    layer = SimpleNamespace(tp_q_head_num=2, qk_head_dim=4, layer_id=5, scaling=0.5)
    q = torch.randn(18, 8)
    assert hybrid.forward_extend(q, None, None, layer, batch) == "out"
    assert [call[0] for call in seen.method_calls] == ["join", "attend", "observe"]
    layer_idx, parts, scaling = seen.observe.call_args.args
    assert (layer_idx, scaling) == (2, 0.5)
    assert [(part.row, part.start) for part in parts] == [(7, 10), (2, 3)]
    for part, rows in zip(parts, (range(5), range(11, 18)), strict=True):
        assert torch.equal(part.q, q.view(18, 2, 4)[list(rows)])
        assert torch.equal(part.token_slots, torch.arange(10 * part.row, 10 * part.row + 10))


class SimpleBackend(AttentionBackend):
    """Has nothing to prepare."""

    def init_forward_metadata(self, forward_batch):
        pass
