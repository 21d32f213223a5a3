#!/usr/bin/env python3
"""Writes the tables of the pages: what a dataset costs, what was measured on a GPU, what many shards cost.

    python docs/tables.py [--check]

A table stands between ``<!-- tables.py: NAME -->`` and ``<!-- end -->``. `tests/bench/plan.py` and
`tests/bench/recipes.py` compute costs, from `pipeline/plan/rates.json`. Figures of many shards are those of one run of
`python tests/bench/scale.py --work /dev/shm --out tests/bench/scale.json`. Figures of a GPU are those of
`tests/gpu/figures.jsonl`, the last one of each name; one that docs/benchmarks.md explains and that is not among them
was not run yet (… in the name of an explained one stands for any text, or none). That file and the rates are copied
from $OUT after `bash tests/gpu/run.sh`. --check writes nothing and fails where a page has other tables.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "tests/bench", "tests/gpu"))

import plan
import recipes
import runner
from scale_table import scale_table

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "docs/scale.md",
    "docs/benchmarks.md",
    *(f"docs/recipes/{name}.md" for name in recipes.PAGES),
)
FIGURES = ROOT / "tests" / "gpu" / "figures.jsonl"
MANY_SHARDS = ROOT / "tests" / "bench" / "scale.json"
BLOCK = re.compile(r"(<!-- tables\.py: (?P<name>[^>]+) -->\n).*?(<!-- end -->\n)", re.S)
EXPLAINED = re.compile(r"^\| figure \| what it is \| goal \|\n\|[-|]+\|\n(?P<rows>(?:\|.*\n)+)", re.M)


def explained_rows(page: str) -> dict[str, str]:
    """The figures that docs/benchmarks.md explains, with their goals."""
    found = EXPLAINED.search(page)
    if found is None:
        sys.exit("docs/benchmarks.md: no table with the head: figure, what it is, goal")
    rows = [line.strip("| ").split(" | ") for line in found["rows"].splitlines()]
    return {row[0]: row[2].strip() if len(row) > 2 else "" for row in rows}


def explains(explained: str, name: str) -> bool:
    """Whether a name that docs/benchmarks.md explains is that of a figure."""
    return re.fullmatch(re.escape(explained).replace("…", ".*"), name) is not None


def gpu_table(lines: list[str], explained: dict[str, str]) -> str:
    """The figures of a GPU, and a row for each explained one that is not there; another card than the first is named.

    Args:
        lines: JSON, a figure each.
        explained: The goal by the name of the figure.
    """
    figures: dict[str, dict[str, Any]] = {}
    for line in lines:
        one = json.loads(line)
        figures[one["name"]] = one
    missing = [
        f"| {name} | not run yet | {goal} |  |"
        for name, goal in explained.items()
        if not any(explains(name, measured) for measured in figures)
    ]
    runs = dict.fromkeys(f"{one['card']}, torch {one['torch']}, {one['date']}" for one in figures.values())
    card = next((one["card"] for one in figures.values()), None)
    for one in figures.values():
        if one["card"] != card:
            one["facts"] = {**one["facts"], "card": one["card"]}
    table = "\n".join([runner.markdown(list(figures.values())), *missing])
    return f"Measured on {'; '.join(runs)}:\n\n{table}" if runs else table


def tables() -> dict[str, str]:
    """All tables by name."""
    lines = FIGURES.read_text().splitlines() if FIGURES.exists() else []
    explained = explained_rows((ROOT / "docs" / "benchmarks.md").read_text())
    return {
        **plan.blocks(plan.parser().parse_args([])),
        **recipes.blocks(),
        "on a GPU": gpu_table(lines, explained),
        "many shards": scale_table(json.loads(MANY_SHARDS.read_text())),
    }


def filled(page: str, by_name: dict[str, str]) -> str:
    """A page with its tables; raises KeyError for a name that no table has."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{by_name[block['name']]}\n\n{block[3]}", page)


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page has other tables")
    check = parser.parse_args().check
    by_name = tables()
    stale = []
    for name in PAGES:
        page = (ROOT / name).read_text()
        wanted = filled(page, by_name)
        if page == wanted:
            continue
        stale.append(name)
        if not check:
            (ROOT / name).write_text(wanted)
    if check and stale:
        print(f"{', '.join(stale)}: other tables than `python docs/tables.py` writes")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
