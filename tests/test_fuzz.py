"""A seeded slice of `make fuzz` and every input that it ever found: no traceback, no hang, memory within 1 GB."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz import targets as fuzz_targets
from fuzz import worker as fuzz_worker
from warm_process import WarmProcess

from shards_spec.files import UserError

pytestmark = pytest.mark.integration

FUZZ = Path(__file__).parent / "fuzz"
INPUTS = 30  # of each target


def test_a_slice_of_the_fuzz_run_and_all_that_it_found(tmp_path):
    worker = f"import runpy; runpy.run_path({str(FUZZ / 'worker.py')!r}, {{}}, '__main__')"
    process = WarmProcess(worker, "all", "0", "300", str(tmp_path), str(INPUTS))
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, output + errors[-3000:]
    assert "0 still taken badly" in output
    assert output.count(f": {INPUTS} inputs") == 12


def busy(seconds: float) -> None:
    """Compute for so long."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def failed(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("run", "limit_s", "said"),
    [
        (lambda: failed(ValueError("x")), 20, "ValueError: x"),
        (lambda: b"1" * (1100 << 20), 20, " MB"),
        (lambda: busy(1), 0.5, "s of processor time"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 20, ""),
        (lambda: failed(UserError("fine")), 20, None),
    ],
    ids=["exception", "memory", "time", "death", "user error"],
)
def test_the_fuzzer_finds(tmp_path, run, limit_s, said):
    """Each kind of finding, planted in a fork of this process."""
    process = multiprocessing.get_context("fork").Process(target=find_planted, args=(run, limit_s, tmp_path))
    process.start()
    process.join()
    output = (tmp_path / "output").read_text()
    if said is None:
        assert process.exitcode == 0, output
        return
    assert process.exitcode == (1 if said else -signal.SIGKILL), output
    assert said in output
    assert (tmp_path / "json/current").exists()


def find_planted(run: Callable[[], object], limit_s: float, folder: Path) -> None:
    """Try one input of a target that does what ``run`` does; what is found is printed to a file."""

    class Planted(fuzz_targets.Json):
        def run(self, folder, path, data):
            run()

    fuzz_targets.TARGETS["json"] = Planted
    fuzz_worker.LIMIT_S = limit_s
    with (folder / "output").open("w") as output, contextlib.redirect_stdout(output):
        code = fuzz_worker.main("json", 0, 60, folder, 1)
    sys.exit(code)
