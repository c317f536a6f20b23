"""Make tiny random-weight checkpoints, without any download.

Run ``python -m benchmarks.models.make_models [OUT_DIR] [NAME ...]``. Each checkpoint is a folder that SGLang and
transformers load as they load a published model: weights, tokenizer, chat template and, for the vision ones, image and
video processor.

The scales are chosen so that the models behave like models: logits spread by about 3, and the attention scores of the
KV heads of a layer spread by different amounts (`HEAD_SPREADS`), so that some heads look sparse and others diffuse for
the same prompt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import internvl
from benchmarks.models.folders import make_once

DEFAULT_DIR = Path(__file__).resolve().parents[2] / ".models"
MAX_POSITIONS = 32768
WINDOW = 90  # tokens, where a model has layers with one; no multiple of a page
VOCAB_TARGET = 1024
LOGIT_STD = 3.0
GEMMA_EMBEDDING = 0.3
"""Root mean square of an input. Embeddings are the head, too: small beside what layers add, lest tokens repeat."""
HEAD_SPREADS = (0.5, 1.5, 3.0, 9.0)
"""Standard deviation of the attention scores, one value per KV head; rotated by one head from layer to layer."""

TEXT_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "phi3": ("Phi3", {"sliding_window": None}),
}
"""Name in transformers, and settings that the others do not have."""
VISION_FAMILIES = {
    "qwen2_vl": ("Qwen2VL", 14),
    "qwen2_5_vl": ("Qwen2_5_VL", 14),
    "qwen3_vl": ("Qwen3VL", 16),
    "qwen3_vl_moe": ("Qwen3VL", 16),
    "glm4v_moe": ("Glm4v", 14),
}
"""Name of the processor, and pixels of a patch's side."""
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
GLM_TOKENS = {
    "<|vision_start|>": "<|begin_of_image|>",
    "<|vision_end|>": "<|end_of_image|>",
    "<|vision_pad|>": "<|begin_of_video|>",
    "<|image_pad|>": "<|image|>",
    "<|video_pad|>": "<|video|>",
}
"""What GLM calls them."""
SPECIAL_NAMES = {"glm4v_moe": GLM_TOKENS, "internvl": internvl.TOKENS}
GLM_TOKEN_IDS = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|im_start|>",  # no prompt of the tests has a video for GLM
}
CORPUS = [
    "The quick brown fox jumps over the lazy dog. ",
    "Describe the image in one sentence, please. What happens in the video?",
    "You are a helpful assistant.",
    "user assistant system",
    "0 1 2 3 4 5 6 7 8 9 the cat sat on a mat with a hat",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part or 'video_url' in part %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class ModelSpec:
    """Shape of one checkpoint. The group size is `num_q_heads / num_kv_heads`."""

    family: str
    num_q_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    num_layers: int = 4
    seed: int = 0

    @property
    def hidden_size(self) -> int:
        return self.num_q_heads * self.head_dim


SPECS = {
    "tiny-qwen2_5_vl": ModelSpec("qwen2_5_vl"),
    "tiny-qwen2_5_vl-g7": ModelSpec("qwen2_5_vl", num_q_heads=28, seed=1),
    "tiny-qwen2_5_vl-d128": ModelSpec("qwen2_5_vl", num_q_heads=4, num_kv_heads=2, head_dim=128, seed=2),
    "tiny-qwen2": ModelSpec("qwen2", seed=3),
    "tiny-llama": ModelSpec("llama", seed=4),
    "tiny-qwen3": ModelSpec("qwen3", num_q_heads=6, num_kv_heads=2, seed=5),
    "tiny-mistral": ModelSpec("mistral", num_q_heads=6, num_kv_heads=1, seed=6),
    "tiny-qwen3_moe": ModelSpec("qwen3_moe", num_q_heads=6, num_kv_heads=2, seed=7),
    "tiny-qwen3_vl": ModelSpec("qwen3_vl", num_q_heads=6, num_kv_heads=2, seed=8),
    "tiny-qwen3_vl_moe": ModelSpec("qwen3_vl_moe", num_q_heads=6, num_kv_heads=2, seed=9),
    "tiny-phi3": ModelSpec("phi3", num_q_heads=6, num_kv_heads=2, seed=10),
    "tiny-qwen2_vl": ModelSpec("qwen2_vl", seed=11),
    "tiny-glm4v_moe": ModelSpec("glm4v_moe", num_q_heads=6, num_kv_heads=2, seed=12),
    "tiny-internvl": ModelSpec("internvl", num_q_heads=6, num_kv_heads=2, seed=13),
    "tiny-gemma3": ModelSpec("gemma3", num_q_heads=6, num_kv_heads=2, num_layers=6, seed=14),
}


def train_pieces(corpus: Sequence[str], vocab_size: int, special_tokens: Sequence[str] = ()) -> Any:
    """Byte-level BPE of so many pieces, bytes and special tokens included; the special ones come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(corpus, trainer)
    return raw


def _tokenizer(names: Mapping[str, str]) -> Any:
    """Of special tokens, those in `names` are called otherwise."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_pieces(CORPUS * 4, VOCAB_TARGET - len(SPECIAL_TOKENS)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[names.get(token, token) for token in SPECIAL_TOKENS],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    template = CHAT_TEMPLATE
    for token, name in names.items():
        template = template.replace(token, name)
    tokenizer.chat_template = template
    return tokenizer


def _text_config(spec: ModelSpec, tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
        "hidden_size": spec.hidden_size,
        "intermediate_size": 512,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_q_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }


def _gemma3_config(spec: ModelSpec, tokenizer: Any) -> Any:
    """The first and the last of its layers attend to a window; in published checkpoints five in six do."""
    from transformers import Gemma3TextConfig

    windowed, full = "sliding_attention", "full_attention"
    return Gemma3TextConfig(
        **_text_config(spec, tokenizer) | {"tie_word_embeddings": True},
        layer_types=[windowed, *[full] * (spec.num_layers - 2), windowed],
        sliding_window=WINDOW,
        query_pre_attn_scalar=spec.head_dim,
        rope_parameters={
            windowed: {"rope_type": "default", "rope_theta": 1e4},
            full: {"rope_type": "default", "rope_theta": 1e6},
        },
    )


def _vl_config(spec: ModelSpec, tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config={**_text_config(spec, tokenizer), "rope_parameters": _mrope(spec)},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "in_channels": 3,
            "out_hidden_size": spec.hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "hidden_act": "silu",
        },
        **_visual_token_ids(tokenizer),
        tie_word_embeddings=False,
    )


