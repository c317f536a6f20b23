"""What a compressing server refuses to start with: one table, one sentence each.

A row goes when a test proves the combination.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybridkv_kernels import dispatch
from hybridkv_kernels.decode_attn import flashinfer
from sglang_hybridkv.compressors import get_compressor
from sglang_hybridkv.config import RetrievalConfig
from sglang_hybridkv.srt.settings import Settings

CPU_BACKEND = "torch_native"
FLASHINFER = "flashinfer"
# By device. Their prefill stays theirs; decode is ours, and FlashInfer's on flashinfer. Others want pages of 64 or 128
# tokens, or were not read.
ATTENTION_BACKENDS = {"cpu": (CPU_BACKEND,), "cuda": ("triton", FLASHINFER, "fa3", CPU_BACKEND)}
DEVICES = tuple(ATTENTION_BACKENDS)
DECODE_GRAPHS = ("full", "disabled")
KV_CACHE_DTYPES = ("auto", "bf16", "bfloat16")
# Read in sglang/srt/models: these hand K after RoPE to RadixAttention, which writes it through the attention backend.
# A model that writes the cache inside its RoPE kernel would bypass the observation, see models/utils.py.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A server argument that compression does not work with.

    Attributes
    ----------
    field : name in ServerArgs.
    flag : how the user set it, as they should read it.
    applies : whether a value of the field is refused.
    recipe : what to do instead, an imperative.
    """

    field: str
    flag: str
    applies: Callable[[Any], bool]
    recipe: str


def _is_set(value: Any) -> bool:
    return value not in (None, False, [], {}, "", "null", "none")


def _above_one(value: Any) -> bool:
    return value is not None and value > 1


def _switch(field: str, flag: str | None = None, recipe: str = "leave it out") -> Refusal:
    return Refusal(field, flag or "--" + field.replace("_", "-"), _is_set, recipe)


def _size(field: str, flag: str, recipe: str) -> Refusal:
    return Refusal(field, flag, _above_one, recipe)


_ONE_GPU = "run one server per device and spread requests over them"

REFUSALS: tuple[Refusal, ...] = (
    # Parallelism: page totals must agree between ranks, which is not proven yet.
    _switch("enable_dp_attention", recipe=_ONE_GPU),
    _size("tp_size", "--tp-size above 1", "it is not proven yet, use --tp-size 1"),
    _size("dp_size", "--dp-size above 1", f"it is not proven yet, {_ONE_GPU}"),
    _size("pp_size", "--pp-size above 1", "use --pp-size 1"),
    _size("dcp_size", "--decode-context-parallel-size above 1", "leave it out"),
    _size("attn_cp_size", "--attention-context-parallel-size above 1", "leave it out"),
    _switch("enable_prefill_cp"),
    _size("moe_dp_size", "--moe-data-parallel-size above 1", "leave it out"),
    _size("dwdp_size", "--dwdp-size above 1", "leave it out"),
    _switch("ep_join_mode", "--elastic-ep-join-mode"),
    _size("nnodes", "--nnodes above 1", "run one server per node"),
    _switch("use_ray", recipe="start without Ray"),
    _switch("enable_pdmux"),
    _switch("enable_two_batch_overlap"),
    _switch("enable_single_batch_overlap"),
    # Batches and requests that prefill, decode or generate in another way.
    _switch("enable_mixed_chunk"),
    _switch("speculative_algorithm", recipe="serve without speculative decoding"),
    _switch("decoupled_spec_role", recipe="serve without speculative decoding"),
    _switch("dllm_algorithm", recipe="serve an autoregressive model"),
    _switch("is_embedding", recipe="serve a generating model"),
    _switch("enable_deterministic_inference"),
    _switch("enable_lora", recipe="serve the merged weights"),
    _switch("lora_paths", recipe="serve the merged weights"),
    _switch("enable_torch_compile"),
    # Where keys and values live.
    _switch("disable_radix_cache", recipe="leave the radix cache on"),
    _switch("radix_cache_backend", recipe="leave it out, compression brings its own tree"),
    _switch("enable_session_radix_cache"),
    _switch("enable_streaming_session"),
    _switch("strip_thinking_cache"),
    _switch("enable_hierarchical_cache"),
    _switch("hicache_storage_backend"),
    _switch("enable_unified_cache_external_linker"),
    _switch("enable_lmcache"),
    _switch("enable_flexkv"),
    _switch("enable_hisparse"),
    _switch("enable_page_major_kv_layout"),
    _switch("enable_unified_memory"),
    _switch("enable_memory_saver"),
    _switch("prefill_only_disable_kv_cache"),
    _switch("kv_canary"),
    # Processes and servers that do not load plugins, or see only a part of a request.
    _switch("disaggregation_mode", recipe="serve prefill and decode in one server"),
    _switch("encoder_only", recipe="serve the whole model in one server"),
    _switch("language_only", recipe="serve the whole model in one server"),
    _switch("smg_grpc_mode", recipe="use the HTTP server or sglang.Engine"),
    _size("tokenizer_worker_num", "--tokenizer-worker-num above 1", "use 1"),
    _size("detokenizer_worker_num", "--detokenizer-worker-num above 1", "use 1"),
    Refusal(
        "model_impl", "--model-impl transformers", lambda value: value == "transformers", "use --model-impl sglang"
    ),
    Refusal(
        "kv_cache_dtype",
        "--kv-cache-dtype with a quantized type",
        lambda value: value not in KV_CACHE_DTYPES,
        f"use one of {', '.join(KV_CACHE_DTYPES)}",
    ),
)


