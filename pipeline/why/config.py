"""Options of `clipmill why`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from pipeline.core.command_line import Root


@dataclass(frozen=True)
class WhyConfig:
    """Show what became of one sample, stage by stage, and when a run used it."""

    root: Root
    """the dataset: a folder or an fsspec URL"""
    key: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="KEY")]
    """the sample's key, or the link (url) of its row in the list"""
    run: str = ""
    """RUN folder of `clipmill train` on this dataset: the epochs and steps that used the sample"""
