"""Choose before SGLang does, where the user left it open: a CPU server's attention backend, prefill's graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from hybridkv_patches.entry import ProcessEntry
from hybridkv_patches.hook import PLUGIN
from sglang_hybridkv.srt import refusals
from sglang_hybridkv.srt import settings as settings_module


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolutionStep(ProcessEntry):
    """Our wrapper of a step of SGLang's argument resolution, in the registry that SGLang has for such wrappers."""

    kind: str = "resolution step"
    function: Callable[[Any, Any], None]

    def install(self) -> None:
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

        register_resolution_hook(self._step)(self.function)

    def is_installed(self) -> bool:
        from sglang.srt.arg_groups import resolution_hooks

        return self.function in resolution_hooks._HOOKS.get(self._step, ())

    @property
    def _step(self) -> str:
        return self.target.rpartition(".")[2]


def choose_cpu_backend(server_args: Any, previous: Any) -> None:
    """The one attention backend that compression works with on a CPU."""
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.arg_groups.overrides import declare_resolution

    view = resolving_view(server_args)
    is_open = view.device == "cpu" and view.attention_backend is None
    if is_open and settings_module.settings_of(server_args) is not None:
        declare_resolution(server_args, PLUGIN, attention_backend=refusals.CPU_BACKEND)
    previous(server_args)


def keep_prefill_eager(server_args: Any, previous: Any) -> None:
    """Without CUDA graphs for prefill, which compression observes; a choice of the user's own is refused in words."""
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    previous(server_args)
    is_open = (Phase.PREFILL, "backend") not in server_args._cuda_graph_config_locked
    if is_open and settings_module.settings_of(server_args) is not None:
        graphs = resolving_view(server_args).cuda_graph_config
        eager = with_phase(graphs, Phase.PREFILL, backend=Backend.DISABLED)
        declare_resolution(server_args, PLUGIN, cuda_graph_config=eager)


ENTRIES = (
    ResolutionStep(
        target="sglang.srt.arg_groups.platform_hook.handle_cpu_backends",
        function=choose_cpu_backend,
        why="on a CPU compression works with torch_native only, and SGLang chooses intel_amx",
        until="a plugin can declare the defaults that it needs",
    ),
    ResolutionStep(
        target="sglang.srt.arg_groups.cuda_graph_hook.handle_cuda_graph_config",
        function=keep_prefill_eager,
        why="a prefill inside a CUDA graph cannot be observed, and SGLang captures it by default",
        until="a plugin can declare the defaults that it needs",
    ),
)
