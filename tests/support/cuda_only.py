"""For the tests of tests/gpu."""

import pytest


def only_on_cuda(device: str) -> None:
    """Skip what only a card can show in the dry run, which is on the CPU."""
    if not device.startswith("cuda"):
        pytest.skip("only a CUDA device can show this")
