"""What a compressing server refuses to start with, and what it refuses to answer: tables, one sentence a row.

A row goes when a test proves the combination. docs/refusals.md is generated from both tables.
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
DECODE_GRAPHS_ALLOWED = ("full", "disabled")
KV_CACHE_DTYPES = ("auto", "bf16", "bfloat16")
# Read in sglang/srt/models: these hand K after RoPE to RadixAttention, which writes it through the attention backend;
# or their RoPE kernel has written it before (models with experts, on CUDA). tests/e2e/test_equality.py asks each.
ARCHITECTURES = (
    "Gemma3ForCausalLM",
    "Glm4vMoeForConditionalGeneration",
    "InternVLChatModel",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
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
    since : the release of SGLang that brought the argument, where not every supported one has it.
    """

    field: str
    flag: str
    applies: Callable[[Any], bool]
    recipe: str
    since: str | None = None

    def is_known_to(self, server_args: Any) -> bool:
        """Whether `server_args`, ServerArgs or one of its objects, have the argument."""
        return self.since is None or hasattr(server_args, self.field)


@dataclasses.dataclass(frozen=True)
class Condition:
    """A refusal that depends on more than the value of one server argument.

    Attributes
    ----------
    flag, recipe : as in `Refusal`; names in braces stand for what the user gave.
    when : the condition in words, for docs/refusals.md.
    """

    flag: str
    recipe: str
    when: str

    def filled(self, **values: Any) -> Condition:
        """The same with `values` in place of the names in braces."""
        return dataclasses.replace(self, flag=self.flag.format(**values), recipe=self.recipe.format(**values))


def _is_set(value: Any) -> bool:
    return value not in (None, False, [], {}, "", "null", "none")


def _above_one(value: Any) -> bool:
    return value is not None and value > 1


def _switch(field: str, flag: str | None = None, recipe: str = "leave it out", since: str | None = None) -> Refusal:
    return Refusal(field, flag or "--" + field.replace("_", "-"), _is_set, recipe, since)


def _size(field: str, flag: str, recipe: str, since: str | None = None) -> Refusal:
    return Refusal(field, flag, _above_one, recipe, since)


_ONE_GPU = "run one server per device and spread requests over them"

