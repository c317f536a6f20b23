"""SGLang's frontend language against a compressing server, with settings of its own for each program."""

from __future__ import annotations

import copy
from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint as StockEndpoint
from sglang.lang.ir import SglSamplingParams

from sglang_hybridkv.requests.settings import KEY


class RuntimeEndpoint(StockEndpoint):
    """A backend for `sgl.set_default_backend` or `program.run(backend=...)`; `sgl.gen` itself takes no custom_params.

    Parameters
    ----------
    kv_compressor : settings of every `sgl.gen` that runs on it, such as ``{"budget": 0.2}``; None leaves the server's.

    Notes
    -----
    A bad setting raises what a bad request does: RuntimeError with the server's sentence.
    """

    def __init__(self, *args: Any, kv_compressor: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.kv_compressor = kv_compressor

    def generate(self, s, sampling_params: SglSamplingParams):
        """As stock."""
        return super().generate(s, self._with_settings(sampling_params))

    def generate_stream(self, s, sampling_params: SglSamplingParams):
        """As stock."""
        return super().generate_stream(s, self._with_settings(sampling_params))

    def _with_settings(self, sampling_params: SglSamplingParams) -> SglSamplingParams:
        if self.kv_compressor is None:
            return sampling_params
        own: Any = copy.copy(sampling_params)
        own.to_srt_kwargs = lambda: {**SglSamplingParams.to_srt_kwargs(own), "custom_params": {KEY: self.kv_compressor}}
        return own