def _qwen2_vl_config(spec: ModelSpec, tokenizer: Any) -> Any:
    from transformers import Qwen2VLConfig

    return Qwen2VLConfig(
        text_config={**_text_config(spec, tokenizer), "rope_parameters": _mrope(spec)},
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": spec.hidden_size,
            "mlp_ratio": 2,
            "num_heads": 2,
            "in_channels": 3,
            "in_chans": 3,  # SGLang reads this one, as published checkpoints have it
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        **_visual_token_ids(tokenizer),
        tie_word_embeddings=False,
    )


def _mrope(spec: ModelSpec) -> dict[str, Any]:
    half = spec.head_dim // 2
    temporal = half // 4
    mrope = [temporal, (half - temporal) // 2, (half - temporal) // 2]
    return {"rope_type": "default", "mrope_section": mrope, "rope_theta": 1e6}


def _qwen3_vl_config(spec: ModelSpec, tokenizer: Any) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

    is_moe = spec.family == "qwen3_vl_moe"
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96} if is_moe else {}
    half = spec.head_dim // 2
    sides = half // 3
    rope = {"rope_type": "default", "mrope_section": [half - 2 * sides, sides, sides], "mrope_interleaved": True}
    return (Qwen3VLMoeConfig if is_moe else Qwen3VLConfig)(
        text_config={**_text_config(spec, tokenizer), "rope_parameters": {**rope, "rope_theta": 1e6}, **experts},
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "in_channels": 3,
            "out_hidden_size": spec.hidden_size,
            "patch_size": VISION_FAMILIES["qwen3_vl"][1],
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0, 1, 2],
            "hidden_act": "gelu_pytorch_tanh",
        },
        **_visual_token_ids(tokenizer),
        tie_word_embeddings=False,
    )


