"""Tiny datasets that several modules of tests read and none changes: written once per test process."""

import pytest
from small_catlip import write_labelled
from small_training import write_clip_root


@pytest.fixture(scope="session")
def clip_root(tmp_path_factory) -> str:
    """ROOT of a packed dataset with a teacher's cache, and a tiny CLIP student in models/clip."""
    return write_clip_root(tmp_path_factory.mktemp("clip-root"))


@pytest.fixture(scope="session")
def labelled_root(tmp_path_factory) -> str:
    """ROOT of a packed dataset with synsets and a vocabulary."""
    folder = tmp_path_factory.mktemp("labelled-root")
    write_labelled(folder)
    return str(folder)
