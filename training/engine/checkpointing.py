"""A training's state in a checkpoint, and back: everything that the next step depends on."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shards_spec.checkpoints import describe_mismatch
from shards_spec.files import DataError, UserError
from shards_spec.messages import counted
from training.data.batches import TrainingRows
from training.engine.frozen_weights import exact_state, load_exact_state
from training.engine.gradients import rng_state, set_rng_state
from training.engine.optim import load_optimizer
from training.engine.updater import Updater
from training.runs.checkpoint_files import load_checkpoint
from training.runs.run_folder import RunFolder

log = logging.getLogger(__name__)
NEW_STREAM = 1_000_003  # a prime, so that streams of processes and steps do not meet


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: Steps that were taken.
        samples_seen: Positions of the stream, over all processes.
        skipped: Samples that could not be used.
        seconds: Training time.
        nonfinite: Steps that were skipped because loss or gradient was not finite.
        in_a_row: The last of these without another step between.
        best: The best score on ``eval_data`` so far.
    """

    step: int = 0
    samples_seen: int = 0
    skipped: int = 0
    seconds: float = 0.0
    nonfinite: int = 0
    in_a_row: int = 0
    best: float | None = None


class Checkpointing:
    """Saves and restores a training.

    Args:
        run: The run folder.
        rows: What is read: a checkpoint's position counts only for shards of the same sizes.
        updater: The task, its optimizer and its average.
        keep: How many of the newest checkpoints stay.
        seed: Of the run, for random streams of processes that were not there before.
    """

    def __init__(self, run: RunFolder, rows: TrainingRows, updater: Updater, *, keep: int, seed: int) -> None:
        self.run = run
        self.rows = rows
        self.updater = updater
        self.ranks, self.device = updater.ranks, updater.device
        self.keep, self.seed = keep, seed
        self.sizes_sha256 = rows.order.sha256

    def save(self, progress: Progress, best: dict[str, Any] | None = None) -> None:
        """Write a checkpoint; with ``best``, also that, as best.pt. All ranks call this, the main one writes."""
        streams = self.ranks.gather_to_main(rng_state(self.device))
        with self.ranks.raise_on_all():
            if not self.ranks.is_main:
                return
            updater = self.updater
            state = {
                "progress": vars(progress),
                "epoch": progress.samples_seen // self.rows.order.total,
                "sizes_sha256": self.sizes_sha256,
                "task": exact_state(updater.task),
                "ema": updater.average.weights if updater.average is not None else None,
                "optimizer": updater.optimizer.state_dict(),
                "scaler": updater.gradients.scaler.state_dict(),
                "rng": streams,  # one of each rank
            }
            if best is not None:
                self.run.save_best(state | best)
            else:
                self.run.save(progress.step, state, self.keep)

    def restore(self, checkpoint: Path) -> tuple[Progress, bool]:
        """Go back to a checkpoint, whatever the number of processes that wrote it.

        Returns:
            The progress, and whether the task has another shape than it was prepared with.

        Raises:
            UserError: The dataset's shards are not those of then.
            DataError: The model is another.
        """
        state = load_checkpoint(checkpoint)
        if state["sizes_sha256"] != self.sizes_sha256:
            raise UserError(
                f"{checkpoint}: the shards in {self.updater.config.data.data}, or what is selected of them, are others "
                "than when it was written, so its place in them is lost; restore them, or train anew with another --out"
            )
        rebuilt = self._load_weights(checkpoint, state)
        self._restore_streams(state)
        writers = len(state["rng"])
        if writers == self.ranks.size:
            log.info("resumed from %s", checkpoint)
        else:
            log.info(
                "resumed from %s, written by %s, with %d",
                checkpoint,
                counted(writers, "process", "processes"),
                self.ranks.size,
            )
        return Progress(**state["progress"]), rebuilt

    def _load_weights(self, checkpoint: Path, state: dict[str, Any]) -> bool:
        updater = self.updater
        updater.task.reshape_like(state["task"])
        rebuilt = updater.task.rebuilt
        if rebuilt:
            updater.rebuild()
        try:
            load_exact_state(updater.task, state["task"])
            load_optimizer(updater.optimizer, state["optimizer"])
        except (RuntimeError, ValueError) as error:  # a name or a shape; a group of parameters
            raise DataError(
                f"{checkpoint} does not fit the model as it is built now ({describe_mismatch(error)}): restore what it "
                "was made from, or train anew with another --out"
            ) from error
        updater.gradients.scaler.load_state_dict(state["scaler"])
        if updater.average is not None:
            for name, value in state["ema"].items():
                updater.average.weights[name].copy_(value)
        return rebuilt

    def _restore_streams(self, state: dict[str, Any]) -> None:
        if self.ranks.rank < len(state["rng"]):
            set_rng_state(state["rng"][self.ranks.rank], self.device)
        else:  # there were fewer processes: a stream of its own from here on
            torch.manual_seed(self.seed + 1 + self.ranks.rank + NEW_STREAM * state["progress"]["step"])
