"""Axes of the report's charts: numbers in few characters, marks at round values, linear and logarithmic ranges."""

import math
from dataclasses import dataclass
from itertools import product

UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Axis:
    """A range with its unit and the marks on it: (value, text)."""

    label: str
    low: float
    high: float
    marks: tuple[tuple[float, str], ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies: 0 at ``low``, 1 at ``high``."""
        if self.log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def short(value: float, digits: int = 3) -> str:
    """A number in a few characters: ``12.3k``, ``0.05``, ``5e-5``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    value = float(f"{value:.{digits}g}")
    if not 1e-4 <= abs(value) < 1e12:
        return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+", "e")
    factor, unit = next((pair for pair in UNITS if abs(value) >= pair[0]), (1.0, ""))
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value / factor))))
    text = f"{value / factor:.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + unit


def percent(part: float, whole: float) -> str:
    """A share in per cent: one decimal, and as many more as tell it from nothing and from all (down to 0.001)."""
    if not whole or part in (0, whole):
        return "100 %" if whole and part == whole else "0 %"
    share = 100 * part / whole
    edge = min(share, 100 - share)
    if 0 < edge < 0.001:
        return "< 0.001 %" if share < 50 else "> 99.999 %"
    decimals = 1 if edge >= 0.1 else -math.floor(math.log10(edge))
    return f"{share:.{decimals}f} %"


def total(number: int) -> str:
    """A whole number for a headline: with commas up to ten million, rounded above."""
    return f"{number:,}" if number < 10_000_000 else short(number, 4)


def linear(label: str, low: float, high: float, count: int = 5) -> Axis:
    """An axis with about ``count`` marks at round numbers, two at least; a range without width gets some."""
    if not high > low:
        pad = abs(low) * 0.05 or 1.0
        low, high = low - pad, high + pad
    values = _round_values(low, high, count)
    if len(values) < 2:
        values = _round_values(low, high, 2 * count)
    return Axis(label, low, high, _label(values))


def _round_values(low: float, high: float, count: int) -> list[float]:
    """The multiples of a round step within a range, about ``count`` of them."""
    step = nice_step((high - low) / count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def logarithmic(label: str, low: float, high: float) -> Axis:
    """A logarithmic axis with marks at powers of ten, and between them when there is room."""
    first = math.floor(math.log10(low))
    decades = range(first, math.ceil(math.log10(max(high, low * 1.0001))) + 1)
    high = max(high, low * 2)
    marks = list[float]()
    for factors in (_factors(len(decades)), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        values = [factor * 10.0**decade for decade, factor in product(decades, factors)]
        marks = [value for value in values if low * 0.999 <= value <= high * 1.001]
        if len(marks) > 2:
            break
    return Axis(label, low, high, _label(marks), log=True)


def _factors(decades: int) -> tuple[int, ...]:
    """By what powers of ten are multiplied to get the marks: fewer where there are many decades."""
    if decades > 4:
        return (1,)
    return (1, 2, 5) if decades < 3 else (1, 3)


def nice_step(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= step * 0.999)


def _label(values: list[float]) -> tuple[tuple[float, str], ...]:
    """The shortest texts that tell the values apart."""
    texts: list[str] = []
    for digits in range(2, 12):
        texts = [short(value, digits) for value in values]
        if len(set(texts)) == len(texts) and all(_same(t, v) for t, v in zip(texts, values, strict=True)):
            break
    return tuple(zip(values, texts, strict=True))


def _same(text: str, value: float) -> bool:
    factor = next((factor for factor, unit in UNITS if text.endswith(unit)), 1.0)
    return math.isclose(float(text.rstrip("kMG")) * factor, value, rel_tol=1e-9)
