"""tests/gpu/run.sh: its dry run, and that the wheels it carries are all that a GPU machine lacks."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import IO

import pytest
import runner
from page_tables import unexplained
from warm_process import WarmProcess

from pipeline.plan.costs import FLOP

ROOT = Path(__file__).parents[1]
GPU = ROOT / "tests" / "gpu"
TORCH_OWN = {"torch", "torchvision"}  # what they need comes with them


def names(file: str) -> set[str]:
    lines = (GPU / file).read_text().splitlines()
    return {canonical(line) for line in lines if line and not line.startswith("#")}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needs(package: str) -> set[str]:
    """What a package needs without extras and on this system."""
    found = set()
    for requirement in requires(package) or []:
        name, _, marker = requirement.partition(";")
        if "extra ==" not in marker and "python_version <" not in marker and "win32" not in marker:
            found.add(canonical(re.match(r"[\w.-]+", name.strip())[0]))
    return found


def test_every_package_that_clipmill_needs_is_carried_or_provided():
    kit, provided = names("kit.txt"), names("provided.txt")
    assert not kit & provided
    open_ends, seen = needs("clipmill") | {"hatchling"}, set()
    while open_ends:
        package = open_ends.pop()
        seen.add(package)
        assert package in kit | provided, f"{package}: in neither tests/gpu/kit.txt nor provided.txt"
        if package in kit:  # what the others need is there with them
            try:
                open_ends |= needs(package) - seen - TORCH_OWN
            except PackageNotFoundError:
                pytest.fail(f"{package} is not installed here: it is not needed any more")
    assert kit <= seen, f"not needed any more: {kit - seen}"


def test_a_package_of_another_version_than_required_is_named(monkeypatch):
    assert runner.unmet_requirements("clipmill") == []
    required = ["pillow>=99", "nowhere-to-be-found", 's3fs>=99; extra == "s3"', "numpy>=1"]
    monkeypatch.setattr(runner.importlib.metadata, "requires", lambda package: required)
    older, missing = runner.unmet_requirements("clipmill")
    assert re.fullmatch(r"pillow>=99, and there is \d+\.\d+\.\d+", older)
    assert missing == "nowhere-to-be-found, and there is none"


RUN_STEP = """
import os, runpy, sys
sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
sys.argv = sys.argv[1:]
if sys.argv[0] == "-m":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_warm(command: list[str], env: dict[str, str], out: IO[str]) -> WarmProcess:
    """A step of the runner in a fork of a process that has imported torch, which takes longer than most steps."""
    return WarmProcess(RUN_STEP, *command[1:], cwd=ROOT, env=env, log=out.name)


@pytest.mark.integration
def test_the_dry_run_runs_every_step_and_prints_a_table_last(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["runner.py", "--dry"])
    monkeypatch.setattr(runner, "start_process", start_warm)
    code = runner.main()
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert printed.rstrip().endswith("all steps done")
    figures = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert {figure["step"] for figure in figures} == {step.name for step in runner.STEPS}
    assert all(figure["value"] >= 0 and figure["card"] == "CPU, dry run" for figure in figures)
    assert runner.markdown(figures) in printed
    assert unexplained(figures) == []
    rates = json.loads((tmp_path / "rates.json").read_text())
    assert rates["ceiling"] > 0
    assert set(rates["rates"]) <= set(FLOP)
    assert rates["rates"] == {figure["rate"]: figure["value"] for figure in figures if figure.get("rate")}


@pytest.mark.integration
def test_a_step_over_its_limit_is_stopped_and_keeps_its_figures(tmp_path):
    line = runner.PREFIX + json.dumps({"name": "early", "value": 1.0, "unit": "s"})
    script = tmp_path / "slow.py"
    script.write_text(f"import time\nprint({line!r}, flush=True)\ntime.sleep(60)\n")
    step = runner.Step("slow", (str(script),), 60)
    outcome = runner.run_step(step, dry=True, limit=2, env=dict(os.environ), log=tmp_path / "log")
    assert outcome.fault == "stopped after 2 s"
    assert [figure["name"] for figure in outcome.figures] == ["early"]
    assert outcome.seconds < 2 + runner.GRACE + 15  # the grace too where SIGINT is ignored, as of background jobs


@pytest.mark.integration
def test_the_script_runs_a_step_on_the_cpu(tmp_path):
    """The steps themselves are those of the test above."""
    env = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "CLIPMILL_GPU_DEVICE": "cuda"}
    command = ["bash", str(GPU / "run.sh"), "--dry", "--only", "limits"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert {figure["card"] for figure in figures} == {"CPU, dry run"}


def test_a_step_without_time_left_fails_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["runner.py", "--dry", "--only", "limits", "--seconds", "0"])
    assert runner.main() == 1
    assert "limits: no time left" in capsys.readouterr().out


@pytest.mark.integration
def test_without_wheels_the_script_says_how_to_get_them(tmp_path):
    shutil.copytree(GPU, tmp_path / "tests" / "gpu", ignore=shutil.ignore_patterns("kit", "__pycache__"))
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')  # without site-packages
    bare.chmod(0o755)
    env = {**os.environ, "PYTHON": str(bare)}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["bash", str(tmp_path / "tests" / "gpu" / "run.sh"), "--dry"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "make gpu-kit" in done.stderr


@pytest.mark.parametrize(
    ("words", "out", "message"),
    [
        ([], "out", "no CUDA device: --dry runs the same steps on the CPU"),
        (["--dry"], "file", "OUT={tmp}/file: File exists; give a folder that can be written"),
        (["--dry"], "file/below", "OUT={tmp}/file/below: Not a directory; give a folder"),
        (["--table", "{tmp}/none"], "out", "--table {tmp}/none: No such file or directory"),
    ],
)
def test_mistakes_are_said_before_a_step_runs(words, out, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OUT", str(tmp_path / out))
    monkeypatch.setattr(runner, "has_cuda", lambda: False)
    monkeypatch.setattr(sys, "argv", ["runner.py", *(word.format(tmp=tmp_path) for word in words)])
    with pytest.raises(SystemExit) as error:
        runner.main()
    assert error.value.code == 2
    assert message.format(tmp=tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("live", "epochs"), [(0.75, 1.0), (0.25, math.inf), (0.125, math.inf)])
def test_a_cache_that_saves_nothing_never_pays(live, epochs, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    distill = importlib.import_module("distill")
    taken = {"none": [0.25], "cached": [0.25], "live": [live]}
    costs = distill.Costs(taken, 0.25 / distill.VIEWS, 0.25 / distill.CAPTIONS, 1)
    assert costs.epochs == pytest.approx(epochs)
