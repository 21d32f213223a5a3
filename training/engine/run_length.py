"""How long a run is against its batch, its dataset and its schedule: what a user should hear before the first step."""

import logging
import os

from shards_spec.messages import counted
from training.config import OptimConfig
from training.data.batches import TrainingRows
from training.engine.optim import learning_rate

log = logging.getLogger(__name__)


def warn_of_lengths(batch_size: int, optim: OptimConfig, rows: TrainingRows, steps: int) -> None:
    """Warn of a batch larger than the dataset, of a batch of one pair, and of a warm-up that does not end.

    Args:
        batch_size: The config's global batch.
        optim: Its warm-up.
        rows: What is trained on.
        steps: Steps of the run.
    """
    has_pairs = rows.student.tokenizer is not None
    samples = rows.order.total
    if batch_size > samples:
        also = ", and a pair that comes twice is its own negative" if has_pairs else ""
        log.warning(
            "--batch-size %d: the dataset has %s, so a batch has some twice%s",
            batch_size,
            counted(samples, "sample"),
            also,
        )
    if batch_size == 1 and has_pairs:
        log.warning("--batch-size 1: a batch of one pair has no negatives, contrastive losses are 0 and teach nothing")
    if optim.warmup > steps:
        last = learning_rate(steps - 1, optim, steps)
        log.warning(
            "--warmup %d: the run has %s, so its learning rate is %.3g at the end and never --lr %.3g; take a "
            "shorter warm-up or more --steps or --epochs",
            optim.warmup,
            counted(steps, "step"),
            last,
            optim.lr,
        )


def warn_of_workers(workers: int) -> None:
    """Warn of more reading processes than this one may use cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers > cores:
        log.warning("--workers %d: more processes than the %s that this one may use", workers, counted(cores, "core"))


def extension(optim: OptimConfig, step: int, before: int, now: int) -> str:
    """Return a message of what becomes of the learning rate when a run is extended.

    Args:
        optim: The schedule.
        step: Steps that were taken.
        before: Steps of the run as it was.
        now: Steps of the run as it is to be.
    """
    last = learning_rate(max(0, step - 1), optim, before)
    following = learning_rate(step, optim, now)
    schedule = "stays" if optim.schedule == "constant" else f"now ends at step {now} with {optim.final_lr:.3g}"
    return (
        f"extended from {before} to {counted(now, 'step')}, resuming after step {step}: "
        f"the {optim.schedule} schedule {schedule}, so the learning rate goes from {last:.3g} to {following:.3g} "
        "at the next step"
    )
