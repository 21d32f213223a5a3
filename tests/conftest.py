"""Shared by all tests: what to do when a Debian package is not there, and no network but loopback."""

import os
from collections.abc import Iterator
from typing import Any

import pytest


def skip_or_fail(reason: str) -> None:
    """Skip a test that needs something this machine lacks; fail instead under CLIPMILL_NO_SKIP=1, as CI runs."""
    if os.environ.get("CLIPMILL_NO_SKIP") == "1":
        pytest.fail(f"would be skipped: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def one_thread():
    """torch on one thread while a module's tests run."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Any]:
    """A real Slurm of two nodes on this host while a module's tests run."""
    from slurm_cluster import NoClusterError, cluster

    try:
        with cluster() as here:
            yield here
    except NoClusterError as error:
        skip_or_fail(str(error))
