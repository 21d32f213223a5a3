"""Options of `clipmill takedown`."""

from dataclasses import dataclass
from typing import Literal

from pipeline.core.command_line import Root
from shards_spec.messages import require

Kind = Literal["key", "url", "sha256"]


@dataclass(frozen=True)
class TakedownConfig:
    """Take samples out of every file of a dataset, prove that they are gone, and keep ingest from fetching them again.

    No other command may run on ROOT meanwhile.
    """

    root: Root
    """the dataset: a folder or an fsspec URL"""
    list: str
    """what has to go: a text file with a key (or uid), a link or a sha256 per line (also KIND, tab, value; also .gz),
    or a TSV or Parquet file with a column key, uid, url or sha256"""
    by: Literal["auto"] | Kind = "auto"
    """what the list names; auto tells it by each value. A key is one sample; a link is every row that has it; a sha256,
    of the image's bytes as downloaded or as stored, is every sample of that image"""
    duplicates: bool = False
    """also take down what dedup holds for duplicates or near-duplicates of these"""
    dry_run: bool = False
    """only say what would go"""

    def __post_init__(self) -> None:
        require(bool(self.list), "list", self.list, "a file of keys, links or sha256")
