"""Everything a run writes, all below one local folder; a run can be continued or rebuilt from it alone.

config.json             recipe and all fields, flat
environment.json        versions, code revision, device of the newest start
open_clip_config.json   the student's architecture and preprocessing (and bpe.txt.gz when it has its own)
metrics.jsonl           one line per log interval; tensorboard/ has the same curves
checkpoints/step_N.pt   state of model, optimizer and random streams after N steps
checkpoints/best.pt     the same of the best measurement on eval_data, which is in it
nonfinite/step_N.pt     what each process had read for a step whose loss was not finite, and the losses
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from shards_spec.checkpoints import read_checkpoint
from shards_spec.files import (
    UserError,
    atomic_writer,
    is_url,
    read_bytes,
    read_json,
    remove_stale,
    write_bytes,
    write_json,
)  # fmt: skip
from shards_spec.models import LoadedModel
from training.classifier import Classifier, describe_classifier
from training.config import FREE_ON_RESUME

CHECKPOINT = re.compile(r"step_(\d+)\.pt")
BEST = "best.pt"
BPE = "bpe.txt.gz"
VERSIONED = ("clipmill", "torch", "open_clip_torch", "timm", "numpy", "pillow", "pyarrow")


class RunDir:
    """The folder of one run."""

    def __init__(self, path: str) -> None:
        if is_url(path):
            raise UserError(f"--out {path!r}: a run needs a local folder, since it is written line by line")
        self.path = Path(path)
        self.checkpoints, self.metrics = self.path / "checkpoints", self.path / "metrics.jsonl"

    def start(self, recipe: str, config: dict[str, Any], resume: bool, device: str) -> Path | None:
        """Make the folder or check that it is this run's; return the newest checkpoint, if any.

        Raises UserError when it holds a run with another config, or a run at all without ``resume``.
        """
        remove_stale(str(self.path))
        remove_stale(str(self.checkpoints))
        newest, asked = self.newest(), {"recipe": recipe, **config}
        if newest is not None:
            if not resume:
                raise UserError(f"{self.path} has checkpoints (up to {newest.name}): use another --out, or --resume")
            self._check_same(asked)
        write_json(str(self.path / "config.json"), asked)
        write_json(str(self.path / "environment.json"), environment(device))
        return newest

    def _check_same(self, asked: dict[str, Any]) -> None:
        there = self.config()
        changed = [
            f"{field}: {there.get(field)!r} there, {asked.get(field)!r} asked"
            for field in sorted({*there, *asked} - FREE_ON_RESUME)
            if there.get(field) != asked.get(field)
        ]
        if changed:
            raise UserError(
                f"{self.path} holds a run with another config ({'; '.join(changed)}): ask for the same to go on, "
                "or use another --out"
            )

    def config(self) -> dict[str, Any]:
        """``recipe`` and the flat config. Raises UserError when the folder is no run."""
        path = self.path / "config.json"
        if not path.exists():
            raise UserError(f"{path} is not there: {self.path} is no RUN folder of `clipmill train`")
        config: dict[str, Any] = read_json(str(path))
        return config

    def describe(self, student: LoadedModel, model: str) -> None:
        """Write what `load_run` rebuilds the student from."""
        if isinstance(student.model, Classifier):
            describe_classifier(str(self.path), student)
        else:
            write_open_clip_config(str(self.path), student, model)

    def newest(self) -> Path | None:
        """The checkpoint of the highest step."""
        found = self._found()
        return found[-1] if found else None

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
        """Write a checkpoint atomically, then delete all but the newest ``keep``."""
        if self.metrics.exists():
            with open(self.metrics, "rb") as lines:
                os.fsync(lines.fileno())  # on disk before the checkpoint that stands for them
        with atomic_writer(str(self.checkpoints / f"step_{step:06d}.pt")) as file:
            torch.save(state, file)
        for old in self._found()[:-keep]:
            old.unlink()

    def save_best(self, state: dict[str, Any]) -> None:
        """Write best.pt atomically."""
        with atomic_writer(str(self.checkpoints / BEST)) as file:
            torch.save(state, file)

    def save_nonfinite(self, step: int, state: dict[str, Any], keep: int) -> Path:
        """Write what led to a loss that is not finite; the newest ``keep`` of these stay."""
        folder = self.path / "nonfinite"
        path = folder / f"step_{step:06d}.pt"
        with atomic_writer(str(path)) as file:
            torch.save(state, file)
        for old in self._found(folder)[:-keep]:
            old.unlink()
        return path

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Drop lines after ``step`` (a killed run had gone on from there), and a half-written last one."""
        if not self.metrics.exists():
            return
        kept = b""
        for line in read_bytes(str(self.metrics)).splitlines(keepends=True):
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            kept += line
        write_bytes(str(self.metrics), kept)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `RunDir.save` wrote, on the CPU. Raises DataError when the file is broken."""
    mend = "delete it to go on from the one before"
    state: dict[str, Any] = read_checkpoint(str(path), given=False, mend=mend)
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
    folder = model.removeprefix("local-dir:")
    for candidate in ([Path(folder) / Path(named).name] if folder != model else []) + [Path(named)]:
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
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", ".").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None
