"""Images rendered ahead into memory that is reused: the right ones, in order, in bounded memory."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from small_data import draw

from pipeline.core import render_pool
from pipeline.core.render_pool import MAX_BYTES, RenderJob, RenderPool, RenderQueue
from shards_spec.files import DataError
from shards_spec.images import decode_rgb
from shards_spec.views import ViewSpec, render_views

SPEC = ViewSpec(ops=1)
SIZE = 16


def jobs(count: int) -> list[RenderJob]:
    """Of one and of two views, in turn."""
    render = partial(render_views, spec=SPEC, size=SIZE)
    views = (partial(render, key=f"{row}", views=range(1 + row % 2)) for row in range(count))
    return [RenderJob(draw(f"{row}")[0], of_row) for row, of_row in enumerate(views)]


def rendered(job: RenderJob) -> np.ndarray:
    return job.render(decode_rgb(job.image))


@pytest.mark.parametrize("processes", [0, 1])
def test_more_samples_than_slots_come_in_order(processes):
    pool = RenderPool(processes, 1, rows=1, most=2, size=SIZE)
    asked = jobs(3 * len(pool.slots) + 1)
    asked[4] = RenderJob(b"<html>", asked[0].render)
    asked[6] = RenderJob(DataError("has none"), asked[0].render)
    found = []
    for views in RenderQueue(pool, asked):
        found.append(views if isinstance(views, DataError) else views.copy())
    pool.shutdown()
    assert len(found) == len(asked)
    assert str(found.pop(6)) == "has none"
    assert "does not decode" in str(found.pop(4))
    del asked[6], asked[4]
    for job, views in zip(asked, found, strict=True):
        assert np.array_equal(views, rendered(job)), job.key


def test_memory_is_bounded_and_two_passes_fit():
    usual = RenderPool(0, 4, rows=256, most=8, size=32)
    assert usual.slots.shape == (2 * 4 + 2 * 32, 8, 32, 32, 3)
    large = RenderPool(0, 64, rows=512, most=1, size=4096)
    assert len(large.slots) >= 2
    assert large.slots.nbytes <= MAX_BYTES


@pytest.fixture
def rendering(monkeypatch) -> list[int]:
    """The threads that render just now, each job of which takes its time."""
    render = render_pool.render
    rendering = []

    def slowly(*args):
        rendering.append(threading.get_ident())
        time.sleep(0.05)
        error = render(*args)
        rendering.remove(threading.get_ident())
        return error

    monkeypatch.setattr(render_pool, "render", slowly)
    return rendering


def test_a_queue_that_is_left_early_writes_nothing_later(rendering):
    pool = RenderPool(0, 2, rows=1, most=2, size=SIZE)
    views = iter(RenderQueue(pool, jobs(20)))
    next(views)
    views.close()
    assert rendering == []
    asked = jobs(5)[::-1]
    found = [views.copy() for views in RenderQueue(pool, asked)]
    assert all(np.array_equal(views, rendered(job)) for job, views in zip(asked, found, strict=True))
    pool.shutdown()


@pytest.mark.parametrize("whole", [3, 20])
def test_jobs_that_end_in_an_error_write_nothing_later(rendering, whole):
    """Before and after as many jobs as are submitted at once."""

    def broken() -> Iterator[RenderJob]:
        yield from jobs(whole)
        raise DataError("a broken tar")

    pool = RenderPool(0, 2, rows=1, most=2, size=SIZE)
    with pytest.raises(DataError, match="a broken tar"):
        list(RenderQueue(pool, broken()))
    assert rendering == []
    pool.shutdown()


KILLED = """
import os, signal
from pipeline.core.render_pool import RenderPool

if __name__ == "__main__":
    pool = RenderPool(2, 0, rows=1, most=1, size=8)
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
