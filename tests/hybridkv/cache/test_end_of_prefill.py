"""The end of prefill makes the host wait for nothing, and does the same for every prompt of one geometry.

Kernels are launches here, unseen inside. So is the offload to the host store, which on a GPU is one.
"""

import dataclasses
import pkgutil

import pytest
import torch

from hybridkv_kernels import compact_kv, gpu, retrieve_chunks, score_heads, select_tokens
from hybridkv_kernels.chunks import rotation
from sglang_hybridkv.cache import offload
from sglang_hybridkv.cache.memory import full_layers
from sglang_hybridkv.cache.observation import QueryPart
from sglang_hybridkv.compressors import BUILT_IN, random_tokens
from sglang_hybridkv.compressors.base import HeadPlan
from sglang_hybridkv.requests.spans import VisualSpan
from tests.builders import LateSideStream, TinyPool, fresh_generator, host_bytes, make_compressor, seeded, use_kernels
from tests.no_sync import HostSync, NoSync

P, PROMPT_LEN = 8, 22 * 8 + 5
SPANS = (VisualSpan(20, 90, "image"), VisualSpan(120, 150, "image"))
METHODS = [(name, {}) for name in BUILT_IN] + [
    ("hybridkv", {"preset": "paper", "theta": 0.5, "page_size": P}),
    ("hybridkv", {"chunk_score": "mean2_max", "unretrieved": "estimate", "chunk_size": P}),
    ("quest", {"chunk_size": P}),
    ("look-m", {"merging": "weighted"}),
]
every_method = pytest.mark.parametrize(("name", "config"), METHODS, ids=lambda x: x if isinstance(x, str) else str(x))
windows = pytest.mark.parametrize("windows", [(), (0, 3 * P, 0)], ids=["full", "windows"])
OFFLOAD_ROWS = offload.offload_rows


class Guard(NoSync):
    """The device's memory is on the device; nobody on the host touches the store's pages."""

    def __init__(self, pool, *more):
        memory = pool.cache.memory
        tensors = [x for part in (memory.table, memory.views) for x in vars(part).values()]
        tensors += [pool.req_to_token, pool.counters, *more]
        device = pool.device
        tensors += [full_layers(pool.layout, device), rotation(16, device), rotation(32, device)]
        tensors += [scores] if (scores := getattr(pool.compressor, "scores", None)) is not None else []
        super().__init__([x for x in tensors if isinstance(x, torch.Tensor)])
        self._host_pages = {segment.untyped_storage().data_ptr() for segment in memory.store.pages.segments}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not self._is_paused and any(x.untyped_storage().data_ptr() in self._host_pages for x in tensors):
            raise HostSync(f"{func.name()} touches the host store")
        return super().__torch_dispatch__(func, types, args, kwargs)


def launches(guard, monkeypatch):
    """References as launches of kernels; Triton's are launches already, in its interpreter."""
    for module in (compact_kv, score_heads, select_tokens, retrieve_chunks):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setitem(module._IMPLEMENTATIONS, "naive", guard.launch(getattr(module.naive, name), name))
    monkeypatch.setattr(offload, "offload_rows", guard.launch(OFFLOAD_ROWS, "offload_rows"))
    monkeypatch.setattr(random_tokens, "to_device", guard.to_device)
    if gpu.is_installed():
        monkeypatch.setattr("hybridkv_kernels.score_heads.triton.to_device", guard.to_device)


@pytest.fixture
def launched(monkeypatch):
    """Makes launches of what a guard must not look into."""
    with use_kernels("naive"):
        yield lambda guard: launches(guard, monkeypatch)


def make_pool(name, config, windows=(), compressor=None, generator=None):
    eager = {"page_size": P, "min_prompt_tokens": 1, "min_head_pages": 1} | ({} if name == "full" else {"budget": 0.3})
    compressor = compressor or make_compressor(name, 3, 2, **eager | config)
    generator = generator or fresh_generator()
    pool = TinyPool(generator, compressor=compressor, num_layers=3, windows=windows, pages=300, host_pages=120)
    compressor.take_layers(pool.layout.full_layers)
    return pool


