"""The one training loop. It knows a task, ``task(batch) -> dict of named weighted losses``, and no paper."""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shards_spec.files import UserError, sha256_json
from shards_spec.models import pick_device
from training.config import CacheConfig, DataConfig, ModelConfig, RunConfig, ViewConfig, flat, total_steps
from training.data import Samples, load_batches, open_samples
from training.optim import OptimConfig, build_optimizer, cosine_lr, set_lr
from training.order import batch_positions
from training.recipes import RECIPES
from training.run_dir import RunDir, load_checkpoint
from training.student import new_student

log = logging.getLogger(__name__)
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class RecipeConfig(Protocol):
    """What every recipe's config is composed of; its own weights come besides."""

    @property
    def data(self) -> DataConfig: ...
    @property
    def views(self) -> ViewConfig | CacheConfig: ...
    @property
    def student(self) -> ModelConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def run(self) -> RunConfig: ...


class Task(Protocol):
    """An nn.Module of a recipe. ``student`` is the open_clip model that is evaluated and exported."""

    student: Any

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Named weighted losses; their sum is minimised."""
        ...

    def after_step(self) -> None:
        """What a parameter's range asks for after the optimizer moved it."""
        ...


@dataclass
class Progress:
    """How far a run is. ``samples_seen`` counts positions over all processes; ``seconds`` is training time."""

    step: int = 0
    samples_seen: int = 0
    skipped: int = 0
    seconds: float = 0.0


def train(recipe: str, config: RecipeConfig) -> str:
    """Train a recipe to its end, or on from RUN's newest checkpoint; return the RUN folder.

    SIGTERM, SIGUSR1 and Ctrl-C end it after the step in progress, with a checkpoint. Raises UserError and DataError.
    """
    if recipe not in RECIPES:
        raise UserError(f"recipe {recipe!r}: there are {', '.join(RECIPES)}")
    module = import_module(f"training.recipes.{recipe}")
    device = pick_device(config.run.device)
    student = new_student(config.student, config.run.seed)
    samples = open_samples(config.data, config.views, student, config.run.seed)
    task = module.build(config, student, samples.cache).to(device).train()
    run = RunDir(config.run.out)
    newest = run.start(recipe, flat(config), config.run.resume, device)
    run.describe(student, config.student.model)
    trainer = Trainer(config, task, samples, run, device)
    if newest is not None:
        trainer.restore(newest)
    run.cut_metrics(trainer.progress.step)
    trainer.loop()
    return str(run.path)


