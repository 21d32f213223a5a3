"""docs/tables.py for tests, and what docs/benchmarks.md explains."""

import re
import runpy
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@cache
def tables_script() -> dict[str, Any]:
    """The names of docs/tables.py; the path of modules is left as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        return runpy.run_path(str(ROOT / "docs" / "tables.py"))


def unexplained(figures: list[dict[str, Any]]) -> list[str]:
    """The figures without a row in docs/benchmarks.md, or with another goal there; numbers in names may differ."""
    script = tables_script()
    rows = script["explained_rows"]((ROOT / "docs" / "benchmarks.md").read_text())
    goals = {without_numbers(name): goal for name, goal in rows.items()}
    wrong = []
    for figure in figures:
        found = [goal for name, goal in goals.items() if script["explains"](name, without_numbers(figure["name"]))]
        if figure.get("goal", "") not in found and not (found and figure["step"] == "tests"):
            wrong.append(f"{figure['name']}: {figure.get('goal', 'no goal')}")
    return wrong


def without_numbers(name: str) -> str:
    """A figure's name with N for its numbers."""
    return re.sub(r"\d+(,\d{3})*", "N", name)