def check_flags(server_args: Any, settings: Settings) -> None:
    """Refuse what the user asked for explicitly, before SGLang resolves it or refuses it in other words.

    Raises
    ------
    ValueError
        One sentence that names the flag and the legal recipe; the first that applies.
    """
    for refusal in REFUSALS:
        if refusal.applies(getattr(server_args, refusal.field)):
            raise _refused(refusal.flag, settings, refusal.recipe)
    # Before SGLang has resolved the device, what any of them can do passes.
    legal = ATTENTION_BACKENDS.get(server_args.device, ATTENTION_BACKENDS["cuda"])
    recipe = f"use --attention-backend {' or '.join(legal)}"
    for phase in ("", "prefill_", "decode_"):
        backend = getattr(server_args, f"{phase}attention_backend")
        if backend is not None and backend not in legal:
            raise _refused(f"--{phase.replace('_', '-')}attention-backend {backend}", settings, recipe)


def check_server_args(view: Any, settings: Settings) -> None:
    """Refuse resolved arguments that compression does not work with, whoever chose them.

    Parameters
    ----------
    view : resolved server arguments, SGLang's ResolvingConfig or anything with its fields.
    settings : what the user asked for.

    Raises
    ------
    ValueError
        One sentence that names the flag and the legal recipe; the first that applies.
    """
    check_flags(view, settings)
    if view.device not in DEVICES:
        raise _refused(f"--device {view.device}", settings, f"use one of {', '.join(DEVICES)}")
    if view.device == "cuda":
        _check_cuda_graphs(view, settings)
    if view.page_size != settings.config.page_size:
        recipe = f"the compressor's page_size is {settings.config.page_size}, SGLang must use the same"
        raise _refused(f"--page-size {view.page_size}", settings, recipe)
    _check_environment(view, settings)


def check_kernels(view: Any, model_config: Any, settings: Settings) -> None:
    """Refuse kernels of the decode step that cannot serve this model in the way that was asked for.

    Parameters
    ----------
    view : as in `check_server_args`.
    model_config : SGLang's; its dtype, head size and heads count.

    Raises
    ------
    ValueError
        One sentence; also what HYBRIDKV_KERNELS forces and cannot be.
    """
    if view.device != "cuda":
        return
    dtype, head_dim = model_config.dtype, model_config.head_dim
    group_size = model_config.num_attention_heads // model_config.get_total_num_kv_heads()
    others = " or ".join(name for name in ATTENTION_BACKENDS["cuda"] if name not in (FLASHINFER, CPU_BACKEND))
    if _decode_backend(view) == FLASHINFER:
        reason = flashinfer.shape_obstacle(dtype, head_dim)
        if reason is not None:
            raise _refused(f"--attention-backend {FLASHINFER} ({reason})", settings, f"use {others}")
        if isinstance(settings.config, RetrievalConfig) and settings.config.estimates:
            recipe = f"use --attention-backend {others}, or 'drop'"
            raise _refused(f"unretrieved = 'estimate' on --attention-backend {FLASHINFER}", settings, recipe)
    graphs = view.cuda_graph_config.decode.backend
    if graphs != "disabled" and dispatch.choose(view.device, dtype, head_dim, group_size) == "naive":
        reason = dispatch.describe(view.device, dtype, head_dim, group_size)
        recipe = "these kernels cannot be captured, use --cuda-graph-backend-decode disabled"
        raise _refused(f"--cuda-graph-backend-decode {graphs} with kernels {reason}", settings, recipe)


def check_model(model_config: Any, settings: Settings) -> None:
    """Refuse a model whose attention was not verified or that the compressor does not fit; ValueError, one sentence."""
    architecture = model_config.hf_config.architectures[0]
    if architecture not in ARCHITECTURES:
        raise _refused(f"--model-path of a {architecture}", settings, f"supported are {', '.join(ARCHITECTURES)}")
    compressor = get_compressor(settings.name)(settings.config)
    config = Path(model_config.model_path) / "config.json"
    fingerprint = hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None
    compressor.bind(model_config.num_hidden_layers, model_config.get_total_num_kv_heads(), fingerprint)


def _check_cuda_graphs(view: Any, settings: Settings) -> None:
    graphs = view.cuda_graph_config
    if graphs.prefill.backend != "disabled":
        # The observation runs in Python between the layers of a prefill, and sees every chunk's own lengths.
        flag = f"--cuda-graph-backend-prefill {graphs.prefill.backend} (CUDA graphs)"
        raise _refused(flag, settings, "use --cuda-graph-backend-prefill disabled")
    if graphs.decode.backend not in DECODE_GRAPHS:
        flag = f"--cuda-graph-backend-decode {graphs.decode.backend} (CUDA graphs)"
        raise _refused(flag, settings, f"use --cuda-graph-backend-decode {' or '.join(DECODE_GRAPHS)}")


def _decode_backend(view: Any) -> str:
    return view.decode_attention_backend or view.attention_backend


def _check_environment(view: Any, settings: Settings) -> None:
    from sglang.srt.environ import envs

    if envs.SGLANG_RUST_SERVER.get():
        raise _refused("SGLANG_RUST_SERVER", settings, "unset it")
    if envs.SGLANG_ENABLE_METADATA_GLUE_GRAPH.get() and _decode_backend(view) == FLASHINFER:
        # It replays the first steps' host work, and FlashInfer's plans are host work that changes.
        recipe = f"unset it or use an --attention-backend other than {FLASHINFER}"
        raise _refused("SGLANG_ENABLE_METADATA_GLUE_GRAPH", settings, recipe)


def _refused(flag: str, settings: Settings, recipe: str) -> ValueError:
    return ValueError(f"{flag} cannot be combined with --kv-compressor {settings.name}; {recipe}")
