"""Questions of published benchmarks, read from a local folder; nothing is downloaded."""

from benchmarks.datasets.base import Example, chat_message
from benchmarks.datasets.loaders import Case, dataset_names, load, load_cases, score_cases

__all__ = ["Case", "Example", "chat_message", "dataset_names", "load", "load_cases", "score_cases"]
