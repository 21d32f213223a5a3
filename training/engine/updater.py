"""What changes a task's weights: gradients, optimizer, average; made anew when the task changes its shape."""

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shards_spec.library_errors import is_out_of_memory, short
from shards_spec.messages import counted
from shards_spec.precision import resolve_precision
from training.engine.batch_fit import halved, warn_of_norms
from training.engine.compilation import compile_task, give_up_compiling, is_compile_failure
from training.engine.distributed import Ranks
from training.engine.ema import ModelEma
from training.engine.gradients import Gradients, rng_state, set_rng_state, total
from training.engine.optim import build_optimizer, keep_state, learning_rate, set_lr
from training.engine.sync_batch_norm import SavedStatistics, synchronise
from training.runs.student import STUDENT
from training.task import Batch, Losses, RecipeConfig, Task

log = logging.getLogger(__name__)


class Update(NamedTuple):
    """What one step did."""

    losses: Losses
    """of the global batch, without their graph"""
    lr: float
    """the schedule's learning rate"""
    grad_norm: float
    """the gradient's norm before clipping; NaN where the loss was not finite"""
    skipped: bool
    """loss or gradient was not finite: weights and running statistics are those before the step"""
    rebuilt: bool = False
    """the task changed the shape of its parameters"""


class Updater:
    """A task's optimizer, its average and its gradients.

    Args:
        task: The task on its device, in training mode.
        config: The recipe's config.
        total: Steps of the run.
        ranks: The processes that share a batch.
        device: The device.
        normalise: Turns images that come as bytes into what the task takes.
    """

    def __init__(
        self,
        task: Task,
        config: RecipeConfig,
        total: int,
        *,
        ranks: Ranks,
        device: str,
        normalise: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.task = task
        self.config = config
        self.total = total
        self.ranks = ranks
        self.device = device
        run = config.run
        self._prepare_modules()
        if run.compile == "on":
            compile_task(task)
        self._build_optimizer()
        precision = resolve_precision(run.precision, device, emulated=False)
        self.gradients = Gradients(
            task, ranks, device, precision=precision, chunk_size=run.chunk_size, normalise=normalise
        )
        self.average = self._build_average()
        self.statistics = SavedStatistics(task)
        warn_of_norms(task, run.chunk_size)

    def _prepare_modules(self) -> None:
        """Give the modules their memory format, and BatchNorms the statistics of all processes."""
        run = self.config.run
        if run.channels_last:
            self.task.to(memory_format=torch.channels_last)
        if run.sync_bn and self.ranks.size > 1:
            synchronised = synchronise(self.task, self.device)
            if synchronised:
                log.info("%s synchronised over the processes", counted(synchronised, "trained BatchNorm"))

    def _build_optimizer(self) -> None:
        self.groups = self.task.param_groups(self.config.optim.weight_decay)
        self.optimizer = build_optimizer(self.task, self.config.optim, self.groups)

    def _build_average(self) -> ModelEma | None:
        decay = self.config.optim.ema_decay
        if decay is None:
            return None
        exact = self.task.exact_weights.items()
        fixed = {name.removeprefix(STUDENT): weight for name, weight in exact if name.startswith(STUDENT)}
        return ModelEma(self.task.student, decay, fixed)

    def rebuild(self) -> None:
        """Make optimizer, DDP and average anew after the task changed its shape; what still fits is kept.

        Loss scale, chunk size and random streams go on.
        """
        log.info("the student has another shape now: optimizer, average and DDP are rebuilt")
        optimizer, average = self.optimizer, self.average
        optimizer.zero_grad(set_to_none=True)  # gradients are parts of the former DDP's buckets
        self._prepare_modules()
        self._build_optimizer()
        keep_state(optimizer, self.optimizer)
        self.gradients.wrap()
        self.average = self._build_average()
        if self.average is not None and average is not None:
            self.average.keep_from(average)
        self.statistics = SavedStatistics(self.task)
        self.task.rebuilt = False

    def update(self, batch: Batch, step: int, sizes: list[int]) -> Update:
        """Take one step.

        Args:
            batch: This process's share of the global batch.
            step: The step's number.
            sizes: Samples of each process's share.
        """
        self.statistics.save()
        losses = self._compute_gradients(batch, step, sizes)
        losses = {name: value.detach() for name, value in losses.items()}  # without the graph
        # the only place where a step waits for the device: forward and backward pass are on their way when it does
        loss, norm = torch.stack([total(losses).double(), self._unscale_and_clip().double()]).tolist()
        scaler = self.gradients.scaler
        is_final = not scaler.is_enabled() or scaler.get_scale() < 1  # else the scaler skips and lowers its scale
        is_lost = not math.isfinite(loss) or (is_final and not math.isfinite(norm))
        is_bad = bool(self.ranks.all_max(is_lost)[0])
        lr = learning_rate(step, self.config.optim, self.total)
        rebuilt = False
        if is_bad:
            self.statistics.restore()
            scaler.update(scaler.get_scale())  # the same scale: it forgets the gradients of this step
        else:
            rebuilt = self._apply(step, lr)
        self.optimizer.zero_grad(set_to_none=True)
        return Update(losses, lr, norm if math.isfinite(loss) else math.nan, is_bad, rebuilt)

    def _compute_gradients(self, batch: Batch, step: int, sizes: list[int]) -> Losses:
        """Return the losses, after their backward pass.

        Chunks that do not fit the memory are halved, and the step begins again; so it does where it cannot be compiled.
        """
        streams = rng_state(self.device)
        while True:
            try:
                return self._try_gradients(batch, step, sizes)
            except (RuntimeError, MemoryError) as error:
                reason = None
                if is_out_of_memory(error):
                    reason = short(error)
                elif self.config.run.compile == "on" and is_compile_failure(error):
                    give_up_compiling(error, self.ranks.size)
                else:
                    raise
            # out here the error, and with it the graph, is gone
            if reason is not None:
                self.gradients.chunk_size = halved(self.gradients.chunk_size, max(sizes), self.ranks.size, reason)
                warn_of_norms(self.task, self.gradients.chunk_size)
            self.optimizer.zero_grad(set_to_none=True)
            set_rng_state(streams, self.device)
            self.statistics.restore()
            if self.device != "cpu":
                torch.cuda.empty_cache()

    def _try_gradients(self, batch: Batch, step: int, sizes: list[int]) -> Losses:
        """A function of its own, so that an attempt that did not fit keeps nothing while the next one runs."""
        losses, backward = self.gradients.losses(batch, step, sizes)
        backward()
        return losses

    def _unscale_and_clip(self) -> Tensor:
        """Return the gradient's norm before clipping, on the device."""
        self.gradients.scaler.unscale_(self.optimizer)
        parameters = [parameter for parameter in self.task.parameters() if parameter.grad is not None]
        return nn.utils.clip_grad_norm_(parameters, self.config.optim.clip_norm or math.inf)

    def _apply(self, step: int, lr: float) -> bool:
        """Move the weights; return whether the task changed its shape."""
        set_lr(self.optimizer, self.groups, lr)
        self.gradients.scaler.step(self.optimizer)
        self.gradients.scaler.update()
        self.task.after_step(step)
        rebuilt = self.task.rebuilt
        if rebuilt:
            self.rebuild()
        if self.average is not None:
            self.average.update(self.task.student)
        return rebuilt
