"""Rules about the code itself: floors and rooms, owners of the import names, sizes, plain code, speed of --help."""

import ast
import dataclasses
import importlib.metadata
import inspect
import os
import pkgutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import clipmill
from shards_spec import layout
from shards_spec.layout import STAGE_COMMANDS, STAGES
from shards_spec.messages import flag

ROOT = Path(__file__).parents[1]
FLOORS = {
    "shards_spec": {"shards_spec"},
    "pipeline": {"pipeline", "shards_spec"},
    "training": {"training", "shards_spec"},
    "slurm": {"slurm", "training", "pipeline", "shards_spec"},
}
SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
TESTS = [*sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "demo").rglob("*.py")), ROOT / "clipmill.py"]
SCRIPTS = sorted(
    path for folder in ("tests/bench", "tests/gpu", "demo", "docs") for path in (ROOT / folder).glob("*.py")
)
MAX_LINES = 500
# Inside pipeline: a stage's package imports core, and of other stages only what stands here.
STAGE_IMPORTS = {
    "caption": {"ingest", "pack"},  # it reads lists of captions as ingest reads lists, cleaned as pack cleans
    "search": {"ingest", "report"},  # it lists a folder as ingest does, and its page is made as report's
    "cache": {
        "ingest",
        "pack",
    },  # it reads the tars of published vectors by ingest's rules, captions as pack cleans them
    "check": {"cache", "dedup"},  # it validates what they wrote, by their own rules
    "report": {"labels"},  # it names synsets that no vocabulary has as WordNet does
    "repair": {"cache", "caption", "check", "dedup", "ingest", "labels", "pack", "select"},  # it runs them again
    "evalset": {"ingest"},  # it reads captions, folders and image Parquet by ingest's rules
    "pack": {"dedup", "labels"},  # it drops dedup's duplicates and labels captions with synsets
    "plan": {"ingest"},  # it ingests the first rows of a list
    "takedown": {"dedup", "ingest", "pack"},  # it changes what they wrote, by their own rules
    # it keeps columns on disk as dedup does, reads lists and folders as ingest does, embeds images as cache does
    "select": {"cache", "dedup", "ingest"},
    "why": {"pack"},  # it selects a dropped sample again, by pack's rules
}
# Inside training: what a package or module must not import; the rest is free.
ABOVE = {
    "choices": {"config", "configs", "data", "engine", "evaluation", "losses", "models", "recipes", "runs", "trainer"},
    "config": {"configs", "data", "engine", "evaluation", "losses", "models", "recipes", "runs", "trainer"},
    "losses": {"config", "configs", "data", "engine", "evaluation", "models", "recipes", "runs", "trainer"},
    "data": {"engine", "evaluation", "models", "recipes", "runs", "trainer"},
    "models": {"engine", "evaluation", "recipes", "trainer"},
    "engine": {"models", "recipes", "trainer"},
    "runs": {"engine", "evaluation", "recipes", "trainer"},
    "evaluation": {"engine", "recipes", "trainer"},
    "configs": {"data", "engine", "evaluation", "losses", "models", "recipes", "runs", "trainer"},
    "recipes": {"trainer"},
}


@cache
def parsed(path: Path) -> ast.Module:
    """A file's tree; every file is looked at by several rules."""
    return ast.parse(path.read_text())


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(parsed(path)):
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


def top_names(path: Path) -> set[str]:
    """What a module has at its top level."""
    names = {path.stem for path in path.parent.iterdir()} if path.name == "__init__.py" else set[str]()
    nodes: list[ast.AST] = [parsed(path)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue  # what is inside is not of the module
        if isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        nodes += ast.iter_child_nodes(node)
    return names


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_imports_what_there_is(path):
    """Benches and the like are run by hand and checked by no types: a name that has moved would be found late."""
    beside = [path.parent, ROOT / "tests" / "bench", ROOT / "tests" / "support", ROOT / "tests", ROOT]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            module = Path(*(node.module or "").split("."))
            files = [folder / end for folder in beside for end in (module.with_suffix(".py"), module / "__init__.py")]
            if source := next(filter(Path.exists, files), None):
                missing = {alias.name for alias in node.names} - top_names(source)
                assert not missing, f"{source.relative_to(ROOT)} has no {missing}"


def test_no_file_hides_a_standard_module():
    names = {path.stem for path in SOURCES} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_a_class_name_means_one_thing():
    defined = Counter[str]()
    for path in SOURCES:
        defined.update(node.name for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef))
    assert not [name for name, number in defined.items() if number > 1]


