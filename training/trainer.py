"""The one training loop. It knows a task (`training.task`), that is features of samples and named losses of them.

A run's concerns are a module each: `Updater` takes a step, `Checkpointing` saves and restores, `Validation` measures,
`MetricsLog` writes lines and curves; `Trainer` is the loop over them.
"""

import dataclasses
import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from shards_spec.files import UserError
from shards_spec.messages import counted
from shards_spec.models import pick_device
from shards_spec.precision import resolve_precision
from shards_spec.unused_options import changed_fields, refuse_unused
from training.config import flat, smoke, total_steps
from training.configs import default_config
from training.data.batches import TrainingRows, lay_out_images, load_batches
from training.engine.batch_fit import fitted, out_of_memory, profiles
from training.engine.checkpointing import Checkpointing, Progress
from training.engine.compilation import resolve_compile
from training.engine.distributed import Ranks, processes
from training.engine.frozen_weights import halve_frozen_weights
from training.engine.memory_estimate import Memory
from training.engine.metrics_log import MetricsLog
from training.engine.run_length import extension, warn_of_lengths, warn_of_workers
from training.engine.stop_signal import stop_flag
from training.engine.updater import Update, Updater
from training.engine.validation import Validation
from training.evaluation.clip_benchmark import check_root
from training.recipes import RECIPES, STAGED
from training.runs.run_folder import RunFolder
from training.runs.wandb_writer import require_wandb
from training.task import Batch, Prepared, RecipeConfig

log = logging.getLogger(__name__)
SHOWN_KEYS = 5  # of a batch, in a message


def train(recipe: str, config: RecipeConfig) -> str:
    """Train a recipe to its end, resuming from RUN's newest checkpoint if there is one; return the RUN folder.

    A recipe of several stages has a RUN for each, below the config's; the last one is returned. Under torchrun this is
    one of several processes. SIGTERM, SIGUSR1 and Ctrl-C end all of them after the step in progress, with a checkpoint
    and SystemExit of 128 + the signal's number. Raises UserError and DataError.
    """
    stages = stages_of(recipe, config)
    if config.run.report_to == "wandb":
        require_wandb()
    with processes(config.run.device) as (ranks, device):
        if device.startswith("cuda"):
            torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves fp32, as open_clip's training does
        for stage in stages:
            stopped = _train_run(recipe, stage, ranks, device)
            if stopped is not None:
                raise SystemExit(128 + stopped)
    return str(Path(stages[-1].run.out))


def stages_of(recipe: str, config: RecipeConfig) -> list[RecipeConfig]:
    """Return the configs of the runs that a config stands for, in their order.

    Raises UserError for stages that cannot be, and for an option that is not its default and has no effect.
    """
    default = default_config(recipe)
    refuse_unused(config, changed_fields(config, default, smoke(default)))
    if recipe not in STAGED:
        return [config]
    stages: list[RecipeConfig] = import_module(f"training.configs.{recipe}").stages(config)
    return stages


def _train_run(recipe: str, config: RecipeConfig, ranks: Ranks, device: str) -> int | None:
    """Train one run; return the number of the signal that stopped it, None at the end."""
    with ExitStack() as held:
        run, precision = RunFolder(config.run.out), config.run.precision
        resumed_from, predicted = None, Memory()
        with ranks.raise_on_all():
            if ranks.is_main:
                held.enter_context(run.lock())
                precision = resolve_precision(precision, device, before=run.recorded("precision"), emulated=False)
        config = _with_run(config, precision=ranks.broadcast(precision))
        with ranks.raise_on_all():
            prepared = prepare(recipe, config)
            rows = prepared.rows
            next(rows.plan.positions(0, 0, 1, ranks.rank, ranks.size))  # raises where processes cannot share a batch
            with out_of_memory(device):
                prepared = prepared._replace(task=prepared.task.to(device).train())
                if ranks.is_main:
                    measured = profiles(config, rows, prepared.task, device, ranks=ranks.size)
                    predicted = fitted(config.run, measured, ranks.size, device)
            if ranks.is_main:
                steps_of = partial(_steps, config, rows)
                defaults = flat(default_config(recipe))
                resumed_from = run.start(
                    recipe, flat(config), config.run.resume, device, steps=steps_of, defaults=defaults
                )
                run.describe(prepared.student, config.student.model)
                if resumed_from is None:
                    run.write_table(prepared.task.table(), 0)
        resumed_from, predicted = ranks.broadcast((resumed_from, predicted))
        log.info("%s", predicted)
        compiles = resolve_compile(config.run.compile, recipe, prepared.task, device)
        config = _with_run(config, chunk_size=predicted.chunk_size, compile=compiles)
        trainer = Trainer(config, prepared, run, ranks=ranks, device=device, predicted=predicted)
        with ranks.raise_on_all():
            if resumed_from is not None:
                trainer.restore(*resumed_from)
            if ranks.is_main:
                run.cut_metrics(trainer.progress.step)
                warn_of_lengths(config.data.batch_size, config.optim, rows, trainer.total)
                warn_of_workers(config.data.workers)
        with out_of_memory(device):  # of batches and of the optimizer's state
            return trainer.loop()


