"""runs/clipkd.sh: every command is one that the product takes, it stops at the first failure, and it runs on scenes."""

import gzip
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_words import parse_command
from served_scenes import served_scenes
from small_data import tiny_coca
from small_training import tiny_clip

from slurm.submit import submit

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "runs" / "clipkd.sh"
# in place of `clipmill`: writes its words to $RECORD, a line each command, and fails at the command $FAILS
RECORDER = """#!/usr/bin/env bash
(IFS=$'\\t'; echo "$*" >>"$RECORD")
[ "$1" != "${FAILS:-}" ]
"""
TORCHRUN = """#!/usr/bin/env bash
[ "$1 $3 $4" = "--nproc_per_node -m clipmill" ] && shift 4 && clipmill "$@"
"""


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Runs the script with a recorder as `clipmill`; returns the outcome and the words of all commands."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, script in (("clipmill", RECORDER), ("torchrun", TORCHRUN)):
        commands.joinpath(name).write_text(script)
        commands.joinpath(name).chmod(0o755)
    (tmp_path / "cc3m.tsv").write_text("a dog\thttp://host/0.jpg\n")
    (tmp_path / "cc12m.tsv").write_text("http://host/1.jpg\ta cat\n")
    (tmp_path / "val").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLIPMILL_SITE", raising=False)

    def run(**variables: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
        record = tmp_path / "record.tsv"
        record.unlink(missing_ok=True)
        given = {"CC3M": "cc3m.tsv", "CC12M": "cc12m.tsv", "IMAGENET": "val", "ROOT": "both", "EVAL": "eval"}
        path = {"PATH": f"{commands}:{os.environ['PATH']}", "RECORD": str(record)}
        done = subprocess.run(
            ["bash", SCRIPT], env={**os.environ, **path, **given, **variables}, capture_output=True, text=True
        )
        lines = record.read_text().splitlines() if record.exists() else []
        return done, [line.split("\t") for line in lines]

    return run


@pytest.mark.parametrize(("where", "gpus"), [("here", "1"), ("here", "2"), ("slurm", "8")])
def test_every_command_of_the_script_parses(where, gpus, recorded, capsys):
    done, commands = recorded(WHERE=where, GPUS=gpus)
    assert done.returncode == 0, done.stderr
    names = [words[1] if words[0] == "submit" else words[0] for words in commands]
    assert names == ["evalset", "eval", "ingest", "pack", "cache", "train", "train", "eval", "compare"]
    for words in commands:
        parse_command(words)
    assert {words[0] == "submit" for words in commands[2:7]} == {where == "slurm"}
    for words in commands if where == "slurm" else ():
        if words[:2] in (["submit", "ingest"], ["submit", "train"]):  # the others look at what is there
            assert submit([*words[1:], "--dry-run"], lambda step: 0) == 0
            assert "#SBATCH --gpus-per-node=8" in capsys.readouterr().out or words[1] == "ingest"


@pytest.mark.parametrize("name", ["cc3m.tsv", "cc3m.tsv.gz"])
def test_both_lists_have_the_columns_of_one(name, recorded):
    Path("cc3m.tsv.gz").write_bytes(gzip.compress(Path("cc3m.tsv").read_bytes()))
    done, commands = recorded(CC3M=name, ROOT="two lists", OUT="my runs")
    assert done.returncode == 0, done.stderr
    assert Path("two lists.lists/cc3m.tsv").read_text() == "http://host/0.jpg\ta dog\n"
    assert commands[2][:5] == ["ingest", "two lists", "--source", "two lists.lists/cc3m.tsv", "cc12m.tsv"]
    assert commands[-1] == ["compare", "my runs/scratch", "my runs/distilled", "--output", "my runs/compare.html"]


def test_the_script_stops_at_the_first_failure(recorded):
    done, commands = recorded(FAILS="pack")
    assert done.returncode == 1
    assert commands[-1][0] == "pack"


@pytest.mark.parametrize("variable", ["CC3M", "CC12M", "IMAGENET"])
def test_what_is_not_given_is_named(variable, recorded):
    done, commands = recorded(**{variable: ""})
    assert done.returncode != 0
    assert f"{variable}: give " in done.stderr
    assert commands == []


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WHERE", "cloud", "WHERE=cloud: here or slurm"),
        ("CC3M", "none.tsv", "none.tsv is no file: give the list"),
        ("CC12M", "val", "val is no file"),
        ("IMAGENET", "cc3m.tsv", "IMAGENET=cc3m.tsv is no folder"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_command(variable, value, message, recorded):
    done, commands = recorded(**{variable: value})
    assert (done.returncode, commands) == (2, [])
    assert f"clipkd.sh: {message}" in done.stderr


@pytest.fixture
def web(tmp_path) -> Iterator[Path]:
    """The demo's scenes as CC3M's list, CC12M's and folders of classes, and their server."""
    folder = tmp_path / "web"
    with served_scenes(folder, count=120, eval_count=40):
        rows = [line.split("\t") for line in (folder / "list.tsv").read_text().splitlines()]
        (folder / "cc3m.tsv").write_text("".join(f"{caption}\t{url}\n" for caption, url in rows[:60]))
        (folder / "cc12m.tsv").write_text("".join(f"{url}\t{caption}\n" for caption, url in rows[60:]))
        classes = (folder / "eval" / "zeroshot" / "classnames.txt").read_text().splitlines()
        with tarfile.open(folder / "eval" / "zeroshot" / "test" / "0.tar") as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
        for name, data in members.items():
            if name.endswith(".jpg"):
                image = folder / "val" / classes[int(members[name.replace(".jpg", ".cls")])] / name
                image.parent.mkdir(parents=True, exist_ok=True)
                image.write_bytes(data)
        yield folder


@pytest.fixture
def small(web, tmp_path) -> dict[str, str]:
    """The script's variables for the scenes, with models of a layer."""
    return {
        "CC3M": str(web / "cc3m.tsv"),
        "CC12M": str(web / "cc12m.tsv"),
        "IMAGENET": str(web / "val"),
        "ROOT": str(tmp_path / "both"),
        "EVAL": str(tmp_path / "eval"),
        "OUT": str(tmp_path / "runs"),
        "TEACHER": tiny_coca(tmp_path / "teacher"),
        "TEACHER_WEIGHTS": "",
        "STUDENT": tiny_clip(tmp_path / "student"),
        "EPOCHS": "1",
        "BATCH": "16",
        "WARMUP": "2",
        "VIEWS": "2",
        "INGEST_OPTIONS": "--allow-private --workers 1",
        "CACHE_OPTIONS": "--threads 1 --device cpu",
        "TRAIN_OPTIONS": "--workers 0 --log-every 1 --device cpu",
    }


def command(folder: Path, before: str = "") -> str:
    """A PATH that has `clipmill` of this checkout; ``before`` is run first."""
    folder.mkdir()
    (folder / "clipmill").write_text(f'#!/bin/sh\n{before}\nexec {sys.executable} -m clipmill "$@"\n')
    (folder / "clipmill").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def check_outcome(folder: Path) -> None:
    """Both runs have their losses, step by step, and an accuracy."""
    distilled = {"contrastive", "feature", "relation", "interactive"}
    for run, losses in (("scratch", {"contrastive"}), ("distilled", distilled)):
        lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
        assert set(lines[-1]["losses"]) == losses
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        result = json.loads((folder / run / "eval" / "eval_zeroshot.json").read_text())
        assert 0 <= result["metrics"]["acc1"] <= 1
    assert (folder / "compare.html").exists()
    assert (folder / "teacher" / "eval_zeroshot.json").exists()


@pytest.mark.slow
@pytest.mark.integration
def test_the_script_runs_on_the_demos_scenes(small, tmp_path):
    """From two lists to two accuracies; stopped before `pack`, the same line resumes."""
    once = tmp_path / "failed"
    path = command(tmp_path / "commands", f'[ -e {once} ] || [ "$1" != pack ] || {{ touch {once}; exit 3; }}')
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, **small}
    for code in (3, 0):
        done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == code, done.stderr[-3000:]
    assert "ingest: 120 samples in 1 shard (0 made now" in done.stdout
    check_outcome(tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.integration
def test_the_script_runs_on_slurm(slurm, small, tmp_path):
    own = {**slurm.own, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}", "OMP_NUM_THREADS": "1"}
    where = {"WHERE": "slurm", "GPUS": "1", "ARRAY": "2", "DOWNLOADERS": "2", "TIME": "11"}
    path = command(tmp_path / "commands")
    environment = {**os.environ, **own, "PATH": path, **small, **where}
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    check_outcome(tmp_path / "runs")
    for stage in ("ingest", "pack", "cache"):
        assert f"\n{stage}: job " in done.stdout
