"""Models that several modules of tests use and none changes: written once per test process."""

import pytest
from small_data import tiny_coca


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A tiny CoCa, as ``--model`` takes it."""
    return tiny_coca(tmp_path_factory.mktemp("models") / "coca")
