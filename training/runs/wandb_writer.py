"""Curves and config of a run in Weights & Biases, where its package is installed (``train --report-to wandb``).

The project is that of WANDB_PROJECT, else clipmill; WANDB_MODE=offline keeps everything in RUN/wandb, for ``wandb
sync`` on another day. A resumed run is the same run there.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from shards_spec.files import UserError
from shards_spec.library_errors import short

PROJECT = "clipmill"


def require_wandb() -> None:
    """Raise UserError where the package is not installed."""
    if find_spec("wandb") is None:
        raise UserError("--report-to wandb needs the package wandb: pip install wandb, or leave the option out")


class WandbCurves:
    """A run of the folder's name; one of several stages has its parent's name before it.

    Args:
        folder: The RUN folder.
        config: Recipe and flat config.

    Raises:
        UserError: The package is not installed, or its service refuses: nobody is logged in, or it is not reached.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        require_wandb()
        import wandb

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=f"{folder.parent.name}-{folder.name}" if folder.name.startswith("stage-") else folder.name,
                dir=str(folder),
                id=_former_id(folder),
                resume="allow",
                config=config,
                settings=wandb.Settings(console="off", init_timeout=60),
            )
        except wandb.Error as error:
            raise UserError(
                f"--report-to wandb: {short(error)}; WANDB_MODE=offline keeps the curves in {folder} for `wandb sync`"
            ) from error

    def add(self, step: int, values: dict[str, float]) -> None:
        """One value per curve. Steps that a resumed run takes again are ignored there."""
        self._run.log(values, step=step)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)


def _former_id(folder: Path) -> str | None:
    """The id of the run that this folder's training began with; None for the first start.

    wandb names a folder ``run-TIME-ID`` or ``offline-run-TIME-ID`` for every start.
    """
    starts = sorted((folder / "wandb").glob("*run-*-*"), key=lambda path: path.name.removeprefix("offline-"))
    return starts[0].name.rpartition("-")[2] if starts else None
