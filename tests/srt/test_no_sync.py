"""A decode step makes the host wait for nothing: what runs before it, and what a graph captures of it.

SGLang's backends on the CPU, see serving.py. `naive` stands for our kernels as recording doubles do: unseen inside, so
this proves the adapters and the kernels' public functions; `triton` are the kernels that serve, in the interpreter.
"""

import pytest
import torch

pytest.importorskip("sglang")

from hybridkv_kernels import decode_attn, retrieve_chunks
from hybridkv_kernels.decode_attn import flashinfer
from sglang_hybridkv.srt import flashinfer_backend
from tests.builders import NO_CPU_KERNELS, forced_kernels
from tests.flashinfer_double import BatchDecodeDouble
from tests.no_sync import HostSync, NoSync
from tests.srt import serving as serving_module
from tests.srt.serving import ROWS, Graph, Serving, needs_twins


def on_device(serving, *batches):
    """Everything that is device memory on a GPU host."""
    cache, backend = serving.cache, serving.backend
    parts = (cache.memory.table, cache.memory.views)
    tensors = [x for part in parts for x in vars(part).values() if isinstance(x, torch.Tensor)]
    tensors += [cache.counters, serving.req_to_token]
    for batch in batches:
        tensors += [batch.req_pool_indices, batch.seq_lens, batch.out_cache_loc, batch.positions]
    tensors += getattr(backend, "kv_indptr", [])
    if cache.prefetch is not None:
        tensors += [cache.prefetch.previous, cache.prefetch.counters]
    head_pages = getattr(backend, "_head_pages", None)
    if head_pages is not None and hasattr(head_pages, "_indices"):
        tensors += [head_pages._indices, head_pages._indptr, head_pages._last_page_len]
    return tensors


def launches(guard, monkeypatch):
    """Doubles and references as launches of kernels; FlashInfer's plan reads its host arguments, and only those."""
    for module in (decode_attn, retrieve_chunks):
        name = module.__name__.rsplit(".", 1)[1]
        run = guard.launch(getattr(module.naive, name), name)
        monkeypatch.setitem(module._IMPLEMENTATIONS, "naive", run)
    for name in ("run", "_planned"):
        monkeypatch.setattr(BatchDecodeDouble, name, guard.launch(getattr(BatchDecodeDouble, name), name))
    plan = BatchDecodeDouble.plan

    def plan_on_host(wrapper, indptr, indices, last_page_len, *args, **kwargs):
        # SGLang's own plan of an uncaptured step hands over device tensors, and waits.
        if kwargs.get("page_size", 1) > 1 or wrapper.is_cuda_graph_enabled:
            assert not guard.is_on_device(indptr), "FlashInfer copies indptr to the host"
            assert not guard.is_on_device(last_page_len), "FlashInfer copies last_page_len to the host"
        with guard.paused():
            plan(wrapper, indptr, indices, last_page_len, *args, **kwargs)

    monkeypatch.setattr(BatchDecodeDouble, "plan", plan_on_host)
    monkeypatch.setattr(BatchDecodeDouble, "begin_forward", plan_on_host)
    for module in (flashinfer, flashinfer_backend):
        monkeypatch.setattr(module, "to_device", guard.to_device)
    stock = serving_module.flashinfer_backend
    if hasattr(stock, "merge_state"):
        monkeypatch.setattr(stock, "merge_state", guard.launch(stock.merge_state, "merge_state"))
    fill = serving_module._Translator.fill_packed_read_stream
    monkeypatch.setattr(serving_module._Translator, "fill_packed_read_stream", guard.launch(fill, "fill"))


PAIRS = pytest.mark.parametrize(
    ("backend", "kernel"),
    [
        pytest.param(
            "torch_native", "cpu", marks=pytest.mark.skipif(NO_CPU_KERNELS, reason="the C++ kernels were not compiled")
        ),
        ("triton", "naive"),
        ("flashinfer", "naive"),
        pytest.param("triton", "triton", marks=needs_twins),
        pytest.param("flashinfer", "triton", marks=needs_twins),
    ],
)


