"""The one training loop. It knows a task, that is features of samples and named losses of them, and no paper."""

import dataclasses
import logging
import math
import signal
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shards_spec.checkpoints import misfit
from shards_spec.files import DataError, UserError, sha256_json
from shards_spec.library_errors import short
from shards_spec.models import LoadedModel, pick_device
from shards_spec.precision import resolve_precision
from training.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TeacherCacheConfig,
    ViewConfig,
    flat,
    total_steps,
)
from training.data.batches import load_batches
from training.data.samples import Samples, check_data, open_samples
from training.engine.batch_fit import fitted, halved, is_out_of_memory, out_of_memory, profiles, warn_of_norms
from training.engine.distributed import Ranks, processes
from training.engine.ema import ModelEma
from training.engine.gradients import Batch, Gradients, rng_state, set_rng_state, total
from training.engine.memory_estimate import Memory
from training.engine.optim import build_optimizer, learning_rate, set_lr
from training.engine.run_length import extension, warn_of_lengths
from training.engine.stop_signal import stop_flag
from training.engine.sync_batch_norm import statistics, synchronise
from training.evaluation.clip_benchmark import check_root
from training.evaluation.zero_shot import Encoder, measure, score
from training.recipes import RECIPES
from training.runs.run_folder import RunDir, load_checkpoint
from training.runs.student import new_student
from training.runs.tensorboard_writer import Curves

log = logging.getLogger(__name__)


class RecipeConfig(Protocol):
    """What every recipe's config is composed of; its own weights come besides."""

    @property
    def data(self) -> DataConfig: ...
    @property
    def views(self) -> ViewConfig | TeacherCacheConfig: ...
    @property
    def student(self) -> ModelConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def run(self) -> RunConfig: ...


class Task(Protocol):
    """An nn.Module of a recipe. ``student`` is the open_clip model that is evaluated and exported."""

    student: Any

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Per-sample tensors (n, ...) of a batch or of a chunk of one, teacher features and per-sample losses too."""
        ...

    # Optional: draw(batch) -> batch, with random numbers that belong to the whole batch, before it is cut into chunks.

    def losses(self, features: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Named weighted losses of the global batch's features (N, ...), in the order of positions.

        Every rank computes all of it, so nothing may come from a rank's own random stream; their sum is minimised.
        """
        ...

    def after_step(self) -> None:
        """What a parameter's range asks for after the optimizer moved it."""
        ...


@dataclass
class Progress:
    """How far a run is. ``samples_seen`` counts positions over all processes; ``seconds`` is training time.

    ``nonfinite`` counts steps that were skipped for their loss, ``in_a_row`` the last ones without another between.
    ``best`` is the best score on ``eval_data`` so far.
    """

    step: int = 0
    samples_seen: int = 0
    skipped: int = 0
    seconds: float = 0.0
    nonfinite: int = 0
    in_a_row: int = 0
    best: float | None = None


def train(recipe: str, config: RecipeConfig) -> str:
    """Train a recipe to its end, or on from RUN's newest checkpoint; return the RUN folder.

    Under torchrun this is one of several processes. SIGTERM, SIGUSR1 and Ctrl-C end all of them after the step in
    progress, with a checkpoint and SystemExit of 128 + the signal's number. Raises UserError and DataError.
    """
    stopped = None
    with processes(config.run.device) as (ranks, device), ExitStack() as held:
        run, precision = RunDir(config.run.out), config.run.precision
        found, predicted = None, Memory()
        with ranks.raise_on_all():
            if ranks.is_main:
                held.enter_context(run.lock())
                precision = resolve_precision(precision, device, before=run.recorded("precision"), emulated=False)
        config = _with(config, precision=ranks.broadcast(precision))
        with ranks.raise_on_all():
            student, samples, task = prepare(recipe, config)
            next(samples.plan.positions(0, 0, 1, ranks.rank, ranks.size))  # raises where it cannot share
            if ranks.is_main:
                predicted = fitted(config.run, profiles(config, samples, task), ranks.size, device)
                found = run.start(recipe, flat(config), config.run.resume, device, partial(_steps, config, samples))
                run.describe(student, config.student.model)
        found, predicted = ranks.broadcast((found, predicted))
        log.info("%s", predicted)
        config = _with(config, chunk_size=predicted.chunk_size)
        with ranks.raise_on_all(), out_of_memory(device):
            task = task.to(device).train()
        trainer = Trainer(config, task, samples, run, device, student, ranks, predicted)
        with ranks.raise_on_all():
            if found is not None:
                trainer.restore(*found)
            if ranks.is_main:
                run.cut_metrics(trainer.progress.step)
                warn_of_lengths(config.data.batch_size, config.optim, samples, trainer.total)
        with out_of_memory(device):  # of batches and of the optimizer's state
            stopped = trainer.loop()
    if stopped is not None:
        raise SystemExit(128 + stopped)
    return str(run.path)


