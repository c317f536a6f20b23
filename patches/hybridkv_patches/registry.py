"""The default radix tree becomes its subclass that commits compressed prompts."""

from hybridkv_patches.hook import Hook
from sglang_hybridkv.srt import settings


def create_tree(original, ctx, *, cache_class=None):
    """The default factory calls this without a class; nobody has to pass --radix-cache-backend."""
    if settings.active() is not None:
        from sglang_hybridkv.srt.radix_cache import HybridRadixCache

        cache_class = HybridRadixCache
    return original(ctx, cache_class=cache_class)


ENTRIES = (
    Hook(
        target="sglang.srt.mem_cache.registry.create_unified_radix_cache",
        kind="around",
        function=create_tree,
        why="the default tree's class is an argument that no flag reaches",
        until="a registered --radix-cache-backend can be the default",
    ),
)
