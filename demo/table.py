#!/usr/bin/env python3
"""The demo's results: what each model learned, how long each stage took, where the reports are.

python demo/table.py DEMO_RUN
"""

import csv
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table


def metrics(run: Path) -> dict[str, float]:
    """Return all metrics of a run's evaluations, as shares."""
    found: dict[str, float] = {}
    for path in sorted((run / "eval").glob("*.json")):
        found |= json.loads(path.read_text())["metrics"]
    return found


def sizes(run: Path) -> dict[str, int]:
    """Return the number of samples of each evaluated dataset."""
    results = [json.loads(path.read_text()) for path in (run / "eval").glob("*.json")]
    return {result["dataset"]: result["samples"] for result in results}


def results_table(folder: Path) -> Table:
    """Return a table of chance, students and teacher; accuracy and recall in per cent."""
    table = Table("", "zero-shot acc@1", "image→text R@1", "text→image R@1", title="held-out scenes, per cent")
    count = sizes(folder / "coca")
    classes = len((folder / "web" / "eval" / "zeroshot" / "classnames.txt").read_text().splitlines())
    captions = 2 * count["retrieval"]
    table.add_row("chance", f"{100 / classes:.2f}", f"{100 * 2 / captions:.2f}", f"{100 / count['retrieval']:.2f}")
    runs = [*sorted(folder.glob("scratch-*")), *sorted(folder.glob("distilled-*"))]
    for name, run in [*((run.name.replace("-", ", seed "), run) for run in runs), ("teacher (CoCa)", folder / "coca")]:
        found = metrics(run)
        shown = (found["acc1"], found["text_retrieval_recall@1"], found["image_retrieval_recall@1"])
        table.add_row(name, *(f"{100 * value:.1f}" for value in shown))
    return table


def seconds_table(folder: Path) -> Table:
    """Return a table of the seconds per stage of this run of demo.sh, start-up of each command included."""
    table = Table("stage", "seconds", title="seconds per stage", show_footer=True)
    latest: dict[str, float] = {}
    with open(folder / "seconds.tsv", newline="") as file:
        for name, seconds in csv.reader(file, delimiter="\t"):
            latest[name] = latest.get(name, 0.0) + float(seconds)
    for name, seconds in latest.items():
        table.add_row(name, f"{seconds:.1f}")
    table.columns[0].footer, table.columns[1].footer = "all", f"{sum(latest.values()):.1f}"
    return table


def main() -> None:
    """Print the tables."""
    folder, console = Path(sys.argv[1]), Console()
    console.print(results_table(folder), seconds_table(folder))
    for report in sorted(folder.glob("*/report.html")):
        console.print(f"report: {report}", soft_wrap=True)


if __name__ == "__main__":
    main()
