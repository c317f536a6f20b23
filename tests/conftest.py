import pytest


def pytest_collection_modifyitems(items):
    """Fast tests first, then slow ones, then those that need a server; GPU tests are skipped without a GPU."""
    items.sort(key=lambda item: 2 if has_marker(item, "server") else 1 if has_marker(item, "slow") else 0)
    gpu_items = [item for item in items if has_marker(item, "gpu")]
    if gpu_items and not cuda_is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def has_marker(item, name):
    return item.get_closest_marker(name) is not None


def cuda_is_available():
    import torch

    return torch.cuda.is_available()
