"""Claims without a cluster: one of many gets a shard, the silent lose theirs, the late start anew."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.core.runner import ALL
from shards_spec.files import UserError
from slurm.claims import Assigned, Claims, Failures, Finished, WorkStealing

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def claims(folder: Path, owner: str, stale_s: float = 60, **options) -> Claims:
    return Claims(str(folder), owner, stale_s, **options)


def age(folder: Path, owner: str, seconds: float) -> None:
    """As if the owner had been silent for so long."""
    then = time.time() - seconds
    os.utime(folder / f".{owner}", (then, then))


def test_one_of_many_gets_a_shard(tmp_path):
    owners = [claims(tmp_path, f"o{number}") for number in range(8)]
    for one in owners:
        one.__enter__()
    with ThreadPoolExecutor(8) as pool:
        for shard in range(50):
            assert sum(pool.map(lambda one, shard=shard: one.acquire(shard), owners)) == 1
    for one in owners:
        one.__exit__()
    assert os.listdir(tmp_path) == []


def test_a_claim_is_the_owners_until_released_or_silent(tmp_path):
    with claims(tmp_path, "a") as a, claims(tmp_path, "b") as b:
        assert a.acquire(3)
        assert a.acquire(3)
        assert not b.acquire(3)
        a.release(3)
        assert b.acquire(3)
        age(tmp_path, "b", 59)
        assert not a.acquire(3)
        age(tmp_path, "b", 61)
        assert a.acquire(3)
        b.release(3)  # it was taken over: the release leaves a's claim
        assert (tmp_path / "00003").read_text() == "a"
        assert not b.acquire(3)


def test_many_take_over_one_silent_claim_once(tmp_path):
    dead = claims(tmp_path, "dead")
    dead.__enter__()
    for shard in range(40):
        assert dead.acquire(shard)
    dead._stop.set()
    dead._thread.join()
    age(tmp_path, "dead", 100)
    owners = [claims(tmp_path, f"o{number}") for number in range(6)]
    for one in owners:
        one.__enter__()
    with ThreadPoolExecutor(6) as pool:
        for shard in range(40):
            assert sum(pool.map(lambda one, shard=shard: one.acquire(shard), owners)) == 1
    for one in owners:
        one.__exit__()


def test_a_restarted_owner_has_its_claims_back_at_once(tmp_path):
    first = claims(tmp_path, "task-7")
    first.__enter__()
    assert first.acquire(0)
    with claims(tmp_path, "task-7") as again, claims(tmp_path, "other") as other:
        assert not other.acquire(0)
        assert again.acquire(0)
        age(tmp_path, "task-7", 0)
        assert not other.acquire(0)
    first._stop.set()


def test_the_heartbeat_keeps_claims_alive(tmp_path):
    with claims(tmp_path, "a", 0.6) as a, claims(tmp_path, "b", 0.6) as b:
        assert a.acquire(0)
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            assert not b.acquire(0)
            time.sleep(0.05)


def test_a_frozen_owner_learns_that_it_is_late(tmp_path):
    """A real process, stopped and woken: its thread calls ``late`` within a blink."""
    code = (
        "import os, time; from slurm.claims import Claims\n"
        "def late(): print('late', flush=True); os._exit(3)\n"
        f"with Claims({str(tmp_path)!r}, 'a', 0.6, late) as a:\n"
        "    a.acquire(0); print('has it', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "has it\n"
    os.kill(child.pid, 19)
    time.sleep(1)
    with claims(tmp_path, "b", 0.6) as b:
        assert b.acquire(0)
        os.kill(child.pid, 18)
        assert child.stdout.read() == "late\n"
        assert child.wait() == 3
        assert (tmp_path / "00000").read_text() == "b"


def test_starting_anew_runs_the_same_command_and_kills_workers(tmp_path):
    """In the place of the old process, without its worker processes."""
    script = tmp_path / "again.py"
    script.write_text(
        "import multiprocessing, os, pathlib, threading, time\n"
        "from slurm.claims import restart_process\n"
        "if __name__ == '__main__':\n"
        f"    runs = pathlib.Path({str(tmp_path)!r}, 'runs'); runs.mkdir(exist_ok=True)\n"
        "    (runs / str(len(list(runs.iterdir())))).write_text(str(os.getpid()))\n"
        "    if len(list(runs.iterdir())) == 1:\n"
        "        child = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(60,)); child.start()\n"
        "        (runs.parent / 'child').write_text(str(child.pid))\n"
        "        threading.Thread(target=restart_process).start(); time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], timeout=30, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "restarting" in done.stderr
    first, second = sorted((tmp_path / "runs").iterdir())
    assert first.read_text() == second.read_text()
    assert not Path("/proc", (tmp_path / "child").read_text()).exists()


def test_a_place_without_hard_links_is_a_users_error(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with claims(tmp_path, "a") as a:
        monkeypatch.setattr(os, "link", refuse)
        with pytest.raises(UserError, match="hard links"):
            a.acquire(0)


def test_shares(tmp_path):
    folder = tmp_path / "stage"
    folder.mkdir()
    for shard in (0, 2):
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    with claims(tmp_path / "claims", "a") as a:
        failures = Failures(str(tmp_path / "claims"), "now")
        assigned = Assigned(a, failures, range(4))
        assert [shard for shard in range(8) if assigned.claim(shard)] == [
            0,
            1,
            2,
            3,
        ]  # the stage itself skips what is done
        for shard in range(4):
            assigned.complete(shard, shard != 1)
        assert assigned.failed
        assert failures.all() == {1}
        failures.add(6)
        stealing = WorkStealing(a, failures, str(folder))
        assert stealing.wait(8)
        assert not stealing.wait(3)
        assert stealing.claim(4)
        failures.add(5)  # after the look
        assert [shard for shard in range(8) if stealing.claim(shard)] == [3, 4, 7]
        assert not assigned.is_complete
        assert not stealing.is_complete
    assert Failures(str(tmp_path / "claims"), "later").all() == set()
    done = Finished(str(folder))
    assert [shard for shard in range(4) if done.claim(shard)] == [0, 2]
    assert done.missing == [1, 3]
    assert not done.is_complete
    assert ALL.claim(5)
    assert ALL.is_complete


def test_threads_of_one_owner_may_ask_at_once(tmp_path):
    with claims(tmp_path, "a") as a:
        barrier, got = threading.Barrier(4), list[bool]()

        def ask() -> None:
            barrier.wait()
            got.append(a.acquire(0))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert any(got)


def test_a_folder_that_takes_long_to_list_is_listed_less_often(tmp_path, monkeypatch):
    """Listing 100,000 shards every five seconds was most of what a task at its end did."""
    clock = 1000.0
    listings = list[float]()

    def list_shards(folder: str) -> list[int]:
        nonlocal clock
        listings.append(clock)
        clock += 1.5
        return list(range(100))

    monkeypatch.setattr("slurm.claims.finished_shards", list_shards)
    monkeypatch.setattr("slurm.claims.time", SimpleNamespace(monotonic=lambda: clock))
    stealing = WorkStealing(claims(tmp_path, "a"), Failures(str(tmp_path), "1"), str(tmp_path))
    for shard in range(100):
        assert not stealing.claim(shard)
        clock += 1.0
    assert listings == [1000.0, 1032.5, 1065.0, 1097.5]