REFUSALS: tuple[Refusal, ...] = (
    # Parallelism other than that of tensors: layers or requests of one model would be in several places.
    _switch("enable_dp_attention", recipe=_ONE_GPU),
    _size("dp_size", "--dp-size above 1", f"it is not proven yet, {_ONE_GPU}"),
    _size("attn_dp_size", "--attn-dp-size above 1", _ONE_GPU, since="0.5.22"),
    _size("pp_size", "--pp-size above 1", "use --pp-size 1"),
    _size("dcp_size", "--decode-context-parallel-size above 1", "leave it out"),
    _size("attn_cp_size", "--attention-context-parallel-size above 1", "leave it out"),
    _switch("enable_prefill_cp"),
    _size("ep_size", "--ep-size above 1", "it is not proven yet, leave it out"),
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
    # Names its convention by --speculative-algorithm, hence before that.
    _switch("enable_return_aux_hidden_states", since="0.5.23"),
    _switch("speculative_algorithm", recipe="serve without speculative decoding"),
    _switch("decoupled_spec_role", recipe="serve without speculative decoding"),
    _switch("dllm_algorithm", recipe="serve an autoregressive model"),
    _switch("is_embedding", recipe="serve a generating model"),
    _switch("enable_deterministic_inference"),
    _switch("enable_lora", recipe="serve the merged weights"),
    _switch("lora_paths", recipe="serve the merged weights"),
    _switch("enable_torch_compile"),
    # Their fused steps attend without the attention backend.
    _switch("enable_amd_monokernel", since="0.5.23"),
    _switch("enable_nvidia_megakernel", since="0.5.23"),
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
    _switch("enable_kv_cache_sharding", since="0.5.22"),
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


_CUDA_DECODE = " or ".join(name for name in ATTENTION_BACKENDS["cuda"] if name not in (FLASHINFER, CPU_BACKEND))

OTHER_BACKEND = Condition(
    "--{phase}attention-backend {backend}",
    "use --attention-backend {legal}",
    "compression does not serve this attention backend on this device; the flags of each phase are checked, too",
)
OTHER_DEVICE = Condition(
    "--device {device}", f"use one of {', '.join(DEVICES)}", "compression has no kernels for this device"
)
PREFILL_GRAPHS = Condition(
    "--cuda-graph-backend-prefill {backend} (CUDA graphs)",
    "use --cuda-graph-backend-prefill disabled",
    "prefill would run in CUDA graphs, where compression cannot observe it; without the flag, compression switches "
    "them off itself",
)
DECODE_GRAPHS = Condition(
    "--cuda-graph-backend-decode {backend} (CUDA graphs)",
    f"use --cuda-graph-backend-decode {' or '.join(DECODE_GRAPHS_ALLOWED)}",
    "decode would run in CUDA graphs of another kind than SGLang's full ones",
)
OTHER_PAGE_SIZE = Condition(
    "a page size of {page_size} tokens, which SGLang chose,",
    "give --page-size {expected}, that of the compressor",
    "SGLang ended up with pages of another size than the compressor's",
)
CHUNK_SIZE = Condition(
    "--chunked-prefill-size {size}",
    "the compressor's page_size is {page_size}, use a multiple of it, such as {multiple}",
    "the size is not a multiple of the compressor's page_size",
)
RUST_SERVER = Condition("SGLANG_RUST_SERVER", "unset it", "this environment variable is set")
GLUE_GRAPH = Condition("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "unset it", "this environment variable is set")
FLASHINFER_SHAPE = Condition(
    f"--attention-backend {FLASHINFER} ({{reason}})",
    f"use {_CUDA_DECODE}",
    "FlashInfer has no decode kernel for the model's dtype or head size",
)
FLASHINFER_ESTIMATE = Condition(
    f"unretrieved = 'estimate' on --attention-backend {FLASHINFER}",
    f"use --attention-backend {_CUDA_DECODE}, or 'drop'",
    "FlashInfer's kernels cannot let a mean key and a mean value stand for a chunk",
)
FLASHINFER_WINDOWS = Condition(
    f"--attention-backend {FLASHINFER} (layers with a window)",
    f"use --attention-backend {_CUDA_DECODE}",
    "some layers of the model attend to a window of the last tokens",
)
NAIVE_GRAPHS = Condition(
    "--cuda-graph-backend-decode {backend} with kernels {kernels}",
    "these kernels cannot be captured, use --cuda-graph-backend-decode disabled",
    "decode would be captured in CUDA graphs, but the torch references serve it (troubleshooting.md says why they may)",
)
OTHER_MODEL = Condition(
    "--model-path of a {architecture}",
    "it is not among the verified ones (docs/models.md), to try it set unverified_model = true in "
    "--kv-compressor-config",
    "no test of this project compares this architecture with stock SGLang, and unverified_model is not set",
)


@dataclasses.dataclass(frozen=True)
class RequestRefusal:
    """A field of a request that SGLang does not serve on a compressing server, or serves wrongly.

    Attributes
    ----------
    field : name in the request, or in its sampling parameters.
    applies : whether a value of the field is refused.
    recipe : what to do instead, an imperative.
    """

    field: str
    applies: Callable[[Any], bool]
    recipe: str


# SGLang itself refuses input_embeds and beams here, with a hint to flags that are refused above. A bootstrap host keeps
# a prompt out of the radix tree; of more than one chunk, its pages are lost, and SGLang ends the server.
REQUEST_REFUSALS: tuple[RequestRefusal, ...] = (
    RequestRefusal("bootstrap_host", _is_set, "leave it out, prefill and decode are in one server"),
    RequestRefusal("bootstrap_room", lambda value: value is not None, "leave it out, as bootstrap_host"),
    RequestRefusal("input_embeds", lambda value: value is not None, "send text or input_ids"),
    RequestRefusal("beam_width", _above_one, "leave it out or use 1"),
)
# Of /v1/score alone; the same hint.
SCORE_EXTRACTION = RequestRefusal("score_extraction_token", _is_set, "leave it out and send each item by itself")
CONDITIONS: tuple[Condition, ...] = (
    OTHER_MODEL,
    OTHER_DEVICE,
    OTHER_BACKEND,
    PREFILL_GRAPHS,
    DECODE_GRAPHS,
    NAIVE_GRAPHS,
    FLASHINFER_SHAPE,
    FLASHINFER_ESTIMATE,
    FLASHINFER_WINDOWS,
    OTHER_PAGE_SIZE,
    CHUNK_SIZE,
    RUST_SERVER,
    GLUE_GRAPH,
)


def check_flags(server_args: Any, settings: Settings) -> None:
    """Refuse what the user asked for explicitly, before SGLang resolves it or refuses it in other words.

    Raises
    ------
    ValueError
        One sentence that names the flag and the legal recipe; the first that applies.
    """
    for refusal in REFUSALS:
        if refusal.is_known_to(server_args) and refusal.applies(getattr(server_args, refusal.field)):
            raise _refused(refusal, settings)
    size, page_size = server_args.chunked_prefill_size, settings.config.page_size
    if size is not None and size > 0 and size % page_size:
        multiple = max(size // page_size, 1) * page_size
        raise _refused(CHUNK_SIZE.filled(size=size, page_size=page_size, multiple=multiple), settings)
    # Before SGLang has resolved the device, what any of them can do passes.
    legal = ATTENTION_BACKENDS.get(server_args.device, ATTENTION_BACKENDS["cuda"])
    for phase in ("", "prefill_", "decode_"):
        backend = getattr(server_args, f"{phase}attention_backend")
        if backend is not None and backend not in legal:
            words = {"phase": phase.replace("_", "-"), "backend": backend, "legal": " or ".join(legal)}
            raise _refused(OTHER_BACKEND.filled(**words), settings)


def check_request(request: Any, settings: Settings) -> None:
    """Refuse a request with a field that is not served with compression.

    Parameters
    ----------
    request : SGLang's GenerateReqInput of one request, or of several with a list in each field.

    Raises
    ------
    ValueError
        One sentence that names the field and what to do instead, which SGLang answers with HTTP status 400.
    """
    sampling = request.sampling_params
    sampling = sampling if isinstance(sampling, list) else [sampling or {}]
    for row in REQUEST_REFUSALS:
        value = getattr(request, row.field, None)
        given = [*(value if isinstance(value, list) else [value]), *(params.get(row.field) for params in sampling)]
        if any(row.applies(one) for one in given):
            raise refused_request(row, settings)


def refused_request(row: RequestRefusal, settings: Settings) -> ValueError:
    """What a client is told of a field that is not served."""
    return ValueError(f"{row.field} is not served with --kv-compressor {settings.name}; {row.recipe}")


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
        raise _refused(OTHER_DEVICE.filled(device=view.device), settings)
    if view.device == "cuda":
        _check_cuda_graphs(view, settings)
    if view.page_size != settings.config.page_size:
        sizes = {"page_size": view.page_size, "expected": settings.config.page_size}
        raise _refused(OTHER_PAGE_SIZE.filled(**sizes), settings)
    _check_environment(settings)


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
    dtype, head_dim = model_config.dtype, model_config.head_dim
    group_size = model_config.num_attention_heads // model_config.get_total_num_kv_heads()
    chosen = dispatch.choose(view.device, dtype, head_dim, group_size)
    if view.device != "cuda":
        return
    if _decode_backend(view) == FLASHINFER:
        reason = flashinfer.shape_obstacle(dtype, head_dim)
        if reason is not None:
            raise _refused(FLASHINFER_SHAPE.filled(reason=reason), settings)
        if isinstance(settings.config, RetrievalConfig) and settings.config.estimates:
            raise _refused(FLASHINFER_ESTIMATE, settings)
    graphs = view.cuda_graph_config.decode.backend
    if graphs != "disabled" and chosen == "naive":
        kernels = dispatch.describe(view.device, dtype, head_dim, group_size)
        raise _refused(NAIVE_GRAPHS.filled(backend=graphs, kernels=kernels), settings)


def check_windows(view: Any, windows: tuple[int, ...], settings: Settings) -> None:
    """Refuse a decode backend that does not serve the loaded model's layers with a window; ValueError, one sentence.

    Parameters
    ----------
    view : as in `check_server_args`.
    windows : as in `HeadPageLayout`.
    """
    if windows and view.device == "cuda" and _decode_backend(view) == FLASHINFER:
        raise _refused(FLASHINFER_WINDOWS, settings)


def check_model(model_config: Any, settings: Settings) -> None:
    """Refuse a model whose attention was not verified or that the compressor does not fit; ValueError, one sentence."""
    architecture = model_config.hf_config.architectures[0]
    if architecture not in ARCHITECTURES and not settings.config.unverified_model:
        raise _refused(OTHER_MODEL.filled(architecture=architecture), settings)
    compressor = get_compressor(settings.name)(settings.config)
    config = Path(model_config.model_path) / "config.json"
    fingerprint = hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None
    compressor.bind(model_config.num_hidden_layers, model_config.get_total_num_kv_heads(), fingerprint)


def _check_cuda_graphs(view: Any, settings: Settings) -> None:
    graphs = view.cuda_graph_config
    if graphs.prefill.backend != "disabled":
        # The observation runs in Python between the layers of a prefill, and sees the own lengths of every part.
        raise _refused(PREFILL_GRAPHS.filled(backend=graphs.prefill.backend), settings)
    if graphs.decode.backend not in DECODE_GRAPHS_ALLOWED:
        raise _refused(DECODE_GRAPHS.filled(backend=graphs.decode.backend), settings)


def _decode_backend(view: Any) -> str:
    return view.decode_attention_backend or view.attention_backend


def _check_environment(settings: Settings) -> None:
    from sglang.srt.environ import envs

    if envs.SGLANG_RUST_SERVER.get():
        raise _refused(RUST_SERVER, settings)
    if envs.SGLANG_ENABLE_METADATA_GLUE_GRAPH.get():
        # It replays the first steps' host work. FlashInfer's plans change from step to step, and a step after a prompt
        # waits for the stream that writes to the host.
        raise _refused(GLUE_GRAPH, settings)


def _refused(row: Refusal | Condition, settings: Settings) -> ValueError:
    return ValueError(f"{row.flag} cannot be combined with --kv-compressor {settings.name}; {row.recipe}")
