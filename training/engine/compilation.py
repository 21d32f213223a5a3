"""torch.compile of a task's forward pass: where it is used, and what becomes of a run where it fails."""

import logging
from typing import Literal

import torch

from shards_spec.files import UserError
from shards_spec.library_errors import short
from training.task import Task

log = logging.getLogger(__name__)
BACKEND = "inductor"
# rate of a compiled step over that of an eager one: rows "loop: RECIPE, compile over eager" of tests/gpu/figures.jsonl
MEASURED_GAINS = {"tinyclip": 1.47}
LEAST_GAIN = 1.05  # from which on auto compiles: less does not pay for the minutes of compiling


def resolve_compile(option: Literal["auto", "on", "off"], recipe: str, task: Task, device: str) -> Literal["on", "off"]:
    """Return whether to compile: ``auto`` does where a GPU was measured to gain by it, never where shapes change.

    Args:
        option: ``--compile``.
        recipe: Name of the recipe.
        task: Its task.
        device: Where it is trained.
    """
    is_wanted = option == "on"
    if option == "auto" and device.startswith("cuda"):
        is_wanted = MEASURED_GAINS.get(recipe, 1.0) >= LEAST_GAIN
        if not is_wanted:
            log.info("torch.compile is off: no GPU was measured to train %s faster with it; --compile on tries", recipe)
    if is_wanted and task.changes_shape:
        log.warning("torch.compile is off: the student changes its shape in this run")
        return "off"
    return "on" if is_wanted else "off"


def compile_task(task: Task) -> None:
    """Compile a task's forward pass, in place: the names of its weights stay."""
    task.compile(backend=BACKEND)


def give_up_compiling(error: Exception, ranks: int) -> None:
    """Let this process run eagerly from here on, after compiling failed.

    Args:
        error: What the compiler raised.
        ranks: How many processes there are.

    Raises:
        UserError: There are several processes: the others are within the step.
    """
    cause = short(getattr(error, "inner_exception", error))
    if ranks > 1:
        raise UserError(f"torch.compile failed ({cause}): train with --compile off") from error
    log.warning("torch.compile failed (%s): the run goes on without it", cause)
    torch.compiler.set_stance("force_eager")


def is_compile_failure(error: BaseException) -> bool:
    """Return whether an error is the compiler's and not the model's."""
    from torch._dynamo.exc import TorchDynamoException  # imported late: it takes seconds, and most runs do not compile

    return isinstance(error, TorchDynamoException)
