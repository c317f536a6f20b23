"""Per-head KV-cache compression for SGLang: HybridKV, re-implemented (arXiv 2604.05887)."""

__version__ = "0.1.0"
