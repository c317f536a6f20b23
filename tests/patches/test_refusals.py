import hashlib
import types

import msgspec
import pytest
import torch
from packaging.version import Version
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig
from sglang.srt.server_args import ServerArgs
from sglang.version import __version__ as installed

from hybridkv_kernels import dispatch
from hybridkv_patches import io_struct
from sglang_hybridkv.compressors import get_compressor
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from sglang_hybridkv.srt import refusals
from sglang_hybridkv.srt.settings import Settings
from tests.builders import make_calibration

SETTINGS = Settings("hybridkv", HybridKVConfig())
PAGE = SETTINGS.config.page_size
DEFAULTS = {field.name: getattr(ServerArgs(model_path="m"), field.name) for field in msgspec.structs.fields(ServerArgs)}


def resolved(**changes):
    """Resolved arguments of a server that compression works with, except for `changes`."""
    graphs = CudaGraphConfig(PhaseConfig("disabled"), PhaseConfig("disabled"))
    fitting = {
        "device": "cpu",
        "attention_backend": "torch_native",
        "page_size": SETTINGS.config.page_size,
        "cuda_graph_config": graphs,
    }
    return types.SimpleNamespace(**{**DEFAULTS, **fitting, **changes})


def sentence(**changes):
    with pytest.raises(ValueError) as caught:
        refusals.check_server_args(resolved(**changes), SETTINGS)
    return str(caught.value)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_plain_server_is_accepted(device):
    refusals.check_flags(ServerArgs(model_path="m"), SETTINGS)
    refusals.check_server_args(resolved(device=device), SETTINGS)


KNOWN = [refusal for refusal in refusals.REFUSALS if refusal.is_known_to(ServerArgs)]


def test_a_row_is_passed_over_in_releases_before_its_argument_only():
    passed_over = set(refusals.REFUSALS) - set(KNOWN)
    assert passed_over == {row for row in refusals.REFUSALS if row.since and Version(installed) < Version(row.since)}


@pytest.mark.parametrize("refusal", KNOWN, ids=lambda refusal: refusal.field)
def test_every_row_names_its_flag_and_a_recipe(refusal):
    default = DEFAULTS[refusal.field]
    values = [2] if type(default) is int else [True, "ngram", "transformers", "fp8_e4m3", ["a=b"]]
    refused = [value for value in values if refusal.applies(value)]
    assert refused
    assert not refusal.applies(default)
    for value in refused:
        assert sentence(**{refusal.field: value}) == (
            f"{refusal.flag} cannot be combined with --kv-compressor hybridkv; {refusal.recipe}"
        )


def test_no_field_has_two_rows():
    fields = [refusal.field for refusal in refusals.REFUSALS]
    assert len(set(fields)) == len(fields)


def test_every_condition_is_in_the_table_and_explained():
    conditions = [value for value in vars(refusals).values() if isinstance(value, refusals.Condition)]
    assert sorted(conditions, key=id) == sorted(refusals.CONDITIONS, key=id)
    assert all(condition.when for condition in conditions)


@pytest.mark.parametrize("dtype", refusals.KV_CACHE_DTYPES)
def test_unquantized_caches_are_accepted(dtype):
    refusals.check_server_args(resolved(kv_cache_dtype=dtype), SETTINGS)


PHASES = pytest.mark.parametrize("phase", ["", "prefill_", "decode_"])


@PHASES
@pytest.mark.parametrize(
    "device, backend", [("cpu", "triton"), ("cuda", "trtllm_mha"), ("cuda", "fa4"), ("cuda", "flex_attention")]
)
def test_other_attention_backends_are_refused(phase, device, backend):
    text = sentence(device=device, **{f"{phase}attention_backend": backend})
    assert text.startswith(f"--{phase.replace('_', '-')}attention-backend {backend} cannot be combined")
    assert text.endswith(f"use --attention-backend {' or '.join(refusals.ATTENTION_BACKENDS[device])}")


@PHASES
@pytest.mark.parametrize("backend", refusals.ATTENTION_BACKENDS["cuda"])
def test_backends_of_nvidia_are_accepted(phase, backend):
    changes = {f"{phase}attention_backend": backend}
    refusals.check_flags(ServerArgs(model_path="m", **changes), SETTINGS)
    refusals.check_server_args(resolved(device="cuda", **changes), SETTINGS)


def graphs(decode="disabled", prefill="disabled"):
    return CudaGraphConfig(PhaseConfig(decode), PhaseConfig(prefill))


def test_graphs_of_decode_are_accepted_and_those_of_prefill_refused():
    refusals.check_server_args(resolved(cuda_graph_config=graphs(prefill="full")), SETTINGS)  # a CPU has none
    refusals.check_server_args(resolved(device="cuda", cuda_graph_config=graphs("full")), SETTINGS)
    for prefill in ("full", "breakable", "tc_piecewise"):
        text = sentence(device="cuda", cuda_graph_config=graphs("full", prefill))
        assert text.startswith(f"--cuda-graph-backend-prefill {prefill} (CUDA graphs) cannot be combined")
        assert text.endswith("use --cuda-graph-backend-prefill disabled")
    text = sentence(device="cuda", cuda_graph_config=graphs("breakable"))
    assert text.endswith("use --cuda-graph-backend-decode full or disabled")


