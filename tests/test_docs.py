"""The pages people read: links lead somewhere, commands and flags exist, examples run, one version everywhere."""

import ast
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
from small_data import tiny_coca, write_raw
from small_training import tiny_clip

import clipmill
from training.recipes import RECIPES

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "shards_spec" / "SPEC.md",
    *sorted((ROOT / ".github").rglob("*.md")),
]
FOLDERS = ("pipeline", "training", "shards_spec", "slurm", "tests", "demo", "docs", ".github")
SUBCOMMANDS = ("train", "submit")  # commands whose flags depend on the word after them
FOREIGN_FLAGS = {"--train-data", "--local-loss", "--gather-with-grad"}  # of open_clip's training
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]+")


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, *languages: str) -> list[str]:
    """The code blocks of these languages."""
    return [code for language, code in FENCE.findall(text) if language in languages]


def spans(text: str) -> list[str]:
    """Inline code outside of blocks; one that was broken over two lines is joined."""
    return [" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", text))]


def test_readme_has_at_most_900_words():
    assert len((ROOT / "README.md").read_text().split()) <= 900


# links and paths


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_relative_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{ids(page)}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", target.read_text()), re.M)
            assert anchor in map(slug, headings), f"{ids(page)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_named_files_are_there(page):
    text = page.read_text()
    for word in re.split(r"[\s:'\"()]", " ".join([*spans(text), *blocks(text, "bash", "")])):
        path = word.rstrip(".,;")
        if path.startswith(tuple(f"{folder}/" for folder in FOLDERS)) and not re.search(r"[A-Z]{2}|…", path):
            found = [*ROOT.glob(path)] if "*" in path else [ROOT / path]
            assert found, f"{ids(page)}: {path}"
            assert all(one.exists() for one in found), f"{ids(page)}: {path}"


# commands and flags


@cache
def flags_of(*words: str) -> frozenset[str]:
    """The flags that ``clipmill WORDS --help`` shows."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown):
        patch.setattr("sys.argv", ["clipmill", *words, "--help"])
        patch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as leave:
            clipmill.main()
    assert not leave.value.code, f"no such command: clipmill {' '.join(words)}"
    return frozenset(FLAG.findall(shown.getvalue()))


def flags_after(words: list[str]) -> frozenset[str]:
    """The flags that a command line may have. Those of a recipe that is submitted are checked by its job."""
    if words[0] not in SUBCOMMANDS or len(words) == 1:
        return flags_of(words[0])
    if words[:2] == ["submit", "train"]:
        return flags_of(*words[:3]) | flags_of(*words[1:3])
    return flags_of(*words[:2])


@cache
def all_flags() -> frozenset[str]:
    """The flags of all commands."""
    commands = re.findall(r"^  (\w+)", clipmill.usage(), re.M)
    lines = [[command] for command in commands if command not in SUBCOMMANDS]
    lines += [["train", recipe] for recipe in RECIPES] + [["submit", "pack"], ["submit", "train", "clip"]]
    return frozenset({"--version", "--help"}).union(*map(flags_after, lines))


def command_lines(text: str) -> Iterator[list[str]]:
    """The words after ``clipmill`` of every command in a page, in blocks and inline."""
    shell = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
    for line in [*shell.splitlines(), *spans(text)]:
        if re.match(r"(torchrun .* -m )?clipmill\s+[a-z]", line):
            words = shlex.split(line, comments=True)
            yield words[words.index("clipmill") + 1 :]


def parts(words: list[str]) -> list[list[str]]:
    """A command; the steps of ``submit pipeline ROOT … -- STEP … -- STEP …`` as commands that are submitted."""
    if words[:2] != ["submit", "pipeline"]:
        return [words]
    steps = " ".join(words).split(" -- ")
    return [["submit", "pack", *steps[0].split()[2:]], *(["submit", *step.split()] for step in steps[1:])]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_exist_with_their_flags(page):
    for line in command_lines(page.read_text()):
        for words in parts(line):
            known = flags_after(words)
            unknown = [flag for flag in FLAG.findall(" ".join(words)) if flag not in known]
            assert not unknown, f"{ids(page)}: clipmill {' '.join(words)}: {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_flags_that_are_named_exist(page):
    codes = spans(page.read_text())
    scripts = set(re.findall(r"(?:tests|docs|demo)/\S+\.py\b", " ".join(codes)))
    known = all_flags().union(FOREIGN_FLAGS, *(FLAG.findall((ROOT / path).read_text()) for path in scripts))
    for code in codes:
        unknown = [flag for flag in FLAG.findall(code) if flag not in known]
        assert not unknown, f"{ids(page)}: {code}: {unknown}"


# messages


def strings(path: Path) -> Iterator[str]:
    """All strings of a file, with an ellipsis for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(piece.value) if isinstance(piece, ast.Constant) else "…" for piece in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_troubleshooting_quotes_messages_as_they_are():
    paths = [ROOT / "clipmill.py"]
    for floor in ("pipeline", "training", "shards_spec", "slurm"):
        paths += (ROOT / floor).rglob("*.py")
    known = "\n".join("\n".join(strings(path)) for path in paths)
    first_cells = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    quoted = re.findall(r"`([^`]+)`", "\n".join(first_cells))
    assert len(quoted) > 30
    pieces = {piece.strip(" .;:,()") for piece in "…".join(quoted).split("…")}
    assert not [piece for piece in pieces if piece not in known]


# examples


@pytest.fixture(scope="module")
def small(tmp_path_factory, one_thread) -> dict[str, str]:
    """What the pages call their dataset and models, to small ones."""
    folder = tmp_path_factory.mktemp("examples")
    write_raw(str(folder / "cc3m"))
    coca = tiny_coca(folder / "coca")
    student = tiny_clip(folder / "student")
    return {
        "/data/cc3m": str(folder / "cc3m"),
        "{00000..00331}": "{00000..00001}",
        "min_count=500": "min_count=2",
        'model="coca_ViT-L-14"': f'model="{coca}"',
        'model="ViT-L-14"': f'model="{coca}"',
        'model="ViT-B-32"': f'model="{student}"',
    }


@pytest.mark.integration
def test_python_examples_run(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codes = blocks((ROOT / "docs" / "python.md").read_text(), "python")
    assert len(codes) >= 7
    for code in [*codes[1:], codes[0]]:  # the first one reads what the next ones make
        for given, ours in small.items():
            code = code.replace(given, ours)
        exec(compile(code, "docs/python.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "exported" / "open_clip_config.json").exists()


# what scripts make


def test_the_diagram_is_the_scripts(tmp_path):
    for name in ("diagram.py", "data-path.svg"):
        shutil.copy(ROOT / "docs" / name, tmp_path)
    runpy.run_path(str(tmp_path / "diagram.py"), run_name="__main__")
    assert (tmp_path / "data-path.svg").read_text() == (ROOT / "docs" / "data-path.svg").read_text()


def test_the_tables_are_the_scripts():
    command = [sys.executable, str(ROOT / "docs" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# versions


def test_the_version_stands_in_one_place():
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version("clipmill") == own
    assert f"\nversion: {own}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{own}]" in (ROOT / "CHANGELOG.md").read_text()
    assert not [path for path in ROOT.glob("*.py") if f'"{own}"' in path.read_text()]
