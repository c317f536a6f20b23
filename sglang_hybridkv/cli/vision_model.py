"""Run a vision-language model with transformers and see which visual token each head attends to most."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sglang_hybridkv.cli.samples import Sample
from sglang_hybridkv.cli.visual_heads import VisualGrid, words_of_tokens
from sglang_hybridkv.compressors.calibration import CalibratedModel

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")
"""Those whose processor tells the grid of visual tokens of a picture."""


@dataclass(frozen=True)
class Observation:
    """Where the heads looked while one answer was read.

    Attributes
    ----------
    top_LHT : [layers, query heads, tokens], int64, on the CPU; see `visual_heads.score_hits`.
    words : for each token of the answer its word, or None.
    """

    top_LHT: torch.Tensor
    words: list[int | None]
    grid: VisualGrid


class TopKeys:
    """Attends like SDPA, and keeps for the chosen query rows the top key of each head, layer by layer.

    Peak memory: fp32 logits of the chosen rows of one layer, rows * query heads * tokens * 4 bytes.
    """

    def __init__(self, top_of: str) -> None:
        self.top_of = top_of
        self.rows = torch.empty(0, dtype=torch.int64)
        self.visual = torch.empty(0, dtype=torch.int64)
        self.by_layer: dict[int, torch.Tensor] = {}

    def watch(self, rows: torch.Tensor, visual: torch.Tensor) -> None:
        """Start anew: `rows` are query positions, `visual` the positions of the visual tokens, all before the rows."""
        self.rows, self.visual, self.by_layer = rows, visual, {}

    def attend(self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        """Attention function in transformers' sense."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        self.by_layer[module.layer_idx] = self.top_keys(query[0], key[0]).cpu()
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    def top_keys(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Visual token with the largest logit, [query heads, rows]; -1 where another key's is larger.

        Parameters
        ----------
        query : [query heads, tokens, head dim].
        key : [KV heads, tokens, head dim].
        """
        num_kv_heads, num_tokens, head_dim = key.shape
        rows = query[:, self.rows].float().reshape(num_kv_heads, -1, head_dim)
        logits = (rows @ key.float().transpose(1, 2)).view(len(query), len(self.rows), num_tokens)
        top_logits, top = logits[..., self.visual].max(-1)
        if self.top_of == "visual":
            return top
        future = torch.arange(num_tokens, device=key.device) > self.rows[:, None]
        return torch.where(top_logits >= logits.masked_fill(future, float("-inf")).amax(-1), top, -1)


class VisionModel:
    """A checkpoint in evaluation mode, whose language model tells its top keys.

    Parameters
    ----------
    folder : a Qwen2-VL or Qwen2.5-VL checkpoint with its processor.
    device : "cpu", "cuda" or "auto".
    top_of : "visual": a head's top key among the visual tokens. "all": among all keys.

    Raises
    ------
    ValueError
        It is no such checkpoint, it cannot be loaded, or transformers is missing.
    """

    def __init__(self, folder: Path, device: str = "auto", top_of: str = "visual") -> None:
        self.facts = read_facts(folder)
        try:
            from transformers import AttentionInterface, AttentionMaskInterface, AutoProcessor
            from transformers import AutoModelForImageTextToText as AutoModel
            from transformers.masking_utils import sdpa_mask
        except ImportError as error:
            raise ValueError(f"{error.name} is missing; pip install sglang-hybridkv[quality]") from None
        self.device = torch.device(choose_device(device))
        try:
            self._processor = AutoProcessor.from_pretrained(folder)
            self._model = AutoModel.from_pretrained(folder, dtype="auto").to(self.device).eval()
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"--model-path = {folder}: the checkpoint cannot be loaded ({reason})") from None
        self._top_keys = TopKeys(top_of)
        # transformers looks attention functions up by name; each model needs its own, or two would share one record.
        name = f"hybridkv_top_keys_{id(self._top_keys)}"
        AttentionInterface.register(name, self._top_keys.attend)
        AttentionMaskInterface.register(name, sdpa_mask)
        self._model.model.language_model.config._attn_implementation = name

    @torch.inference_mode()
    def observe(self, sample: Sample) -> Observation:
        """Let the model read the answer of a sample, and tell where it looked before each of its tokens."""
        inputs, words = self._inputs(sample)
        ids = inputs["input_ids"][0]
        rows = torch.arange(len(ids) - len(words) - 1, len(ids) - 1, device=self.device)
        visual = (ids == self._model.config.image_token_id).nonzero()[:, 0]
        self._top_keys.watch(rows, visual)
        self._model.model(**inputs, use_cache=False)
        top_LHT = torch.stack([self._top_keys.by_layer[layer_idx] for layer_idx in range(self.facts.num_layers)])
        _, patch_rows, patch_columns = inputs["image_grid_thw"][0].tolist()
        merge = self._processor.image_processor.merge_size
        grid = VisualGrid(patch_rows // merge, patch_columns // merge, *sample.image.size)
        return Observation(top_LHT, words, grid)

    def _inputs(self, sample: Sample) -> tuple[dict[str, torch.Tensor], list[int | None]]:
        """Inputs of the model, question and answer, and the word of each token of the answer."""
        content = [{"type": "image"}, {"type": "text", "text": sample.question}]
        chat = [{"role": "user", "content": content}]
        text = self._processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = dict(self._processor(text=[text], images=[sample.image], return_tensors="pt"))
        answer = self._processor.tokenizer(sample.answer, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([answer["input_ids"]])
        # Tokenized apart from the prompt, as a generated answer is.
        inputs["input_ids"] = torch.cat((inputs["input_ids"], ids), 1)
        inputs["attention_mask"] = torch.cat((inputs["attention_mask"], torch.ones_like(ids)), 1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.cat((inputs["mm_token_type_ids"], torch.zeros_like(ids)), 1)
        words = words_of_tokens(sample.answer, answer["offset_mapping"])
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}, words


def read_facts(folder: Path) -> CalibratedModel:
    """Read a checkpoint's config.json; ValueError when it is none, or none of `MODEL_TYPES`."""
    path = folder / "config.json"
    try:
        raw = path.read_bytes()
        config = json.loads(raw)
    except (OSError, ValueError) as error:
        reason = f"expected a local checkpoint folder, but {path} cannot be read ({error})"
        raise ValueError(f"--model-path = {folder}: {reason}") from None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in MODEL_TYPES:
        legal = " or ".join(MODEL_TYPES)
        raise ValueError(f"--model-path = {folder}: model_type = {model_type!r} in config.json; expected {legal}")
    text = {**config, **config.get("text_config", {})}
    try:
        num_q_heads = text["num_attention_heads"]
        head_dim = text.get("head_dim") or text["hidden_size"] // num_q_heads
        num_layers, num_kv_heads = text["num_hidden_layers"], text["num_key_value_heads"]
    except KeyError as error:
        raise ValueError(f"--model-path = {folder}: config.json has no {error.args[0]}") from None
    return CalibratedModel(
        name=folder.resolve().name,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        fingerprint=hashlib.sha256(raw).hexdigest(),
    )


def choose_device(device: str) -> str:
    """Turn "auto" into "cuda" where there is a GPU, else "cpu"; ValueError for a GPU that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device = cuda: torch sees no GPU; use cpu or auto")
    return device
