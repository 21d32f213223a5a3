"""Options of `clipmill check`."""

from dataclasses import dataclass

from pipeline.core.command_line import Root


@dataclass(frozen=True)
class CheckConfig:
    """Validate a dataset against SPEC.md; exit 1 and name the first broken key of each broken file."""

    root: Root
    """the dataset: a folder or an fsspec URL"""
