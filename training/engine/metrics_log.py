"""What a run says of its steps: metrics.jsonl, curves of TensorBoard and wandb, and a line on the terminal."""

import logging
import math
import time
from types import TracebackType
from typing import Any

import torch

from training.data.batches import TrainingRows
from training.engine.checkpointing import Progress
from training.engine.memory_estimate import Memory
from training.engine.updater import Update, Updater
from training.runs.run_folder import RunFolder
from training.runs.tensorboard_writer import Curves
from training.runs.wandb_writer import WandbCurves

log = logging.getLogger(__name__)
MIB = 2**20


class MetricsLog:
    """Lines and curves of a run, written by the main rank.

    Args:
        run: The run folder.
        rows: What is trained on.
        updater: The task and its optimizer.
        progress: Where the run starts, for the rate of samples.
        predicted: The memory that was predicted, logged beside the measured one.
    """

    def __init__(
        self, run: RunFolder, rows: TrainingRows, updater: Updater, progress: Progress, predicted: Memory | None
    ) -> None:
        self.run = run
        self.rows = rows
        self.updater = updater
        self.predicted = predicted
        self.is_main = updater.ranks.is_main
        self._time, self._samples_seen = time.monotonic(), progress.samples_seen
        self._curves: list[Curves | WandbCurves] = []
        if self.is_main:
            self._curves.append(Curves(str(run.path / "tensorboard"), progress.step + 1))
        if self.is_main and updater.config.run.report_to == "wandb":
            self._curves.append(WandbCurves(run.path, run.requested))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for curves in self._curves:
            curves.__exit__(kind, error, at)

    def write(self, progress: Progress, update: Update, metrics: dict[str, float], now: float) -> None:
        """Write one line of metrics.jsonl, the curves and a log record.

        Args:
            progress: After the step.
            update: What the step did.
            metrics: What was measured after it, if anything.
            now: The time, from `time.monotonic`.
        """
        rate = (progress.samples_seen - self._samples_seen) / max(now - self._time, 1e-9)
        self._time, self._samples_seen = now, progress.samples_seen
        if not self.is_main:
            return
        values = {name: value.item() for name, value in update.losses.items()}
        own = self.updater.task.metrics(progress.step - 1)
        line = self._line(progress, update, values, rate) | own
        curves = {name: value for name, value in line.items() if isinstance(value, float)} | own
        curves |= {f"loss/{name}": value for name, value in values.items()}
        curves |= {f"eval/{name}": value for name, value in metrics.items()}
        self.run.log(line | ({"eval": metrics} if metrics else {}))
        with self.run.room():
            for writer in self._curves:
                writer.add(progress.step, curves)
        total = self.updater.total
        log.info(
            "step %d/%d  epoch %.2f  loss %.4f  lr %.2e  %.0f samples/s  %.0f s left%s",
            progress.step,
            total,
            line["epoch"],
            sum(values.values()),
            update.lr,
            rate,
            (total - progress.step) * self.rows.plan.mean / max(rate, 1e-9),
            "".join(f"  {name} {value:.4f}" for name, value in metrics.items()),
        )

    def _line(self, progress: Progress, update: Update, values: dict[str, float], rate: float) -> dict[str, Any]:
        line: dict[str, Any] = {
            "step": progress.step,
            "epoch": round(progress.samples_seen / self.rows.order.total, 6),
            "samples_seen": progress.samples_seen,
            "skipped": progress.skipped,
            "nonfinite": progress.nonfinite,
            "loss": _finite(sum(values.values())),
            "losses": {name: _finite(value) for name, value in values.items()},
            "lr": update.lr,
            "grad_norm": _finite(update.grad_norm),
        }
        scale = getattr(self.updater.task.student, "logit_scale", None)  # classifiers have none
        if scale is not None:
            line["logit_scale"] = scale.exp().item()
        line |= {"samples_per_s": round(rate, 2), "seconds": round(progress.seconds, 3)}
        scaler, device = self.updater.gradients.scaler, self.updater.device
        if scaler.is_enabled():
            line["loss_scale"] = scaler.get_scale()
        if self.predicted is not None and device.startswith("cuda"):
            line["memory_mib"] = round(torch.cuda.max_memory_allocated(device) / MIB, 1)
            line["memory_predicted_mib"] = round(self.predicted.total / MIB, 1)
        return line


def _finite(value: float) -> float | None:
    """JSON has no others."""
    return value if math.isfinite(value) else None