def rooms_imported(path: Path, floor: str) -> set[str]:
    """The packages and modules directly below a floor that a file imports, its own package excepted."""
    rooms = set()
    for node in ast.walk(parsed(path)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == floor:
            modules = [f"{floor}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        rooms |= {module.split(".")[1] for module in modules if module.startswith(f"{floor}.")}
    return rooms - {room_of(path)}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[1]


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline").glob("*/**/*.py")), ids=lambda path: path.stem)
def test_stages_import_core_and_each_other_only_where_it_is_listed(path):
    others = rooms_imported(path, "pipeline") - {"core"}
    allowed = STAGE_IMPORTS.get(room_of(path), set())
    assert others <= allowed, f"pipeline/{room_of(path)} imports {others - allowed}; move what is shared to core"


@pytest.mark.parametrize("path", sorted((ROOT / "training").rglob("*.py")), ids=lambda path: path.stem)
def test_rooms_of_training_import_downward(path):
    wrong = rooms_imported(path, "training") & ABOVE.get(room_of(path), set())
    assert not wrong, f"training/{room_of(path)} imports {wrong}, which stand above it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_reads_aloud(path):
    """No packed assignment; loops and conditions one at a time."""
    for node in ast.walk(parsed(path)):
        where = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            assert all(len(target.elts) < 3 for target in node.targets if isinstance(target, ast.Tuple)), where
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            assert len(node.generators) == 1, f"{where}: a comprehension of two loops"
        if isinstance(node, ast.IfExp):
            parts = [part for child in (node.test, node.body, node.orelse) for part in ast.walk(child)]
            assert not any(isinstance(part, ast.IfExp) for part in parts), f"{where}: nested conditional expressions"


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_formatter_may_touch_every_line(path):
    assert "# fmt" + ": skip" not in path.read_text()


def test_the_table_of_stages_names_what_is_there():
    for name, stage in STAGES.items():
        assert stage.name == name
        assert stage.reads is None or STAGES[stage.reads].has_shards
        assert stage.writes.split("/")[0] in layout.FOLDERS
        assert not stage.array or stage.has_shards or stage.parts
        if name in STAGE_COMMANDS:
            assert stage.help
            config = pkgutil.resolve_name(stage.config)
            function = pkgutil.resolve_name(stage.function)
            assert [*inspect.signature(function).parameters][:1] == ["config"]
            assert inspect.signature(function).parameters["config"].annotation is config
            assert ("assignment" in inspect.signature(function).parameters) == stage.array


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("ingest", "raw"),
        ("dedup", "dedup"),
        ("plan", "plan"),
        ("pack", "shards"),
        ("vocab/a", "vocab/a.tsv"),
        ("caption/a", "captions/a"),
        ("cache/a", "teacher/a"),
        ("cache-lists/a", "teacher/a/lists"),
        ("pack/a", None),
        ("cache", None),
        ("other", None),
    ],
)
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


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("/d/cc3m/raw/00002.tar", "delete /d/cc3m/raw/00002_stats.json and run `clipmill ingest /d/cc3m` again"),
        (
            "s3://b/d/shards/00000.parquet",
            "delete s3://b/d/shards/00000_stats.json and run `clipmill pack s3://b/d` again",
        ),
        (
            "d/captions/coca/00001.parquet",
            "delete d/captions/coca/00001_stats.json and run `clipmill caption d --name coca` again with the options "
            "it had, or `clipmill check d --repair`",
        ),
        (
            "d/teacher/t/00001-2.parquet",
            "delete d/teacher/t/00001_stats.json and run `clipmill cache d --name t` again with the options it had, "
            "or `clipmill check d --repair`",
        ),
        (
            "d/select/s/00001.parquet",
            "delete d/select/s/00001_stats.json and run `clipmill select d --name s` again with the options it had, "
            "or `clipmill check d --repair`",
        ),
        ("d/plan/00001.parquet", "delete d/plan/00001_stats.json and run `clipmill pack d` again"),
        ("elsewhere/00001.tar", "make the shard again"),
        ("/d/cc3m/raw/notes.txt", "make the shard again"),
    ],
)
def test_what_brings_a_deleted_file_back(path, advice):
    assert layout.remake_advice(path) == advice


def test_help_imports_nothing_heavy():
    code = "import sys, clipmill; sys.argv = ['clipmill', '--help']; clipmill.main(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert "ingest" in done.stdout
    assert not {"torch", "numpy", "pyarrow", "tyro", "rich", "fsspec"} & set(done.stdout.split())


@pytest.mark.parametrize(
    "command",
    [
        "ingest",
        "dedup",
        "caption",
        "pack",
        "vocab",
        "classes",
        "cache",
        "evalset",
        "eval",
        "search",
        "export",
        "report",
        "check",
        "plan",
        "why",
        "takedown",
        "jobs",
    ],
)
def test_each_help_shows_every_field_with_default_and_a_line(command, monkeypatch, capsys):
    config = pkgutil.resolve_name(clipmill.COMMANDS[command].config)
    monkeypatch.setattr(sys, "argv", ["clipmill", command, "--help"])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit, match=r"^0$"):
        clipmill.main()
    flat = " ".join(capsys.readouterr().out.replace("│", " ").split())
    fields = list[dataclasses.Field]()
    for field in dataclasses.fields(config):
        inner = field.default_factory  # a group of options is a dataclass of its own
        fields += dataclasses.fields(inner) if dataclasses.is_dataclass(inner) else [field]
    for field in fields:
        option = flag(field.name)
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
