"""Kernels of sglang-hybridkv: torch only, no SGLang. One folder per operation, each with its readable `naive.py`.

Shape letters: N tokens of a prompt, B requests, L layers, H KV heads, G query heads per KV head, D head dim,
P page rows, C chunks of a prompt, W observation rows, M head pages of the pool, R request rows.
"""