def _with_run(config: RecipeConfig, **fields: Any) -> RecipeConfig:
    """Return the config with other fields of its run."""
    run = dataclasses.replace(config.run, **fields)
    return dataclasses.replace(config, run=run)  # type: ignore[type-var]  # every recipe's config is a dataclass


def _steps(config: RecipeConfig, rows: TrainingRows, fields: dict[str, Any]) -> int:
    """Return the steps that a flat config of this run asks for."""
    run = dataclasses.replace(config.run, steps=fields.get("steps"), epochs=fields.get("epochs", 1.0))
    return total_steps(run, rows.plan.mean, rows.order.total)


def prepare(recipe: str, config: RecipeConfig) -> Prepared:
    """Return student, rows and task of a recipe, on the CPU; the config's precision is one that was picked.

    Raises UserError and DataError.
    """
    if recipe not in RECIPES:
        raise UserError(f"recipe {recipe!r}: there are {', '.join(RECIPES)}")
    if config.run.eval_data:
        check_root(config.run.eval_data)  # raises now, not after an epoch
    prepared: Prepared = import_module(f"training.recipes.{recipe}").prepare(config)
    if config.run.checkpoint_activations:
        student = prepared.task.student
        if not hasattr(student, "set_grad_checkpointing"):
            raise UserError(f"--checkpoint-activations: model {config.student.model!r} has no set_grad_checkpointing")
        student.set_grad_checkpointing(True)
    if config.run.frozen_precision == "bf16":
        halve_frozen_weights(prepared.task, config.run.precision)
    return prepared


def predict(recipe: str, config: RecipeConfig) -> dict[str, Memory]:
    """Return the peak memory of one training process, where a batch is shared by the processes there are.

    Of several stages it is the first one's. Chunks are those that training would take here, or within --fit.

    Returns:
        Memory by the phase of the run; the name of the only one is empty.

    Raises:
        UserError: Nothing fits --fit.
    """
    config = stages_of(recipe, config)[0]
    device = pick_device(config.run.device)
    config = _with_run(config, precision=resolve_precision(config.run.precision, device, emulated=False))
    with processes("cpu") as (ranks, _), out_of_memory(device):
        _, rows, task = prepare(recipe, config)

        def of_phase() -> Memory:
            measured = profiles(config, rows, task.to(device), device, ranks=ranks.size)
            return fitted(config.run, measured, ranks.size, device, warn_only=config.run.fit is None)

        memory = of_phase()
        if not task.take_final_shape():
            return {"": memory}
        return {"before the student changes its shape": memory, "afterwards": of_phase()}


