"""SGLang builds its KV pool and allocator here; with a compressor it builds ours."""

import logging

from hybridkv_patches.hook import Hook
from sglang_hybridkv.srt import settings

logger = logging.getLogger(__name__)

_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"


def refuse_model(configurator, active):
    """RuntimeError, one sentence, unless the loaded model meets all requirements."""
    from sglang_hybridkv.srt.model_requirements import unmet_requirement

    config = configurator.model_config
    unmet = unmet_requirement(configurator.model, config.num_hidden_layers)
    if unmet is not None:
        fault = (
            f"--model-path of a {config.hf_config.architectures[0]} cannot be combined with --kv-compressor "
            f"{active.name}; compression needs {unmet}"
        )
        logger.error(fault)
        raise RuntimeError(fault)


def build_pool(original, configurator, **kwargs):
    """The same pool, with all layers in one tensor."""
    if settings.active() is not None:
        from sglang_hybridkv.srt.memory_pool import HybridTokenToKVPool

        kwargs["mha_pool_class"] = HybridTokenToKVPool
    return original(configurator, **kwargs)


def build_allocator(original, configurator, **kwargs):
    """The same allocator as one that knows of compressed pages, and the state it shares with the pool.

    Every model passes here, whatever its pool, once it is loaded: one that compression cannot serve ends here.
    """
    active = settings.active()
    if active is not None:
        refuse_model(configurator, active)
    stock = original(configurator, **kwargs)
    if active is None:
        return stock
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

    from sglang_hybridkv.srt.allocator import HybridAllocator
    from sglang_hybridkv.srt.compression import Compression
    from sglang_hybridkv.srt.model_requirements import model_windows
    from sglang_hybridkv.srt.ranks import tensor_parallel_ranks
    from sglang_hybridkv.srt.refusals import check_windows

    if type(stock) is not PagedTokenToKVPoolAllocator:
        raise RuntimeError(
            f"--kv-compressor needs SGLang's paged allocator, got {type(stock).__name__}; where layers have a window, "
            "--disable-hybrid-swa-memory gives the model one pool"
        )
    pool = stock.get_kvcache()
    ours = HybridAllocator(stock.size, stock.page_size, stock.dtype, stock.device, pool, stock.need_sort)
    num_rows, max_context = kwargs["req_to_token_pool"].req_to_token.shape
    num_kv_heads = configurator.model_config.get_total_num_kv_heads()
    pool.windows = model_windows(configurator.model)
    ranks = tensor_parallel_ranks()
    try:
        check_windows(resolving_view(configurator.server_args), pool.windows, active)
        compression = Compression(active, pool, ours, num_rows, max_context, ranks=ranks, num_kv_heads=num_kv_heads)
    except ValueError as error:
        logger.error(error)
        raise RuntimeError(str(error)) from None
    pool.cache, ours.compression = compression.cache, compression
    return ours


ENTRIES = (
    Hook(
        target=f"{_CONFIGURATOR}._build_mha_kv_pool",
        kind="around",
        function=build_pool,
        why="the pool class is chosen inside the configurator, by no flag",
        until="SGLang lets a plugin name the pool class",
    ),
    Hook(
        target=f"{_CONFIGURATOR}._build_token_to_kv_pool_allocator",
        kind="around",
        function=build_allocator,
        why="the allocator class is chosen inside the configurator, by no flag",
        until="SGLang lets a plugin name the allocator class",
    ),
)
