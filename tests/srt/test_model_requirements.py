import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from sglang_hybridkv.srt.model_requirements import REQUIREMENTS, check_inputs, model_windows, unmet_requirement


def make_model(num_layers=3, changed=None, **changes):
    """Attention layers below other modules; layer 1 has `changes`, of the constructor's arguments or later."""
    shape = {"num_heads": 4, "head_dim": 16, "scaling": 0.25, "num_kv_heads": 2}
    layers = []
    for layer_id in range(num_layers):
        mine = changes if layer_id == 1 else {}
        layers.append(RadixAttention(**({"layer_id": layer_id} | shape | mine)))
    if changed is not None:
        setattr(layers[1], *changed)
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)}))


def test_a_model_that_meets_all_has_none_unmet():
    assert unmet_requirement(make_model(), 3) is None


@pytest.mark.parametrize(
    ("unfit", "requirement"),
    [
        ({"num_layers": 2}, 0),
        ({"layer_id": 0}, 0),
        ({"num_heads": 8}, 1),
        ({"num_kv_heads": 4}, 1),
        ({"head_dim": 32}, 1),
        ({"v_head_dim": 8}, 1),
        ({"is_cross_attention": True}, 2),
        ({"attn_type": AttentionType.ENCODER_ONLY}, 2),
        ({"attn_type": AttentionType.DECODER_BIDIRECTIONAL}, 2),
        ({"use_irope": True}, 3),
        ({"logit_cap": 50.0}, 4),
        ({"pos_encoding_mode": "ALIBI"}, 4),
        ({"changed": ("xai_temperature_len", 1024)}, 4),
    ],
)
def test_what_is_not_met_is_named(unfit, requirement):
    assert unmet_requirement(make_model(**unfit), 3) == REQUIREMENTS[requirement].words


def test_layers_may_have_a_window_but_not_all_of_them():
    model = make_model(sliding_window_size=127)
    assert unmet_requirement(model, 3) is None
    assert model_windows(model) == (0, 128, 0)
    assert model_windows(make_model()) == ()
    layers = [RadixAttention(4, 16, 1.0, 1, layer_id, sliding_window_size=127) for layer_id in range(3)]
    assert unmet_requirement(torch.nn.ModuleList(layers), 3) == REQUIREMENTS[3].words


def test_a_latent_cache_has_one_head_of_two_sizes_in_every_layer():
    layers = [RadixAttention(4, 16, 1.0, 1, layer_id, v_head_dim=8) for layer_id in range(3)]
    assert unmet_requirement(torch.nn.ModuleList(layers), 3) == REQUIREMENTS[1].words


def test_a_model_without_attention_is_not_met():
    assert unmet_requirement(torch.nn.Linear(2, 2), 3) == REQUIREMENTS[0].words


def test_further_inputs_of_attention_are_refused_by_name():
    layer = RadixAttention(4, 16, 1.0, 2, layer_id=5)
    check_inputs(layer, {"sinks": None})
    with pytest.raises(ValueError, match="^compression needs .*; layer 5 of this model hands it sinks, too$"):
        check_inputs(layer, {"sinks": torch.zeros(4), "k_rope": None})
