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


class FailuresAtOnce:
    """Prints a failure when it happens: a run that is stopped does not come to pytest's own list of them."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.getplugin("terminalreporter")
        if report.failed and terminal is not None:  # a process of pytest-xdist has none
            terminal.write_line(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(FailuresAtOnce(config))
