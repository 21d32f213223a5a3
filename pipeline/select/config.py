"""Options of the stage `select`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.core.command_line import Root
from pipeline.select.expression import FactCondition, parse_conditions, parse_number
from shards_spec.files import UserError
from shards_spec.messages import flag, require
from shards_spec.names import check_name
from shards_spec.unused_options import Unused

# options of which one is needed
RULES = ("where", "captions_where", "against", "from_", "drop", "semantic_duplicates", "top", "balance", "weight")


@dataclass(frozen=True)
class SelectConfig:
    """Choose samples and captions of the final shards by rules over what is known of them; nothing is rewritten."""

    root: Root
    """the dataset; reads shards/ and what the rules need of raw/, captions/ and teacher/; writes select/NAME/"""
    name: str = "selected"
    """folder below select/; several can stand side by side"""
    where: tuple[str, ...] = ()
    """conditions that a sample has to meet, such as 'similarity > 0.28 and NSFW == "UNLIKELY"' 'cosine > 0.2'"""
    captions_where: tuple[str, ...] = ()
    """conditions that each caption has to meet to be shown, such as 'cosine > 0.2'; a sample without any goes"""
    against: tuple[str, ...] = ()
    """evaluation sets as `clipmill eval` takes them, ROOTs or folders of images: samples that show one of their images
    again (scaled, encoded anew, mirrored, cropped by up to 10 %) go"""
    against_cosine: float | None = None
    """also compare samples whose image has an embedding with such a cosine with that of an evaluation image, such as
    0.8; by the mean of the cached views of the first teacher, whose model runs here; their pixels still decide"""
    against_model: str | None = None
    """that teacher, where its cache's record does not name it: local-dir:PATH, or a file of its weights"""
    teacher: tuple[str, ...] = ()
    """caches below teacher/ whose cosines the conditions name; by default the only one"""
    captioner: str | None = None
    """folder below captions/ whose similarities the conditions name; by default the only one"""
    from_: tuple[str, ...] = ()
    """lists of the samples that may stay, such as published subsets: a key, URL, sha256 or uid per line, a Parquet file
    with a column uid, url, sha256 or key, or uids as DataComp publishes them (.npy)"""
    drop: tuple[str, ...] = ()
    """lists of samples that go, in the same forms"""
    semantic_duplicates: float | None = None
    """samples whose images have embeddings with a cosine above this are one, of which one stays (SemDeDup), such as
    0.95; by the mean of the cached views of the first teacher"""
    cells: int | None = None
    """k-means cells within which --semantic-duplicates compares; by default the square root of the samples"""
    top: float | None = None
    """share of the samples that meet the conditions, above 0 up to 1, that stays: the best by the fact of --by"""
    by: str | None = None
    """fact of samples that --top is by, larger is better, such as cosine"""
    balance: int | None = None
    """thin out frequent synsets as MetaCLIP does (its t): a sample stays with probability min(1, BALANCE / samples of
    the synset) by each synset of its caption; without any it goes"""
    weight: str | None = None
    """times that an epoch has a sample, a number computed of its facts such as 'cosine / 0.25' or '1 + (synsets > 4)';
    the part behind the point is drawn: 0.3 keeps 3 of 10 samples"""
    seed: int = 0
    """of the draws of --balance and --weight"""
    export_list: str | None = None
    """also write the samples that stay to this file, which --from takes: .parquet, .npy (uids as DataComp publishes
    them), or text"""
    export_by: Literal["key", "url", "sha256", "uid"] = "key"
    """what the samples are called there; a column of raw/"""
    workers: int = os.cpu_count() or 1
    """worker processes"""
    overwrite: bool = False
    """make finished shards again"""

    def __post_init__(self) -> None:
        check_name(self.name)
        require(self.workers >= 1, "workers", self.workers, "1 or more")
        bound = self.semantic_duplicates
        require(bound is None or 0 < bound < 1, "semantic_duplicates", bound, "a cosine above 0 and below 1")
        least = self.against_cosine
        require(least is None or 0 < least < 1, "against_cosine", least, "a cosine above 0 and below 1")
        if least is not None and not self.against:
            raise UserError("--against-cosine goes with --against SET, which is not given")
        if self.against_model is not None and least is None:
            raise UserError("--against-model goes with --against-cosine C, which is not given")
        require(self.cells is None or self.cells >= 1, "cells", self.cells, "1 or more")
        require(self.top is None or 0 < self.top <= 1, "top", self.top, "above 0, and 1 at most: a share")
        require(self.balance is None or self.balance >= 1, "balance", self.balance, "1 or more")
        if (self.top is None) != (self.by is None):
            raise UserError("--top SHARE and --by FACT belong together, such as --top 0.3 --by cosine")
        self._check_expressions()
        if not any(getattr(self, field) for field in RULES):
            raise UserError(
                f"select needs a rule: give one of {', '.join(map(flag, RULES))}; see `clipmill select --help`"
            )

    def _check_expressions(self) -> None:
        """Raise UserError for what is no condition: now, not in a job that was submitted."""
        _ = self.conditions, self.caption_conditions, self.weights

    def unused(self) -> Iterator[Unused]:
        """Yield the options that no rule reads."""
        if self.balance is None and self.weight is None:
            yield Unused(("seed",), "without --balance or --weight, which draw")
        if self.semantic_duplicates is None:
            yield Unused(("cells",), "without --semantic-duplicates")
        if self.export_list is None:
            yield Unused(("export_by",), "without --export-list")
        if not (self.where or self.captions_where or self.by or self.weight):
            why = "without --where, --captions-where, --by or --weight, which name facts"
            yield Unused(("captioner",), why)
            if self.semantic_duplicates is None and self.against_cosine is None:
                yield Unused(("teacher",), f"{why}, and without --semantic-duplicates or --against-cosine")

    @property
    def label(self) -> str:
        """The folder below select/."""
        return self.name

    @property
    def conditions(self) -> tuple[FactCondition, ...]:
        """Those of samples. Raises UserError for what is no condition."""
        return parse_conditions(self.where, "--where")

    @property
    def weights(self) -> FactCondition | None:
        """The number of --weight. Raises UserError for what is none."""
        return None if self.weight is None else parse_number(self.weight, "--weight")

    @property
    def caption_conditions(self) -> tuple[FactCondition, ...]:
        """Those of captions. Raises UserError for what is no condition."""
        return parse_conditions(self.captions_where, "--captions-where")
