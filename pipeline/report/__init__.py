"""`clipmill report`: one self-contained HTML page about a dataset or a run, without scripts or network access."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jinja2
import tyro

from pipeline.report.axes import percent, short
from pipeline.report.chain import chain_page, stage_folders
from pipeline.report.dataset import dataset_page
from pipeline.report.run import read_run, run_page
from shards_spec.display import shown
from shards_spec.files import UserError, exists, is_url, join, write_bytes
from shards_spec.layout import dataset_json
from shards_spec.messages import counted, require


@dataclass(frozen=True)
class ReportConfig:
    """Write one self-contained HTML page about a dataset or a training run."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ROOT_OR_RUN")]
    """ROOT of a dataset (has a dataset.json), or folder of a training run (has a metrics.jsonl) or of one in stages
    (has stage-1, stage-2, ...)"""
    output: str | None = None
    """where to write the page; by default report.html in that folder"""
    samples: int = 24
    """images in the contact sheet of a dataset; 0 leaves it out"""

    def __post_init__(self) -> None:
        require(self.samples >= 0, "samples", self.samples, "0 (no contact sheet) or more")


def report(config: ReportConfig) -> str:
    """Write the page and return its path.

    Raises UserError when the folder is neither a dataset nor a run, or the page cannot be written there.
    """
    root = config.path.rstrip("/") or "/"
    output = config.output or join(root, "report.html")
    check_page_path(output, "--output")
    if exists(dataset_json(root)):
        page = render("dataset.html.j2", dataset_page(root, config.samples))
    elif exists(join(root, "metrics.jsonl")):
        page = render("run.html.j2", {"page": run_page(read_run(root))})
    elif stages := stage_folders(root):
        page = render("chain.html.j2", {"page": chain_page(root, stages)})
    elif not exists(root):
        raise UserError(f"{root} is not there: give the ROOT of a dataset or the folder of a run")
    else:
        raise UserError(
            f"{root} has neither a dataset.json nor a metrics.jsonl: give the ROOT that `clipmill ingest` filled "
            "or the folder that `clipmill train` wrote"
        )
    write_page(output, page, "--output")
    return output


def check_page_path(path: str, option: str) -> None:
    """Raise UserError when a page cannot have that path, which the ``option`` gave, because a folder has it."""
    if not is_url(path) and os.path.isdir(path):
        raise UserError(f"{option} {path} is a folder: give the name of a file, such as {join(path, 'report.html')}")


def write_page(path: str, page: str, option: str) -> None:
    """Write a page, made safe to show. Raises UserError naming the ``option`` that gave its path."""
    try:
        write_bytes(path, shown(page).encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another file with {option}") from error


def render(template: str, context: dict[str, Any]) -> str:
    """A page of a template below ``templates/``, with the filters that all templates use."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "short": short,
        "percent": percent,
        "number": lambda value: f"{value:,}",
        "share": lambda value: percent(value, 1.0),
        "counted": partial(counted, style=","),
        "duration": lambda seconds: f"{seconds:,.0f}" if seconds >= 100 else short(seconds),
    }
    return environment.get_template(template).render(context)
