"""The one command: every stage by its command line on small data, exit codes, one-line errors."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_data import draw, tiny_coca
from small_training import tiny_clip

import clipmill

pytestmark = pytest.mark.integration


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``clipmill WORDS`` in this process; returns exit code, output, errors."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clipmill", *words])
        code = 0
        try:
            clipmill.main()
        except SystemExit as leave:
            code = int(leave.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def images(folder: Path, count: int) -> str:
    folder.mkdir()
    for i in range(count):
        image, caption = draw(str(i))
        (folder / f"{i:03d}.jpg").write_bytes(image)
        (folder / f"{i:03d}.txt").write_text(caption)
    return str(folder)


def evaluation(root: Path) -> str:
    """A retrieval set in CLIP_benchmark's layout."""
    from shards_spec.sample import Sample
    from shards_spec.tar import write_shard

    samples = []
    for i in range(6):
        image, caption = draw(f"eval {i}")
        samples.append(Sample(f"s{i:07d}", {"jpg": image, "txt": caption.encode()}))
    write_shard(str(root / "test" / "0.tar"), samples)
    (root / "test" / "nshards.txt").write_text("1")
    (root / "dataset_type.txt").write_text("retrieval")
    return str(root)


def test_the_whole_path(command, tmp_path):
    source, root, run = images(tmp_path / "images", 24), str(tmp_path / "ds"), str(tmp_path / "run")
    coca, student = tiny_coca(tmp_path / "coca"), tiny_clip(tmp_path / "student")

    def good(*words: str) -> str:
        code, out, err = command(*words)
        assert code == 0, (words, err)
        return out

    assert "ingest: 24 samples in 2 shards (2 made now" in good(
        "ingest", root, "--source", source, "--shard-size", "12"
    )
    good("caption", root, "--model", coca, "--num-captions", "1", "--max-tokens", "8", "--device", "cpu")
    assert "pack: 24 samples" in good("pack", root, "--workers", "1")
    assert "synsets of" in good("vocab", root, "--min-count", "1")
    good("cache", root, "--model", coca, "--views", "2", "--flip", "0", "--ops", "1")
    assert "all promises hold" in good("check", root)
    assert good("train", "tinyclip", "--smoke", "--data", root, "--model", student, "--out", run).strip() == run
    assert "recall" in good("eval", run, "--data", evaluation(tmp_path / "pairs"))
    assert Path(run, "eval", "pairs_retrieval.json").exists()
    good("export", run, "--to", str(tmp_path / "exported"))
    for path in (root, run):
        assert Path(good("report", path).strip()).exists()
    assert "caption: 24 samples in 2 shards (0 made now" in good(
        "caption", root, "--model", coca, "--num-captions", "1", "--max-tokens", "8", "--device", "cpu"
    )


def test_exit_codes_and_one_line_errors(command, tmp_path):
    code, _, err = command("nope")
    assert (code, err.count("\n")) == (2, 1)
    assert "no command 'nope'; there are ingest, dedup, caption" in err
    code, _, err = command("pack", str(tmp_path))
    assert (code, err) == (
        2,
        f"clipmill: {tmp_path}/raw has no finished shards: run `clipmill ingest {tmp_path}` first\n",
    )
    code, out, _ = command("check", str(tmp_path))
    assert code == 1
    assert "it is not a clipmill dataset" in out
    code, _, err = command("train", "nope")
    known = "clip, tinyclip, catlip, probe, finetune, siclip, tinymim, minivit, coca"
    assert (code, err) == (2, f"clipmill: no recipe 'nope'; there are {known}\n")
    assert "tinyclip" in command("train", "--help")[1]
    assert command("--help")[0] == 0