def shape(dtype=torch.bfloat16, head_dim=128):
    return types.SimpleNamespace(
        dtype=dtype, head_dim=head_dim, num_attention_heads=28, get_total_num_kv_heads=lambda: 4
    )


def kernels_sentence(model_config, settings=SETTINGS, **changes):
    with pytest.raises(ValueError) as caught:
        refusals.check_kernels(resolved(device="cuda", **changes), model_config, settings)
    return str(caught.value)


def test_flashinfer_serves_what_it_can_and_names_the_others_for_the_rest():
    refusals.check_kernels(resolved(device="cuda", attention_backend="flashinfer"), shape(), SETTINGS)
    for model_config in (shape(dtype=torch.float32), shape(head_dim=80)):
        refusals.check_kernels(resolved(device="cuda", attention_backend="triton"), model_config, SETTINGS)
        text = kernels_sentence(model_config, attention_backend="flashinfer")
        assert text.startswith("--attention-backend flashinfer (FlashInfer decodes ")
        assert text.endswith("use triton or fa3")
    split = {"attention_backend": "fa3", "decode_attention_backend": "flashinfer"}
    assert "not 80" in kernels_sentence(shape(head_dim=80), **split)


@pytest.mark.parametrize(
    ("device", "value", "complaint"),
    [
        ("cpu", "foo", "is not allowed; legal: one of naive, cpu, triton"),
        ("cuda", "foo", "is not allowed; legal: one of naive, cpu, triton"),
        ("cuda", "cpu", "is impossible here: "),
    ],
)
def test_kernels_that_are_forced_and_cannot_be_are_refused(monkeypatch, device, value, complaint):
    """Here, where no model was loaded yet."""
    monkeypatch.setenv("HYBRIDKV_KERNELS", value)
    with pytest.raises(ValueError, match=f"^HYBRIDKV_KERNELS = '{value}' {complaint}"):
        refusals.check_kernels(resolved(device=device), shape(), SETTINGS)


def test_flashinfer_does_not_estimate():
    estimating = Settings("hybridkv", HybridKVConfig(unretrieved="estimate", chunk_score="mean_max"))
    refusals.check_kernels(resolved(device="cuda", attention_backend="fa3"), shape(), estimating)
    text = kernels_sentence(shape(), estimating, attention_backend="flashinfer")
    assert text.startswith("unretrieved = 'estimate' on --attention-backend flashinfer cannot be combined")
    assert text.endswith("use --attention-backend triton or fa3, or 'drop'")


def test_flashinfer_does_not_decode_layers_with_a_window():
    for device, backend, windows in (
        ("cuda", "triton", (0, 8)),
        ("cpu", "flashinfer", (0, 8)),
        ("cuda", "flashinfer", ()),
    ):
        refusals.check_windows(resolved(device=device, attention_backend=backend), windows, SETTINGS)
    with pytest.raises(ValueError, match="layers with a window.* use --attention-backend triton or fa3$"):
        refusals.check_windows(resolved(device="cuda", attention_backend="flashinfer"), (0, 8), SETTINGS)


@pytest.mark.parametrize("kernels", ["naive", "triton"])
def test_graphs_need_kernels_that_can_be_captured(monkeypatch, kernels):
    monkeypatch.setattr(dispatch, "choose", lambda *args: kernels)
    monkeypatch.setattr(dispatch, "describe", lambda *args: "naive (for a reason)")
    refusals.check_kernels(resolved(device="cuda"), shape(), SETTINGS)
    if kernels == "triton":
        refusals.check_kernels(resolved(device="cuda", cuda_graph_config=graphs("full")), shape(), SETTINGS)
        return
    text = kernels_sentence(shape(), cuda_graph_config=graphs("full"))
    assert text.startswith("--cuda-graph-backend-decode full with kernels naive (for a reason) cannot be combined")
    assert text.endswith("use --cuda-graph-backend-decode disabled")


