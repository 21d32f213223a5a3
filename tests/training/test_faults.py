"""Runs under faults: damaged files of a run, full disks, two trainings at once, exit codes of stopped ones."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from small_training import steady_metrics, tiny_config
from warm_process import WarmProcess

from shards_spec.files import DataError, UserError
from training.runs.checkpoint_files import hash_file, load_checkpoint
from training.runs.run_folder import RunFolder
from training.runs.student import load_run
from training.trainer import Trainer, train

ROOT = Path(__file__).parents[2]
EVERY = {"checkpoint_steps": 4, "keep_checkpoints": 9}
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def root(clip_root):
    return clip_root


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """An undisturbed run of 12 steps with checkpoints 4, 8 and 12."""
    return train("clip", tiny_config("clip", root, str(tmp_path_factory.mktemp("runs") / "whole"), **EVERY))


def same(one, other):
    weights, others = (load_checkpoint(RunFolder(str(out)).newest())["task"] for out in (one, other))
    return steady_metrics(one) == steady_metrics(other) and all(
        torch.equal(weights[name], others[name]) for name in weights
    )


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


def cut(path, place):
    path.write_bytes(path.read_bytes()[: int(place * path.stat().st_size)])


DAMAGE = {
    **{f"flip {place}": lambda path, place=place: flip(path, place) for place in (0, 0.2, 0.4, 0.6, 0.8, 0.99, 1)},
    **{f"cut {place}": lambda path, place=place: cut(path, place) for place in (0, 0.5, 0.99)},
    "pointer": lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n"),
    "page": lambda path: path.write_bytes(b"<!DOCTYPE html><html><body>404</body></html>"),
    "other": lambda path: torch.save([1, 2], path),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


CASES = [(name, hashed) for name in DAMAGE for hashed in (True, False)]


# without a hash the zip's own checksums decide, which cover all but its directory
@pytest.mark.parametrize(
    ("damage", "hashed"), [case for case in CASES if case[0] not in ("flip 0.99", "flip 1") or case[1]]
)
def test_a_damaged_checkpoint_is_not_believed_and_the_former_one_is_used(root, whole, tmp_path, caplog, damage, hashed):
    out = tmp_path / "run"
    subprocess.run(["cp", "-r", whole, out], check=True)
    newest = out / "checkpoints" / "step_000012.pt"
    if not hashed:
        hash_file(newest).unlink()
    DAMAGE[damage](newest)
    with pytest.raises(DataError, match=r"step_000012\.pt.*(delete it to resume|name the|, not the file itself)"):
        load_checkpoint(newest)
    assert load_run(str(out))[1] == 8
    assert [record.getMessage() for record in caplog.records if "taking step_000008.pt" in record.getMessage()]
    caplog.clear()
    train("clip", tiny_config("clip", root, str(out), **EVERY))
    [told] = [record.getMessage() for record in caplog.records if "taking step_000008.pt" in record.getMessage()]
    assert "step_000012.pt" in told
    assert len(told) < 400
    assert same(out, whole)
    assert (out / "checkpoints" / "step_000012.pt.damaged").exists(), "nothing of the user's is deleted"


def test_every_hash_is_as_sha256sum_has_it(whole):
    folder = Path(whole, "checkpoints")
    assert len(list(folder.glob("*.pt"))) == len(list(folder.glob("*.sha256"))) == 3
    for path in folder.glob("*.sha256"):
        subprocess.run(["sha256sum", "-c", path.name], cwd=folder, check=True, capture_output=True)


def test_no_whole_checkpoint_at_all(root, whole, tmp_path):
    out = tmp_path / "run"
    subprocess.run(["cp", "-r", whole, out], check=True)
    for path in (out / "checkpoints").glob("*.pt"):
        flip(path, 0.5)
    for action in (lambda: load_run(str(out)), lambda: train("clip", tiny_config("clip", root, str(out), **EVERY))):
        with pytest.raises(DataError, match=r"step_000012\.pt.*no other checkpoint in .* is whole: restore one, or tr"):
            action()
    assert len(list((out / "checkpoints").glob("*.pt"))) == 3


def test_garbage_in_metrics_is_counted_and_dropped(root, whole, tmp_path, caplog):
    out = tmp_path / "run"
    subprocess.run(["cp", "-r", whole, out], check=True)
    (out / "checkpoints" / "step_000012.pt").unlink()
    good = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    garbage = [
        b"\0\0\0\0\n",
        b"\xff\xfe{\n",
        b"[1]\n",
        b'{"step": "3"}\n',
        b'{"loss": 1}\n',
        b"[" * 100_000 + b"\n",
        b"\n",
    ]
    (out / "metrics.jsonl").write_bytes(b"".join([*good[:3], *garbage, *good[3:], b'{"step": 13, "lo']))
    train("clip", tiny_config("clip", root, str(out), **EVERY))
    assert "metrics.jsonl: dropped 7 lines that held no metrics" in caplog.text
    assert same(out, whole)


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, None], ids=str)
def test_a_broken_config_is_written_anew_by_the_same_command(root, whole, tmp_path, broken):
    """Which is what the message advises, and another config is refused all the same: a checkpoint knows its own."""
    out = tmp_path / "run"
    subprocess.run(["cp", "-r", whole, out], check=True)
    if broken is None:
        (out / "config.json").unlink()
    else:
        (out / "config.json").write_bytes(broken)
    with pytest.raises(DataError, match="rerun the same `clipmill train` command, which rewrites the file"):
        load_run(str(out))
    with pytest.raises(UserError, match=r"--lr: 0\.001 before, 0\.5 now"):
        train("clip", tiny_config("clip", root, str(out), **EVERY, lr=0.5))
    train("clip", tiny_config("clip", root, str(out), **EVERY))
    assert json.loads((out / "config.json").read_text())["lr"] == 0.001
    assert load_run(str(out))[1] == 12
    assert same(out, whole)


def test_a_checkpoint_that_does_not_fit_is_named(root, whole, tmp_path):
    """A model folder that was edited between two calls."""
    data, out = tmp_path / "data", tmp_path / "run"
    subprocess.run(["cp", "-r", root, data], check=True)
    fields = {"model": f"local-dir:{data}/models/clip", **EVERY}
    train("clip", tiny_config("clip", root, str(out), **fields))
    path = data / "models" / "clip" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["embed_dim"] = 24
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"step_000012\.pt does not fit the model as it is built now \(") as error:
        train("clip", tiny_config("clip", root, str(out), **fields))
    assert len(str(error.value)) < 600


TRAIN = """
import sys, json, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
{first}
import clipmill
sys.argv = ["clipmill", *sys.argv[1:]]
clipmill.main()
"""


def start(root, out, *words, first=""):
    """``clipmill train clip`` in a process of its own."""
    words = (
        "train",
        "clip",
        "--smoke",
        "--data",
        root,
        "--out",
        str(out),
        "--model",
        f"local-dir:{root}/models/clip",
        "--batch-size",
        "4",
        *words,
    )
    code = TRAIN.format(tests=str(Path(__file__).parents[1] / "support"), first=first)
    return WarmProcess(code, *words, cwd=ROOT)


def until_logged(process, out, number=1):
    path = Path(out, "metrics.jsonl")
    deadline = time.monotonic() + 90
    while not (path.exists() and path.read_text().count("\n") >= number):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_training_does_not_exit_as_a_finished_one(root, tmp_path, number, code):
    process = start(root, tmp_path / "run", "--steps", "1000000")
    until_logged(process, tmp_path / "run")
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"stopped by {number.name} after step" in errors
    assert "Traceback" not in errors
    assert out == "", "the folder is printed when it is finished"
    assert RunFolder(str(tmp_path / "run")).newest() is not None


def test_a_second_training_on_a_run_is_refused_by_name(root, tmp_path):
    out = tmp_path / "run"
    first = start(root, out, "--steps", "1000000")
    try:
        until_logged(first, out)
        second = start(root, out, "--steps", "1000000")
        _, errors = second.communicate(timeout=60)
        assert second.returncode == 2
        assert f"{out} is being written by process {first.pid} on {socket.gethostname()}" in errors
        assert "Traceback" not in errors
        assert first.poll() is None
        with pytest.raises(UserError, match=f"process {first.pid} on "):
            train("clip", tiny_config("clip", root, str(out)))
    finally:
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=60)
    assert first.returncode == 143
    steps = [line["step"] for line in steady_metrics(out)]
    assert steps == list(range(1, len(steps) + 1)), "nothing interleaved"
    assert not (out / ".lock").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_lock_of_a_killed_training_is_taken_over(root, tmp_path, workers):
    """At once, though its worker processes live on for some seconds."""
    out = tmp_path / "run"
    first = start(root, out, "--steps", "1000000", "--workers", workers, "--checkpoint-steps", "2")
    until_logged(first, out, 4)
    first.kill()
    first.wait()
    done = json.loads((out / ".lock").read_text())
    assert (done["pid"], done["host"]) == (first.pid, socket.gethostname())
    second = start(root, out, "--steps", "1000000", "--workers", workers, "--checkpoint-steps", "2")
    before = len(steady_metrics(out))
    until_logged(second, out, before + 2)
    second.send_signal(signal.SIGINT)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 130, errors
    assert "resumed from" in errors


def test_a_training_within_a_training_is_refused_too(root, tmp_path, monkeypatch):
    config, step = tiny_config("clip", root, str(tmp_path / "run")), Trainer.step

    def again(self, batch):
        with pytest.raises(UserError, match=f"is being written by process {os.getpid()}"):
            train("clip", config)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", again)
    train("clip", config)
    assert len(steady_metrics(tmp_path / "run")) == 12


def test_a_run_that_cannot_begin_leaves_no_folder(root, tmp_path):
    with pytest.raises(UserError, match="--data is needed"):
        train("clip", tiny_config("clip", root, str(tmp_path / "run"), data=""))
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match="is a dataset: give the run a folder of its own"):
        train("clip", tiny_config("clip", root, str(tmp_path)))
    with pytest.raises(UserError, match="no folder can be made there"):
        train("clip", tiny_config("clip", root, str(tmp_path / "file")))


@pytest.fixture
def small_disk(tmp_path, whole):
    """(folder on a disk that holds two checkpoints and a half, code that makes it so): a real one, or a limit."""
    size = Path(whole, "checkpoints", "step_000012.pt").stat().st_size
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size / 1024) + 64}k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode == 0:
        yield disk, ""
        subprocess.run(["umount", "-l", str(disk)], check=True)
    else:  # a limit on each file: the first checkpoint fits, if only the half of it is allowed afterwards
        yield disk, f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))"


def test_a_full_disk_keeps_the_last_good_checkpoint(root, small_disk, whole):
    disk, limit = small_disk
    out = disk / "run"
    if limit:
        subprocess.run(["cp", "-r", whole, out], check=True)
        (out / "checkpoints" / "step_000012.pt").unlink()
    words = ("--steps", "12", "--lr", "1e-3", "--checkpoint-steps", "4", "--keep-checkpoints", "9")
    process = start(root, out, *words, first=limit)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    assert f"no space left on the disk of {out} (the last good checkpoint is step_000008.pt): free some" in errors
    assert sorted(path.name for path in (out / "checkpoints").glob("*.pt")) == ["step_000004.pt", "step_000008.pt"]
    assert not list((out / "checkpoints").glob(".*"))
    if limit:
        return
    (out / "checkpoints" / "step_000004.pt").unlink()
    process = start(root, out, *words)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert same(out, whole)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_a_disk_that_fills_while_lines_are_written(root, tmp_path, name, monkeypatch):
    """/dev/full has room for nothing."""
    out = tmp_path / "run"
    out.mkdir()
    if name == "metrics.jsonl":
        (out / name).symlink_to("/dev/full")
        monkeypatch.setattr(RunFolder, "cut_metrics", lambda self, step: None)  # it would read /dev/full for ever
        with pytest.raises(UserError, match=r"no space left on the disk of .*run \(there is no checkpoint yet\)"):
            train("clip", tiny_config("clip", root, str(out)))
    else:
        config = tiny_config("clip", root, "/dev/full")
        with pytest.raises(UserError, match="--out /dev/full: no folder can be made there"):
            train("clip", config)


def test_metrics_and_curves_that_fill_the_disk_end_the_run_in_one_line(root, small_disk, whole):
    disk, limit = small_disk
    if limit:
        pytest.skip("no disk of one's own can be mounted here")
    out = disk / "run"
    process = start(root, out, "--steps", "1000000", "--checkpoint-minutes", "99")
    until_logged(process, out, 3)
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 2, errors
    assert f"no space left on the disk of {out}" in errors
    assert "Traceback" not in errors
