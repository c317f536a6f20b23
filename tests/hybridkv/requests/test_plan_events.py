"""Plans over ZMQ: what a subscriber reads, and that nobody is waited for."""

import time
from types import SimpleNamespace

import pytest
import torch
import zmq

from benchmarks.harness import free_port
from sglang_hybridkv.requests.plan_events import TOPIC, PlanPublisher, pack_bits, read_message
from sglang_hybridkv.requests.spans import VisualSpan

SECONDS = 10


def reservation(kept, is_dynamic, head_pages):
    """As the forward leaves it; pages of eight tokens."""
    geometry = SimpleNamespace(covered=kept.shape[-1], num_prompt_pages=kept.shape[-1] // 8)
    return SimpleNamespace(
        geometry=geometry,
        spans=(VisualSpan(3, 9, "image"),),
        plan=(is_dynamic, pack_bits(kept), kept.float().mean(-1)),
        digest=torch.tensor(-1),
        head_counts_on_host=lambda: head_pages,
    )


@pytest.fixture
def plan():
    generator = torch.Generator().manual_seed(7)
    kept = torch.rand(2, 3, 40, generator=generator) < 0.4
    return kept, torch.rand(2, 3, generator=generator) < 0.5, torch.randint(1, 5, (2, 3), generator=generator)


@pytest.fixture
def endpoint():
    return f"tcp://127.0.0.1:{free_port()}"


def subscribe(endpoint, publisher, held, high_water=1000):
    """A subscriber that the publisher knows of: it has received the event that was published for that."""
    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.setsockopt(zmq.RCVHWM, high_water)
    socket.setsockopt(zmq.SUBSCRIBE, TOPIC)
    socket.connect(endpoint)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        publisher.publish("first", 43, 0.1, held)
        if socket.poll(50):
            return socket
    raise AssertionError("no event arrived")


def drain(socket):
    messages = []
    while socket.poll(200):
        messages.append(read_message(socket.recv_multipart()))
    return messages


def test_a_subscriber_reads_the_plan(plan, endpoint):
    kept, is_dynamic, head_pages = plan
    publisher = PlanPublisher(endpoint)
    socket = subscribe(endpoint, publisher, reservation(*plan))
    publisher.publish("asked", 43, 0.2, reservation(*plan))
    *_, (sequence, event) = messages = drain(socket)
    assert [number for number, _ in messages] == list(range(messages[0][0], sequence + 1))
    assert torch.equal(event.kept_tokens(), kept)
    assert event.is_dynamic == is_dynamic.tolist()
    assert torch.equal(torch.tensor(event.salience_kept), kept.float().mean(-1))
    assert event.head_pages == head_pages.tolist()
    assert (event.request_id, event.prompt_tokens, event.covered_tokens) == ("asked", 43, 40)
    assert (event.budget, event.page_size, event.rank, event.plan) == (0.2, 8, 0, "f" * 16)
    assert event.spans == [(3, 9, "image")]
    assert abs(event.time - time.time()) < 60
    publisher.close()
    socket.close()


def test_a_subscriber_that_does_not_read_holds_nobody_up_and_sees_the_gap(plan, endpoint):
    publisher, held = PlanPublisher(endpoint), reservation(*plan)
    socket = subscribe(endpoint, publisher, held, high_water=10)
    for _ in range(20_000):  # far more than sockets and the system hold
        publisher.publish("busy", 43, 0.1, held)
    numbers = [number for number, _ in drain(socket)]
    publisher.publish("last", 43, 0.1, held)
    [(last, event)] = drain(socket)
    assert event.request_id == "last"
    assert numbers == sorted(numbers)
    assert last - numbers[0] > len(numbers) + 1
    publisher.close()
    socket.close()


def test_each_rank_has_a_place_of_its_own(endpoint, tmp_path):
    port = int(endpoint.rpartition(":")[2])
    publishers = [PlanPublisher(endpoint, 0), PlanPublisher(endpoint, 1)]
    assert [publisher.endpoint for publisher in publishers] == [endpoint, f"tcp://127.0.0.1:{port + 1}"]
    with pytest.raises(ValueError, match=r"^--kv-compressor-events tcp.* cannot be bound at tcp.* \(Address"):
        PlanPublisher(endpoint)
    file = f"ipc://{tmp_path}/plans"
    publishers += [PlanPublisher(file, 0), PlanPublisher(file, 2)]
    assert publishers[-1].endpoint == f"{file}.2"
    for publisher in publishers:
        publisher.close()
