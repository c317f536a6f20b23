"""What can only be proven on a GPU host, in one command; on any other machine as far as that goes (docs/gpu.md)."""
