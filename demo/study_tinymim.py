#!/usr/bin/env python3
"""The TinyMIM study's table and curves, mean and range over the seeds that are finished.

python demo/study_tinymim.py STUDY OUT      writes OUT.svg (fine-tuning over its epochs), and in OUT.md what stands
                                            between the lines <!-- study_tinymim.py --> and <!-- end -->
"""

import statistics
import sys
from pathlib import Path
from typing import Any

from study import cell, curves, fill_block, lines

from pipeline.report.axes import linear

ROWS = {
    "scratch": "none: from scratch",
    "class": "class token",
    "output": "feature: last block's output",
    "ffn": "feature: FFN before the residual",
    "relations": "relations QK + VV",
    "masked": "relations, 75 % of the patches hidden",
    "chain": "relations, through a middle teacher",
}
PAPER = {  # top-1 of ViT-B from MAE's ViT-L, 100 epochs; of ViT-S from MAE's ViT-L, without and with a teacher between
    "scratch": "81.2 (DeiT)",
    "class": "80.6",
    "output": "83.7",
    "ffn": "84.2",
    "relations": "84.6; ViT-S 82.1",
    "masked": "83.9",
    "chain": "ViT-S 82.6",
}


def finished(study: Path, row: str) -> list[Path]:
    """Return the folders of a row's finished seeds."""
    return sorted(path.parent for path in study.glob(f"rows/{row}-*/done"))


def measured(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run that have a measurement."""
    return [line for line in lines(run) if "eval" in line]


def accuracy(run: Path) -> float:
    """Return acc1 at the end of a run."""
    return float(measured(run)[-1]["eval"]["acc1"])


def results(study: Path) -> str:
    """Return a Markdown table: a line per row."""
    text = [
        "| pre-training | seeds | linear probe acc@1 | fine-tuned acc@1 | the paper, fine-tuned |",
        "|---|---|---|---|---|",
    ]
    for row, name in ROWS.items():
        runs = finished(study, row)
        if not runs:
            text.append(f"| {name} | not run yet | | | {PAPER[row]} |")
            continue
        probe, tuned = (cell([accuracy(run / kind) for run in runs]) for kind in ("probe", "tuned"))
        text.append(f"| {name} | {len(runs)} | {probe} | {tuned} | {PAPER[row]} |")
    return "\n".join(text) + f"\n\nThe teacher's zero-shot acc@1 is {100 * accuracy(study / 'teacher'):.1f}.\n"


def chart(study: Path) -> str:
    """Return an SVG chart: accuracy over the steps of fine-tuning, the mean of the seeds of each row."""
    series = {}
    for row in ("scratch", "class", "ffn", "relations", "chain"):
        points: dict[int, list[float]] = {}
        for run in finished(study, row):
            for line in measured(run / "tuned"):
                points.setdefault(line["step"], []).append(100 * line["eval"]["acc1"])
        if points:
            series[ROWS[row]] = [(float(step), statistics.mean(values)) for step, values in sorted(points.items())]
    last = max(points[-1][0] for points in series.values())
    axes = linear("step of fine-tuning", 0, last, 6), linear("acc@1, %", 0, 100, 5)
    return curves(series, *axes, "accuracy over the steps of fine-tuning")


def main() -> None:
    """Write both files."""
    study, out = Path(sys.argv[1]), Path(sys.argv[2])
    table = results(study)
    out.with_suffix(".svg").write_text(chart(study))
    print(table)
    fill_block(out.with_suffix(".md"), Path(__file__).name, f"\n{table}\n")


if __name__ == "__main__":
    main()
