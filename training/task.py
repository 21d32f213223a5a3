"""The contract between a recipe and the trainer.

A recipe is two modules of one name, in ``training.configs`` and in ``training.recipes``:

    config() -> Config             the paper's numbers, a frozen dataclass that has the fields of `RecipeConfig`
    prepare(config) -> Prepared    the student, the rows it is trained on, and the task, all on the CPU

The trainer reads batches of the rows, calls the `Task` and updates its parameters. It knows no paper: whatever a paper
does differently is a method or an attribute of its task. The order within a step:

    batch = task.draw(batch)                 random numbers that belong to the whole batch
    features = task(batch)                   per sample, maybe in chunks, on each process
    losses = task.losses(features, step)     of the global batch's features
    optimizer step                           with the groups of task.param_groups()
    task.after_step(step)                    clamping; may change the student's shape and set task.rebuilt
    task.evaluate(device)                    now and then, where task.evaluates
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from shards_spec.files import UserError
from shards_spec.models import LoadedModel
from training.config import DataConfig, LabelledImageConfig, ModelConfig, OptimConfig, RunConfig
from training.data.batches import TrainingRows
from training.engine.optim import ParamGroup, param_groups
from training.losses.similarity import ALL_ROWS
from training.models.teacher import FrozenTeacher, TeacherEnsemble

Batch = dict[str, Any]
Features = dict[str, Tensor]
Losses = dict[str, Tensor]


class RecipeConfig(Protocol):
    """What every recipe's config is composed of; a recipe's own fields stand beside them."""

    @property
    def data(self) -> DataConfig | LabelledImageConfig:
        """What is read."""
        ...

    @property
    def student(self) -> ModelConfig:
        """The student's name and weights."""
        ...

    @property
    def optim(self) -> OptimConfig:
        """Optimizer and schedule."""
        ...

    @property
    def run(self) -> RunConfig:
        """How long, where to, and on what."""
        ...


class Task(nn.Module):
    """What a recipe trains: the student, what else is trained with it, and the losses.

    Its state dict is what a checkpoint keeps. Attributes that are a `FrozenTeacher` or a `TeacherEnsemble` are moved
    between devices with the task, but neither trained nor saved.

    Attributes:
        student: The model that is averaged, evaluated and exported.
        item_fields: Tensors that the samples must carry, the keys of a batch that `forward` reads.
        evaluates: Whether `evaluate` measures the student. Otherwise ``--eval-data`` names what it is measured on.
        row_share: Which rows of the similarities of all pairs this process computes: `losses` hands it to every loss
            that takes one. The trainer sets it where several processes share a batch.
        rebuilt: Set by `after_step` or `reshape_like` when parameters were added, removed or reshaped. The trainer then
            makes optimizer, average and DDP anew, describes the student in the run folder again, saves a checkpoint and
            resets it.
        exact_weights: Where frozen weights compute in bf16, their values in fp32 on the CPU, by the names of the state
            dict (`training.engine.frozen_weights`).
    """

    evaluates: ClassVar[bool] = False
    student: Any

    def __init__(self, student: Any, item_fields: tuple[str, ...] = ("images", "tokens")) -> None:
        super().__init__()
        self.student = student
        self.item_fields = item_fields
        self.row_share = ALL_ROWS
        self.rebuilt = False
        self.exact_weights = dict[str, Tensor]()

    @property
    def changes_shape(self) -> bool:
        """Whether `after_step` may set `rebuilt` in this run."""
        return False

    def draw(self, batch: Batch) -> Batch:
        """Return the batch with random numbers that belong to all of it, before it is cut into chunks.

        What `forward` is to know of the samples' keys is added here, too: it sees no lists.

        Called once per step, with images that may still be bytes. What it adds is cut with the batch where it has one
        entry per sample, and normalised where it is images of bytes.
        """
        return batch

    def forward(self, batch: Batch) -> Features:
        """Return tensors (n, ...) of a batch or of a chunk of one: features, teacher features, per-sample losses."""
        raise NotImplementedError

    def losses(self, features: Features, step: int) -> Losses:
        """Return named, weighted losses of the global batch; their sum is minimised.

        Every process has the features of all of them and returns the same numbers: nothing may come from a process's
        own random stream. A loss is computed whole by each process, or as its share of rows where it takes `row_share`.

        Args:
            features: Those of `forward` for the global batch, (N, ...), in the order of positions.
            step: Number of the step, from 0.
        """
        raise NotImplementedError

    def param_groups(self, weight_decay: float) -> list[ParamGroup]:
        """Return the trainable parameters in groups, each with its weight decay and its way to a learning rate.

        By default there are two, as open_clip has them: matrices decay, biases, norms and scales do not.
        """
        return param_groups(self, weight_decay)

    def after_step(self, step: int) -> None:
        """Do what a parameter's range or a schedule asks for after the optimizer's step; skipped steps have none.

        A student may change its shape here: the task sets `rebuilt`. State of the optimizer and averages are kept for
        parameters that stay the same objects.
        """

    def reshape_like(self, weights: Mapping[str, Tensor]) -> None:
        """Give the student the shape it has in a checkpoint, before the checkpoint is loaded.

        Sets `rebuilt` if the student had another.

        Args:
            weights: The task's state dict in the checkpoint.
        """

    def metrics(self, step: int) -> dict[str, float]:
        """Return what metrics.jsonl says of the task besides its losses, after a step that is logged.

        Args:
            step: Number of the step, from 0.
        """
        return {}

    def table(self) -> dict[str, Any]:
        """Return what the run folder keeps of a student whose sizes are learned, as JSON; empty for all others.

        It is written at the start and again when the student has changed its shape.
        """
        return {}

    def take_final_shape(self) -> bool:
        """Give the student the shape that it will end with, as far as it can be foreseen; return whether it is another.

        Only a prediction of memory calls this.
        """
        return False

    def evaluate(self, device: str) -> dict[str, float]:
        """Return metrics of the student, which is in eval mode and may have the averaged weights.

        Called on the main process alone, and only where `evaluates` is true.
        """
        raise NotImplementedError

    @property
    def teachers(self) -> list[FrozenTeacher]:
        """The teachers among the attributes, each once."""
        found = list[FrozenTeacher]()
        for value in vars(self).values():
            if isinstance(value, FrozenTeacher):
                found.append(value)
            elif isinstance(value, TeacherEnsemble):
                found.extend(value.members)
        return list({id(teacher): teacher for teacher in found}.values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Task":
        """Take the teachers along when the task moves between devices and dtypes."""
        for teacher in self.teachers:
            teacher.move(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class Prepared(NamedTuple):
    """What a recipe hands to the trainer, on the CPU."""

    student: LoadedModel
    rows: TrainingRows
    task: Task


def check_item_fields(task: Task, batch: Batch) -> None:
    """Raise UserError when a batch lacks a field that the task reads."""
    missing = [field for field in task.item_fields if field not in batch]
    if missing:
        raise UserError(f"the samples have no {', '.join(missing)}, which this recipe needs: give it other --data")
