"""The trained tiny model's tokenizer, architecture and checkpoint files."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers import decoders as token_decoders
from tokenizers import models as token_models
from tokenizers import pre_tokenizers as token_splitters
from tokenizers import trainers as token_trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.models.make_models import CHAT_TEMPLATE, SPECIAL_TOKENS, save_checkpoint
from benchmarks.scenes import CELL_PIXELS, CODES, COLOURS, KINDS, MOST_DOTS

SPECIAL = tuple(token for token in SPECIAL_TOKENS if token != "<|vision_pad|>")
HIDDEN, LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM, MLP = 256, 4, 4, 2, 64, 512
VISION_HIDDEN, VISION_HEADS, PATCH_PIXELS, MERGE = 128, 2, 14, 2
MAX_POSITIONS = 16384
TOWER_OF_CELLS = {
    "patch_size": PATCH_PIXELS,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "window_size": CELL_PIXELS,
    "fullatt_block_indexes": [],
    "tokens_per_second": 2,
    "in_channels": 3,
}
"""Settings of a vision tower that looks at each cell by itself."""


def _words() -> list[str]:
    counts = [f" {count}" for count in range(MOST_DOTS + 1)]
    colours = [f" {colour}" for colour in COLOURS]
    codes = [f" {code}" for code in CODES]
    return [*KINDS, " is", ",", "user", "assistant", "system", *counts, *colours, *codes]


@functools.cache
def build_tokenizer() -> Tokenizer:
    """Byte-level BPE whose merges make one token of each word of the scenes; anything else falls to bytes."""
    tokenizer = Tokenizer(token_models.BPE())
    words = token_splitters.Split(Regex(r" ?[A-Za-z0-9]+"), "isolated")
    tokenizer.pre_tokenizer = token_splitters.Sequence(
        [words, token_splitters.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = token_decoders.ByteLevel()
    corpus = ["".join(random.Random(i).choices(_words(), k=8)) for i in range(6000)]
    trainer = token_trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(token_splitters.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=12,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


@functools.lru_cache(100_000)
def encode(text: str) -> tuple[int, ...]:
    """Token ids of a text."""
    return tuple(build_tokenizer().encode(text).ids)


def token_id(token: str) -> int:
    """Id of a special token."""
    found = build_tokenizer().token_to_id(token)
    assert found is not None, token
    return int(found)


def build_config() -> Qwen2_5_VLConfig:
    """Architecture; head_dim 64 and groups of two, which the GPU attention backends take."""
    half = HEAD_DIM // 2
    across = half * 3 // 8
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-build_tokenizer().get_vocab_size() // 64) * 64,
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": Q_HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": MAX_POSITIONS,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [half - 2 * across, across, across],
                "rope_theta": 1e6,
            },
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 1,
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": 2 * VISION_HIDDEN,
            "num_heads": VISION_HEADS,
            "out_hidden_size": HIDDEN,
            **TOWER_OF_CELLS,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def save_scene_model(model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> None:
    """Write the checkpoint as SGLang and transformers read it."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    save_checkpoint(model, fast, folder, processor_files(CHAT_TEMPLATE))


def processor_files(chat_template: str) -> dict[str, dict[str, Any]]:
    """Settings of the image processor, and the template once more for those that look for it in a file."""
    return {"preprocessor_config.json": image_settings(), "chat_template.json": {"chat_template": chat_template}}


def image_settings() -> dict[str, Any]:
    """Settings of the image processor: pictures whose sides are multiples of a cell pass as they are."""
    least, most = CELL_PIXELS**2, MAX_POSITIONS * CELL_PIXELS**2
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": PATCH_PIXELS,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "min_pixels": least,
        "max_pixels": most,
        "size": {"shortest_edge": least, "longest_edge": most},
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
