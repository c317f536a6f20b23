"""Train `tiny-qwen2_5_vl-scenes` on drawn scenes, on two CPU cores, and write its checkpoint. ``make train-tiny``.

Phase 1 teaches the vision tower to name what a cell shows: it regresses a fixed code, a sum of orthonormal vectors for
colour, key, value and dot. Phase 2 trains the language model on answers to questions about scenes whose cells are
given as those codes, with noise of the tower's size; phase 3 goes on with the tower's own output. Every weight of the
language model starts at random and nothing is wired by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from benchmarks.models.scene_model import (
    HIDDEN,
    MERGE,
    PATCH_PIXELS,
    build_config,
    encode,
    save_scene_model,
    token_id,
)
from benchmarks.scenes import (
    CELL_PIXELS,
    CODES,
    COLOUR,
    COLOURS,
    DOT,
    KEY,
    KINDS,
    VALUE,
    WHITE,
    Scene,
    ask,
    draw_cells,
    draw_scene,
)

KIND_WEIGHTS = {"get": 1.0, "list": 2.0, "chain": 2.0, "count": 2.0, "main": 0.7, "read": 1.0}
_USER, _ASSISTANT, _END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"


@dataclasses.dataclass(frozen=True)
class Stage:
    """Part of the curriculum: cells on a side of the whole layout, scenes in a batch, questions about a scene."""

    least_side: int
    most_side: int
    scenes: int
    turns: int
    until: float  # share of the steps after which the next stage starts at the latest


STAGES = (
    Stage(3, 5, 12, 6, 0.04),
    Stage(5, 8, 8, 8, 0.08),
    Stage(9, 14, 8, 9, 0.25),
    Stage(15, 21, 4, 12, 0.50),
    Stage(24, 34, 2, 16, 0.75),
    Stage(36, 50, 1, 24, 1.01),
)
_NEXT_STAGE_ACCURACY = 0.93


class CellCode:
    """The fixed code that phase 1 teaches the vision tower."""

    def __init__(self, generator: torch.Generator):
        basis = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))[0]
        self.colour, self.key_letter, self.key_digit, self.value_letter, self.value_digit, self.dot = basis.split(
            [len(COLOURS), 26, 10, 26, 10, 1, HIDDEN - len(COLOURS) - 73]
        )[:6]

    def __call__(self, cells: torch.Tensor) -> torch.Tensor:
        """[..., HIDDEN] of cells [..., 4]."""
        cells = cells.long()
        code = self.colour[cells[..., COLOUR]]
        for column, letters, digits in (
            (KEY, self.key_letter, self.key_digit),
            (VALUE, self.value_letter, self.value_digit),
        ):
            shown = cells[..., column]
            code = code + (shown >= 0)[..., None] * (
                letters[shown.clamp(min=0) // 10] + digits[shown.clamp(min=0) % 10]
            )
        return code + (cells[..., DOT] == 1)[..., None] * self.dot[0]


def random_cells(rng: np.random.Generator, num_cells: int) -> np.ndarray[Any, np.dtype[np.int16]]:
    """[1, num_cells, 4] of all sorts."""
    cells = np.full((1, num_cells, 4), -1, np.int16)
    sort = rng.random((1, num_cells))
    cells[..., COLOUR] = np.where(sort > 0.9, WHITE, rng.integers(0, WHITE, (1, num_cells)))
    for column in (KEY, VALUE):
        cells[..., column] = np.where((sort < 0.75) | (sort > 0.92), rng.integers(0, len(CODES), (1, num_cells)), -1)
    cells[..., DOT] = np.where((sort > 0.75) & (sort < 0.8), 1, -1)
    return cells


def cell_patches(grid: np.ndarray[Any, np.dtype[np.int16]]) -> torch.Tensor:
    """[cells, 4, 3 * 14 * 14] in [-1, 1]: each cell's patches, in the order of the image processor."""
    rows, columns = grid.shape[:2]
    pixels = torch.from_numpy(draw_cells(grid)).float().div_(127.5).sub_(1)
    pixels = pixels.view(rows, CELL_PIXELS, columns, CELL_PIXELS, 3).transpose(1, 2)
    patches = pixels.reshape(-1, 2, PATCH_PIXELS, 2, PATCH_PIXELS, 3).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(rows * columns, 4, -1)


