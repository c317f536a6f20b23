"""Refuse requests that a compressing server cannot serve, before anything of them is done."""

from hybridkv_patches.hook import Hook
from sglang_hybridkv.srt import refusals
from sglang_hybridkv.srt import settings as settings_module


def refuse_request(_result, request):
    """AFTER normalize_batch_and_arguments, which each request passes first; SGLang answers ValueError with 400."""
    settings = settings_module.active()
    if settings is not None:
        refusals.check_request(request, settings)


ENTRIES = (
    Hook(
        target="sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments",
        kind="after",
        function=refuse_request,
        why="SGLang's hints name flags that are refused, and a prompt that is kept out of the tree ends the server",
        until="plugins can refuse a request",
    ),
)
