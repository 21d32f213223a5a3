"""Everything a run writes, all below one local folder; a run can be continued or rebuilt from it alone.

config.json             recipe and all fields, flat
environment.json        versions, code revision, device of the newest start
open_clip_config.json   the student's architecture and preprocessing (and bpe.txt.gz when it has its own)
metrics.jsonl           one line per log interval; tensorboard/ has the same curves
checkpoints/step_N.pt   state of model, optimizer and random streams after N steps
checkpoints/best.pt     the same of the best measurement on eval_data, which is in it
checkpoints/*.sha256    the hash of each, as sha256sum writes it; a checkpoint that is damaged is not believed
.lock                   who trains here at the moment
nonfinite/step_N.pt     what each process had read for a step whose loss was not finite, and the losses
"""

import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, cast

import torch

from shards_spec.checkpoints import read_checkpoint
from shards_spec.files import (
    DISK_FULL,
    DataError,
    UserError,
    atomic_writer,
    is_url,
    read_bytes,
    remove_stale,
    sha256_file,
    write_bytes,
    write_json,
)  # fmt: skip
from shards_spec.library_errors import checkpoint_errors, parse_json, short
from shards_spec.lock import locked
from shards_spec.models import LoadedModel
from training.config import FREE_ON_RESUME
from training.models.classifier import Classifier, describe_classifier

log = logging.getLogger(__name__)
CHECKPOINT = re.compile(r"step_(\d+)\.pt")
BEST = "best.pt"
LOCK = ".lock"
HASH, DAMAGED = ".sha256", ".damaged"  # endings beside a checkpoint's name
BPE = "bpe.txt.gz"
VERSIONED = ("clipmill", "torch", "open_clip_torch", "timm", "numpy", "pillow", "pyarrow")