def small(backend, monkeypatch, **config):
    """Rows 3 and 5 compressed, row 2 dense; interpreted kernels are slow."""
    serving = Serving(backend, monkeypatch, **config)
    serving.add(3, 5 * serving.page_size + 3)
    serving.add(2, serving.page_size, compressed=False)
    serving.add(5, 4 * serving.page_size)
    serving.cache.join()  # so that guards see a step alone
    return serving


def decode(serving, batch, queries):
    serving.backend.init_forward_metadata(batch)
    return serving.forward(batch, queries)


@PAIRS
def test_an_eager_step_waits_for_nothing(backend, kernel, monkeypatch):
    """Also where a request joins: FlashInfer's plans are made from what the host knows."""
    with forced_kernels(kernel):
        serving = small(backend, monkeypatch)
        for rows in ([3, 2], [2, 5, 3]):
            batch = serving.next_batch(rows)
            queries = serving.queries(batch.batch_size)
            tensors = on_device(serving, batch) + [x for layer in queries for x in layer]
            with monkeypatch.context() as patched:
                guard = NoSync(tensors)
                launches(guard, patched)
                with guard:
                    outputs = decode(serving, batch, queries)
            assert guard.trace, "the guard saw nothing"
            assert all(guard.is_on_device(output) for output in outputs), "the guard lost the device's tensors"


@PAIRS
@pytest.mark.parametrize("prefetch", ["off", "previous_query"])
def test_a_captured_step_waits_for_nothing_and_does_the_same_for_every_batch(backend, kernel, prefetch, monkeypatch):
    with forced_kernels(kernel):
        serving = small(backend, monkeypatch, prefetch=prefetch)
        serving.backend.init_cuda_graph_state(ROWS, ROWS)
        graph, traces = Graph(serving, 3, monkeypatch), []
        for rows in ([3, 2], [2], [2, 5, 3]):
            batch = serving.next_batch(rows)
            queries = serving.queries(batch.batch_size)
            with monkeypatch.context() as patched:
                before = NoSync(on_device(serving, batch, graph.view))
                launches(before, patched)
                with before:
                    graph.load(batch, queries)
            with monkeypatch.context() as patched:
                inside = NoSync()
                launches(inside, patched)
                with inside:
                    graph.run()
            traces.append(inside.trace)
        assert len(traces[0]) > 4 * len(serving.layers), "the guard saw nothing"
        assert traces[0] == traces[1] == traces[2], "a graph does the same whoever is in the batch"


LAUNCHES_A_LAYER, LAUNCHES_A_STEP = 4, 1
"""Score, choose, fetch, attend; and the plan of all layers. With prefetch a layer retrieves twice."""
OTHERS_A_LAYER = 25
"""At most so many operations of torch, most of which are views, in a layer of a step without prefetch."""


@needs_twins
@pytest.mark.parametrize(("prefetch", "more"), [("off", 0), ("previous_query", 3)])
def test_launches_of_a_step(prefetch, more, monkeypatch):
    """Whatever the batch: what a step costs beside its bytes."""
    with forced_kernels("triton"):
        serving, names = small("triton", monkeypatch, prefetch=prefetch), []
        serving.backend.init_cuda_graph_state(ROWS, ROWS)
        for size in (2, 4):
            graph = Graph(serving, size, monkeypatch)
            with monkeypatch.context() as patched:
                guard = NoSync()
                launches(guard, patched)
                with guard:
                    graph.run()
            names.append([name for name, _ in guard.trace])
    assert names[0] == names[1], names
    num_layers, num_launches = len(serving.layers), names[0].count("launch")
    assert num_launches == num_layers * (LAUNCHES_A_LAYER + more) + LAUNCHES_A_STEP
    if prefetch == "off":
        assert len(names[0]) - num_launches <= num_layers * OTHERS_A_LAYER


