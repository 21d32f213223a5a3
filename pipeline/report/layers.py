"""What a run logged of its student's blocks (``train minivit --log-analysis``), block by block as MiniViT's figures.

A chart has a line for the first measurement, the one in the middle and the last.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.report.axes import linear
from pipeline.report.charts import Chart, Line, Plot, line_chart
from pipeline.report.curves import Columns

GRADIENTS = "use_grad_norm."  # and the block's number
CKA = "cka."  # and the numbers of the student's block and of the teacher's, as 3-9
MARKS = 8  # of the axis of blocks, at most


def layer_charts(columns: Columns) -> list[Chart]:
    """The gradient of shared weights in each of their uses, and CKA with the teacher; none of what was not logged."""
    charts = []
    if names := [name for name in columns if name.startswith(GRADIENTS)]:
        blocks = [_number(name.removeprefix(GRADIENTS)) for name in names]
        charts.append(_over_blocks(columns, names, blocks, ("Gradient norm of shared weights, per use", "l2 norm")))
    if names := [name for name in columns if name.startswith(CKA)]:
        pairs = [name.removeprefix(CKA).partition("-") for name in names]
        blocks = [_number(student) for student, _, _ in pairs]
        other = [f"{student} with {teacher}" for student, _, teacher in pairs if student != teacher]
        note = f"Blocks of student and teacher: {', '.join(other)}." if other else ""
        charts.append(_over_blocks(columns, names, blocks, ("CKA with the teacher's block", "CKA, unbiased"), note))
    return [chart for chart in charts if chart is not None]


def _number(text: str) -> int:
    """A block's number; -1 for what is none, as another program's metrics may have it."""
    return int(text) if text.isascii() and text.isdigit() else -1


def _over_blocks(
    columns: Columns, names: Sequence[str], blocks: Sequence[int], labels: tuple[str, str], note: str = ""
) -> Chart | None:
    """A chart over the blocks; None where nothing finite was logged."""
    order = np.argsort(blocks, kind="stable")
    values = np.stack([columns[names[place]] for place in order])
    steps = columns["step"]
    measured = np.flatnonzero(np.isfinite(values).any(0))
    if not len(measured):
        return None
    places = np.array(blocks)[order]
    shown = dict.fromkeys(int(measured[place]) for place in (0, len(measured) // 2, len(measured) - 1))
    lines = [Line(places, values[:, at], color=color, name=f"step {steps[at]:,.0f}") for color, at in enumerate(shown)]
    drawn = values[:, list(shown)]
    finite = drawn[np.isfinite(drawn)]
    low, high = min(0.0, float(finite.min())), float(finite.max())
    x = linear("block", float(places[0]), float(places[-1]), min(MARKS, max(1, len(places) - 1)))
    return line_chart(labels[0], Plot(x, linear(labels[1], low, 1.04 * high, 4)), lines, note=note)
