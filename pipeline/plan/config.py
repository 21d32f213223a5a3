"""Options of `clipmill plan`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from pipeline.ingest.config import IngestConfig
from pipeline.ingest.source_files import Format
from pipeline.plan.costs import STUDENTS
from shards_spec.files import UserError
from shards_spec.messages import require


@dataclass(frozen=True)
class PlanConfig:
    """Say what all stages will take on this machine, hours and gigabytes, and the commands."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ROOT_OR_LIST")]
    """a dataset, or any source that `clipmill ingest` takes"""
    format: Literal["auto"] | Format = "auto"
    """form of a source, as of `clipmill ingest`"""
    url_col: str | None = None
    """column with the link; found by its name when not given"""
    caption_col: str | None = None
    """column with the caption; found by its name when not given"""
    probe_rows: int = 500
    """rows of a list that are downloaded to see how many succeed and what they weigh; 0 downloads nothing"""
    views: int = 8
    """of `cache`"""
    captions: int = 5
    """synthetic captions per image, of `caption`"""
    dtype: Literal["float16", "int8"] = "float16"
    """of `cache`"""
    epochs: int = 6
    """of the training"""
    student: str = STUDENTS[0]
    """the model that is trained"""
    cores: int = 0
    """that the stages may use; 0: those of this machine"""
    gbit: float = 1.0
    """1e9 bits per second of the network: assumed"""
    device: str = "auto"
    """whose ceiling is measured: auto, cpu, cuda or cuda:N"""
    allow_private: bool = False
    """also fetch from addresses that are not public, as of `clipmill ingest`"""

    def __post_init__(self) -> None:
        for name in ("views", "epochs"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("probe_rows", "captions", "cores"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.gbit > 0, "gbit", self.gbit, "above 0")
        if self.student not in STUDENTS:
            raise UserError(f"--student {self.student!r}: operations are known of {', '.join(STUDENTS)}")

    def ingest(self, root: str) -> IngestConfig:
        """How the source would be ingested into a ROOT."""
        return IngestConfig(
            root,
            (self.source,),
            self.format,
            self.url_col,
            self.caption_col,
            allow_private=self.allow_private,
        )