@pytest.mark.parametrize("backend", ["torch_native", "triton", "flashinfer"])
def test_the_guard_finds_what_the_references_do(backend, monkeypatch):
    """Unlike kernels, they ask for the rows of a batch: seen from inside, they wait."""
    with forced_kernels("naive"):
        serving = small(backend, monkeypatch)
        batch = serving.next_batch([3, 2])
        queries = serving.queries(batch.batch_size)
        serving.backend.init_forward_metadata(batch)
        with pytest.raises(HostSync, match="waits for the device"), NoSync():
            serving.forward(batch, queries)


WAITS = {
    "item": lambda x: x.sum().item(),
    "int": lambda x: int(x.sum()),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x.any()),
    "if": lambda x: 1 if x.any() else 0,
    "range": lambda x: range(x.sum()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "to_device": lambda x: x.to(device=torch.device("cpu")),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "mask_write": lambda x: x.clone().index_put_((x > 0,), torch.tensor(0)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x.float(), x.float()),
    "repeat": lambda x: torch.repeat_interleave(x, x),
    "bincount": lambda x: torch.bincount(x),
    "sent_numbers": lambda x: torch.tensor([1, 2], device=x.device),
    "read_too_early": lambda x: x.to("cpu", non_blocking=True).tolist(),
    "derived": lambda x: (x + 1).view(2, 2).sum(0)[0].item(),
}
SENDS = {
    "index": lambda x: x[torch.tensor([0, 2])],
    "mask": lambda x: x * torch.ones(4),
    "copy": lambda x: x.copy_(torch.arange(4)),
}
WAITS_NOT = {
    "gather": lambda x: x[torch.arange(2, device=x.device)],
    "number": lambda x: x * torch.tensor(2),
    "send_later": lambda x: x.copy_(torch.arange(4), non_blocking=True),
    "to_host_later": lambda x: x.to("cpu", non_blocking=True),
    "where": lambda x: torch.where(x > 0, x, 0),
    "repeat": lambda x: torch.repeat_interleave(x, x, output_size=10),
    "write": lambda x: x.clone().index_put_((x - 1,), x),
    "shape": lambda x: torch.empty(x.shape[0]).tolist(),
    "host": lambda x: torch.arange(3).sum().item(),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_the_guard_can_fail(wait, strict):
    x = torch.tensor([1, 2, 3, 4])
    wait(x)
    with pytest.raises(HostSync), NoSync(None if strict else [x]):
        wait(x)
    wait(x)


@pytest.mark.parametrize("send", SENDS.values(), ids=SENDS)
def test_what_the_host_sends_is_found(send):
    x = torch.tensor([1, 2, 3, 4])
    with pytest.raises(HostSync, match="host"), NoSync([x]):
        send(x)


def test_a_copy_to_host_memory_is_found():
    x, host = torch.tensor([1, 2, 3, 4]), torch.empty(4, dtype=torch.int64)
    with pytest.raises(HostSync, match="copy_ from the device"), NoSync([x]):
        host.copy_(x)
    with NoSync([x]):
        host.copy_(x, non_blocking=True)
        with pytest.raises(HostSync, match="tolist waits"):
            host.tolist()


@pytest.mark.parametrize("harmless", WAITS_NOT.values(), ids=WAITS_NOT)
def test_the_guard_lets_pass_what_does_not_wait(harmless):
    x = torch.tensor([1, 2, 3, 4])
    with NoSync([x]):
        harmless(x)


@pytest.mark.parametrize("place", ["init_forward_metadata", "forward_decode"])
def test_a_wait_anywhere_in_the_step_is_found(place, monkeypatch):
    """A deliberate one, in what the other tests accept."""
    with forced_kernels("naive"):
        serving = small("triton", monkeypatch)
        batch = serving.next_batch([3, 2])
        queries = serving.queries(batch.batch_size)
        guard = NoSync(on_device(serving, batch))
        launches(guard, monkeypatch)
        original = getattr(serving.backend, place)

        def waiting(*args, **kwargs):
            serving.cache.memory.table.num_pages[batch.req_pool_indices].max().item()
            return original(*args, **kwargs)

        monkeypatch.setattr(serving.backend, place, waiting)
        with pytest.raises(HostSync), guard:
            decode(serving, batch, queries)
