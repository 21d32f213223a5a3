"""Rules about the code itself: floors, owners of the import names, sizes, speed of --help."""

import ast
import importlib.metadata
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from shards_spec import layout
from shards_spec.layout import STAGE_COMMANDS, STAGES

ROOT = Path(__file__).parents[1]
FLOORS = {
    "shards_spec": {"shards_spec"},
    "pipeline": {"pipeline", "shards_spec"},
    "training": {"training", "shards_spec"},
    "slurm": {"slurm", "training", "pipeline", "shards_spec"},
}
SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
MAX_LINES, MAX_FUNCTION = 500, 80  # complexity is what ruff limits


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path):
    floor = path.relative_to(ROOT).parts[0]
    ours = imported(path) & {*FLOORS, "tests", "clipmill", "demo"}
    assert ours <= FLOORS[floor], f"{path.name} on floor {floor} imports {ours - FLOORS[floor]}"


def test_floors_are_this_checkout_and_ours_alone():
    owners = importlib.metadata.packages_distributions()
    for floor in FLOORS:
        module = __import__(floor)
        assert Path(module.__file__).parent == ROOT / floor
        assert set(owners.get(floor, ["clipmill"])) == {"clipmill"}, f"{floor} is also shipped by {owners[floor]}"


def test_no_file_hides_a_standard_module():
    names = {path.stem for path in SOURCES} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION, f"{node.name} has too many lines"


def test_the_table_of_stages_names_what_is_there():
    for name, stage in STAGES.items():
        assert stage.name == name
        assert stage.reads is None or STAGES[stage.reads].has_shards
        assert stage.writes.split("/")[0] in layout.FOLDERS
        assert not stage.array or stage.has_shards
        if name in STAGE_COMMANDS:
            assert stage.help
            config = pkgutil.resolve_name(stage.config)
            function = pkgutil.resolve_name(stage.function)
            assert [*inspect.signature(function).parameters][:1] == ["config"]
            assert inspect.signature(function).parameters["config"].annotation is config
            assert ("assignment" in inspect.signature(function).parameters) == stage.array


@pytest.mark.parametrize(("key", "path"), [
    ("ingest", "raw"), ("dedup", "dedup"), ("plan", "plan"), ("pack", "shards"), ("vocab/a", "vocab/a.tsv"),
    ("caption/a", "captions/a"), ("cache/a", "teacher/a"), ("cache-lists/a", "teacher/a/lists"),
    ("pack/a", None), ("cache", None), ("other", None),
])  # fmt: skip
def test_where_a_stage_of_a_dataset_writes(key, path):
    assert layout.stage_output(key) == path


def test_paths_of_a_dataset():
    for root in ("/data/cc3m", "s3://bucket/cc3m", "s3://bucket/cc3m/", "cc3m"):
        start = root.rstrip("/")
        assert layout.raw_tar(root, 3) == f"{start}/raw/00003.tar"
        assert layout.captions_parquet(root, "coca", 123456) == f"{start}/captions/coca/123456.parquet"
        assert layout.sizes_json(root) == f"{start}/shards/sizes.json"
        assert layout.stage_log(root, "cache/vit") == f"{start}/logs/cache-vit.jsonl"
    assert layout.tar_path(layout.RAW, 3) == "raw/00003.tar"
    assert layout.parquet_path("teacher/vit", 3, 2) == "teacher/vit/00003-2.parquet"
    assert layout.stats_path("/data/raw", 0) == "/data/raw/00000_stats.json"


def test_help_imports_nothing_heavy():
    code = "import sys, clipmill; sys.argv = ['clipmill', '--help']; clipmill.main(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert "ingest" in done.stdout
    assert not {"torch", "numpy", "pyarrow", "tyro", "rich", "fsspec"} & set(done.stdout.split())


@pytest.mark.parametrize(
    "command",
    ["ingest", "dedup", "caption", "pack", "vocab", "classes", "cache", "eval", "export", "report", "check", "jobs"],
)
def test_each_help_shows_every_field_with_default_and_a_line(command):
    import dataclasses

    import clipmill

    config = pkgutil.resolve_name(clipmill.COMMANDS[command].config)
    done = subprocess.run(
        [sys.executable, "-m", "clipmill", command, "--help"], capture_output=True, text=True, cwd=ROOT,
        env={"COLUMNS": "160", "PATH": "/usr/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    flat = " ".join(done.stdout.replace("│", " ").split())
    fields = list[dataclasses.Field]()
    for field in dataclasses.fields(config):
        inner = field.default_factory  # a group of options is a dataclass of its own
        fields += dataclasses.fields(inner) if dataclasses.is_dataclass(inner) else [field]
    for field in fields:
        option = "--" + field.name.replace("_", "-")
        positional = field.default is dataclasses.MISSING and option not in flat
        assert positional or option in flat, option
    assert flat.count("(default:") + flat.count("(required)") + flat.count("(repeatable)") >= len(fields)


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_waiting_threads_leave_their_core_to_others(given, policy):
    """It counts when torch is loaded, so a command sets it before, and no command overrides the user."""
    code = "import sys, os, shards_spec; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, check=True)
    assert done.stdout.split() == ["False", policy]
