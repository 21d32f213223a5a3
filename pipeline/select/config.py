"""Options of the stage `select`."""

import os
from dataclasses import dataclass

from pipeline.core.command_line import Root
from pipeline.select.expression import FactCondition, parse_conditions
from shards_spec.messages import require
from shards_spec.names import check_name


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
    teacher: tuple[str, ...] = ()
    """caches below teacher/ whose cosines the conditions name; by default the only one"""
    captioner: str | None = None
    """folder below captions/ whose similarities the conditions name; by default the only one"""
    workers: int = os.cpu_count() or 1
    """worker processes"""
    overwrite: bool = False
    """make finished shards again"""

    def __post_init__(self) -> None:
        check_name(self.name)
        require(self.workers >= 1, "workers", self.workers, "1 or more")

    @property
    def label(self) -> str:
        """The folder below select/."""
        return self.name

    @property
    def conditions(self) -> tuple[FactCondition, ...]:
        """Those of samples. Raises UserError for what is no condition."""
        return parse_conditions(self.where, "--where")

    @property
    def caption_conditions(self) -> tuple[FactCondition, ...]:
        """Those of captions. Raises UserError for what is no condition."""
        return parse_conditions(self.captions_where, "--captions-where")