def see_cells(tower: Any, patches: torch.Tensor) -> torch.Tensor:
    """[cells, HIDDEN]: what the vision tower, whose windows are single cells, makes of cells in one line."""
    pixels = patches.view(-1, 3, 1, PATCH_PIXELS**2).expand(-1, -1, 2, -1).reshape(len(patches) * MERGE**2, -1)
    seen: torch.Tensor = tower(pixels, grid_thw=torch.tensor([[1, MERGE, MERGE * len(patches)]])).pooler_output
    return seen


def train_tower(tower: Any, code: CellCode, rng: np.random.Generator, num_steps: int) -> float:
    """Phase 1; returns the root mean square error of a code vector."""
    optimizer = torch.optim.AdamW(tower.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0)
    started, error = time.monotonic(), 0.0
    for step in range(num_steps):
        done = step / num_steps
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * min(1.0, (1 - done) / 0.7 + 0.003)
        cells = random_cells(rng, 512)
        wrong = see_cells(tower, cell_patches(cells)) - code(torch.from_numpy(cells[0]))
        loss = wrong.square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        error = 0.98 * error + 0.02 * loss.item() if step else loss.item()
        if (step + 1) % 200 == 0:
            print(f"tower: step {step + 1}, {time.monotonic() - started:.0f} s, squared error {error:.5f}", flush=True)
    return math.sqrt(error)


@dataclasses.dataclass
class Batch:
    """Conversations about scenes of one layout.

    Attributes
    ----------
    ids : [B, T], int64. positions : [3, T]. visual : [cells], places of the visual tokens; cells : [B, cells, 4].
    labels : [M, 4], int64: conversation, place, next token, kind (or len(KINDS) for the end of an answer).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor
    cells: torch.Tensor
    labels: torch.Tensor


def rope_positions(config: Any, ids: torch.Tensor, **grids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [3, 1, T] that SGLang gives the tokens `ids` [1, T] of a prompt with images or videos, and how far the
    next token's is from its index, [1, 1]."""
    from sglang.srt.layers.rotary_embedding import MRotaryEmbedding

    tokens = (config.image_token_id, config.video_token_id, config.vision_start_token_id)
    rate = config.vision_config.tokens_per_second
    return MRotaryEmbedding.get_rope_index(MERGE, *tokens, config.model_type, rate, input_ids=ids, **grids)


def place_prompt(layout: list[tuple[int, int]], frame_step: int | None) -> tuple[list[int], torch.Tensor, list[int]]:
    """Ids, positions [3, T] as the server gives them, and visual places up to the first question.

    With `frame_step` the layout is one video whose frames are that many positions apart.
    """
    config, ids, visual = build_config(), list(encode(_USER)), []
    pad = config.image_token_id if frame_step is None else config.video_token_id
    for span in [[size] for size in layout] if frame_step is None else [layout]:
        ids.append(config.vision_start_token_id)
        num_cells = sum(rows * columns for rows, columns in span)
        visual += range(len(ids), len(ids) + num_cells)
        ids += [pad] * num_cells + [config.vision_end_token_id]
    if frame_step is None:
        grids = {"image_grid_thw": torch.tensor([[1, MERGE * rows, MERGE * columns] for rows, columns in layout])}
    else:
        rows, columns = layout[0]
        grids = {"video_grid_thw": torch.tensor([[len(layout), MERGE * rows, MERGE * columns]])}
        grids["second_per_grid_ts"] = torch.tensor([frame_step / config.vision_config.tokens_per_second])
    return ids, rope_positions(config, torch.tensor([ids]), **grids)[0][:, 0], visual


