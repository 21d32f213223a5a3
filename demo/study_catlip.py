#!/usr/bin/env python3
"""The CatLIP study's tables and curves, mean and range over the seeds.

python demo/study_catlip.py STUDY OUT      writes OUT.md, OUT.svg (probe against epochs) and OUT-transfer.svg
"""

import statistics
import sys
from collections import defaultdict
from pathlib import Path

from study import cell, curves, lines

from pipeline.report.axes import linear, logarithmic

ROWS = {"clip": "CLIP", "catlip": "CatLIP", "bias": "CatLIP, head biases from the vocabulary"}
STARTS = {"random": "random rows", "rows": "Transfer Init"}


def accuracy(run: Path) -> float:
    """Return acc1 at the end of a probe."""
    return float(lines(run)[-1]["eval"]["acc1"])


def probes(study: Path) -> dict[str, dict[int, list[float]]]:
    """Return acc1 with all labels by row and epochs, one number per seed."""
    found: dict[str, dict[int, list[float]]] = {row: defaultdict(list) for row in ROWS}
    for run in sorted(study.glob("*-*-*/probe")):
        row, epochs, _ = run.parent.name.split("-")
        found[row][int(epochs)].append(accuracy(run))
    return found


def transfers(study: Path) -> dict[str, dict[float, tuple[str, list[float]]]]:
    """Return, by start and share of the labels, the learning rate with the best mean and its acc1 per seed."""
    runs: dict[tuple[str, float], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted((study / "transfer").iterdir()):
        start, fraction, rate = run.name.rsplit("-", 1)[0].split("-", 2)
        runs[start, float(fraction)][rate].append(accuracy(run))
    found: dict[str, dict[float, tuple[str, list[float]]]] = {start: {} for start in STARTS}
    for (start, fraction), rates in sorted(runs.items()):
        best = max(rates, key=lambda rate: statistics.mean(rates[rate]))
        found[start][fraction] = best, rates[best]
    return found


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def main() -> None:
    """Write the three files."""
    study, out = Path(sys.argv[1]), Path(sys.argv[2])
    by_epochs, by_labels = probes(study), transfers(study)
    epochs = sorted(next(iter(by_epochs.values())))
    first = markdown(
        ["pre-training", *(f"{count} epochs" for count in epochs)],
        [[ROWS[row], *(cell(found[count]) for count in epochs)] for row, found in by_epochs.items()],
    )
    shares = sorted(by_labels["rows"])
    second = markdown(
        ["start of the head", *(f"{100 * share:g} % of the labels" for share in shares)],
        [
            [STARTS[start], *(f"{cell(found[share][1])}, lr {found[share][0]}" for share in shares)]
            for start, found in by_labels.items()
        ],
    )
    head = (Path(__file__).parent / "study_catlip.md").read_text()
    out.with_suffix(".md").write_text(head.replace("EPOCHS\n", first).replace("LABELS\n", second))
    axis = linear("linear probe acc@1, %", 0, 100, 5)
    means = {
        ROWS[row]: [(float(count), 100 * statistics.mean(found[count])) for count in epochs]
        for row, found in by_epochs.items()
    }
    shown = curves(means, linear("epochs of pre-training", 0, epochs[-1], 8), axis, "linear probe against epochs")
    out.with_suffix(".svg").write_text(shown)
    means = {
        STARTS[start]: [(100 * share, 100 * statistics.mean(found[share][1])) for share in shares]
        for start, found in by_labels.items()
    }
    shown = curves(means, logarithmic("labels used, %", 1, 100), axis, "linear probe against the share of labels")
    Path(f"{out}-transfer.svg").write_text(shown)
    print(first, second, sep="\n")


if __name__ == "__main__":
    main()
