"""The tables that docs/tables.py writes into the pages, with and without figures of a GPU."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench import plan
from page_tables import tables_script, unexplained

from pipeline.plan.costs import FLOP, Costs

ROOT = Path(__file__).parents[1]
MEASURED = {
    "card": "Some Card",
    "date": "2026-12-01",
    "torch": "2.11",
    "ceiling": 8e14,
    "rates": {"image, ViT-L/14": 2400.0, "step of ViT-M-32": 12_000.0},
}


@pytest.fixture
def tables() -> dict:
    """The names of docs/tables.py."""
    return tables_script()


def blocks(*words: str) -> dict[str, str]:
    return plan.blocks(plan.parser().parse_args([*words]))


@pytest.fixture
def measured(tmp_path) -> dict[str, str]:
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(MEASURED))
    return blocks("--rates", str(path))


def row(table: str, start: str) -> list[str]:
    [line] = [line for line in table.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_figures_from_measured_rates_have_a_mark_and_name_the_card(measured):
    for table in ("corpora", "one GPU", "one GPU, in short"):
        assert "Some Card (2026-12-01)" in " ".join(measured[table].split())
    assert row(measured["jobs of a GPU"], "image, ViT-L/14")[2:] == ["2,400", "0.486"]
    assert row(measured["jobs of a GPU"], "text, ViT-L/14")[2:] == ["not yet", ""]
    assert row(measured["cores beside a GPU"], "train ViT-M-32") == [
        "train ViT-M-32",
        "12,000†",
        f"{12_000 * Costs().train_ms / 1e3:.3g}†",
    ]
    assert row(measured["one GPU, in short"], "`cache`")[1].endswith("‡")
    assert row(measured["one GPU, in short"], "`train tinyclip`, 6 epochs")[1].endswith("†")
    assert row(measured["one GPU, in short"], "`caption`") == row(plan.readme_table(None), "`caption`")
    # the card's own rate counts on the card: 2,905,954 steps at 12,000 a second are 67 s
    corpus = measured["corpora"].split("**CC12M**")[0]
    assert row(corpus, "train ViT-M-32")[3] == f"{2_905_954 / 12_000 / 3600:.3g}†"


def test_where_all_rates_are_measured_nothing_is_said_of_assumptions(tmp_path, measured):
    path = tmp_path / "all.json"
    path.write_text(json.dumps({**MEASURED, "rates": dict.fromkeys(FLOP, 1000.0)}))
    for name in ("corpora", "one GPU", "one GPU, in short"):
        assert "Unmarked GPU figures assume" in " ".join(measured[name].split())
        complete = blocks("--rates", str(path))[name]
        assert "†:" in complete
        assert "assume" not in complete
        assert "‡" not in complete


def test_without_a_file_of_rates_all_is_assumed(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "RATES", tmp_path / "none.json")
    for name, table in blocks().items():
        assert not {"†", "‡"} & set(table)
        assert "GPU figures assume" in table or name in ("jobs of a GPU", "cores beside a GPU")


def test_another_card_is_as_fast_as_its_ceiling(tmp_path, measured):
    half = blocks("--rates", str(tmp_path / "rates.json"), "--peak", "0.4")
    assert row(half["cores beside a GPU"], "train ViT-M-32")[1] == "6,000†"
    assert row(half["cores beside a GPU"], "train ViT-B-16") == row(measured["cores beside a GPU"], "train ViT-B-16")


def test_only_gpu_figures_are_marked(measured):
    for line in measured["one GPU"].splitlines():
        cells = [cell for cell in line.split(" | ") if "(cores)" in cell or "(network)" in cell]
        assert not [cell for cell in cells if "†" in cell or "‡" in cell]


def test_the_command_names_a_file_that_is_wrong(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({**MEASURED, "rates": {"image of ViT-L/14": 1}}))
    command = [sys.executable, str(ROOT / "tests" / "bench" / "plan.py"), "--rates", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{path}: rates: no job 'image of ViT-L/14'")
    assert len(done.stderr.splitlines()) == 1


def test_a_page_gets_its_tables_and_keeps_the_rest(tables):
    first = "Before\n\n<!-- tables.py: a -->\nold\n<!-- end -->\n\n"
    page = f"{first}After <!-- end -->\n<!-- tables.py: b -->\n<!-- end -->\n"
    filled = tables["filled"](page, {"a": "| A\\1 |", "b": "| B |"})
    assert filled == (
        "Before\n\n<!-- tables.py: a -->\n\n| A\\1 |\n\n<!-- end -->\n\nAfter <!-- end -->\n"
        "<!-- tables.py: b -->\n\n| B |\n\n<!-- end -->\n"
    )
    assert tables["filled"](filled, {"a": "| A\\1 |", "b": "| B |"}) == filled
    with pytest.raises(KeyError):
        tables["filled"](page, {"a": ""})


def test_each_table_stands_on_a_page(tables):
    text = "".join((ROOT / page).read_text() for page in tables["PAGES"])
    assert sorted(block["name"] for block in tables["BLOCK"].finditer(text)) == sorted(tables["tables"]())


def test_rows_without_a_figure_were_not_run_yet(tables):
    explained = {"views": "fast", "texts": ""}
    assert "| views | not run yet | fast |" in tables["gpu_table"]([], explained)
    shared = {"unit": "views/s", "goal": "fast", "card": "Some Card", "torch": "2.11"}
    lines = [
        json.dumps({"name": "views", "value": value, "date": date, **shared})
        for value, date in ((1.0, "2026-12-01"), (2.0, "2026-12-02"))
    ]
    table = tables["gpu_table"](lines, explained)
    assert table.startswith("Measured on Some Card, torch 2.11, 2026-12-02:\n")
    assert row(table, "views")[1:3] == ["2 views/s", "fast"]
    assert row(table, "texts")[1] == "not run yet"


@pytest.mark.parametrize(
    ("explained", "name", "same"),
    [
        ("views, 64 rows", "views, 64 rows", True),
        ("views, 64 rows", "views, 128 rows", False),
        ("train: …, compile", "train: ViT-M-32, compile", True),
        ("train: …, compile", "train: ViT-M-32, compiled", False),
        ("views (a|b)", "views a", False),
        ("views", "views of texts", False),
    ],
)
def test_an_explained_name_stands_for_itself_or_other_texts(tables, explained, name, same):
    assert tables["explains"](explained, name) == same


def test_every_figure_on_the_page_is_explained_there(tables):
    figures = tables["FIGURES"]
    assert (
        unexplained([json.loads(line) for line in figures.read_text().splitlines()] if figures.exists() else []) == []
    )
    assert unexplained([{"name": "memory of a mule", "step": "limits"}]) == ["memory of a mule: no goal"]
    images = {"name": "cache: ViT-L/14 images", "step": "cache", "goal": "share of the ceiling >= 0.5"}
    assert unexplained([images, {**images, "goal": "0.6"}]) == ["cache: ViT-L/14 images: 0.6"]


def literal_rates(path: Path) -> set[str]:
    """The values of ``rate=`` in a file, those that stand there as they are."""
    keywords = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.keyword)]
    return {one.value.value for one in keywords if one.arg == "rate" and isinstance(one.value, ast.Constant)} - {""}


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "gpu").glob("measure_*.py")), ids=lambda path: path.stem)
def test_measurements_name_jobs_that_are_known(path):
    assert literal_rates(path) <= set(FLOP)


def many_shards(**cells: list[tuple[float, float]]) -> dict:
    """A report of the bench of many shards; CPU seconds and MiB of each row at 1,000, 10,000 and 100,000 shards."""
    sizes = [1_000, 10_000, 100_000]
    rows = []
    for title, own in cells.items():
        measured = {
            str(size): {"CPU": cpu, "seconds": 2 * cpu, "MiB": mib, "worker MiB": 0.0}
            for size, (cpu, mib) in zip(sizes, own, strict=True)
        }
        rows.append({"name": title, "title": title, "measured": measured, "operations": {"open": 2.0, "list": 0.001}})
    return {"machine": "2 cores of a Some CPU", "date": "2026-12-01", "sizes": sizes, "rows": rows}


def test_rows_of_many_shards_that_grow_more_than_linearly_are_named(tables):
    def note(**cells: list[tuple[float, float]]) -> str:
        return " ".join(tables["scale_table"](many_shards(**cells)).rpartition("\n\n")[2].split())

    flat, steep = [(0.1, 20), (1.0, 21), (10.0, 30)], [(0.1, 20), (1.0, 21), (16.0, 30)]
    figures = row(tables["scale_table"](many_shards(flat=flat)), "flat")[1:]
    assert figures == ["0.10, 0.20, 20", "1.00, 2.00, 21", "10.00, 20.00, 30", "2 open"]
    start = "Measured by one run with `--shards 1000 10000 100000` on 2 cores of a Some CPU, 2026-12-01. All is flat: "
    assert note(flat=flat).startswith(start)
    said = note(flat=flat, steep=steep)
    assert said.endswith("Not flat: steep (CPU time per shard, 1.6 times from 10,000 to 100,000).")
    said = note(heavy=[(0.1, 20), (1.0, 28), (10.0, 208)])
    assert said.endswith("Not flat: heavy (memory, 2.1 kB per shard from 10,000 to 100,000).")
    assert "All is flat" in note(start_up=[(0.001, 1), (0.1, 18), (0.9, 35)])


def test_the_folder_of_a_killed_bench_is_removed_and_that_of_a_running_one_stays(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    scale = importlib.import_module("scale")
    left, other = tmp_path / f"{scale.PREFIX}left", tmp_path / "other"
    for folder in (left, other):
        folder.mkdir()
        (folder / scale.LOCK).write_text("")
    with scale.work_folder(str(tmp_path)) as running:
        assert not left.exists()
        with scale.work_folder(str(tmp_path)) as second:
            assert {running, second, other} == set(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.slow
def test_the_bench_of_many_shards_runs_from_nothing_and_leaves_nothing(tables, tmp_path):
    work, out = tmp_path / "work", tmp_path / "scale.json"
    work.mkdir()
    words = ["--shards", "20", "30", "--only", "sizes", "pack", "dedup", "vocab", "check"]
    command = [
        sys.executable,
        str(ROOT / "tests" / "bench" / "scale.py"),
        *words,
        "--work",
        str(work),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert tables["scale_table"](report) == done.stdout.strip()
    assert [row["name"] for row in report["rows"]] == words[4:]
    assert all(row["measured"]["30"]["CPU"] > 0 for row in report["rows"])
    assert list(work.iterdir()) == []