class RunDir:
    """The folder of one run."""

    def __init__(self, path: str) -> None:
        if is_url(path):
            raise UserError(f"--out {path!r}: a run needs a local folder, since it is written line by line")
        self.path = Path(path)
        self.checkpoints, self.metrics = self.path / "checkpoints", self.path / "metrics.jsonl"
        self.asked = dict[str, Any]()  # recipe and flat config, once it has started

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One training at a time. Raises UserError naming the process that has it; a folder made for this alone goes.

        Where that one was killed the kernel has freed the lock.
        """
        made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.path}: no folder can be made there ({short(error)})") from error
        try:
            with locked(str(self.path / LOCK), str(self.path)):
                yield
        finally:
            if made:
                with suppress(OSError):  # it is filled
                    self.path.rmdir()

    def start(
        self, recipe: str, config: dict[str, Any], resume: bool, device: str, steps: Callable[[dict[str, Any]], int]
    ) -> tuple[Path, dict[str, Any]] | None:
        """Make the folder or check that it is this run's; return the newest whole checkpoint, if any, and its config.

        ``steps`` counts the steps that a config asks for: it may grow. Raises UserError when the folder holds a run
        with another config, or a run at all without ``resume``, and DataError when no checkpoint is whole.
        """
        remove_stale(str(self.path))
        remove_stale(str(self.checkpoints))
        asked, before = {"recipe": recipe, **config}, dict[str, Any]()
        newest = self.newest()
        if newest is not None:
            if not resume:
                raise UserError(f"{self.path} has checkpoints (up to {newest.name}): use another --out, or --resume")
            newest = self._newest_whole(set_aside=True)
            before = self._config_before(newest) or asked
            self._check_same(before, asked, steps)
        elif self.metrics.exists():
            log.warning("%s: has metrics and no checkpoint; the run starts again from step 0", self.path)
        self.asked = asked
        write_json(str(self.path / "config.json"), asked)
        write_json(str(self.path / "environment.json"), environment(device))
        return (newest, before) if newest is not None else None

    def _config_before(self, checkpoint: Path) -> dict[str, Any]:
        """What the run was asked for so far: config.json, or where that is broken what the checkpoint says of it."""
        try:
            return self.config()
        except (UserError, DataError) as error:
            kept: dict[str, Any] = load_checkpoint(checkpoint).get("config") or {}
            there = f"it is written anew, as {checkpoint.name} has it" if kept else "it is written anew, as asked now"
            log.warning("%s; %s", str(error).split(";")[0], there)
            return kept

    def _check_same(self, there: dict[str, Any], asked: dict[str, Any], steps: Callable[[dict[str, Any]], int]) -> None:
        different = {field for field in {*there, *asked} - FREE_ON_RESUME if there.get(field) != asked.get(field)}
        if different <= {"steps", "epochs"} and steps(asked) >= steps(there):
            return
        changed = [f"{field}: {there.get(field)!r} before, {asked.get(field)!r} now" for field in sorted(different)]
        shorter = " (a run can be extended, not shortened)" if different <= {"steps", "epochs"} else ""
        raise UserError(
            f"{self.path} holds a run with another config ({'; '.join(changed)}){shorter}: ask for the same to go on, "
            "or use another --out"
        )

    def recorded(self, field: str) -> Any:
        """A field of the config of a run that has checkpoints; None where there is none, or no config to be read."""
        try:
            return self.config().get(field) if self.newest() is not None else None
        except (UserError, DataError):
            return None

    def config(self) -> dict[str, Any]:
        """``recipe`` and the flat config. Raises UserError when the folder is no run, DataError when it is broken."""
        path, mend = self.path / "config.json", "run the same `clipmill train` command again, it writes the file anew"
        if not path.exists():
            if self.newest() is not None:
                raise DataError(f"{path} is not there, though there are checkpoints; {mend}")
            raise UserError(f"{path} is not there: {self.path} is no RUN folder of `clipmill train`")
        config: Any = parse_json(str(path), read_bytes(str(path)), fix=mend)
        if not isinstance(config, dict):
            raise DataError(f"{path}: not the config of a run; {mend}")
        return config

    def describe(self, student: LoadedModel, model: str) -> None:
        """Write what `load_run` rebuilds the student from."""
        if isinstance(student.model, Classifier):
            describe_classifier(str(self.path), student)
        else:
            write_open_clip_config(str(self.path), student, model)

    def newest(self) -> Path | None:
        """The checkpoint of the highest step, whole or not."""
        found = self._found()
        return found[-1] if found else None

    def load_newest(self) -> dict[str, Any] | None:
        """The state of the newest checkpoint that is whole, if there is any; newer ones are named in a warning.

        Raises DataError when there are checkpoints and none is whole.
        """
        return load_checkpoint(self._newest_whole()) if self._found() else None

    def _newest_whole(self, set_aside: bool = False) -> Path:
        """Raises DataError when none of the checkpoints is whole."""
        damaged = dict[Path, str]()
        for path in reversed(self._found()):
            try:
                load_checkpoint(path)
            except DataError as error:
                damaged[path] = str(error)
                continue
            for other, reason in damaged.items():
                log.warning("%s; taking %s, the one before it", reason.split(";")[0], path.name)
                if set_aside:  # it would count as the newest
                    other.rename(f"{other}{DAMAGED}")
                    hash_file(other).unlink(missing_ok=True)
            return path
        raise DataError(
            f"{next(iter(damaged.values())).split(';')[0]}; no other checkpoint in {self.checkpoints} is whole: "
            "restore one, or train anew with another --out"
        )

    def best(self) -> Path | None:
        """The checkpoint of the best measurement."""
        path = self.checkpoints / BEST
        return path if path.exists() else None

    def _found(self, folder: Path | None = None) -> list[Path]:
        folder = folder or self.checkpoints
        names = os.listdir(folder) if folder.is_dir() else []
        steps = sorted((int(match[1]), name) for name in names if (match := CHECKPOINT.fullmatch(name)))
        return [folder / name for _, name in steps]

    def save(self, step: int, state: dict[str, Any], keep: int) -> None:
        """Write a checkpoint atomically, then delete all but the newest ``keep``.

        Raises UserError when the disk is full; the checkpoints before it are there still.
        """
        with self.room():
            if self.metrics.exists():
                with open(self.metrics, "rb") as lines:
                    os.fsync(lines.fileno())  # on disk before the checkpoint that stands for them
            write_checkpoint(self.checkpoints / f"step_{step:06d}.pt", {"config": self.asked, **state})
        for old in self._found()[:-keep]:
            old.unlink()
            hash_file(old).unlink(missing_ok=True)

    def save_best(self, state: dict[str, Any]) -> None:
        """Write best.pt atomically."""
        with self.room():
            write_checkpoint(self.checkpoints / BEST, {"config": self.asked, **state})

    def save_nonfinite(self, step: int, state: dict[str, Any], keep: int) -> Path:
        """Write what led to a loss that is not finite; the newest ``keep`` of these stay."""
        folder = self.path / "nonfinite"
        path = folder / f"step_{step:06d}.pt"
        with self.room():
            _save_state(path, state)
        for old in self._found(folder)[:-keep]:
            old.unlink()
        return path

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with self.room(), open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @contextmanager
    def room(self) -> Iterator[None]:
        """Within, a full disk is a UserError that names the last good checkpoint."""
        try:
            yield
        except (OSError, UserError) as error:
            cause = error.__cause__ if isinstance(error, UserError) else error
            if not isinstance(cause, OSError) or cause.errno not in DISK_FULL:
                raise
            newest = self.newest()
            kept = f"the last good checkpoint is {newest.name}" if newest else "there is no checkpoint yet"
            raise UserError(
                f"no space left on the disk of {self.path} ({kept}): free some and run the same command again, it goes "
                "on from there"
            ) from error

    def cut_metrics(self, step: int) -> None:
        """Drop lines after ``step`` (a killed run had gone on from there), and those that are none, which are counted.

        A half-written last line is what a kill leaves, and not worth a word.
        """
        if not self.metrics.exists():
            return
        kept, garbage = list[bytes](), 0
        for line in read_bytes(str(self.metrics)).splitlines(keepends=True):
            number = _step_of(line)
            if number is None:
                garbage += line.endswith(b"\n")
            elif number <= step:
                kept.append(line)
        if garbage:
            log.warning("%s: %d lines were no metrics and are dropped", self.metrics, garbage)
        write_bytes(str(self.metrics), b"".join(kept))


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl; None for what is none."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    step = found.get("step") if isinstance(found, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def hash_file(checkpoint: Path) -> Path:
    """Where a checkpoint's hash is."""
    return checkpoint.with_name(checkpoint.name + HASH)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically and its hash after it. Raises UserError when the disk is full."""
    hash_file(path).unlink(missing_ok=True)  # an older file's of this name; a kill leaves one without, which is fine
    _save_state(path, state)
    write_bytes(str(hash_file(path)), f"{sha256_file(str(path))}  {path.name}\n".encode())


class _Written:
    """A file that remembers why it could not be written: torch then says "unexpected pos" and no more."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _save_state(path: Path, state: dict[str, Any]) -> None:
    with atomic_writer(str(path)) as file:
        written = _Written(file)
        try:
            torch.save(state, cast(IO[bytes], written))  # of which it uses these two alone
        except RuntimeError as error:
            if written.error is None:
                raise
            raise written.error from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `RunDir.save` wrote, on the CPU.

    Raises DataError when its bytes are not those of its hash, or when it cannot be read. One without a hash, of an
    earlier version, is checked by its zip's own checksums.
    """
    mend, hashed = "delete it to go on from the one before", hash_file(path)
    with checkpoint_errors(str(path), given=False, fix=mend):
        if not hashed.exists():
            with zipfile.ZipFile(path) as parts:
                whole = parts.testzip() is None
        else:
            whole = hashed.read_text().split()[:1] == [sha256_file(str(path))]
        if not whole:
            raise DataError(f"{path} is damaged: its bytes are not those that were written; {mend}")
    state: Any = read_checkpoint(str(path), given=False, fix=mend)
    if not isinstance(state, dict) or not {"task", "progress"} <= set(state):
        raise DataError(f"{path} is no checkpoint of `clipmill train`; {mend}")
    return state


def write_open_clip_config(folder: str, student: LoadedModel, model: str) -> None:
    """``open_clip_config.json`` of a student in ``folder``, with the tokenizer files of one that has its own.

    ``model`` is the name it was loaded by. Nothing in it names another folder, so that this one can be moved.
    """
    import open_clip

    config = json.loads(json.dumps(student.config))
    text = config.get("text_cfg") or {}
    source = bpe_file(model, config)
    if source is not None:
        write_bytes(str(Path(folder) / BPE), read_bytes(str(source)))
        text["tokenizer_kwargs"]["bpe_path"] = BPE
    if text.get("hf_tokenizer_name"):  # open_clip takes the files beside its config, whatever the name says
        text["hf_tokenizer_name"] = Path(text["hf_tokenizer_name"]).name
        with TemporaryDirectory() as near:
            student.tokenizer.tokenizer.save_pretrained(near)
            for path in sorted(Path(near).rglob("*")):
                if path.is_file():
                    write_bytes(str(Path(folder) / path.relative_to(near)), path.read_bytes())
    preprocess = open_clip.get_model_preprocess_cfg(student.model)
    write_json(str(Path(folder) / "open_clip_config.json"), {"model_cfg": config, "preprocess_cfg": preprocess})


def bpe_file(model: str, config: dict[str, Any]) -> Path | None:
    """The BPE file of a model that brings its own; None for CLIP's. Raises UserError when it is not there."""
    named = ((config.get("text_cfg") or {}).get("tokenizer_kwargs") or {}).get("bpe_path")
    if not named:
        return None
    folder = Path(model.removeprefix("local-dir:"))
    candidates = [folder / Path(named).name] if folder.is_dir() else []
    for candidate in [*candidates, Path(named)]:
        if candidate.exists():
            return candidate
    raise UserError(f"model {model!r} names the BPE file {named}, which is not there")


def environment(device: str) -> dict[str, Any]:
    """What a number may depend on besides the config."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONED},
        "git": git_revision(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def git_revision() -> str | None:
    """Commit of the checkout this file lies in, ``+`` when it was changed since; None outside a checkout."""
    here = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", ".").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None
