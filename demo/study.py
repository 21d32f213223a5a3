"""What the studies' tables and charts share: a run's measurements, a table's cell, curves with a legend."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.report.axes import Axis
from pipeline.report.charts import Plot

COLOURS = ("#7f7f7f", "#1f77b4", "#2ca02c", "#d62728", "#9467bd")
WIDTH, HEIGHT, LINE = 560, 320, 18  # px: a chart, and a line of its legend
STYLE = (
    "<style>text{font:11px sans-serif;fill:#444}.grid{stroke:#e4e4e4}.axis,.tick{stroke:#888}"
    "polyline{fill:none;stroke-width:1.8}</style>"
)


def lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def cell(values: Sequence[float]) -> str:
    """Mean and range of shares, in per cent."""
    low, middle, high = (100 * value for value in (min(values), statistics.mean(values), max(values)))
    return f"{middle:.1f} ({low:.1f}–{high:.1f})"


def curves(series: dict[str, list[tuple[float, float]]], x: Axis, y: Axis, summary: str) -> str:
    """SVG: (x, y) points of each name as a line, the names below."""
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
