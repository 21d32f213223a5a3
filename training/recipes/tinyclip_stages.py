"""TinyCLIP's progressive stages: which runs one command stands for."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from shards_spec.files import UserError
from shards_spec.messages import counted
from training.config import check_stage


@dataclass(frozen=True)
class StageConfig:
    """Several runs, each of which starts from the student of the one before."""

    stages: str = ""
    """auto: shares of the teacher's parameters that stages end with, as 1,0.75,0.5,0.25; RUN/stage-1 ... are their
    runs; the teacher is the same in all"""
    stage_models: str = ""
    """manual: the student of each stage, with commas"""
    stage_prune_steps: str = ""
    """auto: steps with masks of each stage, with commas; empty: those of prune_step in all"""
    stage: int | None = None
    """train this stage alone, from 1; the one before must have finished"""

    def check(self, inherit: str) -> None:
        """Raise UserError where an option would not be used with --inherit, or does not fit the others."""
        for option, value, wanted in (
            ("--stages", self.stages, "auto"),
            ("--stage-models", self.stage_models, "manual"),
            ("--stage-prune-steps", self.stage_prune_steps, "auto"),
        ):
            if value and inherit != wanted:
                raise UserError(f"{option} {value!r} is for --inherit {wanted}, not {inherit}")
        shares, steps = self.shares(), self.prune_steps()
        if steps and len(steps) != len(shares) - 1:
            raise UserError(
                f"--stage-prune-steps {self.stage_prune_steps!r}: {counted(len(steps), 'number')} for "
                f"{counted(max(0, len(shares) - 1), 'stage')}"
            )
        check_stage(self.stage, self.number, "--stages or --stage-models")

    @property
    def number(self) -> int:
        """How many stages there are; 0 for a run of its own. Raises UserError."""
        return max(len(self.shares()) - 1, len(self.models()))

    def shares(self) -> list[float]:
        """Return the shares of parameters, the whole first; empty without --stages. Raises UserError."""
        if not self.stages:
            return []
        try:
            shares = [float(word) for word in self.stages.split(",")]
        except ValueError:
            shares = []
        whole = shares if shares[:1] == [1.0] else [1.0, *shares]
        if len(whole) < 2 or not whole[-1] > 0 or any(not before > after for before, after in pairwise(whole)):
            raise UserError(
                f"--stages {self.stages!r}: must be shares of the parameters, each smaller than the one before, such "
                "as 1,0.75,0.5,0.25"
            )
        return whole

    def models(self) -> list[str]:
        """Return the names of the students; empty without --stage-models."""
        return [word for word in self.stage_models.split(",") if word]

    def prune_steps(self) -> list[int]:
        """Return the steps with masks of each stage; empty without --stage-prune-steps. Raises UserError."""
        try:
            steps = [int(word) for word in self.stage_prune_steps.split(",") if word]
        except ValueError:
            steps = [0]
        if any(number < 1 for number in steps):
            raise UserError(f"--stage-prune-steps {self.stage_prune_steps!r}: must be whole numbers of 1 or more")
        return steps


class StageStart(NamedTuple):
    """What is particular to a stage; None is as the command has it."""

    out: str
    """its RUN folder"""
    from_run: str | None
    """that of the stage before"""
    sparsity: float | None = None
    prune_step: int | None = None
    model: str | None = None


def stage_starts(config: StageConfig, out: str) -> list[StageStart]:
    """Return the stages of a chain whose folders lie in ``out``; none where there is no chain.

    With ``--stage`` it is that one alone.
    """
    sparsities = [round(1 - share, 6) for share in config.shares()[1:]]
    models, steps = config.models(), config.prune_steps()
    starts = []
    for index in range(config.number):
        starts.append(
            StageStart(
                out=str(Path(out, f"stage-{index + 1}")),
                from_run=str(Path(out, f"stage-{index}")) if index else None,
                sparsity=sparsities[index] if sparsities else None,
                prune_step=steps[index] if steps else None,
                model=models[index] if models else None,
            )
        )
    return starts if config.stage is None else starts[config.stage - 1 : config.stage]
