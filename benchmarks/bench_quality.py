"""Measure answers under compression: ``python -m benchmarks.bench_quality --preset smoke --json``."""

from __future__ import annotations

import sys

from benchmarks.quality.cli import main

if __name__ == "__main__":
    sys.exit(main())
