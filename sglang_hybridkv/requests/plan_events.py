"""Plans as they are made: a message on a ZMQ PUB socket for each compressed prompt; docs/events.md.

In the way of SGLang's KV events a message has three frames: the topic, a sequence number (8 bytes, big-endian), and
msgpack. A publisher never waits: what a subscriber does not take in time is lost for it, and the numbers show the gap.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from sglang_hybridkv.config import EVENTS_FLAG

if TYPE_CHECKING:
    from sglang_hybridkv.requests.ledger import Reservation

TOPIC = b"kv_compressor"
_HIGH_WATER = 1000  # messages that wait for a slow subscriber


class PlanEvent(msgspec.Struct, tag="plan", kw_only=True):
    """What was decided for one prompt, for the L layers and the H KV heads of one tensor-parallel rank.

    Attributes
    ----------
    time : seconds since 1970.
    rank : tensor-parallel rank; each publishes on a port of its own.
    request_id : `rid` of the request; one that is retracted and compressed again has a second event.
    prompt_tokens, covered_tokens : of the prompt, and of them those in whole pages, which are compressed.
    budget : that was used.
    page_size : tokens.
    spans : [start, end, "image" or "video"] of each, as positions in the prompt, end excluded.
    is_dynamic : [L][H].
    head_pages : [L][H], device pages of each head.
    kept : [L, H, covered_tokens / 8] bytes; see `kept_tokens`.
    salience_kept : [L][H], from 0 to 1. What these rows hold of the salience that the compressor saw in the covered
        prompt, before it is pooled; with most, the mean attention of the observed queries. NaN where there is none.
    plan : the digest in the request's record; of the rank's own heads, where there are several ranks.
    windows : [L], the last tokens that a layer attends to, 0 for all; empty where all layers do. Heads of a layer with
        a window are not compressed, and none of the two types; is_dynamic is false of them, and salience_kept NaN.
    """

    time: float
    rank: int
    request_id: str
    prompt_tokens: int
    covered_tokens: int
    budget: float
    page_size: int
    spans: list[tuple[int, int, str]]
    is_dynamic: list[list[bool]]
    head_pages: list[list[int]]
    kept: bytes
    salience_kept: list[list[float]]
    plan: str
    windows: list[int] = []

    def compressed_layers(self) -> list[int]:
        """The layers that attend to all tokens."""
        windows = self.windows or [0] * len(self.is_dynamic)
        return [layer_idx for layer_idx, window in enumerate(windows) if not window]

    def kept_tokens(self) -> torch.Tensor:
        """[L, H, covered_tokens], bool: rows that went to the device when the prompt was compressed."""
        packed = torch.frombuffer(bytearray(self.kept), dtype=torch.uint8)
        bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
        return bits.view(len(self.is_dynamic), len(self.is_dynamic[0]), -1).bool()


def pack_bits(kept: torch.Tensor) -> torch.Tensor:
    """[..., N] bool to [..., N / 8] uint8 on its device; token i is bit i % 8 of byte i // 8. N is a multiple of 8."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (kept.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def write_message(event: PlanEvent) -> bytes:
    """The last frame."""
    return msgspec.msgpack.encode(event)


def read_message(frames: Sequence[bytes]) -> tuple[int, PlanEvent]:
    """Sequence number and event of the three frames that a subscriber receives."""
    _, sequence, payload = frames
    return int.from_bytes(sequence, "big"), msgspec.msgpack.decode(payload, type=PlanEvent)


class PlanPublisher:
    """Binds one endpoint and publishes there.

    Parameters
    ----------
    endpoint : value of the setting `events`.
    rank : ranks beyond the first have the next ports, or the same path with a number behind it.
    windows : of the model's layers, as events have them.

    Raises
    ------
    ValueError
        One sentence: the endpoint cannot be bound.
    """

    def __init__(self, endpoint: str, rank: int = 0, windows: Sequence[int] = ()):
        import zmq

        self.windows = list(windows)
        self.rank, self.endpoint, self._sequence = rank, _of_rank(endpoint, rank), itertools.count()
        self._socket: Any = zmq.Context.instance().socket(zmq.PUB)
        self._socket.setsockopt(zmq.SNDHWM, _HIGH_WATER)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._socket.bind(self.endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ValueError(
                f"{EVENTS_FLAG} {endpoint} cannot be bound at {self.endpoint} ({error.strerror})"
            ) from None

    def publish(self, request_id: str, prompt_tokens: int, budget: float, reservation: Reservation) -> None:
        """One event, from what the forward has written to the host; waits for that, and for no subscriber."""
        head_pages = reservation.head_counts_on_host()
        assert reservation.plan is not None, "compressed without its plan"
        assert reservation.digest is not None
        is_dynamic, kept, salience_kept = reservation.plan
        covered = reservation.geometry.covered
        event = PlanEvent(
            time=time.time(),
            rank=self.rank,
            request_id=request_id,
            prompt_tokens=prompt_tokens,
            covered_tokens=covered,
            budget=budget,
            page_size=covered // reservation.geometry.num_prompt_pages,
            spans=[(span.start, span.end, span.modality) for span in reservation.spans],
            is_dynamic=is_dynamic.tolist(),
            head_pages=head_pages.tolist(),
            kept=kept.numpy().tobytes(),
            salience_kept=salience_kept.tolist(),
            plan=f"{int(reservation.digest) % 2**64:016x}",
            windows=self.windows,
        )
        sequence = next(self._sequence).to_bytes(8, "big")
        self._socket.send_multipart((TOPIC, sequence, write_message(event)))

    def close(self) -> None:
        """Give the endpoint back."""
        self._socket.close()


def _of_rank(endpoint: str, rank: int) -> str:
    if rank == 0:
        return endpoint
    place, separator, port = endpoint.rpartition(":")
    if endpoint.startswith("tcp://"):
        return f"{place}{separator}{int(port) + rank}"
    return f"{endpoint}.{rank}"
