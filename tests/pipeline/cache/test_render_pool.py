"""Views rendered ahead into memory that is reused: the right ones, in order, in bounded memory."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from small_data import draw

from pipeline.cache import render_pool
from pipeline.cache.render_pool import MAX_BYTES, RenderJob, RenderPool, RenderQueue
from shards_spec.files import DataError
from shards_spec.images import decode_rgb
from shards_spec.views import ViewSpec, render_views

SPEC = ViewSpec(ops=1)
SIZE = 16


def jobs(count: int) -> list[RenderJob]:
    """Of one and of two views, in turn."""
    return [RenderJob(f"{row}", draw(f"{row}")[0], tuple(range(1 + row % 2))) for row in range(count)]


def rendered(job: RenderJob) -> np.ndarray:
    return render_views(decode_rgb(job.image), SPEC, job.key, job.views, SIZE)


@pytest.mark.parametrize("processes", [0, 1])
def test_more_samples_than_slots_come_in_order(processes):
    pool = RenderPool(processes, 1, rows=1, views=2, size=SIZE)
    asked = jobs(3 * len(pool.slots) + 1)
    asked[4] = RenderJob("4", b"<html>", (0,))
    found = []
    for views in RenderQueue(pool, asked, SPEC):
        found.append(views if isinstance(views, DataError) else views.copy())
    pool.shutdown()
    assert len(found) == len(asked)
    assert "does not decode" in str(found.pop(4))
    del asked[4]
    for job, views in zip(asked, found, strict=True):
        assert np.array_equal(views, rendered(job)), job.key


def test_memory_is_bounded_and_two_passes_fit():
    usual = RenderPool(0, 4, rows=256, views=8, size=32)
    assert usual.slots.shape == (2 * 4 + 2 * 32, 8, 32, 32, 3)
    large = RenderPool(0, 64, rows=512, views=1, size=4096)
    assert len(large.slots) >= 2
    assert large.slots.nbytes <= MAX_BYTES


def test_a_queue_that_is_left_early_writes_nothing_later(monkeypatch):
    render = render_pool.render
    rendering = []

    def slowly(*args):
        rendering.append(threading.get_ident())
        time.sleep(0.05)
        error = render(*args)
        rendering.remove(threading.get_ident())
        return error

    monkeypatch.setattr(render_pool, "render", slowly)
    pool = RenderPool(0, 2, rows=1, views=2, size=SIZE)
    views = iter(RenderQueue(pool, jobs(20), SPEC))
    next(views)
    views.close()
    assert rendering == []
    asked = jobs(5)[::-1]
    found = [views.copy() for views in RenderQueue(pool, asked, SPEC)]
    assert all(np.array_equal(views, rendered(job)) for job, views in zip(asked, found, strict=True))
    pool.shutdown()


KILLED = """
import os, signal
from pipeline.cache.render_pool import RenderPool

if __name__ == "__main__":
    pool = RenderPool(2, 0, rows=1, views=1, size=8)
    pool._executor.submit(int).result()
    print(*pool._executor._processes, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_rendering_processes_end_with_a_killed_parent(tmp_path):
    """They belong to a fork server, which would outlive it as long as they do."""
    (tmp_path / "killed.py").write_text(KILLED)
    here = Path(__file__).parents[3]
    command = [sys.executable, str(tmp_path / "killed.py")]
    environment = {**os.environ, "PYTHONPATH": str(here)}
    killed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    assert killed.returncode == -signal.SIGKILL
    workers = [Path("/proc", pid) for pid in killed.stdout.decode().split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(worker.exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(worker.exists() for worker in workers)
