"""Every registered attention backend can become one that serves compressed requests."""

import functools

from hybridkv_patches.hook import Hook
from sglang_hybridkv.srt import settings

HOOKS: tuple[Hook, ...] = ()  # the registry is a dict of factories: SGLang's hooks cannot wrap its entries


def install() -> None:
    """Wrap the factories in place, under their own names: SGLang compares backend names as strings."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    for name, factory in list(ATTENTION_BACKENDS.items()):
        ATTENTION_BACKENDS[name] = _wrap(factory)


def _wrap(factory):
    @functools.wraps(factory)
    def make(runner):
        backend = factory(runner)
        if settings.active() is None or getattr(runner, "is_draft_worker", False):
            return backend
        from sglang_hybridkv.srt.backends import make_hybrid

        return make_hybrid(backend)

    return make
