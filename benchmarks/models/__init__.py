"""Small checkpoints that the benchmarks and tests serve."""
