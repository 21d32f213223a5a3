"""How long a run is against its batch, its dataset and its schedule: what a user should hear before the first step."""

import logging

from training.config import OptimConfig
from training.data.batches import TrainingRows
from training.engine.optim import learning_rate

log = logging.getLogger(__name__)


def warn_of_lengths(batch_size: int, optim: OptimConfig, samples: TrainingRows, steps: int) -> None:
    """One warning for each: a batch larger than the dataset, a batch of one, a warm-up that does not end."""
    pairs, there = samples.student.tokenizer is not None, samples.order.total
    if batch_size > there:
        also = ", and a pair that comes twice is its own negative" if pairs else ""
        log.warning("--batch-size %d: the dataset has %d samples, so a batch has some twice%s", batch_size, there, also)
    if batch_size == 1 and pairs:
        log.warning("--batch-size 1: a batch of one pair has no negatives, contrastive losses are 0 and teach nothing")
    if optim.warmup > steps:
        last = learning_rate(steps - 1, optim, steps)
        log.warning(
            "--warmup %d: the run has %d steps, so its learning rate is %.3g at the end and never --lr %.3g; take a "
            "shorter warm-up or more --steps or --epochs", optim.warmup, steps, last, optim.lr,
        )  # fmt: skip


def extension(optim: OptimConfig, step: int, before: int, now: int) -> str:
    """What becomes of the learning rate when a run of ``before`` steps is extended at ``step`` to ``now`` steps."""
    was, then = learning_rate(max(0, step - 1), optim, before), learning_rate(step, optim, now)
    way = "stays" if optim.schedule == "constant" else f"now ends at step {now} with {optim.final_lr:.3g}"
    return (
        f"extended from {before} to {now} steps, going on after step {step}: the {optim.schedule} schedule {way}, so "
        f"the learning rate goes from {was:.3g} to {then:.3g} at the next step"
    )
