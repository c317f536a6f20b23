"""The console script ``hybridkv``: what is done once for a model, away from a server."""
