"""Everything a run writes, all below one local folder; a run can be resumed, and its student rebuilt, from it alone.

config.json             recipe and all fields, flat
environment.json        versions, code revision, device of the newest start; parameters of the student by part
open_clip_config.json   the student's architecture and preprocessing (and bpe.txt.gz when it has its own)
student.json            sizes of a student whose sizes are learned, layer by layer, and its parameters
metrics.jsonl           one line per log interval; tensorboard/ has the same curves
checkpoints/step_N.pt   state of model, optimizer and random streams after N steps
checkpoints/best.pt     the same of the best measurement on eval_data, which is in it
checkpoints/*.sha256    the hash of each, as sha256sum writes it; a damaged checkpoint is not used
.lock                   the process that trains here at the moment
nonfinite/step_N.pt     what each process had read for a step whose loss was not finite, and the losses
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shards_spec.files import (
    DISK_FULL,
    DataError,
    UserError,
    exists,
    is_url,
    read_bytes,
    read_json,
    remove_stale,
    write_bytes,
    write_json,
)
from shards_spec.layout import dataset_json
from shards_spec.library_errors import parse_json, short
from shards_spec.lock import locked
from shards_spec.messages import counted, flag
from shards_spec.models import LOCAL_DIR, TIMM, LoadedModel
from shards_spec.student_table import STUDENT_TABLE
from training.config import FREE_ON_RESUME
from training.models.classifier import Classifier, describe_classifier
from training.models.parameter_count import count_parameters
from training.runs.checkpoint_files import hash_file, load_checkpoint, save_state, write_checkpoint
from training.runs.environment import environment
from training.runs.model_folder import write_open_clip_config

log = logging.getLogger(__name__)
CHECKPOINT = re.compile(r"step_(\d+)\.pt")
BEST = "best.pt"
LOCK = ".lock"
DAMAGED = ".damaged"  # ending of a checkpoint that is set aside


class RunFolder:
    """The folder of one run.

    Attributes:
        path: The folder.
        requested: Recipe and flat config, once the run has started.
    """

    def __init__(self, path: str) -> None:
        if is_url(path):
            raise UserError(f"--out {path!r}: a run needs a local folder, since it is written line by line")
        self.path = Path(path)
        self.checkpoints, self.metrics = self.path / "checkpoints", self.path / "metrics.jsonl"
        self.requested = dict[str, Any]()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Allow one training at a time. Raises UserError that names the process which trains here, or for a dataset.

        If that one was killed, the kernel has freed the lock. A folder made for the lock alone is removed again.
        """
        if Path(dataset_json(str(self.path))).exists():
            raise UserError(f"--out {self.path} is a dataset: give the run a folder of its own")
        is_new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.path}: no folder can be made there ({short(error)})") from error
        try:
            with locked(str(self.path / LOCK), str(self.path)):
                yield
        finally:
            if is_new:
                with suppress(OSError):  # it is not empty
                    self.path.rmdir()

    def start(
        self,
        recipe: str,
        config: dict[str, Any],
        resume: bool,
        device: str,
        *,
        steps: Callable[[dict[str, Any]], int],
        defaults: dict[str, Any],
    ) -> tuple[Path, dict[str, Any]] | None:
        """Make the folder, or check that it is this run's.

        Args:
            recipe: Name of the recipe.
            config: The flat config.
            resume: Whether the folder may hold checkpoints.
            device: Recorded in environment.json.
            steps: Counts the steps that a flat config asks for: they may grow.
            defaults: The recipe's flat config, for options that the run's version did not have.

        Returns:
            The newest intact checkpoint and the run's config so far, if there is a checkpoint.

        Raises:
            UserError: The folder holds a run with another config, or a run at all without ``resume``.
            DataError: No checkpoint is intact.
        """
        remove_stale(str(self.path))
        remove_stale(str(self.checkpoints))
        self.requested = {"recipe": recipe, **config}
        recorded = dict[str, Any]()
        newest = self.newest()
        if newest is not None:
            if not resume:
                raise UserError(f"{self.path} has checkpoints (up to {newest.name}): use another --out, or --resume")
            newest = self._newest_intact(set_aside=True)
            recorded = self._recorded_config(newest) or self.requested
            self._check_same({**defaults, **recorded}, steps)
        elif self.metrics.exists():
            log.warning("%s: has metrics and no checkpoint; the run starts again from step 0", self.path)
        write_json(str(self.path / "config.json"), self.requested)
        write_json(str(self.path / "environment.json"), environment(device))
        return (newest, recorded) if newest is not None else None

    def _recorded_config(self, checkpoint: Path) -> dict[str, Any]:
        """Return the run's config so far: config.json, or where that is broken the checkpoint's copy of it."""
        try:
            return self.config()
        except (UserError, DataError) as error:
            copy: dict[str, Any] = load_checkpoint(checkpoint).get("config") or {}
            source = f"as {checkpoint.name} has it" if copy else "as requested now"
            log.warning("%s; it is rewritten, %s", str(error).split(";")[0], source)
            return copy

    def _check_same(self, recorded: dict[str, Any], steps: Callable[[dict[str, Any]], int]) -> None:
        """Raise UserError where the requested config is another than the recorded one, but for a longer run."""
        requested = self.requested
        fields = {*recorded, *requested} - FREE_ON_RESUME
        different = sorted(field for field in fields if not _is_same(recorded.get(field), requested.get(field)))
        is_length = set(different) <= {"steps", "epochs"}
        if is_length and steps(requested) >= steps(recorded):
            return
        changed = []
        for field in different:
            name = field if field == "recipe" else flag(field)
            changed.append(f"{name}: {recorded.get(field)!r} before, {requested.get(field)!r} now")
        shorter = " (a run can be extended, not shortened)" if is_length else ""
        raise UserError(
            f"{self.path} holds a run with another config ({'; '.join(changed)}){shorter}: give the same config to "
            "resume, or use another --out"
        )

    def recorded(self, field: str) -> Any:
        """Return a field of the config of a run that has checkpoints; None without them or a readable config."""
        try:
            return self.config().get(field) if self.newest() is not None else None
        except (UserError, DataError):
            return None

    def stages_hint(self) -> str:
        """For a message that this is no run: which run to take where it has those of stages, else nothing."""
        stages = [path for path in self.path.glob("stage-*") if path.name.removeprefix("stage-").isdigit()]
        if not stages:
            return ""
        last = max(stages, key=lambda path: int(path.name.removeprefix("stage-")))
        return f"; its stages are RUN folders of their own, the last one is {last}"

    def config(self) -> dict[str, Any]:
        """Return ``recipe`` and the flat config.

        Raises UserError when the folder is no run, and DataError when its config is broken.
        """
        path = self.path / "config.json"
        fix = "rerun the same `clipmill train` command, which rewrites the file"
        if not path.exists():
            if self.newest() is not None:
                raise DataError(f"{path} is not there, though there are checkpoints; {fix}")
            raise UserError(
                f"{path} is not there: {self.path} is no RUN folder of `clipmill train`{self.stages_hint()}"
            )
        config: Any = parse_json(str(path), read_bytes(str(path)), fix=fix)
        if isinstance(config, dict) and "recipe" in config:
            return config
        if not isinstance(config, dict) or self.newest() is not None:
            raise DataError(f"{path}: not the config of a run; {fix}")
        timm = f"; it is a timm folder, named {TIMM}{LOCAL_DIR}{self.path}" if "architecture" in config else ""
        raise UserError(f"{path} has no recipe: {self.path} is no RUN folder of `clipmill train`{timm}")

    def describe(self, student: LoadedModel, model: str) -> None:
        """Write what `load_run` rebuilds the student from, and count its parameters in environment.json.

        ``model`` is the name it was loaded by.
        """
        if isinstance(student.model, Classifier):
            describe_classifier(str(self.path), student)
        else:
            write_open_clip_config(str(self.path), student, model)
        path = str(self.path / "environment.json")
        write_json(path, read_json(path) | {"parameters": count_parameters(student.model)})

    def write_table(self, table: dict[str, Any], step: int) -> None:
        """Write student.json: the sizes of a student, and the step that it has them from.

        Nothing is written where there are no sizes, or where the file has them already.
        """
        path = str(self.path / STUDENT_TABLE)
        present = json.loads(json.dumps(table))
        recorded = read_json(path) if exists(path) else {}
        if table and {name: value for name, value in recorded.items() if name != "step"} != present:
            write_json(path, {"step": step, **table})

    def newest(self) -> Path | None:
        """Return the checkpoint of the highest step, intact or not."""
        checkpoints = self._numbered()
        return checkpoints[-1] if checkpoints else None

    def load_newest(self) -> dict[str, Any] | None:
        """Return the state of the newest intact checkpoint, if there is one; damaged ones are named in a warning.

        Raises DataError when there are checkpoints and none is intact.
        """
        return load_checkpoint(self._newest_intact()) if self._numbered() else None

    def _newest_intact(self, set_aside: bool = False) -> Path:
        """Return the newest intact checkpoint. Raises DataError when there is none."""
        damaged = dict[Path, str]()
        for path in reversed(self._numbered()):
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
        """Return the checkpoint of the best measurement."""
        path = self.checkpoints / BEST
        return path if path.exists() else None

    def _numbered(self, folder: Path | None = None) -> list[Path]:
        """Return the files step_N.pt of a folder, by default of the checkpoints, in the order of steps."""
        folder = folder or self.checkpoints
        names = os.listdir(folder) if folder.is_dir() else []
        steps = sorted((int(match[1]), name) for name in names if (match := CHECKPOINT.fullmatch(name)))
        return [folder / name for _, name in steps]

    def save(self, step: int, state: dict[str, Any], keep: int) -> None:
        """Write a checkpoint atomically, then delete all but the newest ``keep``.

        Raises UserError when the disk is full; the checkpoints before it stay.
        """
        with self.room():
            if self.metrics.exists():
                with open(self.metrics, "rb") as lines:
                    os.fsync(lines.fileno())  # on disk before the checkpoint that stands for them
            write_checkpoint(self.checkpoints / f"step_{step:06d}.pt", {"config": self.requested, **state})
        for old in self._numbered()[:-keep]:
            old.unlink()
            hash_file(old).unlink(missing_ok=True)

    def save_best(self, state: dict[str, Any]) -> None:
        """Write best.pt atomically."""
        with self.room():
            write_checkpoint(self.checkpoints / BEST, {"config": self.requested, **state})

    def save_nonfinite(self, step: int, state: dict[str, Any], keep: int) -> Path:
        """Write what led to a loss that is not finite, and keep the newest ``keep`` of these files."""
        folder = self.path / "nonfinite"
        path = folder / f"step_{step:06d}.pt"
        with self.room():
            save_state(path, state)
        for old in self._numbered(folder)[:-keep]:
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
                f"no space left on the disk of {self.path} ({kept}): free some and rerun the same command to resume"
            ) from error

    def cut_metrics(self, step: int) -> None:
        """Drop the lines after ``step``, which a killed run had written, and lines that are no metrics.

        The latter are counted in a warning, except a half-written last line, which a killed process leaves.
        """
        if not self.metrics.exists():
            return
        kept = list[bytes]()
        garbage = 0
        for line in read_bytes(str(self.metrics)).splitlines(keepends=True):
            number = _step_of(line)
            if number is None:
                garbage += line.endswith(b"\n")
            elif number <= step:
                kept.append(line)
        if garbage:
            log.warning("%s: dropped %s that held no metrics", self.metrics, counted(garbage, "line"))
        write_bytes(str(self.metrics), b"".join(kept))


def _step_of(line: bytes) -> int | None:
    """Return the step of a line of metrics.jsonl; None where it is no such line."""
    try:
        parsed = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    step = parsed.get("step") if isinstance(parsed, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def _is_same(recorded: Any, requested: Any) -> bool:
    """Whether two values of a field are the same; older runs have one name where now a list of them stands."""
    if isinstance(recorded, str) and isinstance(requested, list):
        recorded = [recorded] if recorded else []
    return bool(recorded == requested)
