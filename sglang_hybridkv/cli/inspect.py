"""What a server kept of one prompt, drawn: ``hybridkv inspect``."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sglang_hybridkv.cli import watch
from sglang_hybridkv.requests.plan_events import TOPIC, PlanEvent, read_message, write_message

_SECONDS = 600.0  # that an answer may take
_KNOCK_SECONDS = 20.0  # until the server knows of the subscriber
_MAGIC = b"hybridkv plan 2\n"


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A plan, with the pictures that were sent, as their files' bytes, what the server answered, and its record."""

    event: PlanEvent
    pictures: tuple[bytes, ...] = ()
    answer: str = ""
    record: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write a file that `load` reads."""
        pictures = [as_text(one) for one in self.pictures]
        about = json.dumps({"answer": self.answer, "record": self.record, "pictures": pictures})
        path.write_bytes(_MAGIC + about.encode() + b"\n" + write_message(self.event))

    @classmethod
    def load(cls, path: Path) -> Inspection:
        """ValueError in one sentence when the file is none that `save` wrote."""
        try:
            content = path.read_bytes()
            if not content.startswith(_MAGIC):
                raise ValueError("it is no file of hybridkv inspect")
            header, _, payload = content.removeprefix(_MAGIC).partition(b"\n")
            about = json.loads(header)
            _, event = read_message((TOPIC, bytes(8), payload))
            return cls(event, tuple(map(base64.b64decode, about["pictures"])), about["answer"], about["record"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--from = {path}: {getattr(error, 'strerror', None) or error}") from None


def as_text(picture: bytes) -> str:
    """Base64."""
    return base64.b64encode(picture).decode()


def with_pictures(prompt: str, pictures: Sequence[bytes]) -> Any:
    """Content of a chat message: the pictures, then the text."""
    # Readers of images look at their first bytes, not at this type.
    images = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{as_text(one)}"}} for one in pictures]
    return [*images, {"type": "text", "text": prompt}] if images else prompt


def ask(
    url: str, content: Any, pictures: Sequence[bytes] = (), *, max_tokens: int = 16, api_key: str | None = None
) -> Inspection:
    """Send one chat message to a running server, and catch the plan that it publishes.

    Parameters
    ----------
    content : of the message, as the chat API has it; `with_pictures` makes one.
    pictures : that are in it, to be drawn.

    Raises
    ------
    ValueError
        One sentence: no such server, it does not publish plans, or it served the prompt dense.
    """
    import zmq

    endpoint = watch.read(url, api_key).state["config"].get("events")
    if endpoint is None:
        recipe = "--kv-compressor-events tcp://127.0.0.1:5559"
        raise ValueError(f"the server at {url} does not publish its plans; start it with {recipe}")
    rid = f"hybridkv-inspect-{uuid.uuid4().hex}"
    body = {"model": "default", "messages": [{"role": "user", "content": content}], "temperature": 0}
    body |= {"max_tokens": max_tokens, "rid": rid}
    socket: Any = zmq.Context.instance().socket(zmq.SUB)
    try:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SUBSCRIBE, TOPIC)
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        socket.connect(endpoint)
        if not monitor.poll(int(1000 * _KNOCK_SECONDS)):
            raise ValueError(f"events = {endpoint!r} cannot be reached from here")
        answer = _post(f"{url.rstrip('/')}/v1/chat/completions", body, api_key)
        event = _wait_for(socket, rid)
    finally:
        socket.disable_monitor()
        socket.close()
    record = answer.get("metadata", {}).get("kv_compressor")
    if event is None:
        why = f"dense, {record['reason']}" if record and not record["compressed"] else f"with the record {record}"
        raise ValueError(f"the server has published no plan for the prompt, which it served {why}")
    return Inspection(event, tuple(pictures), answer["choices"][0]["message"]["content"] or "", record or {})


def _post(place: str, body: dict[str, Any], api_key: str | None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    request = urllib.request.Request(place, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        raise ValueError(
            f"{place} answers with HTTP {error.code}: {error.read(500).decode(errors='replace')}"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{place} cannot be read: {getattr(error, 'reason', error)}") from None


def _wait_for(socket: Any, rid: str) -> PlanEvent | None:
    """The first event of that request, which may be on its way; others are somebody else's."""
    while socket.poll(2000):
        _, event = read_message(socket.recv_multipart())
        if event.request_id.startswith(rid):
            return event
    return None


