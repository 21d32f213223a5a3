"""Helpers that both pages share: lines of JSON, numbers that may be missing, nested settings as rows."""

import math
from itertools import chain
from typing import Any

from shards_spec.files import read_bytes
from shards_spec.sample import parse_object


def json_lines(path: str) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a file with one per line, and how many lines are none (a writer killed in mid-line)."""
    rows, broken = list[dict[str, Any]](), 0
    for line in read_bytes(path).decode("utf-8", "replace").splitlines():
        if not line.strip():
            continue
        try:
            rows.append(parse_object(line))
        except ValueError:
            broken += 1
    return rows, broken


def number(value: Any) -> float:
    """A float; NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested objects as (dotted name, text)."""
    if isinstance(value, dict) and (value or not prefix):
        inner = (flatten(own, f"{prefix}{name}.") for name, own in value.items())
        return list(chain.from_iterable(inner))
    return [(prefix.removesuffix("."), "–" if value is None else str(value))]
