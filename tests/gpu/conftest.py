"""Tests that need a CUDA device: all of this folder. The dry run of tests/gpu/run.sh runs them on the CPU instead."""

import os
from pathlib import Path

import pytest
from figures import DEVICE

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> str:
    """cuda, or cpu in a dry run."""
    import torch

    device = os.environ.get(DEVICE, "cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        pytest.fail("no CUDA device; `bash tests/gpu/run.sh --dry` runs these tests on the CPU")
    return device
