"""A student whose sizes are learned: bars of what is left per layer, curves of how it came to that, and its table."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.report.axes import Axis, linear
from pipeline.report.charts import Chart, Plot, Rule
from pipeline.report.curves import STEPS, Columns, RunAxis, curve, several
from shards_spec.student_table import TOWERS, student_markdown

CONFIGS = ("vision_cfg", "text_cfg")  # of the towers, in open_clip_config.json
COUNTS = ("parameters", "token_embedding", "macs")
MARKS = 12  # numbers of layers below a chart at most
MASKED = {"sparsity": "p, expected", "sparsity_target": "q, its target"}
MULTIPLIERS = {"lambda": "λ", "beta": "β"}


class TowerSizes(NamedTuple):
    """Width, and heads and neurons of each layer."""

    width: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]


class Bar(NamedTuple):
    """What is left of a number of units, of how many at the run's start, and of how many before any pruning."""

    name: str
    left: int
    before: int
    whole: int
    color: int = 0


def student_part(table: dict[str, Any], described: dict[str, Any], start: dict[str, Any]) -> dict[str, Any] | None:
    """The variables of the template for a student.json; None for a run without one, or with another kind of table.

    Args:
        table: The run's student.json.
        described: Its open_clip_config.json, which has the sizes before any pruning.
        start: The open_clip_config.json of the model that it began with, which has sizes if that was cut before.
    """
    towers = _towers(table)
    if not towers:
        return None
    wholes, befores = list[TowerSizes](), list[TowerSizes]()
    for part, sizes in zip(CONFIGS, towers, strict=True):
        whole = _original(_described(described, part).get("original"), sizes)
        before = _sizes(_described(start, part))
        wholes.append(whole)
        befores.append(before if before and len(before.heads) == len(sizes.heads) else whole)
    return {
        "table": table,
        "towers": {name: table[name] for name in TOWERS},
        "with_masks": table.get("masks") is True,
        "charts": _charts(list(zip(towers, befores, wholes, strict=True))),
        "markdown": student_markdown(table),
    }


def _towers(table: dict[str, Any]) -> list[TowerSizes]:
    """The sizes of both towers; none where the table lacks a number that the page shows."""
    found = [table.get(name) for name in TOWERS]
    sizes = [own for own in map(_sizes, found) if own is not None]
    has_counts = _has_counts(table, ("parameters", "macs")) and all(_has_counts(tower, COUNTS) for tower in found)
    complete = len(sizes) == len(TOWERS) and has_counts
    return sizes if complete and isinstance(table.get("sparsity"), float | int) else []


def _has_counts(owner: Any, counts: Sequence[str]) -> bool:
    return isinstance(owner, dict) and all(_is_count(owner.get(name)) for name in counts)


def _sizes(tower: Any) -> TowerSizes | None:
    """The sizes that a tower of student.json, or of open_clip_config.json if it was cut, says layer by layer."""
    if not isinstance(tower, dict) or not _is_count(tower.get("width")):
        return None
    layers = [tower.get(name) for name in ("heads", "neurons")]
    if not all(isinstance(own, list) and own and all(map(_is_count, own)) for own in layers):
        return None
    heads, neurons = (tuple(own) for own in layers if own)
    return TowerSizes(tower["width"], heads, neurons) if len(heads) == len(neurons) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _described(description: dict[str, Any], part: str) -> dict[str, Any]:
    """A tower of an open_clip_config.json; empty where it has none."""
    value: Any = description
    for name in ("model_cfg", part):
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _original(value: Any, sizes: TowerSizes) -> TowerSizes:
    """The sizes before any pruning; those that there are where the description does not say them."""
    if not isinstance(value, dict) or not all(_is_count(value.get(name)) for name in sizes._fields):
        return sizes
    layers = len(sizes.heads)
    return TowerSizes(value["width"], (value["heads"],) * layers, (value["neurons"],) * layers)


