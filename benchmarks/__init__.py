"""Benchmarks and the demo: real servers, real requests, JSON rows."""
