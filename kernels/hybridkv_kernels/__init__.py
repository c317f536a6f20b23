"""Kernels of sglang-hybridkv: torch only, no SGLang. One folder per operation, each with its readable `naive.py`.

`head_pages` says where rows lie, `chunks` what dynamic heads retrieve. A *page* is P tokens of all layers and heads; a
*head page* is P rows of one KV head; a *host page* is a page of the host store; a *chunk* is what a dynamic head
retrieves together, a page or a part of it; its *summary* is what stands for it on the device. A *row* is a request's
in the table, or one token's of one head in the pool; a *slot* is a token's place in the pool.

Shape letters: N tokens of a prompt, B requests, L layers, H KV heads, G query heads per KV head, D head dim,
P page rows, C chunks of a prompt, T tokens of a chunk, W observation rows, M head pages of the pool, R request rows.
"""
