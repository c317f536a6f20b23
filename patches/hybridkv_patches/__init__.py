"""HybridKV inside an unmodified SGLang: the entry point ``sglang.srt.plugins: hybridkv``.

Two stages, so that a server without ``--kv-compressor`` stays as it is:

1. `register`, when SGLang loads its plugins in a process: the flags, the arguments of ``sglang.Engine``, and a
   look at the configuration that the process publishes.
2. `runtime_context.activate`, when that configuration asks for compression: all other changes, and the proof that each
   is in place.

`ledger.py` lists every change with its reason; no module here imports this one.
"""

_registered = False


def register() -> None:
    """Entry point: make the flags known. Changes nothing for a server that does not set them."""
    global _registered
    if _registered:
        return
    _registered = True
    from hybridkv_patches import activation, engine, resolution_hooks, runtime_context, server_args

    # A process that has not imported the engine is not in Engine.__init__, and is spared the import.
    engine_entries = engine.ENTRIES if engine.is_imported() else ()
    if activation.version_fault() is None:
        # The flag first: whatever fails after it can be named in the answer to it.
        activation.install(server_args.ENTRIES + resolution_hooks.ENTRIES + runtime_context.ENTRIES + engine_entries)
    else:
        # Only the flag, so that asking for compression gets an answer; the rest may not fit this SGLang.
        activation.install(server_args.FLAG_ENTRIES + engine_entries)