class Trainer:
    """The loop over a run's steps.

    Args:
        config: The recipe's config, with a precision and a chunk size that were picked.
        prepared: Student, rows and task, the task on its device and in training mode.
        run: The run folder.
        ranks: The processes that share a batch.
        device: The device.
        predicted: The memory that was predicted.
    """

    def __init__(
        self,
        config: RecipeConfig,
        prepared: Prepared,
        run: RunFolder,
        *,
        ranks: Ranks,
        device: str,
        predicted: Memory | None = None,
    ) -> None:
        self.config = config
        self.run = run
        self.ranks = ranks
        self.device = device
        self.predicted = predicted
        self.student, self.rows, self.task = prepared
        self.progress = Progress()
        self.total = total_steps(config.run, self.rows.plan.mean, self.rows.order.total)
        normalise = self.student.normalise
        self.updater = Updater(self.task, config, self.total, ranks=ranks, device=device, normalise=normalise)
        keep, seed = config.run.keep_checkpoints, config.run.seed
        self.checkpoints = Checkpointing(run, self.rows, self.updater, keep=keep, seed=seed)
        self.validation = Validation(self.student, self.rows, self.updater, self.checkpoints)
        torch.manual_seed(seed + 1 + ranks.rank)  # dropout and the like, whatever was drawn for the weights

    def loop(self) -> int | None:
        """Run the steps that are left; return the number of the signal that stopped it, None at the end."""
        progress, run = self.progress, self.config.run
        samples = counted(self.rows.order.total, "sample")
        log.info("%s: step %d of %d, %s", self.run.path, progress.step, self.total, samples)
        if progress.step >= self.total:
            return None
        batches = self.batches()
        last_save = time.monotonic()
        start = last_save - progress.seconds
        with (
            MetricsLog(self.run, self.rows, self.updater, progress, self.predicted) as metrics_log,
            stop_flag() as stop,
        ):
            while progress.step < self.total:
                with self.ranks.raise_on_all():
                    batch = next(batches)
                update = self.step(batch)
                del batch  # its memory serves the next one
                metrics = self.validation.evaluate(progress) if self.validation.is_due(progress) else {}
                now = time.monotonic()
                progress.seconds = now - start
                # looked at once, and by all: a signal after this waits for the next step; rank 0's clock decides
                wants_save = self.ranks.is_main and self._is_save_due(now - last_save)
                stopped, is_save_due = self.ranks.all_max(stop[0] if stop else 0, wants_save)
                is_finished = progress.step == self.total
                if progress.step % run.log_every == 0 or is_finished or metrics:
                    metrics_log.write(progress, update, metrics, now)
                if stopped or is_finished or is_save_due or update.rebuilt:
                    self.checkpoints.save(progress)
                    last_save = now
                if stopped:
                    name = signal.Signals(stopped).name
                    log.warning(
                        "stopped by %s after step %d of %d; rerun the same command to resume",
                        name,
                        progress.step,
                        self.total,
                    )
                    return int(stopped)
        return None

    def batches(self) -> Iterator[Batch]:
        """Return the batches of this process that are left, as bytes where they are taken in chunks."""
        progress, plan = self.progress, self.rows.plan
        left = self.total - progress.step
        positions = plan.positions(progress.step, progress.samples_seen, left, self.ranks.rank, self.ranks.size)
        sides = plan.sides_from(progress.step)
        as_bytes = self.config.run.chunk_size is not None  # floats are those of a chunk alone
        workers = self.config.data.workers
        return load_batches(self.rows, positions, workers=workers, device=self.device, sides=sides, as_bytes=as_bytes)

    def step(self, batch: Batch) -> Update:
        """Take one step and count it.

        Where the loss or the gradient is not finite, weights and running statistics stay those before the step. Raises
        UserError when that comes too often in a row.
        """
        progress = self.progress
        sizes = self.ranks.sizes(len(batch["keys"]))
        size = self.rows.plan.size(progress.step)
        progress.skipped += size - sum(sizes)
        if self.config.run.channels_last:
            lay_out_images(batch)
        update = self.updater.update(batch, progress.step, sizes)
        progress.step += 1
        progress.samples_seen += size
        progress.in_a_row = progress.in_a_row + 1 if update.skipped else 0
        if update.skipped:
            self._note_nonfinite(batch, update)
        if update.rebuilt:
            self._describe_student()
        return update

    def _describe_student(self) -> None:
        """Write again what the run folder says of the student, whose shape has changed."""
        with self.ranks.raise_on_all():
            if self.ranks.is_main:
                student = dataclasses.replace(self.student, model=self.task.student)
                self.run.describe(student, self.config.student.model)
                self.run.write_table(self.task.table(), self.progress.step)

    def _note_nonfinite(self, batch: Batch, update: Update) -> None:
        """Keep a skipped step's batch. Raises UserError when it is one too many in a row."""
        progress, run = self.progress, self.config.run
        progress.nonfinite += 1
        values = {name: value.item() for name, value in update.losses.items()}
        where = self.run.path
        with self.ranks.raise_on_all():
            batches = self.ranks.gather_to_main(batch)
            if self.ranks.is_main:
                state = {"step": progress.step, "losses": values, "batches": batches}
                where = self.run.save_nonfinite(progress.step, state, run.max_nonfinite)
        what = "gradient" if math.isfinite(sum(values.values())) else "loss"
        parts = ", ".join(f"{name} {value:g}" for name, value in values.items())
        keys = batch["keys"][:SHOWN_KEYS]
        message = f"the {what} is not finite at step {progress.step} ({parts}; first keys {keys})"
        with self.ranks.raise_on_all():
            if progress.in_a_row >= run.max_nonfinite and self.ranks.is_main:
                raise UserError(
                    f"{message}, {progress.in_a_row} in a row; the batch is in {where}: lower --lr "
                    f"({self.config.optim.lr:g}), clip with --clip-norm, or train with --precision fp32"
                )
        if self.ranks.is_main:
            log.warning("%s: skipped; the batch is in %s", message, where)

    def _is_save_due(self, seconds: float) -> bool:
        """Return whether to save, ``seconds`` after the last checkpoint."""
        run = self.config.run
        is_step = run.checkpoint_steps is not None and self.progress.step % run.checkpoint_steps == 0
        return is_step or seconds > 60 * run.checkpoint_minutes

    def restore(self, checkpoint: Path, before: dict[str, Any]) -> None:
        """Go back to a checkpoint. Raises UserError and DataError when it is of other data or another model.

        Args:
            checkpoint: Written by any number of processes.
            before: The run's flat config of then; its number of steps may have been another.
        """
        self.progress, rebuilt = self.checkpoints.restore(checkpoint)
        if rebuilt:
            self._describe_student()
        steps = _steps(self.config, self.rows, before)
        if steps != self.total and self.ranks.is_main:
            log.warning("%s", extension(self.config.optim, self.progress.step, steps, self.total))
