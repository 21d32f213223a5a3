"""The lock: one holder at a time, named when it is refused, and no trace of one that was killed."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shards_spec.files import UserError
from shards_spec.lock import locked

HOLD = """
import sys, time
from shards_spec.lock import locked
with locked(sys.argv[1], "the thing"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held(tmp_path):
    path = str(tmp_path / ".lock")
    child = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    yield path, child
    child.kill()
    child.wait()


def test_the_holder_is_named(held):
    path, child = held
    named = f"the thing is being written by process {child.pid} on {socket.gethostname()}"
    with pytest.raises(UserError, match=named), locked(path, "the thing"):
        pass
    assert child.poll() is None
    assert os.path.exists(path), "a refused one takes nothing away"


def test_shared_holders_exclude_the_others_and_the_last_one_deletes_the_file(tmp_path):
    path = str(tmp_path / ".lock")
    with locked(path, "the thing", shared=True):
        with locked(path, "the thing", shared=True):
            pass
        with pytest.raises(UserError, match="being written by"), locked(path, "the thing"):
            pass
    assert not os.path.exists(path)
    with locked(path, "the thing"), pytest.raises(UserError), locked(path, "the thing", shared=True):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_holder_holds_nothing(held, number):
    path, child = held
    child.send_signal(number)
    child.wait()
    with locked(path, "the thing"):
        assert str(os.getpid()) in Path(path).read_text()
    assert not os.path.exists(path)


def test_a_lock_that_is_waited_for(held, caplog):
    path, child = held
    timer = threading.Timer(0.3, child.kill)
    timer.start()
    with caplog.at_level("INFO"), locked(path, "the thing", wait=True):
        assert str(os.getpid()) in Path(path).read_text()
    assert caplog.text.count(f"the thing is being written by process {child.pid}") == 1


def test_garbage_and_links(tmp_path):
    path, victim = tmp_path / ".lock", tmp_path / "victim"
    path.write_bytes(b"\xff{ no json")
    with locked(str(path), "x"):
        pass
    victim.write_text("precious")
    path.symlink_to(victim)
    with pytest.raises(UserError, match="lock file of x cannot be opened"), locked(str(path), "x"):
        pass
    assert victim.read_text() == "precious"


def test_many_take_turns(tmp_path):
    """Each of many processes reads, waits and writes a number under the lock: no step is lost."""
    code = """
import sys, time
from pathlib import Path
from shards_spec.files import UserError
from shards_spec.lock import locked
folder, done = Path(sys.argv[1]), 0
while done < 5:
    try:
        with locked(str(folder / ".lock"), "x"):
            number = int((folder / "n").read_text())
            time.sleep(0.002)
            (folder / "n").write_text(str(number + 1))
            done += 1
    except UserError:
        time.sleep(0.001)
"""
    (tmp_path / "n").write_text("0")
    children = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(6)]
    deadline = time.monotonic() + 60
    assert all(child.wait(deadline - time.monotonic()) == 0 for child in children)
    assert (tmp_path / "n").read_text() == "30"
