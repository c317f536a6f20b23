"""Models that SGLang loads beside its own (SGLANG_EXTERNAL_MODEL_PACKAGE)."""