def _glm4v_config(spec: ModelSpec, tokenizer: Any) -> Any:
    from transformers import Glm4vMoeConfig

    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    # Half of a head's elements turn, and a quarter of them by time.
    turned = spec.head_dim // 4
    mrope = [turned // 4, (turned - turned // 4) // 2, (turned - turned // 4) // 2]
    rope = {"rope_type": "default", "mrope_section": mrope, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in GLM_TOKEN_IDS.items()}
    return Glm4vMoeConfig(
        text_config={**_text_config(spec, tokenizer), "rope_parameters": rope, **experts},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "image_size": 336,
            "patch_size": VISION_FAMILIES["glm4v_moe"][1],
            "out_hidden_size": spec.hidden_size,
        },
        **ids,
        tie_word_embeddings=False,
    )


def _visual_token_ids(tokenizer: Any) -> dict[str, int]:
    pads = {f"{kind}_token_id": f"<|{kind}_pad|>" for kind in ("image", "video")}
    edges = {f"vision_{edge}_token_id": f"<|vision_{edge}|>" for edge in ("start", "end")}
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in (pads | edges).items()}


def _build(spec: ModelSpec, tokenizer: Any) -> Any:
    import transformers

    if spec.family == "qwen2_5_vl":
        return transformers.Qwen2_5_VLForConditionalGeneration(_vl_config(spec, tokenizer))
    if spec.family == "qwen2_vl":
        return transformers.Qwen2VLForConditionalGeneration(_qwen2_vl_config(spec, tokenizer))
    if spec.family == "qwen3_vl":
        return transformers.Qwen3VLForConditionalGeneration(_qwen3_vl_config(spec, tokenizer))
    if spec.family == "qwen3_vl_moe":
        return transformers.Qwen3VLMoeForConditionalGeneration(_qwen3_vl_config(spec, tokenizer))
    if spec.family == "glm4v_moe":
        return transformers.Glm4vMoeForConditionalGeneration(_glm4v_config(spec, tokenizer))
    if spec.family == "gemma3":
        return transformers.Gemma3ForCausalLM(_gemma3_config(spec, tokenizer))
    name, own = TEXT_FAMILIES["qwen3" if spec.family == "internvl" else spec.family]
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    config = getattr(transformers, f"{name}Config")(**_text_config(spec, tokenizer), **rope, **own)
    language_model = getattr(transformers, f"{name}ForCausalLM")(config)
    return internvl.InternVL(language_model) if spec.family == "internvl" else language_model


def _initialise(model: Any, spec: ModelSpec) -> None:
    """Draw every weight anew: unit gain, so that each block answers its input and not only its bias."""
    import torch

    generator = torch.Generator().manual_seed(spec.seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.ndim >= 2:
                # Experts lie one after the other in one tensor of three dimensions.
                fan_in = weight.shape[-1] if weight.ndim == 3 else weight[0].numel()
                std = 1.0 if "embed_tokens" in name else 1.0 / math.sqrt(fan_in)
                if spec.family == "gemma3" and "embed_tokens" in name:
                    std = GEMMA_EMBEDDING / math.sqrt(fan_in)
                weight.normal_(0.0, LOGIT_STD * std if "lm_head" in name else std, generator=generator)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.2, generator=generator)
        if spec.family == "gemma3":
            model.model.norm.weight.fill_(LOGIT_STD / GEMMA_EMBEDDING - 1.0)
        _spread_heads(model, spec)