def _charts(towers: list[tuple[TowerSizes, TowerSizes, TowerSizes]]) -> list[Chart]:
    """Dimensions of both towers, then heads and neurons of each."""
    dims = [
        Bar(name, left.width, before.width, whole.width, color)
        for color, (name, (left, before, whole)) in enumerate(zip(TOWERS, towers, strict=True))
    ]
    charts = [bar_chart("Dimensions of the residual stream", "D", "tower", dims)]
    for color, (name, sizes) in enumerate(zip(TOWERS, towers, strict=True)):
        for kind, letter in (("heads", "H"), ("neurons", "F")):
            counts = enumerate(zip(*(getattr(each, kind) for each in sizes), strict=True), 1)
            layers = [Bar(str(layer), left, before, whole, color) for layer, (left, before, whole) in counts]
            charts.append(bar_chart(f"{kind.capitalize()} per layer, {name}", letter, "layer", layers))
    return charts


def bar_chart(title: str, unit: str, label: str, bars: Sequence[Bar]) -> Chart:
    """A bar per layer or tower: filled what is left, pale what the run began with, an outline of the original."""
    tallest = max(max(bar.left, bar.before, bar.whole) for bar in bars)
    every = -(-len(bars) // MARKS)
    marks = tuple((i + 0.5, bar.name) for i, bar in enumerate(bars) if i % every == 0)
    plot = Plot(Axis(label, 0, len(bars), marks), _whole_axis(unit, max(1, tallest)))
    body = Markup("").join(_bar(plot, i, bar, f"{label} {bar.name}") for i, bar in enumerate(bars))
    left, whole = sum(bar.left for bar in bars), sum(bar.whole for bar in bars)
    return Chart(title, plot.draw(body, f"{title}: {left:,} of {whole:,} are left"))


def _whole_axis(unit: str, tallest: int) -> Axis:
    """An axis of counts: no marks between whole numbers."""
    axis = linear(unit, 0, tallest * 1.04, 4)
    return Axis(unit, axis.low, axis.high, tuple(mark for mark in axis.marks if mark[0] == round(mark[0])))


def _bar(plot: Plot, index: int, bar: Bar, name: str) -> Markup:
    each = plot.wide / (plot.x.high - plot.x.low)
    wide = min(each * 0.72, 64.0)
    x = (index + 0.5) * each - wide / 2
    rect = Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">{}</rect>')

    def drawn(style: str, count: int) -> Markup:
        top = plot.y_at(count)
        return rect.format(style, x, top, wide, plot.tall - top, "")

    text = f"{name}: {bar.left:,} of {bar.whole:,}"
    if bar.before != bar.whole:
        text += f", {bar.before:,} at the start of the run"
    hover = rect.format("strip", index * each, 0, each, plot.tall, Markup("<title>{}</title>").format(text))
    bars = [drawn(f"pale c{bar.color}", bar.before), drawn(f"c{bar.color}", bar.left), drawn("whole", bar.whole)]
    return Markup("").join([*bars, hover])


def mask_curves(columns: Columns, rules: Sequence[Rule], over: RunAxis = STEPS) -> list[Chart]:
    """Sparsity against its target, the multipliers, and the parameters left; none of a run without masks."""
    charts = []
    for names, labels in (
        (MASKED, ("Sparsity and its target", "share of the weights")),
        (MULTIPLIERS, ("Multipliers", "of the sparsity loss")),
    ):
        there = {column: name for column, name in names.items() if column in columns}
        if there:
            charts.append(several(columns, there, labels, rules, over))
    if "parameters" in columns and "sparsity" in columns:
        charts.append(
            curve(columns, "parameters", ("Parameters left", "as evaluation has them"), rules=rules, over=over)
        )
    return charts


def cut_rules(table: dict[str, Any]) -> list[Rule]:
    """The step of the cut, on the x axis; none while there are masks."""
    step = table.get("step")
    if table.get("masks") is not False or not isinstance(step, int) or step < 1:
        return []
    return [Rule("x", step, "cut")]
