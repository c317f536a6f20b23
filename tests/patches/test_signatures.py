"""Every symbol that the ledger names is in each supported release, and our functions take what SGLang hands them."""

import inspect
from importlib.metadata import distribution
from pathlib import Path

import pytest

pytest.importorskip("sglang")

from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.version import __version__ as installed

from hybridkv_patches import ledger
from hybridkv_patches.hook import Hook
from sglang_hybridkv.srt import sglang_versions
from sglang_hybridkv.srt.allocator import HybridAllocator
from sglang_hybridkv.srt.attention_backend import HybridAttnMixin
from sglang_hybridkv.srt.flashinfer_backend import HybridFlashInferMixin
from sglang_hybridkv.srt.memory_pool import HybridTokenToKVPool
from sglang_hybridkv.srt.output_streamer import HybridOutputStreamer, HybridSender
from sglang_hybridkv.srt.pool_stats import HybridPoolStats
from sglang_hybridkv.srt.prefill_budget import HybridPrefillBudget
from sglang_hybridkv.srt.radix_cache import HybridRadixCache
from tests.patches import signatures

LOOKS = signatures.read_table()
HOOKS = [entry for modules in ledger.stages().values() for module in modules for entry in module.ENTRIES]
HOOKS = [entry for entry in HOOKS if isinstance(entry, Hook)]
every_release = pytest.mark.parametrize("release", sorted(LOOKS))


def calls(signature):
    """Arguments of a call with all parameters that have no default, and of one that names the others, too."""
    named = [one for one in signature.parameters.values() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    needed = [one for one in named if one.default is one.empty]
    positional = [None for one in needed if one.kind is not one.KEYWORD_ONLY]
    keywords = {one.name: None for one in needed if one.kind is one.KEYWORD_ONLY}
    yield positional, keywords
    yield positional, keywords | {one.name: None for one in named if one not in needed}


def test_the_releases_of_the_table_are_supported_and_this_one_is_among_them():
    assert all(sglang_versions.is_supported(release) for release in LOOKS)
    assert installed in LOOKS, f"run `python -m tests.patches.signatures` with the wheel of SGLang {installed}"


@every_release
def test_the_table_has_what_the_ledger_names(release):
    assert sorted(LOOKS[release]) == signatures.TARGETS, "run `python -m tests.patches.signatures` with all wheels"


def test_the_installed_release_looks_as_the_table_says():
    read = signatures.reader_of_folder(Path(distribution("sglang").locate_file("")))
    assert signatures.look_of(read, signatures.TARGETS) == LOOKS[installed]


@every_release
@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.target.rpartition(".")[2])
def test_a_hook_takes_what_its_target_is_called_with(release, hook):
    ours = inspect.signature(hook.function)
    handed_before = 0 if hook.kind == "before" else 1  # the result, or the original
    for positional, keywords in calls(signatures.as_signature(LOOKS[release][hook.target])):
        ours.bind(*[None] * handed_before, *positional, **keywords)


HYBRIDS = [
    HybridAllocator,
    HybridOutputStreamer,
    HybridPoolStats,
    HybridPrefillBudget,
    HybridRadixCache,
    HybridSender,
    HybridTokenToKVPool,
    type("HybridTorchNative", (HybridAttnMixin, TorchNativeAttnBackend), {}),
    type("HybridTriton", (HybridAttnMixin, TritonAttnBackend), {}),
    type("HybridFlashInfer", (HybridFlashInferMixin, FlashInferAttnBackend), {}),
]


@pytest.mark.parametrize("hybrid", HYBRIDS, ids=lambda hybrid: hybrid.__name__)
def test_a_method_that_overrides_one_of_sglang_s_takes_what_it_takes(hybrid):
    """Of the installed release."""
    is_ours = {base: base.__module__.startswith("sglang_hybridkv.") for base in hybrid.__mro__}
    stock_bases = [base for base, ours in is_ours.items() if not ours and base.__module__.startswith("sglang.")]
    checked = []
    for name in {name for base, ours in is_ours.items() if ours for name in vars(base)}:
        stock = next((vars(base)[name] for base in stock_bases if name in vars(base)), None)
        ours = inspect.getattr_static(hybrid, name)
        if name == "__init__" or not (inspect.isfunction(stock) and inspect.isfunction(ours)):
            continue
        for positional, keywords in calls(inspect.signature(stock)):
            inspect.signature(ours).bind(*positional, **keywords)
        checked.append(name)
    assert checked
