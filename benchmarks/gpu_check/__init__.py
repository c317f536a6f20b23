"""One command proves what only a GPU host can prove; elsewhere it runs what does not need a GPU (docs/gpu.md)."""
