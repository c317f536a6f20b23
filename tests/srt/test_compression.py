"""Life of requests in `Compression`, with a real pool and allocator, and the tree's part played by the test."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

pytest.importorskip("sglang")

from sglang.srt.managers.schedule_batch import (
    FINISH_ABORT,
    FINISH_LENGTH,
    Modality,
    MultimodalDataItem,
    MultimodalInputs,
)

from sglang_hybridkv.cache import host_segments
from sglang_hybridkv.cache.compress import ObservedPrompt
from sglang_hybridkv.compressors.base import HeadPlan
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from sglang_hybridkv.requests.settings import WARM_UP
from sglang_hybridkv.requests.spans import VisualSpan
from sglang_hybridkv.srt import compression as compression_module
from sglang_hybridkv.srt.compression import visual_spans
from sglang_hybridkv.srt.ranks import Ranks
from tests.builders import LAWS
from tests.srt.serving import HEADS, LAYERS, Serving, make_compression, make_request

P = 8
NUM_HEADS = LAYERS * HEADS


def admit(compression, row, prompt_len, **kwargs):
    """A request whose prompt has just been given its own pages."""
    pages = compression.allocator.alloc_pages(-(-prompt_len // P))
    if pages is None:
        return None
    more = {"finished_reason": FINISH_LENGTH(length=1), "finished": lambda: True, "row_pages": pages}
    return make_request(row, prompt_len, **more, **kwargs)


def commit(compression, req, num_dynamic):
    """What the forward and the tree do around a commit; the exact prompt is evicted at once."""
    reservation = compression.ledger.get(req.kv.req_pool_idx)
    reservation.outcome.copy_(torch.tensor([NUM_HEADS - num_dynamic, num_dynamic]))
    reservation.digest = torch.tensor(-1)
    chunks = reservation.geometry.num_prompt_pages
    compression.settle(reservation)
    compression.allocator.free_page_ids(req.row_pages[:chunks])
    compression.commit(req)
    req.row_pages = torch.cat((reservation.pages[: reservation.num_in_row], req.row_pages[chunks:]))


def finish(compression, req):
    compression.allocator.free_page_ids(req.row_pages)
    compression.release(req)


class CompressionAgainstModel(RuleBasedStateMachine):
    """Requests that are prefilled, committed, decoded, aborted and finished in any order."""

    @initialize(
        budget=st.sampled_from([0.3, 0.6, 1.0]),
        host_pages=st.sampled_from([0, 12, 60, 60]),
        when_full=st.sampled_from(["dense", "static"]),
        num_pages=st.sampled_from([24, 80, 80]),
        theta=st.sampled_from([0.0, 0.5, 1.01]),
    )
    def build(self, budget, host_pages, when_full, num_pages, theta):
        config = {"budget": budget, "on_host_store_full": when_full, "theta": theta}
        self.compression = make_compression(num_pages, host_pages, **config)
        self.num_pages, self.requests, self.finished, self.num_begun = num_pages, {}, [], 0

    @precondition(lambda self: len(self.requests) < 6)
    @rule(data=st.data(), prompt_len=st.integers(2 * P, 15 * P) | st.just(P), left=st.sampled_from([1, 8, 8, 8]))
    def prefill(self, data, prompt_len, left):
        row = data.draw(st.sampled_from([row for row in range(1, 7) if row not in self.requests]))
        req = admit(self.compression, row, prompt_len, max_new_tokens=left)
        if req is not None:
            self.compression.prepare(req, None)
            self.requests[row], self.num_begun = req, self.num_begun + 1

    @precondition(lambda self: self.uncommitted())
    @rule(data=st.data(), num_dynamic=st.integers(0, NUM_HEADS))
    def commit(self, data, num_dynamic):
        self.commit_row(data.draw(st.sampled_from(self.uncommitted())), num_dynamic)

    @precondition(lambda self: self.uncommitted())
    @rule(data=st.data(), excess=st.integers(1, NUM_HEADS))
    def overflow(self, data, excess):
        """The forward finds more dynamic heads than fit, which is a fault where the compressor knew how many do."""
        row = data.draw(st.sampled_from(self.uncommitted()))
        reservation, req = self.compression.ledger.get(row), self.requests[row]
        num_dynamic = reservation.most_dynamic + excess
        reservation.figures = torch.tensor([reservation.geometry.budget_head_pages, 1, 1, num_dynamic, 0])
        self.compression.settle(reservation)
        assert reservation.failed
        self.compression.give_up(req)
        is_full = num_dynamic <= reservation.geometry.max_dynamic_heads and not reservation.caps_plan
        assert self.compression.request_info(req)["reason"] == ("host_store_full" if is_full else "compressor_failed")

    @precondition(lambda self: len(self.uncommitted()) > 1)
    @rule(num_dynamic=st.integers(0, NUM_HEADS))
    def commit_all(self, num_dynamic):
        for row in self.uncommitted():
            self.commit_row(row, num_dynamic)

    def commit_row(self, row, num_dynamic):
        most = self.compression.ledger.get(row).most_dynamic
        commit(self.compression, self.requests[row], min(num_dynamic, most))
        info = self.compression.request_info(self.requests[row])
        assert info["compressed"]
        assert info["static_heads"] + info["dynamic_heads"] == NUM_HEADS

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish_or_abort(self, data):
        req = self.requests.pop(data.draw(st.sampled_from(sorted(self.requests))))
        finish(self.compression, req)
        self.finished.append(req)

    @precondition(lambda self: len(self.requests) == 3)
    @rule()
    def flush(self):
        self.num_begun -= len(self.uncommitted())
        self.compression.allocator.clear()
        self.requests.clear()

    def uncommitted(self):
        return sorted(row for row, r in self.compression.ledger.by_row.items() if not r.committed)

    @invariant()
    def everything_is_accounted_for(self):
        if not hasattr(self, "compression"):
            return
        compression = self.compression
        compression.check_integrity()
        in_rows = sum(len(req.row_pages) for req in self.requests.values()) * P
        free = compression.allocator.available_size()
        assert free + in_rows + compression.ledger.unlisted_tokens() == self.num_pages * P
        pages = compression.allocator.get_all_free_pages().tolist()
        pages += [page for req in self.requests.values() for page in req.row_pages.tolist()]
        pages += [page for r in compression.ledger.by_row.values() for page in r.unlisted_pages.tolist()]
        assert sorted(pages) == list(range(1, self.num_pages + 1))
        info = compression.server_info()
        host = info["host_store"]
        assert host["used_bytes"] + host["reserved_bytes"] == compression.store.used_bytes() <= host["pinned_bytes"]
        assert host["pinned_bytes"] <= host["limit_bytes"] == info["host_store_bytes"]
        assert host["used_bytes"] == info["host_kv_bytes"]
        assert self.uncommitted() or host["reserved_bytes"] == 0
        counted = info["compressed_requests"] + sum(info["dense_requests"].values())
        assert counted == self.num_begun - len(self.uncommitted()), "a request counts once"
        records = [compression.request_info(req) for req in [*self.requests.values(), *self.finished]]
        assert all(record["compressed"] == (record["reason"] is None) for record in records)

    def teardown(self):
        if not hasattr(self, "compression"):
            return
        for req in self.requests.values():
            finish(self.compression, req)
        assert self.compression.allocator.available_size() == self.num_pages * P
        assert self.compression.store.used_bytes() == 0
        assert not self.compression.cache.memory.table.num_pages.any()


CompressionAgainstModel.TestCase.settings = hypothesis_settings(LAWS, max_examples=40, stateful_step_count=25)
test_compression_against_model = CompressionAgainstModel.TestCase


def prepared(compression, **kwargs):
    req = admit(compression, 1, **{"prompt_len": 10 * P} | kwargs)
    compression.prepare(req, None)
    return req


def test_the_record_counts_every_page_of_the_request():
    compression = make_compression(budget=0.4)
    req = prepared(compression, prompt_len=10 * P + 3)
    commit(compression, req, num_dynamic=4)
    # 4 pages of rows and 1 of summaries, and the dense tail's page, of 11 in stock SGLang.
    info = compression.request_info(req)
    assert info["resident_ratio"] == pytest.approx(6 / 11)
    assert info["host_bytes"] == 10 * compression.page_bytes
    assert (info["prompt_tokens"], info["budget"], info["reason"]) == (10 * P + 3, 0.4, None)
    held = compression.held()
    assert (held.device, held.stock) == (6 * compression.page_bytes, 11 * compression.page_bytes)
    assert compression.server_info()["compressed_requests"] == 1


def test_rounded_rows_take_less_host_memory_and_traffic():
    """A record of 2 x 8 numbers is 64 bytes in fp32; as codes with two scales it is 24, padded to 32."""
    plain, rounded = (make_compression(host_dtype=host_dtype) for host_dtype in ("same", "int8"))
    assert rounded.store.num_pages == 2 * plain.store.num_pages
    host_bytes = []
    for compression in (plain, rounded):
        req = prepared(compression)
        commit(compression, req, num_dynamic=4)
        host_bytes.append(compression.request_info(req)["host_bytes"])
    assert host_bytes[0] == 2 * host_bytes[1] > 0
    assert plain.server_info()["host_store_bytes"] == rounded.server_info()["host_store_bytes"]
    assert plain._chunk_bytes == 2 * rounded._chunk_bytes == P * 64


def test_without_retrieval_a_request_holds_its_budget_and_no_host_memory():
    compression = make_compression(name="snapkv", budget=0.4)
    assert compression.store.num_pages == 0
    req = prepared(compression, prompt_len=10 * P)
    assert compression.ledger.get(1).most_dynamic == 0
    commit(compression, req, num_dynamic=0)
    info = compression.request_info(req)
    assert (info["resident_ratio"], info["host_bytes"], info["dynamic_heads"]) == (0.4, 0, 0)


def test_a_retraction_before_the_commit_is_not_an_answer():
    compression = make_compression(budget=0.4)
    req = prepared(compression)
    req.finished = lambda: False
    compression.release(req)
    assert compression.server_info()["dense_requests"] == {}
    compression.prepare(req, None)
    commit(compression, req, num_dynamic=4)
    assert compression.request_info(req)["compressed"]
    assert compression.server_info()["compressed_requests"] == 1


@pytest.mark.parametrize(
    ("config", "request_", "reason"),
    [
        ({}, {"max_new_tokens": 0}, "prefill_only"),
        ({}, {"prompt_len": 2 * P - 1}, "prompt_too_short"),
        ({}, {"max_new_tokens": 1}, "no_decode"),
        ({"min_head_pages": 5}, {}, "budget_below_floor"),
        ({"budget": 0.9}, {}, "saves_nothing"),
        ({"num_pages": 14}, {}, "pool_too_small"),
        ({"host_pages": 9}, {}, "host_store_full"),
    ],
)
def test_dense_requests_say_why_and_hold_nothing(config, request_, reason):
    compression = make_compression(**config)
    req = prepared(compression, **request_)
    info = compression.request_info(req)
    assert (info["compressed"], info["reason"], info["resident_ratio"]) == (False, reason, 1.0)
    assert info["plan"] is None
    assert compression.server_info()["dense_requests"] == {reason: 1}
    assert not compression.ledger.by_row
    assert not compression.cache.observer.is_interested(1)
    finish(compression, req)
    assert compression.allocator.available_size() == compression.allocator.size
    assert compression.store.used_bytes() == 0


@pytest.mark.parametrize(
    ("stage", "ended_by", "reason"),
    [
        ("queue", FINISH_ABORT("gone"), "not_prefilled"),
        ("first part", FINISH_ABORT("gone"), "not_prefilled"),
        ("refused", FINISH_ABORT("too long"), "not_prefilled"),
        ("last part", FINISH_ABORT("gone"), "aborted"),
        ("last part", FINISH_LENGTH(length=1), "no_decode"),
        ("dense", FINISH_ABORT("gone"), "no_decode"),
        ("committed", FINISH_ABORT("gone"), None),
    ],
)
def test_a_request_that_ends_early_is_counted_once_and_says_where_it_stood(stage, ended_by, reason):
    compression = make_compression()
    req = admit(compression, 1, 10 * P, chunk_end=3 * P if stage == "first part" else None)
    req.finished_reason = ended_by
    req.to_finish = ended_by if stage == "refused" else None
    req.sampling_params.max_new_tokens = 1 if stage == "dense" else 8
    if stage == "queue":
        compression.record_unprefilled(req)
    else:
        compression.prepare(req, None)
        if stage == "committed":
            commit(compression, req, num_dynamic=4)
        finish(compression, req)
        compression.record_unprefilled(req)  # as for an AbortReq, which is also sent for a part of a prefill
    assert compression.request_info(req)["reason"] == reason
    info = compression.server_info()
    counted = {} if reason is None else {reason: 1}
    assert (info["compressed_requests"], info["dense_requests"]) == (int(reason is None), counted)
    assert not compression.ledger.by_row
    assert not compression.cache.observer.is_interested(1)


def test_no_free_pages_gives_the_host_pages_back():
    compression = make_compression(num_pages=40)
    taken = compression.allocator.alloc_pages(27)
    req = prepared(compression)
    assert compression.request_info(req)["reason"] == "no_free_pages"
    assert compression.store.used_bytes() == 0
    compression.allocator.free_page_ids(taken)
    finish(compression, req)
    assert compression.allocator.available_size() == 40 * P


@pytest.mark.parametrize(
    ("config", "host_pages"), [({"max_dynamic_heads": 0.5}, 5), ({"theta": 0.0}, 0), ({"max_dynamic_heads": 0.0}, 0)]
)
def test_a_reservation_is_for_the_heads_that_may_be_dynamic(config, host_pages):
    compression = make_compression(host_pages=host_pages, **config)
    req = prepared(compression, prompt_len=10 * P)
    reservation = compression.ledger.get(1)
    assert len(reservation.host_pages) == host_pages
    # 4 pages of rows; 1 head page of summaries a dynamic head.
    assert len(reservation.pages) == 4 + (host_pages > 0)
    commit(compression, req, num_dynamic=host_pages * NUM_HEADS // 10)
    assert compression.request_info(req)["compressed"]


GIB = 2**30


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64 * GIB),
        ({"memory.max": "max\n", "memory.current": f"{GIB}\n"}, 64 * GIB),
        ({"memory.max": f"{8 * GIB}\n", "memory.current": f"{3 * GIB}\n"}, 5 * GIB),
        ({"memory.max": f"{GIB}\n", "memory.current": f"{2 * GIB}\n"}, 0),
        (
            {
                "memory.max": f"{8 * GIB}\n",
                "memory.current": f"{3 * GIB}\n",
                "memory.stat": f"anon {GIB}\ninactive_file {GIB}\nactive_file {GIB}\n",
            },
            6 * GIB,
        ),
        ({"memory/memory.limit_in_bytes": f"{2**63}", "memory/memory.usage_in_bytes": "9"}, 64 * GIB),
        ({"memory/memory.limit_in_bytes": f"{4 * GIB}", "memory/memory.usage_in_bytes": f"{GIB}"}, 3 * GIB),
    ],
)
def test_a_container_has_less_memory_than_its_machine(files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(host_segments, "_CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(host_segments.psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert host_segments.available_host_bytes() == expected


@pytest.mark.parametrize(
    ("device", "ranks", "free", "expected"),
    [
        ("cpu", 1, 64 * GIB, 8 * GIB),  # every head may be dynamic: eight times the pool
        ("cpu", 1, 7 * GIB, 7 * GIB // 2),
        ("cpu", 2, 64 * GIB, 16 * GIB),
        ("cuda", 1, 64 * GIB, 8 * GIB),
        ("cuda", 1, 7 * GIB, 7 * GIB // 2),
        ("cuda", 3, 64 * GIB, 24 * GIB),
        ("cuda", 1, 0, 0),
    ],
)
def test_the_default_host_store_is_what_dynamic_heads_need_if_that_is_free(device, ranks, free, expected, monkeypatch):
    monkeypatch.setattr(compression_module, "available_host_bytes", lambda: free)
    together = Ranks()
    together.size = ranks
    monkeypatch.setattr(together, "gather", lambda *values: torch.tensor([values]))
    config = HybridKVConfig(max_dynamic_heads=1.0)
    rows = {"head_num": 2, "head_dim": 64, "store_dtype": torch.bfloat16, "device": device}
    pool = SimpleNamespace(layer_num=2, pool_bytes=GIB, windows=(), **rows)
    assert compression_module._host_store_bytes(config, pool, together) == expected
    half = SimpleNamespace(layer_num=4, pool_bytes=2 * GIB, windows=(512, 0, 512, 0), **rows)
    assert compression_module._host_store_bytes(config, half, together) == expected, "heads with a window need none"
    rounded = config.model_copy(update={"host_dtype": "int8"})
    if device == "cpu" and free > 32 * GIB:
        assert compression_module._host_store_bytes(rounded, pool, together) == expected * 144 // 256
    asked = HybridKVConfig(host_store_bytes=12345)
    if device == "cuda" and not free:
        with pytest.raises(ValueError, match=r"^host_store_bytes: 12,345; legal: at most 0, "):
            compression_module._host_store_bytes(asked, pool, together)
    else:
        assert compression_module._host_store_bytes(asked, pool, together) == 12345


def test_an_earlier_chunk_is_watched_and_reserves_nothing():
    compression = make_compression()
    before = compression.allocator.size
    prepared(compression, chunk_end=3 * P)
    assert compression.cache.observer.is_interested(1)
    assert not compression.cache.observer.is_final(1)
    assert not compression.ledger.by_row
    assert compression.allocator.available_size() == before - 10 * P


def test_a_request_that_was_compressed_says_so_when_it_comes_back_with_one_token_left():
    compression = make_compression()
    req = prepared(compression)
    commit(compression, req, num_dynamic=4)
    record = compression.request_info(req)
    finish(compression, req)
    req.sampling_params.max_new_tokens = 1
    compression.prepare(req, None)
    assert compression.request_info(req) == record
    assert compression.server_info()["dense_requests"] == {}


def test_health_checks_are_not_counted():
    compression = make_compression()
    prepared(compression, prompt_len=1, rid="HEALTH_CHECK_1")
    assert compression.server_info()["dense_requests"] == {}


def test_a_request_that_never_ran_has_a_record():
    compression = make_compression()
    params = SimpleNamespace(custom_params=None)
    info = compression.request_info(SimpleNamespace(origin_input_ids=[1, 2, 3], sampling_params=params))
    assert (info["compressed"], info["reason"], info["prompt_tokens"]) == (False, "not_prefilled", 3)


def test_what_is_planned_is_what_the_reservation_takes():
    compression = make_compression()
    req = admit(compression, 1, 10 * P)
    planned = compression.planned(req)
    compression.prepare(req, None)
    assert compression.ledger.get(1).geometry == planned
    assert len(compression.ledger.get(1).pages) == planned.num_pages > 0
    assert compression.planned(admit(compression, 2, P)) is None


@pytest.mark.parametrize("num_generated", [1, P, 3 * P + 5])
def test_a_retracted_request_has_the_plan_of_its_prompt(num_generated):
    """What it has generated is prefilled along, and neither observed nor compressed."""
    compression = make_compression()
    first, again = prepared(compression, max_new_tokens=60), admit(compression, 2, 10 * P + num_generated)
    again.origin_input_ids, again.output_ids = again.full_untruncated_fill_ids[: 10 * P], [0] * num_generated
    again.sampling_params = first.sampling_params
    compression.prepare(again, None)
    held = compression.ledger.get(2)
    assert held.geometry == compression.ledger.get(1).geometry
    assert (held.geometry.covered, held.prefilled) == (10 * P, 10 * P + num_generated)
    assert compression.window(again) == compression.window(first)
    assert compression.cache.observer.prompt_len(2) == 10 * P
    commit(compression, first, num_dynamic=4)
    commit(compression, again, num_dynamic=4)
    assert compression.request_info(again)["plan"] == compression.request_info(first)["plan"] == "f" * 16


def test_a_commit_before_the_compression_is_an_error():
    compression = make_compression()
    req = prepared(compression)
    compression.settle(compression.ledger.get(1))
    with pytest.raises(AssertionError, match="committed before it was compressed"):
        compression.commit(req)


@pytest.mark.parametrize("ends", ["in a commit", "at its first token"])
def test_a_plan_that_the_forward_refused_is_a_prompt_that_it_could_not_compress(ends, monkeypatch, caplog):
    """Between the two a decode step may run, and reads a dense row; the log says what is wrong with the plan."""
    serving = Serving("torch_native", monkeypatch, compressor="snapkv")
    compression, compressor = serving.compression, serving.cache.compressor
    plan = compressor.plan

    def too_much(*args, **kwargs):
        heads = plan(*args, **kwargs)
        return HeadPlan(heads.is_dynamic, heads.num_head_pages + 1)

    monkeypatch.setattr(compressor, "plan", too_much)
    serving.add(1, 100, compressed=False)
    req = make_request(1, 100, finished_reason=FINISH_LENGTH(length=1), finished=lambda: True)
    compression.prepare(req, None)
    reservation, slots = compression.ledger.get(1), serving.req_to_token[1].long()
    shape = (LAYERS, HEADS)
    observed = ObservedPrompt((), torch.rand(shape), torch.rand(*shape, 100), torch.rand(*shape, serving.head_dim))
    serving.cache.compress(1, slots, observed)
    compression.check_integrity()
    assert not reservation.failed
    assert serving.cache.readable(1) is None
    if ends == "in a commit":
        compression.settle(reservation)
        assert reservation.failed
        compression.give_up(req)
    else:
        compression.release(req)
    assert "a prompt of 100 tokens could not be compressed: KV compressor 'snapkv': num_head_pages = " in caplog.text
    assert caplog.text.count("could not be compressed") == 1
    assert compression.request_info(req)["reason"] == "compressor_failed"
    compression.check_integrity()
    assert not compression.ledger.by_row


def test_what_is_read_of_a_plan_on_the_host_is_waited_for(monkeypatch):
    class Event:
        waits = 0

        def synchronize(self):
            self.waits += 1

    event, compression = Event(), make_compression()
    prepared(compression)
    reservation = compression.ledger.get(1)
    assert reservation.refusal() is None, "before it was compressed there is no plan"
    geometry = reservation.geometry
    reservation.written = event
    reservation.figures = torch.tensor([geometry.total_head_pages + 1, 1, 2, 0, 0])
    compression.settle(reservation)
    assert event.waits == 1
    assert reservation.failed


def test_integrity_finds_a_row_without_a_reservation():
    compression = make_compression()
    prepared(compression)
    compression.check_integrity()
    compression.ledger.close(1)
    with pytest.raises(AssertionError):
        compression.check_integrity()


def item(modality, offsets):
    return MultimodalDataItem(modality=modality, offsets=offsets)


def test_spans_of_images_and_videos_are_half_open_and_in_order():
    inputs = MultimodalInputs(
        mm_items=[
            item(Modality.VIDEO, [(50, 59)]),
            item(Modality.IMAGE, [(30, 39), (5, 5)]),
            item(Modality.AUDIO, [(70, 79)]),
            item(Modality.IMAGE, None),
        ]
    )
    assert visual_spans(inputs) == (
        VisualSpan(5, 6, "image"),
        VisualSpan(30, 40, "image"),
        VisualSpan(50, 60, "video"),
    )


def test_text_has_no_spans():
    assert visual_spans(None) == ()
    assert visual_spans(MultimodalInputs(mm_items=[])) == ()


@pytest.mark.parametrize("given", [{"budget": 0.6}, {"theta": 0.2}, {"budget": 0.7, "theta": 0.9}, {"theta": 0.0}])
def test_settings_of_a_request_are_settings_of_a_server(monkeypatch, given):
    """The same pages and the same plan, whichever of the two said so."""
    outcomes = []
    for server, request in (({}, given), (given, {})):
        torch.manual_seed(0)
        serving = Serving("torch_native", monkeypatch, **server)
        serving.generator = torch.Generator().manual_seed(7)
        serving.add(1, 130, custom_params={"kv_compressor": request} if request else None)
        reservation = serving.compression.ledger.get(1)
        outcomes.append((reservation.geometry, reservation.outcome.tolist(), int(reservation.digest)))
    assert outcomes[0] == outcomes[1]
    plain = Serving("torch_native", monkeypatch)
    plain.generator = torch.Generator().manual_seed(7)
    plain.add(1, 130)
    assert int(plain.compression.ledger.get(1).digest) != outcomes[0][2]


def test_what_is_remembered_of_a_length_is_remembered_for_its_settings():
    compression = make_compression()
    given = [None, {"budget": 0.6}, {"budget": 0.8}, {"min_prompt_tokens": 999}, {"enabled": False}]
    requests = [
        admit(compression, row, 10 * P, custom_params=None if one is None else {"kv_compressor": one})
        for row, one in enumerate(given, start=1)
    ]
    plans = [compression.plan(req) for req in requests + requests]
    assert plans[:5] == plans[5:]
    assert [plan.total_head_pages for plan in plans[:3]] == [16, 24, 32]
    assert plans[3:5] == ["prompt_too_short", "request_disabled"]


def test_a_change_concerns_requests_whose_prefill_has_not_begun(monkeypatch):
    """Each has the pages and the plan of a server that was started with what held when its prefill began."""
    given = {"kv_compressor": {"min_prompt_tokens": 80}}

    def outcomes(budgets, **server):
        torch.manual_seed(0)
        serving = Serving("torch_native", monkeypatch, **server)
        compression = serving.compression
        for row, budget in enumerate(budgets, start=1):
            serving.generator = torch.Generator().manual_seed(7)
            if budget is not None:
                compression.change_settings({"budget": budget})
            serving.add(row, 130, custom_params=given)
        reservations = [compression.ledger.get(row) for row in range(1, len(budgets) + 1)]
        return [(held.geometry, held.outcome.tolist(), int(held.digest)) for held in reservations]

    [low], [high] = outcomes([None], budget=0.6), outcomes([None], budget=0.8)
    assert low != high
    assert outcomes([None, 0.8, 0.6], budget=0.6) == [low, high, low]

    compression = make_compression()
    begun, waiting = (admit(compression, row, 10 * P, custom_params=given) for row in (1, 2))
    compression.prepare(begun, None)
    plans = [compression.plan(req) for req in (begun, waiting)]
    assert plans[0] == plans[1]
    compression.change_settings({"budget": 0.8})
    assert compression.plan(begun) == plans[0] != compression.plan(waiting)
    assert compression.request_info(begun)["budget"] != compression.request_info(waiting)["budget"] == 0.8
    limits = {"request_override": False, "request_budget_max": 0.2}
    compression.change_settings(limits)  # what was let in before is served
    assert compression.plan(waiting) != plans[0]
    assert compression.server_info()["config"].items() >= limits.items()


@pytest.mark.parametrize("own", ["warm-up", "samples", "health"])
def test_only_requests_of_users_are_counted(own):
    compression = make_compression()
    req = admit(compression, 1, P, rid="HEALTH_CHECK_1" if own == "health" else "r")
    if own == "warm-up":
        req.sampling_params.custom_params = {WARM_UP: True}
    if own == "samples":
        req.sampling_params.max_new_tokens, req.sampling_params.n = 0, 2
    compression.prepare(req, None)
    assert not compression.stats.num_dense
    compression.prepare(admit(compression, 2, P), None)
    assert compression.stats.num_dense == {"prompt_too_short": 1}