@pytest.mark.parametrize("backend", ["triton", "flashinfer"])
def test_a_graph_of_the_host_s_work_is_refused(backend, monkeypatch):
    monkeypatch.setenv("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "1")
    text = sentence(device="cuda", attention_backend=backend)
    assert text.startswith("SGLANG_ENABLE_METADATA_GLUE_GRAPH cannot be combined")


def test_other_devices_are_refused():
    assert sentence(device="npu").endswith("use one of cpu, cuda")


def test_the_page_size_must_be_the_compressors():
    """Not one that the user gave: that is refused earlier, in other words."""
    assert sentence(page_size=64).startswith("a page size of 64 tokens, which SGLang chose, cannot be combined")


def test_the_rust_server_is_refused(monkeypatch):
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    assert sentence() == "SGLANG_RUST_SERVER cannot be combined with --kv-compressor hybridkv; unset it"


def model(architecture, path="org/name"):
    config = types.SimpleNamespace(architectures=[architecture])
    return types.SimpleNamespace(
        hf_config=config, model_path=str(path), num_hidden_layers=2, get_total_num_kv_heads=lambda: 2
    )


@pytest.mark.parametrize("architecture", refusals.ARCHITECTURES)
def test_verified_models_are_accepted(architecture):
    refusals.check_model(model(architecture), SETTINGS)


@pytest.mark.parametrize(
    "architecture", ["DeepseekV3ForCausalLM", "Qwen2MoeForCausalLM", "GptOssForCausalLM", "MambaForCausalLM"]
)
def test_other_models_are_refused_unless_they_may_be_unverified(architecture):
    with pytest.raises(ValueError) as caught:
        refusals.check_model(model(architecture), SETTINGS)
    assert str(caught.value).startswith(f"--model-path of a {architecture} cannot be combined")
    assert str(caught.value).endswith("set unverified_model = true in --kv-compressor-config")
    refusals.check_model(model(architecture), Settings("hybridkv", HybridKVConfig(unverified_model=True)))


def test_a_compressor_that_does_not_fit_the_model_is_refused_before_anything_is_loaded(tmp_path):
    config_class = get_compressor("sparsemm").config_class
    foreign = Settings("sparsemm", config_class(calibration=str(make_calibration(tmp_path / "c.json", 2, 5))))
    with pytest.raises(ValueError, match="2 layers of 5 KV heads, the model to serve has 2 of 2"):
        refusals.check_model(model("LlamaForCausalLM"), foreign)


def test_a_calibration_of_another_model_of_the_same_shape_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    described = {"name": "m", "num_layers": 2, "num_kv_heads": 2, "head_dim": 32}
    config_class = get_compressor("sparsemm").config_class

    def settings(fingerprint):
        facts = described | {"fingerprint": fingerprint}
        return Settings(
            "sparsemm", config_class(calibration=str(make_calibration(tmp_path / "c.json", 2, 2, model=facts)))
        )

    served = model("LlamaForCausalLM", tmp_path)
    with pytest.raises(ValueError, match=f"SHA-256 {'a' * 12}, the model to serve has {digest[:12]}; write one with"):
        refusals.check_model(served, settings("a" * 64))
    refusals.check_model(served, settings(digest))
    refusals.check_model(served, settings(None))
    refusals.check_model(model("LlamaForCausalLM"), settings("a" * 64))


@pytest.mark.parametrize("size", [1001, 4, 4095])
def test_a_chunk_of_no_whole_pages_is_refused_with_one_that_is(size):
    for check in (refusals.check_flags, refusals.check_server_args):
        with pytest.raises(ValueError) as caught:
            check(resolved(chunked_prefill_size=size), SETTINGS)
        words = f"--chunked-prefill-size {size} cannot be combined with --kv-compressor hybridkv; "
        words += f"the compressor's page_size is {PAGE}, use a multiple of it, such as "
        assert str(caught.value).startswith(words)
        assert int(str(caught.value).removeprefix(words)) % PAGE == 0
    for fits in (None, -1, 0, PAGE, 63 * PAGE):
        refusals.check_flags(resolved(chunked_prefill_size=fits), SETTINGS)


REFUSED_FIELDS = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0, "input_embeds": [[0.0, 1.0]]}


@pytest.mark.parametrize("num_prompts", [1, 2])
@pytest.mark.parametrize("field", [row.field for row in refusals.REQUEST_REFUSALS])
def test_a_request_that_is_not_served_is_refused_by_name(monkeypatch, field, num_prompts):
    """As one of a batch, too; and only on a compressing server."""
    monkeypatch.setattr(io_struct.settings_module, "active", lambda: SETTINGS)
    prompt = {} if field == "input_embeds" else {"input_ids": [1, 2] if num_prompts == 1 else [[1, 2]] * num_prompts}

    def request(**values):
        made = GenerateReqInput(sampling_params={"max_new_tokens": 2}, **{"input_ids": None, **prompt, **values})
        made.sampling_params |= {"beam_width": 2} if field == "beam_width" and not values else {}
        made.normalize_batch_and_arguments()
        return made

    given = {field: REFUSED_FIELDS[field]} if field in REFUSED_FIELDS else {}
    if field == "input_embeds" and num_prompts > 1:
        given = {field: [REFUSED_FIELDS[field]] * num_prompts}
    made = request(**given)
    with pytest.raises(ValueError, match=f"^{field} is not served with --kv-compressor hybridkv; "):
        io_struct.refuse_request(None, made)
    monkeypatch.setattr(io_struct.settings_module, "active", lambda: None)
    io_struct.refuse_request(None, made)


def test_a_plain_request_is_not_refused(monkeypatch):
    monkeypatch.setattr(io_struct.settings_module, "active", lambda: SETTINGS)
    for prompt in ({"text": "a"}, {"input_ids": [[1], [2]]}):
        made = GenerateReqInput(**prompt, sampling_params={"n": 2, "beam_width": 1})
        made.normalize_batch_and_arguments()
        io_struct.refuse_request(None, made)
