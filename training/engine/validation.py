"""Measuring the student while it is trained, by the task's own evaluation or zero-shot on ``--eval-data``."""

import dataclasses
from contextlib import nullcontext

from shards_spec.models import LoadedModel
from training.data.batches import TrainingRows
from training.engine.checkpointing import Checkpointing, Progress
from training.engine.frozen_weights import exact_weights
from training.engine.updater import Updater
from training.evaluation.zero_shot import Encoder, measure, score

BATCH_SIZE = 64


class Validation:
    """Measures when it is time to, and keeps the best checkpoint.

    Args:
        student: The student as it was loaded, for its tokenizer and preprocessing.
        rows: What is trained on.
        updater: The task and its average.
        checkpoints: Where the best one is saved.
    """

    def __init__(self, student: LoadedModel, rows: TrainingRows, updater: Updater, checkpoints: Checkpointing) -> None:
        self.student = student
        self.rows = rows
        self.updater = updater
        self.checkpoints = checkpoints
        self.run = updater.config.run

    def is_due(self, progress: Progress) -> bool:
        """Return whether to measure after the step that ``progress`` counts last."""
        is_wanted = bool(self.run.eval_data) or self.updater.task.evaluates
        if not is_wanted or progress.step == self.updater.total:
            return is_wanted
        if self.run.eval_every_steps is not None:
            return progress.step % self.run.eval_every_steps == 0
        period = self.run.eval_every_epochs * self.rows.order.total
        seen_before = progress.samples_seen - self.rows.plan.size(progress.step - 1)
        return progress.samples_seen // period > seen_before // period

    def evaluate(self, progress: Progress) -> dict[str, float]:
        """Return the metrics, measured by the main rank, of the averaged weights where there are any.

        A checkpoint that is better than those before is saved as best.pt. All ranks call this.
        """
        ranks = self.updater.ranks
        metrics: dict[str, float] = {}
        with ranks.raise_on_all():
            if ranks.is_main:
                metrics = self._measure()
        metrics = ranks.broadcast(metrics)
        if progress.best is None or score(metrics) > progress.best:
            progress.best = score(metrics)
            self.checkpoints.save(progress, {"eval": metrics, "score": progress.best})
        return metrics

    def _measure(self) -> dict[str, float]:
        task, average = self.updater.task, self.updater.average
        student = task.student.eval()
        with exact_weights(task), average.swap_in(student) if average is not None else nullcontext():
            if task.evaluates:
                metrics = task.evaluate(self.updater.device)
            else:
                loaded = dataclasses.replace(self.student, model=student)
                _, metrics, _ = measure(Encoder(loaded, BATCH_SIZE, self.updater.device), self.run.eval_data)
        task.train()
        return metrics
