import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch

from hybridkv_kernels.head_pages import HeadPageLayout, HeadPageTable
from sglang_hybridkv.cache.prefetch import QueryPrefetch
from tests.builders import fresh_generator

LAYOUT = HeadPageLayout(2, 2, 8, 8)
ROWS = torch.tensor([3, 1, 0, 4])  # 0 is padding, 4 has no dynamic head


@pytest.fixture
def generator():
    return fresh_generator()


@pytest.fixture
def table():
    table = HeadPageTable(6, 4, 4, LAYOUT, "cpu")
    table.is_dynamic[3, :, 1] = table.is_dynamic[1] = True
    return table


def make(similarity=0.9):
    return QueryPrefetch(similarity, 6, LAYOUT, 16, torch.float32, "cpu")


def queries(generator):
    return torch.randn(len(ROWS), 6, 16, generator=generator)


def split(prefetch, q, table, layer=0):
    now, later = prefetch.split(q, table, layer, ROWS)
    assert torch.equal(now + later, ROWS), "each row is retrieved once, now or later"
    assert (now * later == 0).all()
    return now.tolist()


def test_the_first_query_retrieves_at_once_and_one_like_it_later(generator, table):
    prefetch, q = make(), queries(generator)
    assert split(prefetch, q, table) == [3, 1, 0, 0]
    assert split(prefetch, q + 0.01, table) == [0, 0, 0, 0]
    assert split(prefetch, -q, table) == [3, 1, 0, 0]
    assert split(prefetch, q, table, layer=1) == [3, 1, 0, 0], "each layer has its own queries"
    assert prefetch.counters.tolist() == [8, 6]
    assert prefetch.correction_rate() == 0.75


def test_one_head_that_moved_corrects_its_request_only(generator, table):
    prefetch, q = make(), queries(generator)
    split(prefetch, q, table)
    q = q.clone()
    q[0, :3] *= -1  # head 0 of row 3 is static
    assert split(prefetch, q, table) == [0, 0, 0, 0]
    q[1, 3:] *= -1
    assert split(prefetch, q, table) == [0, 1, 0, 0]


def test_a_stricter_threshold_corrects_no_fewer(generator, table):
    q, then = queries(generator), queries(generator)
    corrected = []
    for similarity in (0.05, 0.5, 0.9, 1.0):
        prefetch = make(similarity)
        split(prefetch, q, table)
        corrected.append(set(split(prefetch, q + 0.7 * then, table)))
    assert all(a <= b for a, b in itertools.pairwise(corrected))


def test_another_request_on_a_row_does_not_inherit_its_queries(generator, table):
    prefetch, q = make(), queries(generator)
    for layer in range(2):
        split(prefetch, q, table, layer)
    prefetch.forget(3)
    for layer in range(2):
        assert split(prefetch, q, table, layer) == [3, 0, 0, 0]


def test_padding_may_hold_anything(generator, table):
    prefetch, q = make(), queries(generator)
    q[2] = float("nan")
    assert split(prefetch, q, table) == [3, 1, 0, 0]
    assert split(prefetch, q, table) == [0, 0, 0, 0]
    assert make().correction_rate() is None


def test_on_a_gpu_it_runs_beside_and_the_last_layer_waits_for_all(monkeypatch):
    """Doubles of the streams, which say in which order the device may run what."""
    log = []

    def stream(name):
        def wait_stream(other):
            log.append(f"{name} waits for {other.name}")

        return SimpleNamespace(name=name, device="cuda", wait_stream=wait_stream)

    @contextlib.contextmanager
    def on(stream):
        log.append(f"on {stream.name}")
        yield
        log.append("on main")

    prefetch, main = make(), stream("main")
    prefetch._side._stream = stream("side")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    used = SimpleNamespace(record_stream=lambda stream: log.append(f"{stream.name} keeps"))
    prefetch.beside(lambda: log.append("retrieve"), used, is_last=False)
    assert log == ["side waits for main", "side keeps", "on side", "retrieve", "on main"]
    prefetch.beside(lambda: log.append("retrieve"), used, is_last=True)
    assert log[5:] == [*log[:5], "main waits for side"]
    prefetch._side.join()
    assert len(log) == 11, "nothing is waited for twice"
