"""Give a pretrained text model eyes: a Qwen2.5-VL that reads pages of text. ``make models-real`` makes one.

The language model is taken as it is. The vision tower maps each 28-pixel cell with a drawn word piece to the language
model's own input embedding of that piece, so that a page of pictures is to the model what the text is. The tower is
written down, not trained. Drawings are black and white, so that the norm makes each pixel exactly 1 or -1. The merger's
first layer holds one template for each piece. Its product with a drawing counts the pixels that agree, and a bias makes
it positive only for the piece's own drawing. The last layer holds the embeddings. All weights are small integers and
powers of two, so that float32, bfloat16 and float16 compute the same.

Positions: an image is one line of text, and `mrope_section` gives all of the rotation to the column, so that cells
along a line, and the text after it, have the positions that text would have.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from benchmarks.models.make_models import save_checkpoint
from benchmarks.models.scene_model import MERGE, PATCH_PIXELS, TOWER_OF_CELLS, processor_files
from benchmarks.pages import PIECES_FILE, choose_pieces, draw_piece, drawings_digest, piece_text

NUM_PIECES = 6144
"""Word pieces with a template each. The tower's work for a cell grows with the square of their number."""
VISION_NAMES = ("vision_start", "image", "vision_end", "video")
VISION_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
SPARE_IDS = (7, 8, 9, 10)
"""Special tokens of SmolLM2's vocabulary that no training text had; they get the names of `VISION_TOKENS`."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_PATCHES, _PATCH_DIM = MERGE**2, PATCH_PIXELS**2
_ANSWER = 8.0  # output of a template for its own drawing; for any other it is at most -8, which a GELU turns into 0


@dataclass(frozen=True)
class Accuracy:
    """How well single cells are read.

    Attributes
    ----------
    right : share of cells whose nearest embedding, of all pieces, is that of the piece shown.
    worst : greatest |output - embedding| / |embedding|.
    """

    right: float
    worst: float


def cell_patches(texts: Sequence[str]) -> torch.Tensor:
    """[cells, 4, 196] in [-1, 1]: the grey patches of drawn pieces, in the order of the image processor."""
    pixels = torch.from_numpy(np.stack([draw_piece(text) for text in texts])).float().div_(127.5).sub_(1)
    pixels = pixels.view(-1, MERGE, PATCH_PIXELS, MERGE, PATCH_PIXELS).transpose(2, 3)
    return pixels.reshape(-1, _PATCHES, _PATCH_DIM)


def processed_pixels(patches: torch.Tensor) -> torch.Tensor:
    """[cells * 4, 3 * 2 * 196]: what the image processor makes of the same cells. Colours and frames are equal."""
    return patches.reshape(-1, 1, _PATCH_DIM).expand(-1, 6, -1).flatten(1)


def build_config(language: Any, num_pieces: int) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL with the shape of a Llama, and a tower of `num_pieces` templates without transformer blocks."""
    head_dim = language.hidden_size // language.num_attention_heads
    vision_hidden = num_pieces // _PATCHES
    if num_pieces % 256 or vision_hidden < _PATCH_DIM:
        raise ValueError(f"num_pieces: expected a multiple of 256 of at least 1,024, got {num_pieces}")
    if getattr(language, "head_dim", head_dim) != head_dim:
        raise ValueError(f"language: expected head_dim = {head_dim} (hidden size / heads), got {language.head_dim}")
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps"
    )
    return Qwen2_5_VLConfig(
        text_config={
            **{name: getattr(language, name) for name in names.split()},
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [0, 0, head_dim // 2],
                "rope_theta": language.rope_parameters["rope_theta"],
            },
            "bos_token_id": language.bos_token_id,
            "eos_token_id": language.eos_token_id,
            "pad_token_id": language.eos_token_id,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 0,
            "hidden_size": vision_hidden,
            "intermediate_size": vision_hidden,
            "num_heads": vision_hidden // 64,
            "out_hidden_size": language.hidden_size,
            **TOWER_OF_CELLS,
        },
        **{f"{name}_token_id": token for name, token in zip(VISION_NAMES, SPARE_IDS, strict=True)},
        tie_word_embeddings=True,
    )


def copy_language(model: Any, llama: Any, newline: int) -> None:
    """Copy a Llama's weights; Qwen2's attention has biases beside them, which stay zero.

    The tokens around an image get half the embedding of a newline: of all that was tried it disturbs the text least.
    With tied embeddings their logits are half the newline's, which no greedy answer picks.
    """
    weights = llama.model.state_dict()
    missing, unexpected = model.model.language_model.load_state_dict(weights, strict=False)
    if unexpected or any(not name.endswith("_proj.bias") for name in missing):
        raise ValueError(f"language: expected the weights of a Llama; missing {missing}, unexpected {unexpected}")
    with torch.no_grad():
        for name in missing:
            model.model.language_model.get_parameter(name).zero_()
        embeddings = model.model.language_model.embed_tokens.weight
        embeddings[list(SPARE_IDS)] = embeddings[newline] / 2
    model.tie_weights()


