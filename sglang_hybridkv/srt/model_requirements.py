"""What a model must be so that its cache can be compressed, checked on the loaded model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.layers.radix_attention import AttentionType, RadixAttention


@dataclasses.dataclass(frozen=True)
class Requirement:
    """One of them.

    Attributes
    ----------
    words : what compression needs, after these two words.
    holds : whether the attention layers of a model, and the number of all its layers, are so.
    """

    words: str
    holds: Callable[[Sequence[Any], int], bool]


def window_of(layer: Any) -> int:
    """The last tokens that an attention layer attends to, the newest included; 0 for all of them."""
    # SGLang counts those before the newest.
    return 0 if layer.sliding_window_size <= 0 else layer.sliding_window_size + 1


def _have_one_shape(layers: Sequence[Any], _num_layers: int) -> bool:
    shapes = {(one.tp_q_head_num, one.tp_k_head_num, one.tp_v_head_num, one.qk_head_dim) for one in layers}
    return len(shapes) == 1 and all(
        (one.tp_k_head_num, one.qk_head_dim) == (one.tp_v_head_num, one.v_head_dim) for one in layers
    )


REQUIREMENTS = (
    Requirement(
        "every layer to attend through SGLang's RadixAttention once (no linear attention, no state in place of a "
        "cache, no layers that share one cache)",
        lambda layers, num_layers: sorted(one.layer_id for one in layers) == list(range(num_layers)),
    ),
    Requirement(
        "one number of query heads and of KV heads in all layers, and one head size for queries, keys and values "
        "(no latent cache)",
        _have_one_shape,
    ),
    Requirement(
        "causal self-attention in every layer (no cross attention, no encoder, no attention between image tokens in "
        "both directions)",
        lambda layers, _: all(one.attn_type == AttentionType.DECODER and not one.is_cross_attention for one in layers),
    ),
    Requirement(
        "attention to the whole context in at least one layer, and to a window of the last tokens in all others (no "
        "chunked attention)",
        lambda layers, _: not all(map(window_of, layers)) and not any(one.use_irope for one in layers),
    ),
    Requirement(
        "a plain softmax of scaled scores (no logit cap, no bias or temperature by position)",
        lambda layers, _: all(
            not one.logit_cap and one.pos_encoding_mode == "NONE" and one.xai_temperature_len <= 0 for one in layers
        ),
    ),
)
NO_OTHER_INPUTS = "attention to take nothing but queries, keys and values (no attention sinks)"


def unmet_requirement(model: Any, num_layers: int) -> str | None:
    """Words of the first requirement that a loaded `model` of `num_layers` layers does not meet; None when it is fit.

    Layers of its vision tower have another class, and no cache.
    """
    layers = attention_layers(model)
    return next((one.words for one in REQUIREMENTS if not one.holds(layers, num_layers)), None)


def attention_layers(model: Any) -> list[Any]:
    """Its RadixAttention modules, in the order of the layers."""
    layers = [module for module in model.modules() if isinstance(module, RadixAttention)]
    return sorted(layers, key=lambda layer: layer.layer_id)


def model_windows(model: Any) -> tuple[int, ...]:
    """As in `HeadPageLayout`, of a loaded model that meets the requirements."""
    windows = tuple(map(window_of, attention_layers(model)))
    return windows if any(windows) else ()


def check_inputs(layer: Any, inputs: dict[str, Any]) -> None:
    """Refuse further inputs of an attention layer, which our kernels would not read; ValueError, one sentence."""
    names = [name for name, value in inputs.items() if value is not None]
    if names:
        raise ValueError(
            f"compression needs {NO_OTHER_INPUTS}; "
            f"layer {layer.layer_id} of this model hands it {', '.join(names)}, too"
        )