def prepared(pool, prompt_len=PROMPT_LEN, num_observed=20, *, most_dynamic=None, caps_plan=True):
    """A dense prompt that is about to be compressed, and its queries of each layer."""
    prompt = pool.add_prompt(prompt_len)
    reservation = pool._reserve(prompt.seq_len, SPANS, most_dynamic)
    reservation.caps_plan = caps_plan
    pool.cache.observer.watch(prompt.row, range(prompt.seq_len - num_observed, prompt.seq_len))
    pool.cache.bind(prompt.row, reservation)
    return prompt, [pool.queries(prompt.seq_len) * scale for scale in torch.rand(3, generator=pool.generator) * 4]


def observe(pool, prompt, queries):
    """All layers, as the attention backend shows them; the last one compresses."""
    for layer_idx in range(len(queries)):
        observe_layer(pool, layer_idx, [(prompt, queries)])
    assert not pool.cache.bound[prompt.row].failed


def observe_layer(pool, layer_idx, prompts):
    """One layer of prompts that are prefilled in one batch, each with its queries."""
    parts = [QueryPart(prompt.row, q[layer_idx], 0, pool.req_to_token[prompt.row]) for prompt, q in prompts]
    pool.cache.observe(layer_idx, parts, pool.scaling)


def guarded(pool, launched, prompt, queries):
    """What was dispatched and launched, with the shapes of all results."""
    guard = Guard(pool, *queries)
    launched(guard)
    with guard:
        observe(pool, prompt, queries)
    return guard.trace


@every_method
@windows
def test_it_waits_for_nothing_and_does_the_same_for_every_prompt(name, config, windows, launched):
    pool, traces, digests = make_pool(name, config, windows), [], []
    for _ in range(3):
        prompt, queries = prepared(pool)
        traces.append(guarded(pool, launched, prompt, queries))
        reservation = pool.cache.bound[prompt.row]
        assert reservation.refusal() is None
        digests.append(int(reservation.digest))
    assert len(traces[0]) > 100, "the guard saw nothing"
    assert traces[0] == traces[1] == traces[2]
    assert len(set(digests)) == (1 if name in ("full", "random") else 3), "the plans differ"


class Unrun:
    """A kernel that is launched and does nothing."""

    def __init__(self, guard):
        self.guard = guard

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.guard.trace.append(("launch", ()))


@pytest.fixture
def launched_by_triton(monkeypatch):
    """The kernels of a GPU; those that look for order statistics, which take long in the interpreter, are not run."""

    def launched(guard, unrun=("hit_kernel", "keep_kernel")):
        launches(guard, monkeypatch)
        for name in unrun:
            monkeypatch.setattr(f"hybridkv_kernels.score_heads.triton.{name}", Unrun(guard))

    pytest.importorskip("triton")
    with use_kernels("triton"):
        yield launched


@pytest.mark.parametrize("config", [{}, {"preset": "paper", "page_size": P}])
def test_with_the_kernels_of_a_gpu_it_waits_for_nothing_either(config, launched_by_triton):
    """Beside their launches they use torch, here in the statistics of heads."""
    pool, traces = make_pool("hybridkv", config), []
    for _ in range(2):
        traces.append(guarded(pool, launched_by_triton, *prepared(pool, 5 * P + 3, num_observed=3)))
    assert sum(name == "launch" for name, _ in traces[0]) >= 10, "three to seven a layer score, one copies rows"
    assert traces[0] == traces[1]


KERNELS = ("row", "lse", "probability", "hit", "keep", "captured", "statistic")  # of a layer, with today's defaults
OTHERS_A_LAYER = ["cat"]
"""The copy of the queries. The sizes of the prompts, from the host, are one more that the guard does not see."""
NO_LAUNCHES = {"slice.Tensor", "select.int", "split_with_sizes", "split.Tensor", "view", "view.dtype", "as_strided"}
NO_LAUNCHES |= {"empty.memory_format", "empty_like", "new_empty", "lift_fresh", "detach"}