@dataclass
class Trainer:
    """The state of a run and the loop over its steps."""

    config: RecipeConfig
    task: Any
    samples: Samples
    run: RunDir
    device: str
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.optimizer = build_optimizer(self.task, self.config.optim)
        self.total = total_steps(self.config.run, self.config.data.batch_size, self.samples.order.total)
        self.sizes_sha256 = sha256_json(self.samples.order.sizes.tolist())
        torch.manual_seed(self.config.run.seed + 1)  # dropout and the like, whatever the weights' draw took

    def loop(self) -> None:
        """Run the steps that are left."""
        from torch.utils.tensorboard import SummaryWriter

        progress, config = self.progress, self.config
        left = self.total - progress.step
        log.info("%s: step %d of %d, %d samples", self.run.path, progress.step, self.total, self.samples.order.total)
        if left <= 0:
            return
        positions = batch_positions(progress.samples_seen, left, config.data.batch_size)
        writer = SummaryWriter(str(self.run.path / "tensorboard"), purge_step=progress.step + 1)
        saved = logged = (time.monotonic(), progress.step)
        start = time.monotonic() - progress.seconds
        with writer, _stop_flag() as stop:
            for batch in load_batches(self.samples, positions, config.data.workers, self.device):
                losses, lr, norm = self.step(batch)
                now = time.monotonic()
                progress.seconds = now - start
                stopped = stop[0] if stop else None  # looked at once: a signal after this waits for the next step
                if progress.step % config.run.log_every == 0 or progress.step == self.total:
                    rate = (progress.step - logged[1]) * config.data.batch_size / max(now - logged[0], 1e-9)
                    logged = (now, progress.step)
                    self._log(writer, losses, lr, norm, rate)
                if stopped or progress.step == self.total or self._checkpoint_due(now - saved[0]):
                    self.save()
                    saved = (now, progress.step)
                if stopped:
                    log.warning(
                        "stopped by %s after step %d of %d; the same command goes on from there",
                        stopped.name, progress.step, self.total,
                    )  # fmt: skip
                    return

    def step(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], float, float]:
        """One step; returns the losses, the learning rate and the gradient's norm before clipping.

        Raises UserError when the loss is not finite; the weights are still those before the step.
        """
        progress, optim = self.progress, self.config.optim
        progress.skipped += len(batch["skipped"])
        bf16 = self.config.run.precision == "bf16"
        with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=bf16):
            losses: dict[str, Tensor] = self.task(batch)
        loss = torch.stack(list(losses.values())).sum()
        if not math.isfinite(loss.item()):
            parts = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
            raise UserError(
                f"the loss is not finite at step {progress.step + 1} ({parts}; first keys {batch['keys'][:5]}): "
                f"lower --lr ({optim.lr:g}), clip with --clip-norm, or train with --precision fp32"
            )
        loss.backward()
        parameters = [parameter for parameter in self.task.parameters() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, optim.clip_norm or math.inf).item()
        lr = cosine_lr(progress.step, optim.lr, optim.warmup, self.total)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step()
        progress.step += 1
        progress.samples_seen += self.config.data.batch_size
        return losses, lr, norm

    def _checkpoint_due(self, seconds: float) -> bool:
        every = self.config.run.checkpoint_steps
        return seconds > 60 * self.config.run.checkpoint_minutes or (
            every is not None and self.progress.step % every == 0
        )

    def _log(self, writer: Any, losses: dict[str, Tensor], lr: float, norm: float, rate: float) -> None:
        progress, values = self.progress, {name: value.item() for name, value in losses.items()}
        line = {
            "step": progress.step,
            "epoch": round(progress.samples_seen / self.samples.order.total, 6),
            "samples_seen": progress.samples_seen,
            "skipped": progress.skipped,
            "loss": sum(values.values()),
            "losses": values,
            "lr": lr,
            "grad_norm": norm,
            "logit_scale": self.task.student.logit_scale.exp().item(),
            "samples_per_s": round(rate, 2),
            "seconds": round(progress.seconds, 3),
        }
        self.run.log(line)
        curves = {f"loss/{name}": value for name, value in values.items()}
        for name, value in (curves | {k: v for k, v in line.items() if isinstance(v, float)}).items():
            writer.add_scalar(name, value, progress.step)
        eta = (self.total - progress.step) * self.config.data.batch_size / max(rate, 1e-9)
        log.info(
            "step %d/%d  epoch %.2f  loss %.4f  lr %.2e  %.0f samples/s  %.0f s left",
            progress.step, self.total, line["epoch"], line["loss"], lr, rate, eta,
        )  # fmt: skip

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        state = {
            "progress": vars(self.progress),
            "epoch": self.progress.samples_seen // self.samples.order.total,
            "sizes_sha256": self.sizes_sha256,
            "task": self.task.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.startswith("cuda") else [],
        }
        self.run.save(self.progress.step, state, self.config.run.keep_checkpoints)

    def restore(self, checkpoint: Any) -> None:
        """Go back to a checkpoint. Raises UserError when the dataset's shards are not those of then."""
        state = load_checkpoint(checkpoint)
        if state["sizes_sha256"] != self.sizes_sha256:
            raise UserError(
                f"{checkpoint}: the shards in {self.config.data.data} have other sizes than when it was written, so "
                "its place in them is lost; restore the dataset, or train anew with another --out"
            )
        self.task.load_state_dict(state["task"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and self.device.startswith("cuda"):
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        log.info("going on from %s", checkpoint)


@contextmanager
def _stop_flag() -> Iterator[list[signal.Signals]]:
    """A list that receives the first stopping signal; a second one acts as if this were not here."""
    received: list[signal.Signals] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        for name, handler in before.items():
            signal.signal(name, handler)

    for name in STOPPING:
        before[name] = signal.signal(name, note)
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