def templates_of(pixels: torch.Tensor) -> torch.Tensor:
    """[N, 4, 196]: detectors of black and white patches [N, 4, 196], all different, whose cells have white corners.

    The weights are the pixels, so that a product is 784 less twice the pixels that differ. The corners, 1 in every
    drawing, take 783 away from it: each patch its part, so that no partial sum is large where it has to be exact.
    """
    if not (pixels.abs() == 1).all() or len(pixels.flatten(1).unique(dim=0)) < len(pixels):
        raise ValueError("pieces: expected different drawings in black and white")
    weights = pixels.clone()
    last = _PATCH_DIM - 1
    corners = [0, PATCH_PIXELS - 1, last - PATCH_PIXELS + 1, last]
    if not (pixels[:, range(_PATCHES), corners] == 1).all():
        raise ValueError("pieces: expected drawings with white corners")
    weights[:, range(_PATCHES), corners] -= _PATCH_DIM
    weights[:, -1, -1] += 1
    return weights


def write_tower(tower: Any, patches: torch.Tensor, targets: torch.Tensor) -> None:
    """Set the weights of a tower without blocks so that cells [N, 4, 196] give targets [N, hidden]."""
    num_pieces, width = len(patches), tower.merger.hidden_size
    first, _, last = tower.merger.mlp
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.zero_()
        tower.merger.ln_q.weight.fill_(1)
        # Every channel is a pixel, and all have the same magnitude, so that the norm rounds nothing.
        channels = torch.arange(width // _PATCHES)
        kernel = tower.patch_embed.proj.weight
        kernel.copy_(torch.eye(_PATCH_DIM)[channels % _PATCH_DIM].view(-1, 1, 1, *kernel.shape[-2:]))
        columns = first.weight.view(width, _PATCHES, -1)
        columns[:num_pieces, :, :_PATCH_DIM] = _ANSWER * templates_of(patches)
        last.weight[:, :num_pieces] = targets.T / _ANSWER


def measure(
    tower: Any, patches: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype = torch.bfloat16, batch: int = 512
) -> Accuracy:
    """Read every cell with a copy of the tower."""
    tower = copy.deepcopy(tower).to(dtype)
    with torch.inference_mode():
        outputs = torch.cat([_read(tower, part) for part in patches.split(batch)])
        nearest = torch.cat([torch.cdist(part, targets).argmin(1) for part in outputs.split(batch)])
    errors = (outputs - targets).norm(dim=1) / targets.norm(dim=1)
    right = (nearest == torch.arange(len(targets))).float().mean()
    return Accuracy(right.item(), errors.max().item())


def _read(tower: Any, patches: torch.Tensor) -> torch.Tensor:
    """[N, hidden] of cells that stand in one line."""
    grid = torch.tensor([[1, MERGE, MERGE * len(patches)]])
    return tower(processed_pixels(patches), grid_thw=grid).pooler_output.float()


def rename_tokens(folder: Path) -> None:
    """Give the spare special tokens of a saved tokenizer the names by which SGLang finds images in a prompt."""
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    added = {token["id"]: token for token in settings["added_tokens"]}
    for spare_id, name in zip(SPARE_IDS, VISION_TOKENS, strict=True):
        if spare_id not in added:
            raise ValueError(f"language: expected a special token with the id {spare_id} in its tokenizer")
        vocabulary = settings["model"]["vocab"]
        vocabulary[name] = vocabulary.pop(added[spare_id]["content"], spare_id)
        added[spare_id]["content"] = name
    path.write_text(json.dumps(settings, ensure_ascii=False))


def load_tokenizer(language: Path, folder: Path) -> PreTrainedTokenizerFast:
    """The language model's tokenizer with names for images, and the template; leaves `tokenizer.json` in the folder."""
    shutil.copy(language / "tokenizer.json", folder)
    rename_tokens(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_reader(language: Path, folder: Path, num_pieces: int = NUM_PIECES) -> Accuracy:
    """Write a checkpoint that reads pages with the language model in `language`, a Llama with SmolLM2's tokenizer.

    Parameters
    ----------
    num_pieces : word pieces that can be drawn, and width of the tower: a multiple of 256.
    """
    if not (language / "config.json").is_file():
        raise ValueError(f"language: expected a folder with a config.json, got {str(language)!r}")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(language, folder)
    llama = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    pieces = choose_pieces(tokenizer, num_pieces)
    model = Qwen2_5_VLForConditionalGeneration(build_config(llama.config, num_pieces))
    copy_language(model, llama, tokenizer("\n", add_special_tokens=False)["input_ids"][0])
    patches = cell_patches([piece_text(tokenizer, piece) for piece in pieces])
    targets = llama.get_input_embeddings().weight.detach()[pieces]
    write_tower(model.model.visual, patches, targets)
    accuracy = measure(model.model.visual, patches, targets)
    read = {PIECES_FILE: {"pieces": pieces, "drawings": drawings_digest(tokenizer, pieces)}}
    save_checkpoint(model, tokenizer, folder, processor_files(CHAT_TEMPLATE) | read)
    (folder / "README.md").write_text(describe(accuracy, len(pieces)))
    return accuracy


def describe(accuracy: Accuracy, num_pieces: int) -> str:
    """Model card."""
    return f"""# A reader of pages made of real weights

SmolLM2-135M-Instruct (Apache-2.0), or the Llama that was given, as a Qwen2_5_VLForConditionalGeneration whose vision
tower was written down by `benchmarks/models/train_reader.py`: it knows {num_pieces:,} drawn word pieces, whose token
ids `{PIECES_FILE}` lists. Single cells in bf16: nearest embedding right {accuracy.right:.2%}, error
{accuracy.worst:.2%} of the embedding's length at worst.

`PageWriter.load(FOLDER).user_message(text, question)` of `benchmarks/pages.py` draws a text as one picture a line. The
tower looks drawings up, it is no eye: other pictures, and those of several rows, give vectors that mean nothing.
"""