def _spread_heads(model: Any, spec: ModelSpec) -> None:
    """Scale the key weights of each KV head so that its scores spread by its value of `HEAD_SPREADS`.

    Queries and keys have unit variance, so a score (q . k / sqrt(D)) does too before this factor. Where keys are
    normalised the heads of a layer share the factor, and layers differ.
    """
    text = getattr(model.model, "language_model", model.model)
    for layer_id, layer in enumerate(text.layers):
        attention = layer.self_attn
        if hasattr(attention, "k_norm"):
            spread = HEAD_SPREADS[layer_id % len(HEAD_SPREADS)]
            # Gemma adds one to it.
            attention.k_norm.weight.fill_(spread - 1.0 if spec.family == "gemma3" else spread)
            continue
        is_fused = hasattr(attention, "qkv_proj")
        key, first = (attention.qkv_proj, spec.num_q_heads * spec.head_dim) if is_fused else (attention.k_proj, 0)
        for kv_head in range(spec.num_kv_heads):
            spread = HEAD_SPREADS[(kv_head * len(HEAD_SPREADS) // spec.num_kv_heads + layer_id) % len(HEAD_SPREADS)]
            rows = slice(first + kv_head * spec.head_dim, first + (kv_head + 1) * spec.head_dim)
            key.weight[rows] *= spread
            if key.bias is not None:
                key.bias[rows] *= spread


def _lay_out_experts(model: Any) -> None:
    """Turn the experts' weights as published checkpoints of Qwen3-VL-MoE have them: [experts, in, out]."""
    for name, weight in model.named_parameters():
        if ".experts." in name:
            weight.data = weight.data.transpose(1, 2).contiguous()


def _processors(name: str, patch_size: int) -> dict[str, dict[str, Any]]:
    pixels = {
        "min_pixels": 4 * (2 * patch_size) ** 2,
        "max_pixels": 4096 * (2 * patch_size) ** 2,
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    sizes = {"size": {"shortest_edge": pixels["min_pixels"], "longest_edge": pixels["max_pixels"]}}
    colours = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    shared = {"processor_class": f"{name}Processor", **pixels, **sizes, **colours}
    kind = name if name in ("Glm4v", "Qwen3VL") else "Qwen2VL"
    image = {"image_processor_type": f"{'Glm4v' if kind == 'Glm4v' else 'Qwen2VL'}ImageProcessor", **shared}
    video = {
        "video_processor_type": f"{kind}VideoProcessor",
        "min_frames": 4,
        "max_frames": 768,
        "fps": 2.0,
        "do_sample_frames": False,
        **shared,
    }
    return {"preprocessor_config.json": image, "video_preprocessor_config.json": video}


def save_checkpoint(model: Any, tokenizer: Any, folder: Path, processors: Mapping[str, Mapping[str, Any]]) -> None:
    """Write weights in bfloat16, tokenizer and chat template as SGLang and transformers read them.

    Parameters
    ----------
    processors : settings of a vision model's image and video processor, by file name.
    """
    import torch

    model.generation_config.do_sample = False
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Named explicitly: else transformers loads the model family's tokenizer class, which rewrites the pre-tokenizer.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if processors:
        settings["processor_class"] = processors["preprocessor_config.json"]["processor_class"]
    for name, values in {"tokenizer_config.json": settings, **processors}.items():
        (folder / name).write_text(json.dumps(values, indent=1) + "\n")


def _stamp(name: str) -> dict[str, str]:
    import transformers

    sources = (Path(__file__), Path(internvl.__file__))
    recipe = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return {"model": name, "recipe": recipe, "transformers": transformers.__version__}


def make_model(name: str, out_dir: Path = DEFAULT_DIR) -> Path:
    """Make one checkpoint unless it is there already, and return its folder.

    Parameters
    ----------
    name : str
        A key of `SPECS`.
    out_dir : Path
        Parent folder. The checkpoint appears in one rename, so processes may call this at the same time.

    Raises
    ------
    ValueError
        The name is unknown.
    """
    if name not in SPECS:
        raise ValueError(f"model: expected one of {', '.join(SPECS)}, got {name!r}")

    def build(folder: Path) -> None:
        spec = SPECS[name]
        tokenizer = _tokenizer(SPECIAL_NAMES.get(spec.family, {}))
        model = _build(spec, tokenizer)
        _initialise(model, spec)
        if spec.family == "qwen3_vl_moe":
            _lay_out_experts(model)
        processors = _processors(*VISION_FAMILIES[spec.family]) if spec.family in VISION_FAMILIES else {}
        save_checkpoint(model, tokenizer, folder, processors)

    return make_once(out_dir / name, _stamp(name), build)


def make_models(names: Sequence[str] = tuple(SPECS), out_dir: Path = DEFAULT_DIR) -> dict[str, Path]:
    """Make several checkpoints; see `make_model`."""
    return {name: make_model(name, out_dir) for name in names}


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out_dir", nargs="?", type=Path, default=DEFAULT_DIR)
    parser.add_argument("names", nargs="*", help=f"any of: {', '.join(SPECS)} (default: all)")
    args = parser.parse_args()
    for name, folder in make_models(args.names or tuple(SPECS), args.out_dir).items():
        print(f"{name}: {folder}")


if __name__ == "__main__":
    main()
