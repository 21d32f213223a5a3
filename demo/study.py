"""What the studies' tables and charts share: a run's measurements, a table's cell, curves with a legend."""

import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.report.axes import Axis
from pipeline.report.charts import Plot

COLOURS = ("#7f7f7f", "#1f77b4", "#2ca02c", "#d62728", "#9467bd", "#ff7f0e")
WIDTH = 560  # px, of a chart
HEIGHT = 320  # px, of a chart
LINE = 18  # px, of a line of the legend
STYLE = (
    "<style>text{font:11px sans-serif;fill:#444}.grid{stroke:#e4e4e4}.axis,.tick{stroke:#888}"
    "polyline{fill:none;stroke-width:1.8}</style>"
)


def lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def cell(values: Sequence[float]) -> str:
    """Return mean and range of shares, in per cent."""
    percent = [100 * value for value in values]
    mean = 100 * statistics.mean(values)
    return f"{mean:.1f} ({min(percent):.1f}–{max(percent):.1f})"


def fill_block(page: Path, script: str, text: str) -> None:
    """Replace what stands in a page between the lines ``<!-- SCRIPT -->`` and ``<!-- end -->``.

    Raises SystemExit where the page has no such lines.
    """
    block = re.compile(rf"(<!-- {re.escape(script)} -->\n).*?(<!-- end -->\n)", re.S)
    filled, found = block.subn(lambda match: f"{match[1]}{text}{match[2]}", page.read_text())
    if found != 1:
        sys.exit(f"{page} must have the lines <!-- {script} --> and <!-- end --> once, not {found} times")
    page.write_text(filled)


def curves(series: dict[str, list[tuple[float, float]]], x: Axis, y: Axis, summary: str) -> str:
    """Return an SVG with a line through the (x, y) points of each name, and a legend below."""
    plot = Plot(x, y, (WIDTH, HEIGHT))
    body, legend = "", ""
    for number, (name, points) in enumerate(series.items()):
        path = " ".join(f"{plot.x_at(at):.1f},{plot.y_at(value):.1f}" for at, value in points)
        body += f'<polyline points="{path}" style="stroke:{COLOURS[number]}"/>'
        top = HEIGHT + 25 + LINE * number
        legend += f'<line x1="40" x2="64" y1="{top}" y2="{top}" style="stroke:{COLOURS[number]};stroke-width:2.5"/>'
        legend += f'<text x="72" y="{top + 4}">{name}</text>'
    chart, tall = plot.draw(Markup(body), summary), HEIGHT + 30 + LINE * len(series)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall}" width="{WIDTH}" height="{tall}">{STYLE}'
        f'<rect width="{WIDTH}" height="{tall}" fill="#fff"/>'
        f'<svg width="{WIDTH}" height="{HEIGHT}">{chart}</svg>{legend}</svg>\n'
    )