def test_duplicates_are_counted_in_one_line(command, tmp_path):
    source = Path(images(tmp_path / "images", 3))
    for copy in ("100.jpg", "200.jpg"):
        shutil.copy(source / "000.jpg", source / copy)
    root = str(tmp_path / "ds")
    assert command("ingest", root, "--source", str(source), "--shard-size", "2")[0] == 0
    code, out, err = command("dedup", root, "--near-bits", "-1")
    assert (code, out) == (0, "dedup: 2 of 5 images are duplicates (2 exact, 0 near)\n"), err
    assert "pack: 3 samples in 2 shards (2 made now" in command("pack", root, "--workers", "1")[1]
    code, _, err = command("dedup", root)
    assert (code, "--near-bits: -1 before, 3 now" in err) == (2, True)


def test_failed_shards_are_exit_code_one(command, tmp_path):
    from small_data import write_raw

    root = str(tmp_path / "ds")
    write_raw(root, 2)
    path = Path(root, "raw", "00001.tar")
    path.write_bytes(path.read_bytes()[:3000])
    code, _, err = command("pack", root, "--workers", "1")
    assert code == 1
    assert "1 of 2 shards failed\n  00001: " in err
    assert "truncated tar" in err
    assert Path(root, "shards", "00000.tar").exists()


@pytest.mark.parametrize("recipe", ["clip", "tinyclip", "coca"])
def test_recipes_show_their_options(recipe, command):
    code, out, _ = command("train", recipe, "--help")
    assert code == 0
    for option in ("--data", "--out", "--model", "--batch-size", "--lr", "--steps"):
        assert option in out


def demo(out: Path, *more: str) -> dict:
    script = Path(clipmill.__file__).parent / "demo" / "scenes.py"
    subprocess.run(
        [sys.executable, script, out, "--count", "60", "--eval-count", "40", *more], check=True, capture_output=True
    )
    return json.loads((out / "summary.json").read_text())


def test_the_demos_scenes_are_reproducible_and_true(tmp_path):
    summary = demo(tmp_path / "a")
    assert demo(tmp_path / "b") == summary
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files)
    with open(tmp_path / "a" / "list.tsv", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == summary["rows"]
    for line in (tmp_path / "a" / "truth.jsonl").read_text().splitlines():
        scene = json.loads(line)
        if scene["caption_kind"] != "junk":
            assert all(thing["name"] in scene["caption"] for thing in scene["things"])


def test_the_demos_images_are_licensed_and_known_to_wordnet():
    from conftest import skip_or_fail

    from pipeline.labels.wordnet import load_wordnet
    from shards_spec.files import UserError

    folder = Path(clipmill.__file__).parent / "demo" / "images"
    assert "SIL OPEN FONT LICENSE" in (folder / "LICENSE").read_text().upper()
    names = [path.stem for path in folder.glob("*.png")]
    assert len(names) >= 24
    assert sum(path.stat().st_size for path in folder.glob("*.png")) < 300_000
    try:
        net = load_wordnet()
    except UserError as error:
        skip_or_fail(str(error))
    assert all(net.synset(name) for name in names)


def test_the_wheel_carries_every_floor(tmp_path):
    import zipfile

    root = Path(clipmill.__file__).parent
    source = tmp_path / "src"
    shutil.copytree(root, source, ignore=shutil.ignore_patterns(".git", ".venv", "demo-run", "__pycache__", ".*_cache"))
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"clipmill.py", "shards_spec/SPEC.md", "training/recipes/tinyclip.py", "slurm/__init__.py"} <= names
    assert any(name.endswith("dataset.html.j2") for name in names)
    assert not any(name.startswith(("tests/", "demo/")) for name in names)


def test_ctrl_c_while_modules_are_imported_is_one_line_and_130():
    program = """
import os, signal, sys
import clipmill
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with SIGINT ignored
class Interrupted:
    def find_spec(self, name, *rest):
        if name == "shards_spec.files":
            sys.meta_path.remove(self)  # once
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupted())
sys.argv = ["clipmill", "check", "nowhere"]
clipmill.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr.splitlines() == ["clipmill: interrupted; rerun the same command to resume"]
