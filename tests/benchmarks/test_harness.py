"""What the tests' own servers rest on."""

import socket

from benchmarks import harness


def test_no_outgoing_connection_can_take_a_servers_port(monkeypatch, tmp_path):
    """Between the choice and the server's bind lie tens of seconds of loading."""
    limits = tmp_path / "ip_local_port_range"
    limits.write_text("11000\t60999\n")
    monkeypatch.setattr(harness, "OUTGOING_PORTS", limits)
    ports = {harness.free_port() for _ in range(200)}
    assert len(ports) > 100
    assert min(ports) >= harness.FIRST_PORT
    assert max(ports) < 11000


def test_a_port_in_use_is_not_chosen(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "OUTGOING_PORTS", tmp_path / "nowhere")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", harness.free_port()))
        taken = listener.getsockname()[1]
        order = [taken, *range(10000, 10999)]
        monkeypatch.setattr(harness.random.SystemRandom, "sample", lambda *_: order)
        assert harness.free_port() != taken