def draw_batch(
    rng: np.random.Generator, layout: list[tuple[int, int]], arrangement: str, frame_step: int | None, stage: Stage
) -> Batch:
    """Scenes and questions for one step."""
    prefix, positions, visual = place_prompt(layout, frame_step)
    sequences, labels, cells = [], [], []
    for b in range(stage.scenes):
        scene = draw_scene(rng, layout, arrangement=arrangement)
        ids = list(prefix)
        for turn in range(stage.turns):
            _add_turn(rng, scene, ids, labels, b, first=turn == 0)
        sequences.append(ids)
        cells.append(np.concatenate([grid.reshape(-1, 4) for grid in scene.grids]))
    longest = max(map(len, sequences))
    padded = torch.full((len(sequences), longest), token_id("<|endoftext|>"))
    for b, ids in enumerate(sequences):
        padded[b, : len(ids)] = torch.tensor(ids)
    start = int(positions[0, -1]) + 1
    text = torch.arange(start, start + longest - len(prefix)).expand(3, -1)
    return Batch(
        padded,
        torch.cat((positions, text), dim=1),
        torch.tensor(visual),
        torch.from_numpy(np.stack(cells)),
        torch.tensor(labels),
    )


def _add_turn(
    rng: np.random.Generator, scene: Scene, ids: list[int], labels: list[list[int]], b: int, *, first: bool
) -> None:
    weights = np.array([KIND_WEIGHTS[kind] for kind in scene.kinds])
    question = ask(rng, scene, str(rng.choice(scene.kinds, p=weights / weights.sum())))
    ids += encode(("" if first else _USER) + question.text + _ASSISTANT)
    answer, kind = encode(question.answer), KINDS.index(question.kind)
    # Only the words after the one that was asked for show whether the scene was read. The first ones are copied.
    for i, token in enumerate((*answer, token_id(_END))):
        labels.append([b, len(ids) - 1, token, len(KINDS) if i == len(answer) or i < 2 else kind])
        ids.append(token)
    ids += encode("\n")


