"""A tiny InternVL 3.5 as published checkpoints are laid out; transformers has the model under other names only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

TILE = 448  # pixels of a tile's side; SGLang's processor knows no other
VISION = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": TILE,
    "patch_size": 56,
    "qkv_bias": True,
    "qk_normalization": False,
    "norm_type": "layer_norm",
}
MERGED = 2  # patches of a token's side
TOKENS = {"<|vision_start|>": "<img>", "<|vision_end|>": "</img>", "<|image_pad|>": "<IMG_CONTEXT>"}


class _Block(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        self.ls1, self.ls2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))


class _Embeddings(nn.Module):
    def __init__(self, width: int, patch: int):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, (TILE // patch) ** 2 + 1, width))
        self.patch_embedding = nn.Conv2d(3, width, patch, patch)


class InternVL(nn.Module):
    """Weights and config around a language model of transformers; it computes nothing.

    Parameters
    ----------
    language_model : whose architecture SGLang's InternVL knows.
    """

    def __init__(self, language_model: Any):
        super().__init__()
        width, inner = VISION["hidden_size"], VISION["intermediate_size"]
        blocks = nn.ModuleList(_Block(width, inner) for _ in range(VISION["num_hidden_layers"]))
        encoder, embeddings = nn.ModuleDict({"layers": blocks}), _Embeddings(width, VISION["patch_size"])
        self.vision_model = nn.ModuleDict({"embeddings": embeddings, "encoder": encoder})
        hidden, merged = language_model.config.hidden_size, width * MERGED**2
        self.mlp1 = nn.Sequential(nn.LayerNorm(merged), nn.Linear(merged, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.language_model = language_model

    @property
    def model(self) -> Any:
        """Where transformers' models have their layers."""
        return self.language_model.model

    @property
    def generation_config(self) -> Any:
        """That of the language model."""
        return self.language_model.generation_config

    def save_pretrained(self, folder: Path) -> None:
        """As transformers' models do."""
        from safetensors.torch import save_file

        save_file(
            {name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / "model.safetensors"
        )
        self.generation_config.save_pretrained(folder)
        language = self.language_model.config.to_dict() | {"architectures": [type(self.language_model).__name__]}
        config = {
            "architectures": ["InternVLChatModel"],
            "model_type": "internvl_chat",
            "llm_config": language,
            "vision_config": VISION,
            "downsample_ratio": 1 / MERGED,
            "force_image_size": TILE,
            "ps_version": "v2",
            "select_layer": -1,
            "template": "internvl2_5",
            "torch_dtype": "bfloat16",
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
