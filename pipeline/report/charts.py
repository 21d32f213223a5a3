"""Charts as inline SVG: a frame with axes, marks and labels, and lines in it.

A chart is drawn for a column of about 360 CSS pixels and takes its colours from the page's style sheet. Hover values
are SVG titles, so that the page needs no script.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from pipeline.report.axes import Axis, short

SIZE = (360, 216)
TOP = 24
RIGHT = 14
BOTTOM = 38
STRIPS = 40  # hover strips of a line chart
COLORS = 8  # of series, in the style sheet; further lines are dashed
POINTS = 300  # vertices of a line at most


@dataclass(frozen=True)
class Chart:
    """One figure of the page; ``legend`` names the series, which have the ``colors``, by default 0, 1, and so on."""

    title: str
    svg: Markup
    note: str = ""
    legend: tuple[str, ...] = ()
    colors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Line:
    """A series over x; values that are not finite make gaps. A faint line is raw data.

    Lines with a name are in the legend: they have the same x, and colors in the legend's order.
    """

    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    faint: bool = False
    color: int = 0
    name: str = ""
    breaks: Sequence[float] = ()  # x after which the line begins anew


@dataclass(frozen=True)
class Rule:
    """A dashed line with its text, at a value of the ``axis`` "x" or "y"."""

    axis: str
    value: float
    text: str


@dataclass(frozen=True)
class Plot:
    """The frame of a chart. Coordinates inside are in pixels from the plot's upper left corner."""

    x: Axis
    y: Axis
    size: tuple[int, int] = SIZE

    @property
    def width(self) -> int:
        """Of the whole chart, marks and labels included."""
        return self.size[0]

    @property
    def left(self) -> float:
        """Room for the marks of the y axis."""
        return max(26.0, 6.4 * max((len(text) for _, text in self.y.marks), default=1) + 10)

    @property
    def wide(self) -> float:
        """Width of the plot."""
        return self.width - self.left - RIGHT

    @property
    def tall(self) -> float:
        """Height of the plot."""
        return self.size[1] - TOP - BOTTOM

    def x_at(self, value: float) -> float:
        """Pixels from the left."""
        return self.x.place(value) * self.wide

    def y_at(self, value: float) -> float:
        """Pixels from the top; values far outside stay near the edge."""
        return self.tall * (1 - min(max(self.y.place(value), -1), 2))

    def draw(self, body: Markup, summary: str) -> Markup:
        """Axes, grid, marks and labels around the body. ``summary`` is what a screen reader says."""
        start = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">')
        units = Markup(
            '<text class="unit" x="0" y="11">{}</text><text class="unit" x="{}" y="{}" text-anchor="end">{}</text>'
        )
        axis = Markup('<line class="axis" x1="{:.1f}" x2="{}" y1="{}" y2="{}"/>')
        inner = Markup('<svg x="{:.1f}" y="{}" width="{:.1f}" height="{}" overflow="hidden">')
        bottom = TOP + self.tall
        parts = [
            start.format(*self.size, summary),
            units.format(self.y.label, self.width - RIGHT, self.size[1] - 4, self.x.label),
            *(self._y_mark(value, text) for value, text in self.y.marks),
            *(self._x_mark(value, text) for value, text in self.x.marks),
            axis.format(self.left, self.width - RIGHT, bottom, bottom),
            inner.format(self.left, TOP, self.wide, self.tall),
            body,
            Markup("</svg></svg>"),
        ]
        return Markup("").join(parts)

    def _y_mark(self, value: float, text: str) -> Markup:
        at = TOP + self.y_at(value)
        grid = Markup('<line class="grid" x1="{:.1f}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
        label = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>')
        return grid.format(self.left, self.width - RIGHT, at, at) + label.format(self.left - 6, at + 4, text)

    def _x_mark(self, value: float, text: str) -> Markup:
        at, bottom = self.left + self.x_at(value), TOP + self.tall
        tick = Markup('<line class="tick" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>')
        label = Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
        return tick.format(at, at, bottom, bottom + 4) + label.format(at, bottom + 16, text)


def line_chart(title: str, plot: Plot, lines: Sequence[Line], rules: Sequence[Rule] = (), note: str = "") -> Chart:
    """Lines over x; the values of the first one, or of all that have names, show under the pointer."""
    named = [line for line in lines if line.name]
    shown = named or lines[:1]
    body = [*(_path(plot, line) for line in lines), *(_rule(plot, rule) for rule in rules), _strips(plot, shown)]
    summary = f"{title}: {'; '.join(map(_summary, shown))}"
    return Chart(title, plot.draw(Markup("").join(body), summary), note, tuple(line.name for line in named))


def overlay_chart(title: str, plot: Plot, lines: Sequence[Line], note: str = "") -> Chart:
    """Named lines that have x of their own; the value of each that is nearest shows under the pointer."""
    body = [*(_path(plot, line) for line in lines), _shared_strips(plot, lines)]
    summary = f"{title}: {'; '.join(map(_summary, lines))}"
    legend, colors = tuple(line.name for line in lines), tuple(line.color for line in lines)
    return Chart(title, plot.draw(Markup("").join(body), summary), note, legend, colors)


@dataclass(frozen=True)
class Dot:
    """A point of a scatter chart: its number is written on it, and its name is in the legend."""

    x: float
    y: float
    name: str
    number: int
    color: int


def scatter_chart(title: str, plot: Plot, dots: Sequence[Dot], note: str = "") -> Chart:
    """Dots, each with its values under the pointer."""
    parts = [_dot(plot, dot) for dot in dots]
    values = [f"{dot.name} {short(dot.x)}, {short(dot.y)}" for dot in dots]
    legend, colors = tuple(dot.name for dot in dots), tuple(dot.color for dot in dots)
    svg = plot.draw(Markup("").join(parts), f"{title}: {'; '.join(values)}")
    return Chart(title, svg, note, legend, colors)


def _dot(plot: Plot, dot: Dot) -> Markup:
    x, y = f"{plot.x_at(dot.x):.1f}", plot.y_at(dot.y)
    circle = Markup('<circle class="c{}" cx="{}" cy="{:.1f}" r="9"><title>{}</title></circle>')
    number = Markup('<text class="number" x="{}" y="{:.1f}" text-anchor="middle" pointer-events="none">{}</text>')
    said = f"{dot.name}: {plot.x.label} {short(dot.x, 4)}, {plot.y.label} {short(dot.y, 4)}"
    return circle.format(dot.color % COLORS, x, y, said) + number.format(x, y + 4, dot.number)


def _shared_strips(plot: Plot, lines: Sequence[Line]) -> Markup:
    """Invisible columns over the whole width; each names the lines' points that are nearest to its middle."""
    strip = Markup('<rect class="strip" x="{:.1f}" width="{:.1f}" height="{}"><title>{}</title></rect>')
    each, parts = plot.wide / STRIPS, []
    for index in range(STRIPS):
        middle = plot.x.low + (index + 0.5) / STRIPS * (plot.x.high - plot.x.low)
        values = [f"{line.name} {short(value, 4)}" for line in lines if math.isfinite(value := _near(line, middle))]
        if values:
            text = f"{plot.x.label} about {short(middle)}: {'; '.join(values)}"
            parts.append(strip.format(index * each, each, plot.tall, text))
    return Markup("").join(parts)


def _near(line: Line, x: float) -> float:
    """The value nearest to ``x`` of a line; NaN behind its end."""
    places = np.asarray(line.x, float)[np.isfinite(line.y)]
    values = np.asarray(line.y, float)[np.isfinite(line.y)]
    if not len(places) or x > places[-1] + (places[-1] - places[0]) / STRIPS:
        return math.nan
    return float(values[np.argmin(np.abs(places - x))])


def _summary(line: Line) -> str:
    """A line in words."""
    finite = [float(value) for value in line.y if math.isfinite(value)]
    words = f"{short(finite[0])} first, {short(finite[-1])} last" if finite else "no finite value"
    return f"{line.name} {words}".strip()


def _path(plot: Plot, line: Line) -> Markup:
    """A polyline per stretch of finite values; a stretch of one is a dot."""
    stretches: list[list[str]] = []
    for part in parts_between(line.x, line.breaks):
        stretches.append([])
        for x, y in thin(np.asarray(line.x, float)[part], np.asarray(line.y, float)[part]):
            if math.isfinite(y):
                stretches[-1].append(f"{plot.x_at(x):.1f},{plot.y_at(y):.1f}")
            else:
                stretches.append([])
    dot, path = Markup('<circle class="c{}" cx="{}" cy="{}" r="3"/>'), Markup('<polyline class="{}" points="{}"/>')
    style = f"c{line.color % COLORS}"
    if line.faint or line.color >= COLORS:
        style = f"{'faint' if line.faint else 'dashed'} {style}"
    return Markup("").join(
        dot.format(line.color % COLORS, *points[0].split(","))
        if len(points) == 1
        else path.format(style, " ".join(points))
        for points in stretches
        if points
    )


def parts_between(x: Sequence[float] | np.ndarray, breaks: Sequence[float]) -> list[slice]:
    """Slices of rising x that end at the breaks, those included."""
    edges = [0, *np.searchsorted(x, sorted(breaks), side="right").tolist(), len(x)]
    return [slice(start, end) for start, end in pairwise(edges)]


def thin(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    """At most about POINTS points: from each run of neighbours the least and the greatest; gaps stay gaps."""
    if len(x) <= POINTS:
        return list(zip(x.tolist(), y.tolist(), strict=True))
    points: list[tuple[float, float]] = []
    for part in np.array_split(np.arange(len(x)), POINTS // 2):
        finite = part[np.isfinite(y[part])]
        if not len(finite):
            points.append((float(x[part[0]]), math.nan))
            continue
        chosen = sorted({int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])})
        points += [(float(x[i]), float(y[i])) for i in chosen]
    return points


def _strips(plot: Plot, lines: Sequence[Line]) -> Markup:
    """Invisible columns that show the values under the pointer."""
    x = lines[0].x
    chosen = np.unique(np.linspace(0, len(x) - 1, min(STRIPS, len(x))).round().astype(int))
    places = [plot.x_at(float(x[i])) for i in chosen]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(places)), plot.wide]
    strip = Markup('<rect class="strip" x="{:.1f}" width="{:.1f}" height="{}"><title>{}</title></rect>')
    parts = []
    for i, (start, end) in zip(chosen, pairwise(edges), strict=True):
        there = [line for line in lines if math.isfinite(line.y[i])] or lines[:1]
        values = [f"{line.name} {short(float(line.y[i]), 4)}".strip() for line in there]
        text = f"{plot.x.label} {float(x[i]):,.0f}: {'; '.join(values)}"
        parts.append(strip.format(start, max(0.0, end - start), plot.tall, text))
    return Markup("").join(parts)


def _rule(plot: Plot, rule: Rule) -> Markup:
    if rule.axis == "y":
        at = plot.y_at(rule.value)
        line = Markup('<line class="rule" x1="0" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(plot.wide, at, at)
        return line + Markup('<text class="ruled" x="4" y="{:.1f}">{}</text>').format(
            at - 5 if at > 16 else at + 13, rule.text
        )
    at = plot.x_at(rule.value)
    anchor, shift = ("end", -5) if at > plot.wide / 2 else ("start", 5)
    line = Markup('<line class="rule" y1="0" y2="{}" x1="{:.1f}" x2="{:.1f}"/>').format(plot.tall, at, at)
    return line + Markup('<text class="ruled" x="{:.1f}" y="12" text-anchor="{}">{}</text>').format(
        at + shift, anchor, rule.text
    )
