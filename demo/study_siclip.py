#!/usr/bin/env python3
"""The SiCLIP study's table and curves (mean and range over the seeds), and the base's attention divergences.

python demo/study_siclip.py STUDY ROOT OUT      writes OUT.md, OUT.svg and OUT-divergence.svg
"""

import statistics
import sys
from itertools import chain
from pathlib import Path

from study import cell, curves, lines
from table import metrics

from pipeline.report.axes import linear
from training.config import DataConfig, ViewConfig
from training.data.batches import load_batches
from training.data.order import batch_positions
from training.data.samples import open_samples
from training.evaluation.attention_divergence import adjacent_divergences, write_divergences
from training.runs.student import load_run

ROWS = {
    "plain": "plain training",
    "inherited": "weight inheritance (WI)",
    "wikd": "WI + distillation (WIKD)",
    "whole": "WIKD + pair matching (SiCLIP)",
    "original": "SiCLIP, original captions only",
}
SHOWN = {
    "acc1": "zero-shot acc@1",
    "text_retrieval_recall@1": "image→text R@1",
    "image_retrieval_recall@1": "text→image R@1",
}


def table(study: Path) -> str:
    """Return a Markdown table: a row of the ablation per line, the base model last."""
    runs = {row: sorted(study.glob(f"{row}-*")) for row in ROWS}
    text = [f"| | {' | '.join(SHOWN.values())} | samples/s |", "|---" * 5 + "|"]
    for row, name in ROWS.items():
        results = [metrics(run) for run in runs[row]]
        logged = chain.from_iterable(lines(run) for run in runs[row])
        rate = statistics.median(line["samples_per_s"] for line in logged)
        cells = [cell([result[metric] for result in results]) for metric in SHOWN]
        text.append(f"| {name} | {' | '.join(cells)} | {rate:.0f} |")
    base = metrics(study / "base")
    text.append(f"| base and teacher | {' | '.join(f'{100 * base[metric]:.1f}' for metric in SHOWN)} | |")
    return "\n".join(text) + "\n"


def chart(study: Path) -> str:
    """Return an SVG chart: zero-shot accuracy over the steps, the mean of the seeds of each row."""
    series = {}
    for row, name in ROWS.items():
        points: dict[int, list[float]] = {}
        for run in study.glob(f"{row}-*"):
            for line in lines(run):
                if "eval" in line:
                    points.setdefault(line["step"], []).append(100 * line["eval"]["acc1"])
        series[name] = [(float(step), statistics.mean(values)) for step, values in sorted(points.items())]
    last = max(step for step, _ in chain.from_iterable(series.values()))
    axes = linear("step", 0, last, 6), linear("zero-shot acc@1, %", 0, 100, 5)
    return curves(series, *axes, "zero-shot accuracy over the steps")


def divergences(study: Path, root: str) -> dict[str, list[tuple[float, float]]]:
    """Return the divergences of the trained base's adjacent attention blocks, as SiCLIP measures S0's.

    Over 1,024 scenes and their captions.
    """
    base, _ = load_run(str(study / "base"))
    samples = open_samples(DataConfig(data=root), ViewConfig(scale=None), base, 0)
    batches = list(load_batches(samples, batch_positions(0, 8, 128)))
    towers = {"image": (base.model.visual, "images"), "text": (base.model.text, "tokens")}
    return {name: adjacent_divergences(tower, [b[kind] for b in batches]) for name, (tower, kind) in towers.items()}


def main() -> None:
    """Write the three files."""
    study = Path(sys.argv[1])
    root = sys.argv[2]
    out = Path(sys.argv[3])
    write_divergences(f"{out}-divergence.svg", divergences(study, root))
    head = (Path(__file__).parent / "study_siclip.md").read_text()
    out.with_suffix(".md").write_text(head.replace("TABLE\n", table(study)))
    out.with_suffix(".svg").write_text(chart(study))
    print(table(study))


if __name__ == "__main__":
    main()