def test_a_layer_takes_as_many_launches_for_five_prompts_as_for_one(launched_by_triton):
    """Of several lengths and numbers of observed rows, and two of them with settings of their own."""
    traces = []
    for num_prompts in (1, 5):
        pool = make_pool("hybridkv", {})
        prompts = [prepared(pool, 4 * P + i, num_observed=1 + i % 2) for i in range(num_prompts)]
        for prompt, _ in prompts[3:]:
            own = pool.compressor.with_config(pool.compressor.config.model_copy(update={"budget": 0.6, "theta": 0.9}))
            pool.cache.observer.begin(prompt.row, SPANS, own)
        with use_kernels("naive"):
            observe_layer(pool, 0, prompts)  # the first layer takes the slots of all
        slots = [prompt.slots for prompt in pool.cache.observer._prompts.values()]
        guard = Guard(pool, *slots, *(q for _, queries in prompts for q in queries))
        launched_by_triton(guard, [f"{name}_kernel" for name in KERNELS])
        with guard:
            observe_layer(pool, 1, prompts)
        traces.append([name for name, _ in guard.trace])
    for trace in traces:
        assert trace.count("launch") == len(KERNELS)
        assert [name for name in trace if name != "launch" and name not in NO_LAUNCHES] == OTHERS_A_LAYER


def test_a_plan_that_is_refused_takes_the_same_launches(launched):
    """The host learns of it later."""
    pool, traces = make_pool("snapkv", {}), []
    plan = pool.compressor.plan
    for fault in (0, 1):

        def faulty(*args, fault=fault, **kwargs):
            heads = plan(*args, **kwargs)
            return HeadPlan(heads.is_dynamic, heads.num_head_pages + fault)

        pool.compressor.plan = faulty
        prompt, queries = prepared(pool)
        traces.append(guarded(pool, launched, prompt, queries))
        assert (pool.cache.bound[prompt.row].refusal() is None) == (fault == 0)
        assert (pool.cache.readable(prompt.row) is None) == (fault == 1)
        pool.cache.check_integrity()
    assert traces[0] == traces[1]


@pytest.mark.parametrize("name", ["hybridkv", "quest"])
def test_a_plan_that_has_too_few_host_pages_takes_the_same_launches(name, launched):
    """Made as if there was room for all: the host learns later that it was refused, and how many heads it wanted."""
    pool, traces = make_pool(name, {}), []
    for most_dynamic in (None, 1):
        prompt, queries = prepared(pool, most_dynamic=most_dynamic, caps_plan=False)
        traces.append(guarded(pool, launched, prompt, queries))
    wanted, refused = pool.cache.bound.values()
    assert wanted.overflow() is None
    assert refused.overflow() == int(wanted.outcome[1]) > 1
    assert refused.outcome[1] == 0
    assert pool.cache.readable(prompt.row) is None
    pool.cache.check_integrity()
    assert traces[0] == traces[1]


@pytest.mark.parametrize("name", ["hybridkv", "quest"])
def test_a_plan_that_is_told_of_its_host_pages_waits_for_nothing(name, launched):
    pool = make_pool(name, {})
    prompt, queries = prepared(pool, most_dynamic=1)
    guarded(pool, launched, prompt, queries)
    assert pool.cache.bound[prompt.row].outcome.tolist() == [5, 1]
    assert pool.cache.readable(prompt.row) is not None


def test_events_wait_for_nothing_either(launched):
    pool = make_pool("hybridkv", {"events": "tcp://127.0.0.1:1"}, (0, 3 * P, 0))
    prompt, queries = prepared(pool)
    guarded(pool, launched, prompt, queries)
    assert pool.cache.bound[prompt.row].plan is not None


WAITS = {
    "plan": ("compressors.hybridkv.HybridKV.plan", lambda plan: plan.is_dynamic.any().item()),
    "rank": ("compressors.hybridkv.HybridKV.rank_tokens", lambda order: order.score.max().tolist()),
    "digest": ("cache.compress.digest_plan", int),
    "summaries": ("cache.offload.summarize_heads", lambda vectors: vectors.isnan().nonzero()),
    "score": ("compressors.hybridkv.HybridKV.score_layer", lambda scores: scores[0].cpu()),
}


@pytest.mark.parametrize("place", WAITS)
def test_a_wait_anywhere_is_found(place, launched, monkeypatch):
    """A deliberate one, in what the other tests accept."""
    path, wait = WAITS[place]
    owner, _, name = path.rpartition(".")
    owner = pkgutil.resolve_name(f"sglang_hybridkv.{owner}")
    original = getattr(owner, name)

    def waiting(*args, **kwargs):
        result = original(*args, **kwargs)
        wait(result)
        return result

    monkeypatch.setattr(owner, name, waiting)
    pool = make_pool("hybridkv", {})
    with pytest.raises(HostSync):
        guarded(pool, launched, *prepared(pool))


