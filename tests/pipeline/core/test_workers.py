"""How many cores there are for worker processes."""

import os

import pytest

from pipeline.core import workers
from pipeline.core.process_map import map_in_order
from pipeline.core.workers import BLAS_THREADS, usable_cores


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000", 8),
        ("400000 100000", 4),
        ("250000 100000", 3),
        ("50000 100000", 1),
        ("6400000 100000", 8),
        ("", 8),
    ],
)
def test_a_containers_quota_bounds_them(quota, cores, tmp_path, monkeypatch):
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    monkeypatch.setattr(workers, "CPU_QUOTA", str(file))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert usable_cores() == cores
    file.unlink()
    assert usable_cores() == 8, "no container"


@pytest.mark.integration
@pytest.mark.parametrize(("given", "found"), [(None, "1"), ("3", "3")])
def test_a_worker_has_one_thread_in_blas_unless_told_otherwise(given, found, monkeypatch):
    monkeypatch.setenv(BLAS_THREADS, given or "")
    if given is None:
        monkeypatch.delenv(BLAS_THREADS)
    assert list(map_in_order(os.getenv, [BLAS_THREADS], 2)) == [found]
