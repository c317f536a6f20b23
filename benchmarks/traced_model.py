"""A Qwen2.5-VL of transformers that shows the attention of its text layers along a prompt and its right answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.scenes import Question, Scene
from sglang_hybridkv.requests.spans import VisualSpan

_ATTENTION = "hybridkv_traced"


@dataclass(frozen=True)
class Trace:
    """Attention of every layer along a prompt and its answer, T tokens.

    Attributes
    ----------
    q : [L, T, H * G, D] and k, v : [L, T, H, D]. After RoPE.
    prompt_len : tokens before the answer.
    spans : images of the prompt.
    scaling : factor of q . k before the softmax.
    accuracy : share of the answer's tokens that the model predicts from those before.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    prompt_len: int
    spans: tuple[VisualSpan, ...]
    scaling: float
    accuracy: float


class TracedModel:
    """A checkpoint whose text layers show their queries, keys and values."""

    def __init__(self, path: str, dtype: torch.dtype = torch.float32):
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForImageTextToText, AutoProcessor
        from transformers.masking_utils import sdpa_mask

        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"--model-path = {path!r} is not a checkpoint; legal: a folder with a config.json")
        AttentionInterface.register(_ATTENTION, self._attend)
        AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
        self.processor = AutoProcessor.from_pretrained(path)
        attention = {"text_config": _ATTENTION, "vision_config": "sdpa"}
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation=attention)
        self.model.eval()
        self._layers: list[tuple[torch.Tensor, ...]] = []
        self._scaling = 0.0

    def _attend(self, module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        assert module.layer_idx == len(self._layers), "layers run once each, in order"
        self._layers.append(tuple(states[0].transpose(0, 1).contiguous() for states in (query, key, value)))
        self._scaling = kwargs["scaling"]
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    @torch.inference_mode()
    def trace(self, scene: Scene, question: Question) -> Trace:
        """Run the question and its right answer in one forward."""
        content = [{"type": "image"} for _ in scene.images] + [{"type": "text", "text": question.text}]
        messages = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = dict(self.processor(text=[text], images=list(scene.images), return_tensors="pt"))
        tokenizer, prompt_ids = self.processor.tokenizer, inputs["input_ids"]
        answer = tokenizer(question.answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        beyond = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
        for name, tensor in inputs.items():
            if tensor.shape == prompt_ids.shape:  # one entry a token; the others belong to the pictures
                inputs[name] = torch.cat((tensor, beyond.get(name, torch.zeros_like(answer))), dim=1)
        self._layers.clear()
        logits = self.model(**inputs, use_cache=False).logits[0]
        q, k, v = (torch.stack(states) for states in zip(*self._layers, strict=True))
        self._layers.clear()
        prompt_len = prompt_ids.shape[1]
        accuracy = (logits[prompt_len - 1 : -1].argmax(-1) == answer[0]).float().mean().item()
        return Trace(q, k, v, prompt_len, self._spans(prompt_ids[0]), self._scaling, accuracy)

    def _spans(self, ids: torch.Tensor) -> tuple[VisualSpan, ...]:
        is_image = torch.nn.functional.pad((ids == self.model.config.image_token_id).int(), (1, 1))
        starts, ends = ((is_image.diff() == step).nonzero().flatten().tolist() for step in (1, -1))
        return tuple(VisualSpan(start, end, "image") for start, end in zip(starts, ends, strict=True))


def full_attention(trace: Trace, layer_idx: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [H, G, D] and probabilities [H, G, position + 1], fp32, of one query over every row before it."""
    k, v = (rows[layer_idx, : position + 1].float().transpose(0, 1) for rows in (trace.k, trace.v))
    q = trace.q[layer_idx, position].float().view(len(k), -1, k.shape[-1])
    probs = (q @ k.transpose(1, 2) * trace.scaling).softmax(-1)
    return probs @ v, probs