def _with(config: RecipeConfig, **fields: Any) -> RecipeConfig:
    """The config with other fields of its run."""
    run = dataclasses.replace(config.run, **fields)
    return dataclasses.replace(config, run=run)  # type: ignore[type-var]  # every recipe's config is a dataclass


def _steps(config: RecipeConfig, samples: Samples, asked: dict[str, Any]) -> int:
    """Steps that a flat config of this run asks for."""
    run = dataclasses.replace(config.run, steps=asked.get("steps"), epochs=asked.get("epochs", 1.0))
    return total_steps(run, samples.plan.mean, samples.order.total)


def prepare(recipe: str, config: RecipeConfig) -> tuple[LoadedModel, Samples, Any]:
    """Student, reader and task of a recipe, on the CPU. Raises UserError and DataError."""
    if recipe not in RECIPES:
        raise UserError(f"recipe {recipe!r}: there are {', '.join(RECIPES)}")
    if config.run.eval_data:
        check_root(config.run.eval_data)  # raises now, not after an epoch
    module = import_module(f"training.recipes.{recipe}")
    if hasattr(module, "check"):
        module.check(config)
    if hasattr(module, "prepare"):  # its student or its samples are others than open_clip's and pairs
        student, samples, task = module.prepare(config)
    else:
        check_data(config.data)
        student = new_student(config.student, config.run.seed)
        samples = open_samples(config.data, config.views, student, config.run.seed)
        task = module.build(config, student, samples.cache)
    if config.run.checkpoint_activations:
        if not hasattr(task.student, "set_grad_checkpointing"):
            raise UserError(f"--checkpoint-activations: model {config.student.model!r} has no set_grad_checkpointing")
        task.student.set_grad_checkpointing(True)
    return student, samples, task


def predict(recipe: str, config: RecipeConfig) -> Memory:
    """Peak memory of one training process, where a batch is shared by the processes there are.

    Chunks are those that training would take here, or within --fit. Raises UserError when nothing fits --fit.
    """
    device = pick_device(config.run.device)
    config = _with(config, precision=resolve_precision(config.run.precision, device, emulated=False))
    with processes("cpu") as (ranks, _):
        _, samples, task = prepare(recipe, config)
        sized = profiles(config, samples, task)
        return fitted(config.run, sized, ranks.size, device, only_said=config.run.fit is None)