def draw_layout(rng: np.random.Generator, stage: Stage) -> tuple[list[tuple[int, int]], int | None]:
    """One image, two or three side by side, or a video of equal frames."""
    rows, columns = rng.integers(stage.least_side, stage.most_side + 1, 2).tolist()
    choice = rng.random()
    if choice < 0.55 or columns < 6:
        return [(rows, columns)], None
    parts = int(rng.integers(2, 4)) if choice < 0.85 else int(rng.integers(2, 6))
    if choice < 0.85:
        cuts = sorted(rng.choice(np.arange(2, columns - 1), min(parts, columns // 3) - 1, replace=False).tolist())
        edges = [0, *cuts, columns]
        return [(rows, right - left) for left, right in itertools.pairwise(edges)], None
    parts = min(parts, columns // 2)
    return [(rows, columns // parts)] * parts, int(rng.integers(1, 5))


class Trainer:
    """Phases 2 and 3: the language model."""

    def __init__(self, model: Any, code: CellCode, noise: float, rng: np.random.Generator):
        self.model, self.code, self.noise, self.rng = model, code, noise, rng
        language = model.model.language_model
        matrices = [p for name, p in language.named_parameters() if p.ndim == 2 and "embed" not in name]
        chosen = {id(p) for p in matrices}
        others = [p for name, p in model.named_parameters() if "visual" not in name and id(p) not in chosen]
        self.muon = torch.optim.Muon(matrices, lr=0.01, momentum=0.95, weight_decay=0.0)
        self.adam = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0)
        self.others = others

    def logits(self, batch: Batch, *, real: bool) -> torch.Tensor:
        """[M, vocabulary] at the labelled places."""
        language, count = self.model.model.language_model, len(batch.ids)
        with torch.no_grad():
            if real:
                patches = cell_patches(batch.cells.reshape(1, -1, 4).numpy())
                seen = see_cells(self.model.model.visual, patches).view(*batch.cells.shape[:2], HIDDEN)
            else:
                seen = self.code(batch.cells)
                seen = seen + torch.randn_like(seen) * self.noise / HIDDEN**0.5
        inputs = language.embed_tokens(batch.ids).clone()
        inputs[:, batch.visual] = seen
        with torch.autocast("cpu", torch.bfloat16):
            hidden = language(
                inputs_embeds=inputs,
                position_ids=batch.positions[:, None].expand(3, count, -1),
                use_cache=False,
            ).last_hidden_state
            return self.model.lm_head(hidden[batch.labels[:, 0], batch.labels[:, 1]]).float()

    def step(self, batch: Batch, scale: float, *, real: bool) -> tuple[float, torch.Tensor]:
        """One update; returns the loss and which labels were right."""
        for optimizer, rate in ((self.muon, 0.01), (self.adam, 2e-3)):
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.zero_grad()
        logits = self.logits(batch, real=real)
        loss = F.cross_entropy(logits, batch.labels[:, 2])
        loss.backward()
        nn.utils.clip_grad_norm_(self.others, 1.0)
        self.muon.step()
        self.adam.step()
        return loss.item(), logits.argmax(-1) == batch.labels[:, 2]


def train_language_model(trainer: Trainer, num_steps: int, real_from: float) -> None:
    """Phases 2 and 3: the curriculum moves on when the lookups are right, or when a stage's steps are over."""
    rng, stage_idx, in_stage = trainer.rng, 0, 0
    right, asked = torch.zeros(len(KINDS) + 1), torch.zeros(len(KINDS) + 1)
    started = time.monotonic()
    for step in range(num_steps):
        done = step / num_steps
        current = stage_idx if rng.random() < 0.75 else int(rng.integers(0, stage_idx + 1))
        stage = STAGES[current]
        arrangement = str(rng.choice(["shuffled", "coherent", "page"], p=[0.55, 0.3, 0.15]))
        layout, frame_step = draw_layout(rng, stage)
        batch = draw_batch(rng, layout, arrangement, frame_step, stage)
        scale = min(1.0, (step + 1) / 30) * min(1.0, max((1 - done) / 0.5, 0.02))
        loss, correct = trainer.step(batch, scale, real=done > real_from)
        in_stage += 1
        if current == stage_idx:
            right.index_add_(0, batch.labels[:, 3], correct.float())
            asked.index_add_(0, batch.labels[:, 3], torch.ones(len(correct)))
        if (step + 1) % 25 == 0:
            share = (right / asked.clamp(min=1)).tolist()
            figures = " ".join(f"{kind} {value:.2f}" for kind, value in zip([*KINDS, "copy"], share, strict=True))
            seconds = time.monotonic() - started
            print(f"step {step + 1} {seconds:.0f} s stage {stage_idx} loss {loss:.3f} {figures}", flush=True)
            reached = min(share[KINDS.index(kind)] for kind in ("get", "list", "chain")) > _NEXT_STAGE_ACCURACY
            right.zero_()
            asked.zero_()
            if stage_idx < len(STAGES) - 1 and in_stage >= 25 and (reached or done > stage.until):
                stage_idx, in_stage = stage_idx + 1, 0


def build_model(generator: torch.Generator) -> Any:
    """Random weights, scaled by fan-in; layers add half of what they could to the residual stream.

    The vectors of a code's token start as the sum of a random one for its letter and one for its digit.
    """
    model = Qwen2_5_VLForConditionalGeneration(build_config()).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                is_embedding = "embed_tokens" in name
                fan_in = HIDDEN if is_embedding else parameter[0].numel()
                parameter.normal_(0, fan_in**-0.5, generator=generator)
                if "o_proj" in name or "down_proj" in name:
                    parameter.mul_(0.5)
        for table in (model.model.language_model.embed_tokens.weight, model.lm_head.weight):
            letters, digits = torch.randn(36, HIDDEN, generator=generator).div_((2 * HIDDEN) ** 0.5).split((26, 10))
            for i, code in enumerate(CODES):
                (token,) = encode(f" {code}")
                table[token] = letters[i // 10] + digits[i % 10]
    return model


def main() -> None:
    """Train, and write the checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--tower-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=1600, help="of the language model; about a second each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator, rng = torch.Generator().manual_seed(args.seed), np.random.default_rng(args.seed)
    model, code = build_model(generator), CellCode(generator)
    noise = train_tower(model.model.visual, code, rng, args.tower_steps)
    print(f"tower: root mean square error {noise:.4f}", flush=True)
    trainer = Trainer(model, code, noise, rng)
    train_language_model(trainer, args.steps, 0.8)
    save_scene_model(model, args.out)


if __name__ == "__main__":
    main()
