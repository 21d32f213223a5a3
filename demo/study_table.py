#!/usr/bin/env python3
"""The SiCLIP study's table and curves (mean and range over the seeds), and the base's attention divergences.

python demo/study_table.py STUDY ROOT OUT      writes OUT.md, OUT.svg and OUT-divergence.svg
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from table import metrics

from pipeline.report.axes import linear
from pipeline.report.charts import Plot
from training.config import DataConfig, ViewConfig
from training.data import load_batches, open_samples
from training.divergence import adjacent_divergences, write_divergences
from training.order import batch_positions
from training.student import load_run

ROWS = {
    "plain": "plain training",
    "inherited": "weight inheritance (WI)",
    "wikd": "WI + distillation (WIKD)",
    "whole": "WIKD + pair matching (SiCLIP)",
    "original": "SiCLIP, original captions only",
}
COLOURS = ("#7f7f7f", "#1f77b4", "#2ca02c", "#d62728", "#9467bd")
SHOWN = {
    "acc1": "zero-shot acc@1",
    "text_retrieval_recall@1": "image→text R@1",
    "image_retrieval_recall@1": "text→image R@1",
}
STYLE = (
    "<style>text{font:11px sans-serif;fill:#444}.grid{stroke:#e4e4e4}.axis,.tick{stroke:#888}"
    "polyline{fill:none;stroke-width:1.8}</style>"
)


def lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def cell(values: list[float]) -> str:
    """Mean and range in per cent."""
    low, middle, high = (100 * value for value in (min(values), statistics.mean(values), max(values)))
    return f"{middle:.1f} ({low:.1f}–{high:.1f})"


def table(study: Path) -> str:
    """Markdown: a row of the ablation per line, the base model last."""
    runs = {row: sorted(study.glob(f"{row}-*")) for row in ROWS}
    text = [f"| | {' | '.join(SHOWN.values())} | samples/s |", "|---" * 5 + "|"]
    for row, name in ROWS.items():
        found = [metrics(run) for run in runs[row]]
        rate = statistics.median(line["samples_per_s"] for run in runs[row] for line in lines(run))
        cells = [cell([one[metric] for one in found]) for metric in SHOWN]
        text.append(f"| {name} | {' | '.join(cells)} | {rate:.0f} |")
    base = metrics(study / "base")
    text.append(f"| base and teacher | {' | '.join(f'{100 * base[metric]:.1f}' for metric in SHOWN)} | |")
    return "\n".join(text) + "\n"


def curves(study: Path) -> str:
    """SVG: zero-shot accuracy over the steps, the mean of the seeds of each row."""
    series = {}
    for row in ROWS:
        points: dict[int, list[float]] = {}
        for run in study.glob(f"{row}-*"):
            for line in lines(run):
                if "eval" in line:
                    points.setdefault(line["step"], []).append(100 * line["eval"]["acc1"])
        series[row] = sorted((step, statistics.mean(values)) for step, values in points.items())
    last = max(step for points in series.values() for step, _ in points)
    plot = Plot(linear("step", 0, last, 6), linear("zero-shot acc@1, %", 0, 100, 5), (560, 320))
    body, legend = "", ""
    for number, (row, points) in enumerate(series.items()):
        path = " ".join(f"{plot.x_at(step):.1f},{plot.y_at(value):.1f}" for step, value in points)
        body += f'<polyline points="{path}" style="stroke:{COLOURS[number]}"/>'
        top = 345 + 18 * number
        legend += f'<line x1="40" x2="64" y1="{top}" y2="{top}" style="stroke:{COLOURS[number]};stroke-width:2.5"/>'
        legend += f'<text x="72" y="{top + 4}">{ROWS[row]}</text>'
    from markupsafe import Markup

    chart = plot.draw(Markup(body), "zero-shot accuracy over the steps")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 560 440" width="560" height="440">{STYLE}'
        f'<rect width="560" height="440" fill="#fff"/><svg width="560" height="320">{chart}</svg>{legend}</svg>\n'
    )


def divergences(study: Path, root: str) -> dict[str, list[tuple[float, float]]]:
    """Of the trained base's adjacent attention blocks, over 1,024 scenes and their captions, as SiCLIP probes S0."""
    base, _ = load_run(str(study / "base"))
    samples = open_samples(DataConfig(data=root), ViewConfig(scale=None), base, 0)
    batches = list(load_batches(samples, batch_positions(0, 8, 128)))
    towers = {"image": (base.model.visual, "images"), "text": (base.model.text, "tokens")}
    return {name: adjacent_divergences(tower, [b[kind] for b in batches]) for name, (tower, kind) in towers.items()}


def main() -> None:
    """Write the three files."""
    study, root, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    write_divergences(f"{out}-divergence.svg", divergences(study, root))
    head = (Path(__file__).parent / "study_siclip.md").read_text()
    out.with_suffix(".md").write_text(head.replace("TABLE\n", table(study)))
    out.with_suffix(".svg").write_text(curves(study))
    print(table(study))


if __name__ == "__main__":
    main()
