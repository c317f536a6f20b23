"""A folder of Qwen2.5-VL-7B's shape without weights, for servers with ``--load-format dummy``.

Timings need the shape and no trained weights, and no download of 16 GB. The vision tower is a small one: prompts of
timings are token ids.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.models.folders import make_once
from benchmarks.models.make_models import DEFAULT_DIR, make_model

NAME = "qwen2_5_vl-7b-shape"
BASE = "tiny-qwen2_5_vl-d128"
SHAPE = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
}
MADE_FOR_THE_BASE = ("layer_types", "head_dim")


def shape_of_7b(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a small Qwen2.5-VL with the shape of the large one, in bfloat16."""
    text = {name: value for name, value in config["text_config"].items() if name not in MADE_FOR_THE_BASE}
    vision = config["vision_config"] | {"out_hidden_size": SHAPE["hidden_size"]}
    # Old versions of the format have the text's fields at the top.
    on_top = {name: value for name, value in SHAPE.items() if name in config}
    return config | on_top | {"text_config": text | SHAPE, "vision_config": vision}


def make_dummy_7b(out_dir: Path = DEFAULT_DIR) -> Path:
    """Return the folder, made the first time; see `make_model`."""
    base = make_model(BASE, out_dir)

    def build(folder: Path) -> None:
        for path in base.glob("*.json*"):
            if not path.name.startswith(("model", "made_by")):
                shutil.copy(path, folder)
        for path in base.glob("*.jinja"):
            shutil.copy(path, folder)
        config = json.loads((base / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(shape_of_7b(config), indent=1))

    return make_once(out_dir / NAME, {"base": (base / "made_by.json").read_text(), "shape": json.dumps(SHAPE)}, build)
