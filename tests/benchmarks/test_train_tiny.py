"""What the trainer computes by itself is what the served model computes."""

import copy

import numpy as np
import pytest
import torch

from benchmarks.models.scene_model import SPECIAL, build_tokenizer, encode, save_scene_model, token_id
from benchmarks.models.train_tiny import (
    CellCode,
    Stage,
    Trainer,
    build_model,
    cell_patches,
    draw_batch,
    draw_layout,
    random_cells,
    see_cells,
)
from benchmarks.scenes import CODES, COLOURS
from tests.builders import fresh_generator

STAGE = Stage(4, 8, 4, 3, 1.0)


@pytest.fixture(scope="module")
def model():
    return build_model(fresh_generator())


def test_words_of_the_scenes_are_one_token_each():
    words = [f" {word}" for word in (*CODES, *COLOURS, *range(10), "is")] + [",", "get", "list", "chain", *SPECIAL]
    assert all(len(encode(word)) == 1 for word in words)


def test_any_text_survives_the_tokenizer():
    text = "list K7 B2, Ünïcode\n<tag> 12345"
    assert build_tokenizer().decode(encode(text)) == text


def test_cells_are_seen_one_by_one_in_the_order_of_the_grid(model):
    grid = random_cells(np.random.default_rng(), 15).reshape(3, 5, 4)
    with torch.no_grad():
        alone = [see_cells(model.model.visual, cell_patches(cell.reshape(1, 1, 4))) for cell in grid.reshape(-1, 4)]
        together = see_cells(model.model.visual, cell_patches(grid))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arrangement", ["coherent", "shuffled", "page"])
def test_labels_are_the_answers(arrangement):
    rng = np.random.default_rng()
    layout, frame_step = draw_layout(rng, STAGE)
    batch = draw_batch(rng, layout, arrangement, frame_step, STAGE)
    assert batch.cells.shape[:2] == (STAGE.scenes, len(batch.visual))
    assert batch.positions.shape == (3, batch.ids.shape[1])
    assert batch.positions[:, -1].unique().numel() == 1, "text goes on in one line"
    assert (batch.ids[:, batch.visual] == token_id("<|image_pad|>" if frame_step is None else "<|video_pad|>")).all()
    conversation, place, following, _ = batch.labels.unbind(1)
    assert torch.equal(batch.ids[conversation, place + 1], following)
    ends = (following == token_id("<|im_end|>")).sum()
    assert ends == STAGE.scenes * STAGE.turns


def test_a_few_steps_on_one_batch_reduce_its_loss(model):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    trainer = Trainer(model, CellCode(torch.Generator().manual_seed(0)), 0.05, rng)
    batch = draw_batch(rng, [(4, 4)], "shuffled", None, STAGE)
    losses = [trainer.step(batch, 1.0, real=step % 2 == 1)[0] for step in range(3)]
    assert losses[-1] < 0.7 * losses[0]


def test_checkpoint_is_loaded_by_transformers(model, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    save_scene_model(copy.deepcopy(model), tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).text_config.num_key_value_heads == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "get K7"}]}
    prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert tokenizer(prompt)["input_ids"] == list(
        encode("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>get K7<|im_end|>\n<|im_start|>assistant\n")
    )
