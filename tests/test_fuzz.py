"""A seeded slice of `make fuzz` and every input that it ever found: no traceback, no hang, memory within 1 GB."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

FUZZ = Path(__file__).parent / "fuzz"
INPUTS = 30  # of each target


def worker(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, FUZZ / "worker.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, errors="replace", timeout=600, env=environment
    )


def test_a_slice_of_the_fuzz_run_and_all_that_it_found(tmp_path):
    done = worker("all", 0, 300, tmp_path, INPUTS)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "0 still taken badly" in done.stdout
    assert done.stdout.count(f": {INPUTS} inputs") == 12


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('x')", "ValueError: x"),
        ("b'1' * (1100 << 20)", " MB"),
        ("busy(1)", "s of processor time"),
        ("import os; os.kill(os.getpid(), 9)", ""),
        ("raise UserError('fine')", None),
    ],
)
def test_the_fuzzer_finds(tmp_path, body, said):
    """Each kind of finding, planted."""
    code = f"""
import sys, time
from pathlib import Path
sys.path[:0] = [{str(FUZZ.parent / "support")!r}, {str(FUZZ.parent)!r}, {str(FUZZ.parents[1])!r}]
from fuzz import targets, worker
from shards_spec.files import UserError
def busy(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
class Planted(targets.Json):
    def run(self, folder, path, data):
        {body}
targets.TARGETS["json"] = Planted
worker.LIMIT_S = 0.5 if "busy" in {body!r} else 20
sys.exit(worker.main("json", 0, 60, Path({str(tmp_path)!r}), 1))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if said is None:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == (1 if said else -9), done.stderr
    assert said in done.stdout
    assert (tmp_path / "json/current").exists()