def grid_of(num_tokens: int, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of a picture's tokens: of all pairs with that product, the one nearest to its shape."""
    pairs = [(rows, num_tokens // rows) for rows in range(1, num_tokens + 1) if num_tokens % rows == 0]
    return min(pairs, key=lambda pair: abs(pair[1] * height - pair[0] * width))


def summary(event: PlanEvent) -> list[tuple[str, str]]:
    """Names and values, for people; of the layers that are compressed."""
    layers = event.compressed_layers()
    is_dynamic, pages = torch.tensor(event.is_dynamic)[layers], torch.tensor(event.head_pages)[layers]
    kept, is_image = event.kept_tokens()[layers], torch.zeros(event.covered_tokens, dtype=torch.bool)
    for start, end, _ in event.spans:
        is_image[start:end] = True
    static = kept[~is_dynamic].float()
    lines = [
        ("request", f"{event.request_id}, plan {event.plan}, rank {event.rank}"),
        ("prompt", f"{event.prompt_tokens:,} tokens, {event.covered_tokens:,} of them in whole pages"),
        ("budget", f"{event.budget:g}, pages of {event.page_size} tokens"),
        ("heads", f"{int(is_dynamic.sum())} of {is_dynamic.numel()} are dynamic"),
        ("pages a head", f"{int(pages.min())} to {int(pages.max())}, {pages.float().mean():.1f} in the mean"),
    ]
    salience = torch.tensor(event.salience_kept)[layers][~is_dynamic]
    if len(salience) and not salience.isnan().any():
        mean, least = 100 * salience.mean(), 100 * salience.min()
        lines.append(
            ("salience", f"{mean:.1f} % of it is kept by static heads in the mean, {least:.1f} % by the lowest")
        )
    for name, where in (("text", ~is_image), ("images", is_image)):
        if where.any() and len(static):
            lines.append((f"{name} kept", f"{100 * static[:, where].mean():.1f} % of its tokens, by static heads"))
    return lines


def draw(inspection: Inspection) -> Any:
    """A matplotlib figure: maps of the heads, kept tokens by position, and what each type kept of a picture."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    event = inspection.event
    is_dynamic, pages = torch.tensor(event.is_dynamic), torch.tensor(event.head_pages, dtype=torch.float32)
    kept = event.kept_tokens().float()
    is_compressed = torch.zeros_like(is_dynamic)
    is_compressed[event.compressed_layers()] = True
    both = (("static", is_compressed & ~is_dynamic), ("dynamic", is_dynamic))
    types = [(name, where) for name, where in both if where.any()]
    visual = [span for span in event.spans if span[2] == "image"][: len(inspection.pictures)]
    num_rows = 2 + len(visual)
    figure = Figure(figsize=(11, 3.4 * num_rows), layout="constrained")
    grid = figure.add_gridspec(num_rows, 6)
    layers, heads = is_dynamic.nonzero(as_tuple=True)
    maps: tuple[tuple[str, torch.Tensor, float | None, slice], ...] = (
        ("pages", pages, None, slice(0, 2)),
        ("salience kept", torch.tensor(event.salience_kept), 1.0, slice(2, 4)),
    )
    for name, values, most, place in maps:
        axes = figure.add_subplot(grid[0, place])
        shown = axes.imshow(values.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=most)
        figure.colorbar(shown, ax=axes, label=name)
        axes.scatter(heads.numpy(), layers.numpy(), marker="o", s=12, color="darkorange", label="dynamic")
        axes.set(xlabel="KV head", ylabel="layer", title=f"{name} (dots: dynamic)")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    places = figure.add_subplot(grid[0, 4:])
    shown = places.imshow(kept.mean(1).numpy(), aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    figure.colorbar(shown, ax=places, label="share of the layer's heads")
    places.set(xlabel="token of the prompt", ylabel="layer", title="tokens that went to the device")
    places.yaxis.set_major_locator(MaxNLocator(integer=True))
    by_token = figure.add_subplot(grid[1, :])
    for name, where in types:
        by_token.plot(kept[where].mean(0).numpy(), linewidth=0.7, label=f"{name} heads")
    for start, end, _ in event.spans:
        by_token.axvspan(start, end, color="gold", alpha=0.3)
    by_token.set(xlabel="token of the prompt", ylabel="share", title="heads that keep a token; yellow are images")
    by_token.set_xlim(0, kept.shape[-1])
    by_token.legend()
    width = 6 // len(types)
    for index, (start, end, _) in enumerate(visual):
        for column, (name, where) in enumerate(types):
            axes = figure.add_subplot(grid[2 + index, width * column : width * (column + 1)])
            of_image = kept[where][:, start : min(end, kept.shape[-1])]
            draw_picture(axes, inspection.pictures[index], of_image, end - start)
            axes.set_title(f"image {index + 1}, tokens {start} to {end}: kept by {name} heads")
    return figure


def draw_picture(axes: Any, picture: bytes, kept: torch.Tensor, num_tokens: int) -> None:
    """The picture, darker where fewer heads keep its tokens; tokens beyond the whole pages count as kept.

    Parameters
    ----------
    kept : [heads, <= num_tokens], 0 or 1.
    num_tokens : of the picture.
    """
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as image:
        width, height = image.size
        share = torch.ones(num_tokens)
        share[: kept.shape[-1]] = kept.mean(0)
        rows, columns = grid_of(num_tokens, width, height)
        axes.imshow(image.convert("RGB"), extent=(0, width, height, 0))
        darkness = 0.85 * (1 - share / share.max().clamp(min=1e-6)).view(rows, columns).numpy()
        axes.imshow(
            torch.zeros(rows, columns), extent=(0, width, height, 0), cmap="gray", vmin=0, vmax=1, alpha=darkness
        )
        axes.set_axis_off()


def write_png(inspection: Inspection, path: Path) -> None:
    """Draw to a file."""
    path.write_bytes(_png(inspection))


def write_page(inspection: Inspection, path: Path) -> None:
    """One HTML page that needs no other file."""
    rows = summary(inspection.event) + ([("answer", inspection.answer)] if inspection.answer else [])
    table = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    picture = base64.b64encode(_png(inspection)).decode()
    path.write_text(
        '<!doctype html><meta charset="utf-8"><title>hybridkv inspect</title>'
        "<style>body{font-family:sans-serif;margin:2em}th{text-align:left;padding-right:2em;vertical-align:top}"
        f"img{{max-width:100%}}</style><h1>What was kept</h1><table>{table}</table>"
        f'<p><img alt="heads, tokens and pictures" src="data:image/png;base64,{picture}"></p>\n',
        encoding="utf-8",
    )


def _png(inspection: Inspection) -> bytes:
    file = io.BytesIO()
    draw(inspection).savefig(file, format="png", dpi=110)
    return file.getvalue()
