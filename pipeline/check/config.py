"""Options of `clipmill check`."""

import os
from dataclasses import dataclass

from pipeline.core.command_line import Root
from shards_spec.files import UserError
from shards_spec.messages import require


@dataclass(frozen=True)
class CheckJobConfig:
    """Validate a dataset against SPEC.md; the last job fails and names the problems when there are any."""

    root: Root
    """the dataset: a folder or an fsspec URL"""
    workers: int = os.cpu_count() or 1
    """processes of each task that check shards; of a small dataset one"""

    def __post_init__(self) -> None:
        require(self.workers >= 1, "workers", self.workers, "1 or more")

    def of_run(self, run: str) -> "CheckRunConfig":
        """The config of the jobs of one submission."""
        return CheckRunConfig(self.root, self.workers, run)


@dataclass(frozen=True)
class CheckRunConfig(CheckJobConfig):
    """The jobs of one submission, whose parts are not those of another one."""

    run: str = ""

    @property
    def label(self) -> str:
        """What the folder of its parts is called."""
        return self.run


@dataclass(frozen=True)
class CheckConfig:
    """Validate a dataset against SPEC.md; exit 1 and name the first broken key of each broken file."""

    root: Root
    """the dataset: a folder or an fsspec URL"""
    workers: int = os.cpu_count() or 1
    """processes that check shards; a small dataset has one"""
    repair: bool = False
    """make damaged files again, fetch lost images again, drop what cannot be had again; every action is a line"""
    dry_run: bool = False
    """with --repair: only say what it would do"""
    source: str | None = None
    """with --repair: the source of ingest, where it is not (or no longer) the one in dataset.json"""
    models: tuple[str, ...] = ()
    """with --repair: models to caption and embed with, such as local-dir:PATH; records name models without a path"""
    device: str = "auto"
    """with --repair: where they run: auto, cpu, cuda or cuda:N"""

    def __post_init__(self) -> None:
        require(self.workers >= 1, "workers", self.workers, "1 or more")
        if not self.repair and (self.dry_run or self.source is not None or self.models or self.device != "auto"):
            raise UserError("--dry-run, --source, --models and --device belong to --repair; add it, or leave them out")