def test_only_launches_touch_the_host_store(launched):
    """Its pages are given to the next prompt although the device may still read them: the order of launches is enough.

    A prompt is compressed, decoded once and released, and the next one gets its pages.
    """
    pool = make_pool("hybridkv", {"max_dynamic_heads": 1.0})
    for _ in range(3):
        prompt, queries = prepared(pool)
        reservation = pool.cache.bound[prompt.row]
        rows = torch.tensor([prompt.row])
        guard = Guard(pool, *queries, rows)
        launched(guard)
        with guard:
            observe(pool, prompt, queries)
            for layer_idx, q in enumerate(queries):
                pool.cache.retrieve(layer_idx, q[:1], rows)
            pool.store.free(reservation.host_pages[3:])
            reservation.host_pages = reservation.host_pages[:3]
            pool.store.free(reservation.host_pages)
            pool.cache.release(prompt.row)
        assert ("launch offload_rows", ()) in guard.trace
        pool.cache.check_integrity()


def test_the_first_token_does_not_wait_for_the_host_link():
    """Host rows are written when the next forward begins, at the latest; the steps of `tests/srt` rely on it."""
    pool = make_pool("hybridkv", {"max_dynamic_heads": 1.0})
    pool.cache.memory = dataclasses.replace(pool.cache.memory, side=LateSideStream())
    before = host_bytes(pool.store.pages)
    prompt, queries = prepared(pool)
    observe(pool, prompt, queries)
    assert pool.cache.bound[prompt.row].refusal() is None
    assert torch.equal(host_bytes(pool.store.pages), before)
    pool.cache.join()
    assert not torch.equal(host_bytes(pool.store.pages), before)


@pytest.mark.parametrize("touch", [lambda pages: pages[0].clone(), lambda pages: pages.zero_()])
def test_a_touch_of_the_host_store_is_found(touch):
    pool = make_pool("hybridkv", {})
    with pytest.raises(HostSync, match="touches the host store"), Guard(pool):
        touch(pool.store.pages.segments[-1])


# What breaks of the prompt of `row`, which has `length` tokens, when it has done its work.
BREAKS = {
    "queries": ("cache.observation.PromptObserver.gather", lambda row, length, args: args[1:3] == (row, 1)),
    "scores": (
        "compressors.base.score_heads_batch",
        lambda row, length, args: any(len(slots) == length for _, slots in args[0]),
    ),
    "what was seen": ("cache.observation.PromptObserver.finish", lambda row, length, args: args[1] == row),
    "rows": ("cache.compressed_cache.compress_prompt", lambda row, length, args: args[3] == row),
}


@pytest.mark.parametrize("place", BREAKS)
def test_a_prompt_of_a_batch_that_fails_harms_no_other(place, monkeypatch, caplog):
    """Of three the second fails; the others get the plans that they get without a fault."""
    path, breaks = BREAKS[place]
    plans, generator = [], fresh_generator()
    for is_broken in (False, True):
        pool = make_pool("hybridkv", {}, generator=seeded(generator.initial_seed()))
        prompts = [prepared(pool, 9 * P + 5 * i) for i in range(3)]
        broken = prompts[1][0]
        if is_broken:
            original = pkgutil.resolve_name(f"sglang_hybridkv.{path}")

            def breaking(*args, original=original, row=broken.row, length=broken.seq_len, **kwargs):
                result = original(*args, **kwargs)
                if breaks(row, length, args):
                    raise RuntimeError("injected")
                return result

            monkeypatch.setattr(f"sglang_hybridkv.{path}", breaking)
        for layer_idx in range(3):
            observe_layer(pool, layer_idx, prompts)
        pool.cache.check_integrity()
        assert not any(pool.cache.observer.is_interested(prompt.row) for prompt, _ in prompts)
        reservations = [pool.cache.readable(prompt.row) for prompt, _ in prompts]
        assert [reservation is None for reservation in reservations] == [False, is_broken, False]
        plans.append([int(reservations[i].digest) for i in (0, 2)])
    assert plans[0] == plans[1]
    assert pool.cache.bound[broken.row].failed
    assert caplog.text.count(f"a prompt of {broken.seq_len} tokens could not be compressed") == 1
    assert caplog.text.count("could not be compressed") == 1
    assert ("3 prompts are scored one by one" in caplog.text) == (place == "scores")