@dataclass
class Trainer:
    """The state of a run and the loop over its steps."""

    config: RecipeConfig
    task: Any
    samples: Samples
    run: RunDir
    device: str
    student: LoadedModel
    ranks: Ranks = field(default_factory=Ranks)
    predicted: Memory | None = None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        run, optim = self.config.run, self.config.optim
        if run.channels_last:
            self.task.to(memory_format=torch.channels_last)
        if run.sync_bn and self.ranks.size > 1:
            log.info("%d trained BatchNorms are synchronised", synchronise(self.task, self.device))
        if run.compile:
            self.task.compile()  # its forward, in place: names of weights stay
        self.optimizer = build_optimizer(self.task, optim)
        normalise = self.student.normalise
        self.gradients = Gradients(self.task, self.ranks, self.device, run.precision, run.chunk_size, normalise)
        self.average = ModelEma(self.task.student, optim.ema_decay) if optim.ema_decay is not None else None
        self.total = total_steps(run, self.samples.plan.mean, self.samples.order.total)
        self.sizes_sha256 = sha256_json(self.samples.order.sizes.tolist())
        self.statistics = statistics(self.task)
        warn_of_norms(self.task, run.chunk_size)
        torch.manual_seed(run.seed + 1 + self.ranks.rank)  # dropout and the like, whatever the weights' draw took

    def loop(self) -> int | None:
        """Run the steps that are left; the number of the signal that stopped it, None at the end."""
        progress, config, ranks = self.progress, self.config, self.ranks
        left = self.total - progress.step
        log.info("%s: step %d of %d, %d samples", self.run.path, progress.step, self.total, self.samples.order.total)
        if left <= 0:
            return None
        plan = self.samples.plan
        positions = plan.positions(progress.step, progress.samples_seen, left, ranks.rank, ranks.size)
        sides = plan.sides_from(progress.step)
        as_bytes = config.run.chunk_size is not None  # floats are those of a chunk alone
        batches = load_batches(
            self.samples, positions, workers=config.data.workers, device=self.device, sides=sides, as_bytes=as_bytes
        )
        saved, logged = (time.monotonic(), progress.step), (time.monotonic(), progress.samples_seen)
        start = time.monotonic() - progress.seconds
        with self._writer() as writer, stop_flag() as stop:
            while progress.step < self.total:
                with ranks.raise_on_all():
                    batch = next(batches)
                losses, lr, norm = self.step(batch)
                metrics = self._evaluate() if self._evaluation_due() else {}
                now = time.monotonic()
                progress.seconds = now - start
                # looked at once, and by all: a signal after this waits for the next step; rank 0's clock decides
                stopped, due = ranks.all_max(stop[0] if stop else 0, ranks.is_main and self._save_due(now - saved[0]))
                finished = progress.step == self.total
                if progress.step % config.run.log_every == 0 or finished or metrics:
                    rate = (progress.samples_seen - logged[1]) / max(now - logged[0], 1e-9)
                    logged = (now, progress.samples_seen)
                    if ranks.is_main:
                        self._log(writer, losses, lr, norm, rate, metrics)
                if stopped or finished or due:
                    self.save()
                    saved = (now, progress.step)
                if stopped:
                    log.warning(
                        "stopped by %s after step %d of %d; the same command goes on from there",
                        signal.Signals(stopped).name, progress.step, self.total,
                    )  # fmt: skip
                    return int(stopped)
        return None

    def step(self, batch: Batch) -> tuple[dict[str, Tensor], float, float]:
        """One step; returns the losses, the learning rate and the gradient's norm before clipping.

        Where the loss or the gradient is not finite, weights and running statistics stay those before the step. Raises
        UserError when that comes too often in a row.
        """
        progress, scaler = self.progress, self.gradients.scaler
        sizes = self.ranks.sizes(len(batch["keys"]))
        size = self.samples.plan.size(progress.step)
        progress.skipped += size - sum(sizes)
        before = [buffer.clone() for buffer in self.statistics]
        if self.config.run.channels_last:
            batch["images"] = batch["images"].contiguous(memory_format=torch.channels_last)
        losses, bad = self._gradients(batch, sizes, before)
        lr, norm = learning_rate(progress.step, self.config.optim, self.total), math.nan
        if not bad:
            scaler.unscale_(self.optimizer)
            norm = self._clip()
            hopeless = not scaler.is_enabled() or scaler.get_scale() < 1  # else the scaler skips and lowers its scale
            bad = bool(self.ranks.all_max(hopeless and not math.isfinite(norm))[0])
        if bad:
            for buffer, value in zip(self.statistics, before, strict=True):
                buffer.copy_(value)
        else:
            set_lr(self.optimizer, lr)
            scaler.step(self.optimizer)
            scaler.update()
            self.task.after_step()
            if self.average is not None:
                self.average.update(self.task.student)
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.samples_seen += size
        progress.in_a_row = progress.in_a_row + 1 if bad else 0
        losses = {name: value.detach() for name, value in losses.items()}  # not the graph of a skipped step
        if bad:
            self._note_nonfinite(batch, losses)
        return losses, lr, norm

    def _gradients(self, batch: Batch, sizes: list[int], before: list[Tensor]) -> tuple[dict[str, Tensor], bool]:
        """Losses, and whether one is not finite: then there are no gradients. Chunks that do not fit are halved."""
        streams = rng_state(self.device)
        while True:
            try:
                return self._try_gradients(batch, sizes)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = short(error)
            # out here the error, and with it the graph, is gone
            self.gradients.chunk_size = halved(self.gradients.chunk_size, max(sizes), self.ranks.size, reason)
            warn_of_norms(self.task, self.gradients.chunk_size)
            self.optimizer.zero_grad(set_to_none=True)
            set_rng_state(streams, self.device)
            for buffer, value in zip(self.statistics, before, strict=True):
                buffer.copy_(value)
            if self.device != "cpu":
                torch.cuda.empty_cache()

    def _try_gradients(self, batch: Batch, sizes: list[int]) -> tuple[dict[str, Tensor], bool]:
        """Of its own, so that an attempt that did not fit keeps nothing while the next one runs."""
        losses, backward = self.gradients.losses(batch, self.progress.step, sizes)
        bad = bool(self.ranks.all_max(not math.isfinite(total(losses).item()))[0])
        if not bad:
            backward()
        return losses, bad

    def _clip(self) -> float:
        parameters = [parameter for parameter in self.task.parameters() if parameter.grad is not None]
        return float(nn.utils.clip_grad_norm_(parameters, self.config.optim.clip_norm or math.inf))

    def _note_nonfinite(self, batch: Batch, losses: dict[str, Tensor]) -> None:
        """Keep a skipped step's batch. Raises UserError when it is one too many in a row."""
        progress, run = self.progress, self.config.run
        progress.nonfinite += 1
        values = {name: value.item() for name, value in losses.items()}
        where = self.run.path
        with self.ranks.raise_on_all():
            batches = self.ranks.gather_to_main(batch)
            if self.ranks.is_main:
                state = {"step": progress.step, "losses": values, "batches": batches}
                where = self.run.save_nonfinite(progress.step, state, run.max_nonfinite)
        what = "gradient" if math.isfinite(sum(values.values())) else "loss"
        parts = ", ".join(f"{name} {value:g}" for name, value in values.items())
        message = f"the {what} is not finite at step {progress.step} ({parts}; first keys {batch['keys'][:5]})"
        with self.ranks.raise_on_all():
            if progress.in_a_row >= run.max_nonfinite and self.ranks.is_main:
                raise UserError(
                    f"{message}, {progress.in_a_row} in a row; the batch is in {where}: lower --lr "
                    f"({self.config.optim.lr:g}), clip with --clip-norm, or train with --precision fp32"
                )
        if self.ranks.is_main:
            log.warning("%s: skipped; the batch is in %s", message, where)

    def _evaluation_due(self) -> bool:
        run, seen = self.config.run, self.progress.samples_seen
        measured = bool(run.eval_data) or hasattr(self.task, "measure")
        if not measured or self.progress.step == self.total:
            return measured
        if run.eval_every_steps is not None:
            return self.progress.step % run.eval_every_steps == 0
        period = run.eval_every_epochs * self.samples.order.total
        return seen // period > (seen - self.samples.plan.size(self.progress.step - 1)) // period

    def _evaluate(self) -> dict[str, float]:
        """Metrics on ``eval_data`` (of the averaged weights, where there are), by rank 0; the best is saved."""
        metrics: dict[str, float] = {}
        with self.ranks.raise_on_all():
            if self.ranks.is_main:
                student = self.task.student.eval()
                with self.average.swap_in(student) if self.average is not None else nullcontext():
                    if hasattr(self.task, "measure"):
                        metrics = self.task.measure(self.device)
                    else:
                        encoder = Encoder(dataclasses.replace(self.student, model=student), 64, self.device)
                        _, metrics, _ = measure(encoder, self.config.run.eval_data)
                self.task.train()
        metrics = self.ranks.broadcast(metrics)
        if self.progress.best is None or score(metrics) > self.progress.best:
            self.progress.best = score(metrics)
            self.save({"eval": metrics, "score": self.progress.best})
        return metrics

    def _save_due(self, seconds: float) -> bool:
        every = self.config.run.checkpoint_steps
        return seconds > 60 * self.config.run.checkpoint_minutes or (
            every is not None and self.progress.step % every == 0
        )

    def _writer(self) -> Any:
        """TensorBoard's on rank 0."""
        if not self.ranks.is_main:
            return nullcontext()
        return Curves(str(self.run.path / "tensorboard"), self.progress.step + 1)

    def _log(
        self, writer: Any, losses: dict[str, Tensor], lr: float, norm: float, rate: float, metrics: dict[str, float]
    ) -> None:
        progress, values = self.progress, {name: value.item() for name, value in losses.items()}
        line: dict[str, Any] = {
            "step": progress.step,
            "epoch": round(progress.samples_seen / self.samples.order.total, 6),
            "samples_seen": progress.samples_seen,
            "skipped": progress.skipped,
            "nonfinite": progress.nonfinite,
            "loss": _finite(sum(values.values())),
            "losses": {name: _finite(value) for name, value in values.items()},
            "lr": lr,
            "grad_norm": _finite(norm),
            **self._scale(),
            "samples_per_s": round(rate, 2),
            "seconds": round(progress.seconds, 3),
        }
        if self.gradients.scaler.is_enabled():
            line["loss_scale"] = self.gradients.scaler.get_scale()
        if self.predicted is not None and self.device.startswith("cuda"):
            line["memory_mib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1)
            line["memory_predicted_mib"] = round(self.predicted.total / 2**20, 1)
        curves = {name: value for name, value in line.items() if isinstance(value, float)}
        curves |= {f"loss/{name}": value for name, value in values.items()}
        curves |= {f"eval/{name}": value for name, value in metrics.items()}
        self.run.log(line | ({"eval": metrics} if metrics else {}))
        with self.run.room():
            writer.add(progress.step, curves)
        eta = (self.total - progress.step) * self.samples.plan.mean / max(rate, 1e-9)
        log.info(
            "step %d/%d  epoch %.2f  loss %.4f  lr %.2e  %.0f samples/s  %.0f s left%s",
            progress.step, self.total, line["epoch"], sum(values.values()), lr, rate, eta,
            "".join(f"  {name} {value:.4f}" for name, value in metrics.items()),
        )  # fmt: skip

    def _scale(self) -> dict[str, float]:
        """The logit scale of a student that has one."""
        scale = getattr(self.task.student, "logit_scale", None)
        return {} if scale is None else {"logit_scale": scale.exp().item()}

    def save(self, best: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of everything that the next step depends on; with ``best``, also that, as best.pt."""
        streams = self.ranks.gather_to_main(rng_state(self.device))
        with self.ranks.raise_on_all():
            if not self.ranks.is_main:
                return
            state = {
                "progress": vars(self.progress),
                "epoch": self.progress.samples_seen // self.samples.order.total,
                "sizes_sha256": self.sizes_sha256,
                "task": self.task.state_dict(),
                "ema": self.average.weights if self.average is not None else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.gradients.scaler.state_dict(),
                "rng": streams,  # one of each rank
            }
            if best is not None:
                self.run.save_best(state | best)
            else:
                self.run.save(self.progress.step, state, self.config.run.keep_checkpoints)

    def restore(self, checkpoint: Path, before: dict[str, Any]) -> None:
        """Go back to a checkpoint, whatever the number of processes that wrote it; ``before`` is its run's config.

        Raises UserError when the dataset's shards are not those of then, DataError when the model is another.
        """
        state = load_checkpoint(checkpoint)
        if state["sizes_sha256"] != self.sizes_sha256:
            raise UserError(
                f"{checkpoint}: the shards in {self.config.data.data} have other sizes than when it was written, so "
                "its place in them is lost; restore the dataset, or train anew with another --out"
            )
        try:
            self.task.load_state_dict(state["task"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:  # a name or a shape; a group of parameters
            raise DataError(
                f"{checkpoint} does not fit the model as it is built now ({misfit(error)}): restore what it was made "
                "from, or train anew with another --out"
            ) from error
        self.gradients.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            for name, value in state["ema"].items():
                self.average.weights[name].copy_(value)
        self.progress = Progress(**state["progress"])
        if self.ranks.rank < len(state["rng"]):
            set_rng_state(state["rng"][self.ranks.rank], self.device)
        else:  # there were fewer: a stream of its own from here on
            torch.manual_seed(self.config.run.seed + 1 + self.ranks.rank + 1_000_003 * self.progress.step)
        steps = _steps(self.config, self.samples, before)
        if steps != self.total and self.ranks.is_main:
            log.warning("%s", extension(self.config.optim, self.progress.step, steps, self.total))
        log.info("going on from %s, written by %d processes, with %d", checkpoint, len(state["rng"]), self.ranks.size)


def _finite(value: float) -> float | None:
    """JSON has no others."""
    return value if math.isfinite(value) else None
