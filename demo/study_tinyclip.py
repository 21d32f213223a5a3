#!/usr/bin/env python3
"""The TinyCLIP study's tables (mean and range over the seeds that are finished) and its curves.

python demo/study_tinyclip.py STUDY OUT     writes OUT.svg, and in OUT.md what stands between the lines
                                            <!-- study_tinyclip.py --> and <!-- end -->
"""

import json
import statistics
import sys
from pathlib import Path

from study import cell, curves, fill_block, lines
from table import metrics

from pipeline.report.axes import linear
from training.runs.student import load_run

ROWS = {
    "scratch": "scratch, contrastive loss",
    "feature": "feature loss of each tower alone",
    "affinity": "affinity",
    "affinity15": "affinity, scale 15 instead of 50",
    "manual": "affinity + manual",
    "manual_feature": "feature loss + manual",
    "auto": "affinity + auto",
    "large": "affinity + manual, too large a teacher",
    "jump": "auto, 100 → 25 %",
    "stages": "auto, 100 → 50 → 25 %",
}
ENDS = {"stages": "stage-2"}  # where the last student of a row's chain is
TIMED = ("affinity", "affinity15", "manual", "auto", "large", "feature", "manual_feature")
REFERENCES = ("scratch", "affinity", "feature")
DRAWN = ("scratch", "feature", "affinity", "manual", "auto")
METRICS = ("acc1", "text_retrieval_recall@1", "image_retrieval_recall@1")


def seeds(study: Path, row: str) -> list[str]:
    """Return the seeds whose run of a row is finished."""
    return sorted(path.parent.name.rpartition("-")[2] for path in study.glob(f"rows/{row}-*/done"))


def end(study: Path, row: str, seed: str) -> Path:
    """Return the RUN folder of a row's student."""
    return study / "rows" / f"{row}-{seed}" / ENDS.get(row, "")


def sizes(run: Path) -> tuple[int, int]:
    """Return a student's parameters, all of them and those in the blocks of both towers."""
    model = load_run(str(run))[0].model
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(counts.values()), sum(count for name, count in counts.items() if ".resblocks." in name)


def results(study: Path) -> str:
    """Return a Markdown table of accuracy and recall: a line per row, the teachers last."""
    text = [
        "| | seeds | parameters | in blocks | zero-shot acc@1 | image→text R@1 | text→image R@1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, name in ROWS.items():
        runs = [end(study, row, seed) for seed in seeds(study, row)]
        if not runs:
            text.append(f"| {name} | not run yet | | | | | |")
            continue
        counts = zip(*map(sizes, runs), strict=True)
        shown = " | ".join(f"{statistics.mean(count) / 1000:,.0f} k" for count in counts)
        found = [metrics(run) for run in runs]
        cells = " | ".join(cell([result[metric] for result in found]) for metric in METRICS)
        text.append(f"| {name} | {len(runs)} | {shown} | {cells} |")
    for run, name in (("teacher", "the teacher"), ("large", "the too large teacher")):
        found_of_one = metrics(study / run)
        shown = " | ".join(f"{count / 1000:,.0f} k" for count in sizes(study / run))
        cells = " | ".join(f"{100 * found_of_one[metric]:.1f}" for metric in METRICS)
        text.append(f"| {name} | 1 | {shown} | {cells} |")
    return "\n".join(text) + "\n"


def measured(run: Path) -> list[tuple[int, float]]:
    """Return (step, acc1) of a run's measurements."""
    return [(line["step"], line["eval"]["acc1"]) for line in lines(run) if "eval" in line]


def cut_at(run: Path) -> int:
    """Return the step at which a run with masks was cut: before that its student is as large as the teacher."""
    table = run / "student.json"
    return json.loads(table.read_text())["step"] if table.exists() else 0


def steps_to(run: Path, accuracy: float) -> tuple[int, bool] | None:
    """Return the first measured step at which the final student has an accuracy, and whether that is the first of all.

    None where it never has it.
    """
    steps = [(step, value) for step, value in measured(run) if step > cut_at(run)]
    found = next((step for step, value in steps if value >= accuracy), None)
    return None if found is None else (found, found == steps[0][0])


def speed(study: Path, reference: str, row: str) -> str:
    """Return a cell: the steps of a row to what the reference has at its end, and the ratio of both, over the seeds."""
    shown: list[str] = []
    ratios: list[float] = []
    is_bound = False
    common = sorted(set(seeds(study, reference)) & set(seeds(study, row)))
    for seed in common:
        last, accuracy = measured(end(study, reference, seed))[-1]
        found = steps_to(end(study, row, seed), accuracy)
        if found is None:
            shown.append("–")
            continue
        needed, is_first = found
        is_bound |= is_first
        shown.append(f"{'≤ ' if is_first else ''}{needed}")
        ratios.append(last / needed)
    if not ratios:
        return "not reached" if common else "not run yet"
    return f"{', '.join(shown)}: {'≥ ' if is_bound else ''}{statistics.mean(ratios):.1f} ×"


def speeds(study: Path) -> str:
    """Return a Markdown table of `speed`."""
    names = " | ".join(f"to the end of: {ROWS[reference]}" for reference in REFERENCES)
    text = [f"| | {names} |", "|---" * (1 + len(REFERENCES)) + "|"]
    for row in TIMED:
        cells = ["" if row == reference else speed(study, reference, row) for reference in REFERENCES]
        text.append(f"| {ROWS[row]} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def chart(study: Path) -> str:
    """Return an SVG chart: zero-shot accuracy over the steps, the mean of the seeds of each row."""
    series = {}
    for row in DRAWN:
        points: dict[int, list[float]] = {}
        for seed in seeds(study, row):
            for step, value in measured(end(study, row, seed)):
                points.setdefault(step, []).append(100 * value)
        if points:
            series[ROWS[row]] = [(float(step), statistics.mean(values)) for step, values in sorted(points.items())]
    last = max(points[-1][0] for points in series.values())
    axes = linear("step", 0, last, 8), linear("zero-shot acc@1, %", 0, 100, 5)
    return curves(series, *axes, "zero-shot accuracy over the steps")


def main() -> None:
    """Write both files."""
    study, out = Path(sys.argv[1]), Path(sys.argv[2])
    tables = f"{results(study)}\n{speeds(study)}"
    out.with_suffix(".svg").write_text(chart(study))
    print(tables)
    fill_block(out.with_suffix(".md"), Path(__file__).name, tables)


if __name__ == "__main__":
    main()
