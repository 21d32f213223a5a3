#!/usr/bin/env python3
"""The MiniViT study's tables and charts, over the seeds that are finished.

python demo/study_minivit.py STUDY OUT      writes OUT-gradients.svg, OUT-cka.svg, and in OUT.md what stands between the
                                            lines <!-- study_minivit.py --> and <!-- end -->
"""

import statistics
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study import cell, curves, fill_block, lines

from pipeline.report.axes import linear
from shards_spec.messages import counted
from training.data.batches import load_batches
from training.data.labelled_images import open_images
from training.evaluation.classification import plain_rows
from training.evaluation.layer_analysis import CkaMeter
from training.models.block_reader import BlockReader
from training.models.taps import run_with_taps
from training.runs.student import load_run

ROWS = {
    "plain": "true labels",
    "transformation": "+ transformation",
    "distillation": "+ distillation",
    "all": "+ both (all of MiniViT)",
    "identity": "+ both, head maps from the identity",
}
SIZES = {"1": "no sharing", "2": "pairs", "all": "a stage shares all"}
DRAWN = {
    ("plain", "1"): "no sharing, true labels",
    ("plain", "all"): "a stage shares all, true labels",
    ("transformation", "all"): "a stage shares all, + transformation",
    ("distillation", "all"): "a stage shares all, + distillation",
    ("all", "all"): "a stage shares all, + both",
    ("identity", "all"): "a stage shares all, + both, from the identity",
}
SEEDS = 3  # of a finished study
BATCH = 100  # images of an estimate of CKA
GRADIENT = "use_grad_norm."


def runs(study: Path, row: str, size: str) -> list[Path]:
    """Return the folders of a row's finished seeds."""
    return sorted(path.parent for path in study.glob(f"rows/{row}-{size}-*/done"))


def accuracy(run: Path) -> float:
    """Return acc1 at the end of a run."""
    return float(lines(run)[-1]["eval"]["acc1"])


def parameters(run: Path) -> int:
    """Return a student's parameters; those that blocks share count once."""
    return sum(parameter.numel() for parameter in load_run(str(run))[0].model.parameters())


def gradients(run: Path) -> np.ndarray:
    """Return the gradient norms of a run, (measurements, blocks)."""
    found = [[line[name] for name in line if name.startswith(GRADIENT)] for line in lines(run)]
    return np.array([norms for norms in found if norms])


def spreads(run: Path) -> tuple[float, float]:
    """Return the coefficient of variation of a run's gradient norms over the blocks, and over the measurements.

    The first quarter, in which all fall, is left out; each is the mean over the other axis.
    """
    norms = gradients(run)
    norms = norms[len(norms) // 4 :]
    over_blocks = (norms.std(1) / norms.mean(1)).mean()
    over_steps = (norms.std(0) / norms.mean(0)).mean()
    return float(over_blocks), float(over_steps)


def results(study: Path) -> str:
    """Return Markdown tables of accuracies and parameters, and of the gradients' spreads."""
    names = list(SIZES.values())
    text = [f"| acc@1, % | {' | '.join(names)} |", "|---" * (1 + len(SIZES)) + "|"]
    for row, name in ROWS.items():
        cells = []
        for size in SIZES:
            found = [accuracy(run) for run in runs(study, row, size)]
            seeds = "" if len(found) == SEEDS else f", {counted(len(found), 'seed')}"
            cells.append(f"{cell(found)}{seeds}" if found else "not run")
        text.append(f"| {name} | {' | '.join(cells)} |")
    for row, name in (("plain", "parameters"), ("transformation", "parameters, with transformation")):
        counts = [f"{parameters(runs(study, row, size)[0]) / 1000:,.1f} k" for size in SIZES]
        text.append(f"| {name} | {' | '.join(counts)} |")
    text += ["", f"The teacher has {100 * accuracy(study / 'teacher'):.1f} %.", ""]
    text += [f"| spread of the gradient norms, over blocks; over steps | {' | '.join(names)} |", "|---" * 4 + "|"]
    for row, name in ROWS.items():
        cells = []
        for size in SIZES:
            found_spreads = [spreads(run) for run in runs(study, row, size)]
            means = [statistics.mean(values) for values in zip(*found_spreads, strict=True)]
            cells.append("; ".join(f"{mean:.2f}" for mean in means) or "not run")
        text.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def gradient_chart(study: Path) -> str:
    """Return an SVG chart: the gradient norm of each block, mean over measurements and seeds."""
    series = {}
    for key, name in DRAWN.items():
        norms = np.stack([gradients(run).mean(0) for run in runs(study, *key)]).mean(0)
        series[name] = [(float(block), float(norm)) for block, norm in enumerate(norms)]
    highest = max(norm for _, norm in chain.from_iterable(series.values()))
    axes = linear("block", 0, len(series[name]) - 1, 7), linear("gradient norm, l2", 0, 1.05 * highest, 5)
    return curves(series, *axes, "gradient norm of each block's shared weights")


@torch.no_grad()
def hidden_states(run: Path, images: Any) -> Iterator[list[torch.Tensor]]:
    """Yield the outputs of all blocks, each (n, T, C), of batches of the test images."""
    student, _ = load_run(str(run))
    trunk = student.model.eval().trunk
    reader = BlockReader(trunk)
    rows = plain_rows(images, student)
    ranges = [range(start, start + BATCH) for start in range(0, len(rows.chosen) - BATCH + 1, BATCH)]
    for batch in load_batches(rows, ranges):
        yield reader.read(
            lambda call, taps: run_with_taps(trunk, call, taps), batch["images"], list(range(len(reader.names)))
        ).hidden


def cka_chart(study: Path) -> str:
    """Return an SVG chart: CKA of each block with the teacher's, mean over the seeds, on the test images."""
    images = open_images(str(study / "labelled" / "eval" / "zeroshot"), train=False)
    taught = list(hidden_states(study / "teacher", images))
    series = {}
    for key, name in DRAWN.items():
        values = []
        for run in runs(study, *key):
            meter = CkaMeter()
            for own, theirs in zip(hidden_states(run, images), taught, strict=True):
                meter.add(own, theirs)
            values.append(meter.values())
        series[name] = [(float(block), statistics.mean(each)) for block, each in enumerate(zip(*values, strict=True))]
    axes = linear("block", 0, len(series[name]) - 1, 7), linear("CKA with the teacher", 0, 1, 5)
    return curves(series, *axes, "CKA of each block with the teacher's")


def main() -> None:
    """Write the three files."""
    study, out = Path(sys.argv[1]), Path(sys.argv[2])
    tables = results(study)
    print(tables)
    fill_block(out.with_suffix(".md"), Path(__file__).name, tables)
    Path(f"{out}-gradients.svg").write_text(gradient_chart(study))
    Path(f"{out}-cka.svg").write_text(cka_chart(study))


if __name__ == "__main__":
    main()
