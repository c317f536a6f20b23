"""Qwen2 under a name that nothing here verifies."""

from sglang.srt.models.qwen2 import Qwen2ForCausalLM


class UnverifiedForCausalLM(Qwen2ForCausalLM):
    """Right in every way."""


EntryClass = UnverifiedForCausalLM
