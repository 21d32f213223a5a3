"""The command as it is typed: mistakes and the system's refusals in one line, help, folders with names like ours."""

import ctypes
import os
import pkgutil
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_data import draw, write_raw
from small_training import tiny_clip

import clipmill
from pipeline.core.command_line import EXAMPLES, GROUPS, option_names, parse
from pipeline.ingest.config import IngestConfig
from shards_spec.files import UserError, read_json
from shards_spec.suggest import did_you_mean
from slurm.step import parse_steps
from training.recipes import RECIPES

pytestmark = pytest.mark.integration

ROOT = str(Path(clipmill.__file__).parent)
COMMAND = [sys.executable, "-m", "clipmill"]


def run(*words: str | bytes, code: int | None = None, **more) -> subprocess.CompletedProcess[bytes]:
    """A command in a process of its own, of this checkout; its answer is no traceback."""
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "COLUMNS": "160", **more.pop("env", {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    done = subprocess.run([*COMMAND, *words], env=environment, timeout=200, **streams)
    assert b"Traceback" not in (done.stderr or b""), done.stderr.decode()
    assert b"Exception ignored" not in (done.stderr or b""), done.stderr.decode()
    assert code in (None, done.returncode), (words, done.returncode, done.stderr)
    return done


def refusal(*words: str | bytes, code: int = 2, **more) -> str:
    """The one line on stderr (but for the log's) of a command that fails."""
    said = [line for line in run(*words, code=code, **more).stderr.decode().splitlines() if line[1:2] != " "]
    assert len(said) == 1, said
    assert said[0].startswith("clipmill: ")
    return said[0]


@pytest.fixture
def here(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """As `run`, in this process, where torch is imported once: exit code, output, errors."""

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clipmill", *words])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as leave:
            clipmill.main()
        out, err = capsys.readouterr()
        return leave.value.code, out, err

    return command


@pytest.fixture
def data(tmp_path) -> str:
    write_raw(str(tmp_path / "ds"), shards=2, per_shard=3)
    return str(tmp_path / "ds")


@pytest.fixture
def images(tmp_path) -> str:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(24):
        image, caption = draw(str(number))
        (folder / f"{number}.jpg").write_bytes(image)
        (folder / f"{number}.txt").write_text(caption)
    return str(folder)


# names that are not there


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pakc"], "no command 'pakc'; did you mean pack?"),
        (["Ingest"], "did you mean ingest?"),
        (["nope"], "no command 'nope'; there are ingest, dedup"),
        (["train", "tinyclp"], "no recipe 'tinyclp'; did you mean tinyclip?"),
        (["train", "nope"], "no recipe 'nope'; there are clip, tinyclip"),
        (["ingest"], "ROOT and --source are needed; for example: clipmill ingest /data/cc3m --source"),
        (["ingest", "x"], "ingest: --source is needed; for example"),
        (["ingest", "x", "--sorce", "y"], "no option --sorce; did you mean --source?"),
        (["ingest", "x", "--source=y", "--shard_sise=3"], "no option --shard-sise; did you mean --shard-size?"),
        (["ingest", "x", "--source", "y", "--frobnicate"], "no option --frobnicate; clipmill ingest --help shows all"),
        (["ingest", "x", "--source"], "--source is empty: give a list"),
        (["ingest", "x", "--source", "y", "--shard-size", "many"], "--shard-size: invalid literal for int()"),
        (["ingest", "x", "--source", "y", "--format", "csvv"], "invalid choice 'csvv' for argument '--format'"),
        (["pack", "x", "y"], "Unrecognized options: y"),
        (["train", "minivit", "--data", "x", "--teacher", "a", "b", "c"], "--teacher a b: b is one value too many"),
        (["ingest", "x", "--source", "x", "--shard-size", "9" * 20], "--shard-size 99999999999999999999 is too large"),
        (["cache", "x", "--jitter", "inf", "0", "0", "0"], "--jitter inf 0.0 0.0 0.0: must be 0 or more each"),
        (["cache", "x", "--ratio", "1", "nan"], "--ratio 1.0 nan: must be 0 < low <= high"),
        (["caption", "x", "--temperature", "inf"], "--temperature inf: must be above 0"),
        (["dedup", "x", "--memory-gb", "inf"], "--memory-gb inf: must be above 0"),
        (["ingest", "", "--source", "x"], "ingest: ROOT is empty; is a variable of the shell unset?"),
        (["cache", "x", "--pretrained="], "cache: --pretrained is empty"),
        (["train", "clip", "--data", ""], "train clip: --data is empty"),
        (["train", "clip", "--data", "x", "--out", ""], "train clip: --out is empty"),
        (["report", ""], "report: ROOT_OR_RUN is empty"),
        (["submit", "pack", ""], "submit pack: ROOT is empty"),
        (["eval", "x"], "eval: --data is needed"),
        (["train", "clip"], "train clip: --data is needed; for example: clipmill train clip --data"),
        (["train", "clip", "--data", "x", "--modle", "y"], "no option --modle; did you mean --model?"),
        (["train", "clip", "--data", "x", "--precision", "bf17"], "Expected one of ("),
        (["train", "clip", "--data", "x", "--scale", "0.5"], "--scale 0.5: give FLOAT FLOAT or None; clipmill train"),
        (["train", "clip", "--data", "x", "--steps", "few"], "--steps few: give INT or None; clipmill train clip"),
        (["submit", "pakc", "x"], "cannot submit 'pakc'; did you mean pack?"),
        (["submit", "pack", "x", "--arry", "3"], "submit pack: no option --arry; did you mean --array?"),
        (["submit", "train", "clpi", "--out", "x"], "no recipe 'clpi'; did you mean clip?"),
        (
            ["submit", "train", "clip", "--data", "x", "--out", "x", "--array", "y"],
            "--array: invalid literal for int()",
        ),
    ],
)
def test_a_mistake_is_one_short_line_that_says_what_was_meant(here, words, said):
    code, out, err = here(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert len(err) < 400


def test_suggestions():
    names = [f"ViT-B-{number}" for number in range(100)]
    assert did_you_mean("vit-b-7", names) == "did you mean ViT-B-7?"
    assert did_you_mean("zzz", names) == "none of the 100 names is like it"
    assert did_you_mean("zzz", ["one", "two"]) == "there are one, two"


# help


def test_the_version():
    import importlib.metadata

    assert run("--version", code=0).stdout.decode() == f"clipmill {importlib.metadata.version('clipmill')}\n"


def flat(page: str) -> str:
    return " ".join(page.replace("│", " ").split())


@pytest.mark.parametrize("command", [command for command in EXAMPLES if command in clipmill.COMMANDS])
def test_help_begins_with_an_example_that_is_right(here, command):
    text = flat(here(command, "--help")[1])
    assert f"For example: clipmill {command} {EXAMPLES[command]} " in text
    config = pkgutil.resolve_name(clipmill.COMMANDS[command].config)
    parse(command, config, shlex.split(EXAMPLES[command]))  # raises where it is wrong
    if command in GROUPS:
        assert text.index("basic options") < text.index("more options")
    assert "(required)" in text or "RUN ..." in text  # how many RUNs are needed is the config's to say


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipes_help_has_an_example_what_is_needed_and_how_to_try_it(here, recipe):
    text = flat(here("train", recipe, "--help")[1])
    assert f"For example: clipmill train {recipe} --data " in text
    basic, more = text.split("basic options")[1].split("data options")[:2]
    for option in ("--data", "--out", "--model", "--batch-size", "--steps", "--lr", "--smoke", "--predict-memory"):
        assert f"{option} " in basic.replace(",", " "), option
        assert f"{option} " not in more
    assert "(required)" in basic.split("--out")[0]
    assert "clip-norm" in more


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["pipeline", "--help"], "clipmill submit pipeline /data/cc3m --array 16 -- ingest --source"),
        (["pipeline", "ROOT", "-h"], "ROOT the dataset that all commands work on"),
        (["pipeline", "ROOT", "--", "pack", "--help"], "For example: clipmill submit pack /data/cc3m"),
        (["pipeline", "ROOT", "--", "train", "clip", "--help"], "For example: clipmill submit train clip --data"),
        (["train", "--help"], "Recipes: clip, tinyclip,"),
        (["train", "clip", "--help"], "--batch-size INT pairs per step"),
        (["train", "clip", "--out", "RUN", "-h"], "For example: clipmill submit train clip --data"),
        (["train", "siclip", "--help"], "--base-weights"),
        (["cache", "--help"], "--views INT"),
    ],
)
def test_all_that_can_be_submitted_has_the_whole_help(here, words, shown):
    code, out, err = here("submit", *words)
    assert (code, err) == (0, "")
    assert shown in flat(out)
    assert "--gpus-per-node" in out
    assert "seconds before the limit at which training saves and is requeued" in flat(out)


def test_the_examples_of_submit_are_right():
    *_, train = parse_steps(["pipeline", *EXAMPLES["submit pipeline"].split()])
    assert train.words == ("tinyclip", "--model", "ViT-M-32", "--out", "runs/tinyclip", "--data", "/data/cc3m")
    (alone,) = parse_steps(["train", *EXAMPLES["submit train"].split()])
    assert (alone.words[0], alone.options.gpus_per_node) == ("tinyclip", 4)


def test_no_group_names_an_option_twice_or_one_that_is_nowhere():
    import dataclasses

    from training.config import DataConfig, ModelConfig, OptimConfig, RunConfig

    for command, groups in GROUPS.items():
        named = [name for names in groups.values() for name in names]
        assert len(named) == len(set(named))
        if command != "train":
            known = option_names(pkgutil.resolve_name(clipmill.COMMANDS[command].config))
            assert set(named) <= set(known), command
    pieces = (DataConfig, ModelConfig, OptimConfig, RunConfig)
    common = {field.name for piece in pieces for field in dataclasses.fields(piece)}
    assert {"data", "out", "model", "pretrained", "batch_size", "steps", "epochs", "lr", "device"} <= common


def test_configs_come_out_as_they_are_made_by_hand():
    words = ["R", "--source", "S", "--shard-size", "7", "--no-sane-captions", "--exclude", "a", "b", "--url_col", "u"]
    expected = IngestConfig("R", ("S",), shard_size=7, exclude=("a", "b"), url_col="u")
    assert parse("ingest", IngestConfig, words) == expected
    with pytest.raises(UserError, match="--shard-size 0: must be 1 or more"):
        parse("ingest", IngestConfig, ["R", "--source", "S", "--shard-size", "0"])


# output that goes nowhere, or has few letters


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["pack", "--help"], ["check", "ROOT"], ["dedup", "ROOT"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written(data, words, unbuffered):
    words = [word.replace("ROOT", data) for word in words]
    with open("/dev/full", "w") as full:
        done = run(*words, stdout=full, env={"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode in (1, 2)
    assert b"No space left on device" in done.stderr
    assert done.stderr.count(b"\nclipmill:") + done.stderr.startswith(b"clipmill:") == 1


@pytest.mark.parametrize("words", [["--help"], ["pack", "--help"], ["train", "clip", "--help"]])
def test_a_reader_that_leaves_is_no_fault(words):
    line = f"{sys.executable} -m clipmill {' '.join(words)} | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, env={**os.environ, "PYTHONPATH": ROOT})
    assert done.stdout.startswith(b"usage: clipmill")
    assert done.stderr == b""


@pytest.mark.parametrize(
    "env",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_an_ascii_terminal_shows_what_it_can(tmp_path, images, env):
    root = str(tmp_path / ("plain" if "PYTHONUTF8" in env else "naïve 猫"))
    run("ingest", root, "--source", images, code=0, env=env)
    assert b"all promises hold" in run("check", root, code=0, env=env).stdout
    assert b"report.html" in run("report", root, code=0, env=env).stdout
    assert refusal("pack", root, "--captioner", "猫" if "PYTHONUTF8" not in env else "x", env=env)
    assert run("pack", "--help", code=0, env=env).stdout


@pytest.mark.parametrize(
    "words",
    [
        ["ingest", b"R\xff", "--source", "x"],
        ["ingest", "R", "--source", b"\xff.tsv"],
        ["pack", b"R\xff"],
        ["check", b"R\xff"],
        ["report", b"R\xff"],
        ["train", "clip", "--data", b"R\xff"],
        ["submit", "pack", b"R\xff"],
    ],
)
def test_a_name_that_is_no_text_is_refused(words):
    assert "\\udcff" in refusal(*words)


# what the system refuses


def without_privileges() -> None:
    """As root a process may write anywhere; this one gives that up, and to be given it again."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability)  # PR_CAPBSET_DROP


def everything(root: str, source: str) -> list[list[str]]:
    """Each command that a ROOT is given to."""
    return [
        ["ingest", root, "--source", source],
        ["dedup", root],
        ["pack", root, "--workers", "1"],
        ["caption", root, "--model", "coca_ViT-B-32", "--pretrained", "x"],
        ["vocab", root],
        ["check", root],
        ["cache", root, "--model", "ViT-B-32", "--pretrained", "x"],
        ["report", root],
        ["jobs", root],
        ["submit", "pack", root, "--cluster", "local"],
        ["train", "clip", "--data", root],
    ]


def test_a_root_that_is_a_file(here, tmp_path, images):
    (tmp_path / "file").write_text("x")
    for words in everything(str(tmp_path / "file"), images):
        code, _, err = here(*words)
        assert (code, err.count("\n")) == (2, 1)
        assert ("neither" if words[0] == "report" else "file is a file: ") in err, words


def test_a_root_that_must_not_be_read(data, images):
    os.chmod(data, 0o000)
    try:
        for words in everything(data, images):
            if words[0] not in ("report", "caption", "cache", "train"):  # of those that import torch one is enough
                assert f"{data}: Permission denied" in refusal(*words, preexec_fn=without_privileges), words
    finally:
        os.chmod(data, 0o700)


@pytest.mark.parametrize("how", ["permissions", "file system"])
def test_a_root_that_must_not_be_written(data, images, tmp_path, how):
    root, run_as = data, None
    if how == "permissions":
        subprocess.run(["chmod", "-R", "a-w", root], check=True)
        run_as = without_privileges
    else:
        root = str(tmp_path / "mounted")
        os.mkdir(root)
        mount: Callable[..., int] = lambda *words: subprocess.run(["mount", *words], capture_output=True).returncode  # noqa: E731
        if mount("--bind", data, root) or mount("-o", "remount,ro,bind", root):
            pytest.skip("only root mounts")
    try:
        for words in (
            ["ingest", root, "--source", images, "--overwrite"],
            ["dedup", root],
            ["pack", root, "--workers", "1", "--captioner", "none"],
            ["report", root],
            ["submit", "pack", root, "--cluster", "local"],
        ):
            said = refusal(*words, preexec_fn=run_as)
            assert "Permission denied" in said or "Read-only file system" in said, words
            assert ".tmp:" not in said
    finally:
        subprocess.run(["chmod", "-R", "u+w", data] if how == "permissions" else ["umount", root], check=True)


def test_too_few_open_files_are_told_and_cost_no_sample(tmp_path, images):
    def few(files: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    root = str(tmp_path / "D")
    words = ("ingest", root, "--source", images, "--shard-size", "2")
    # too few for one worker: with more of them, it would be by the clock how many are open at once
    done = run(*words, "--workers", "14", preexec_fn=few(16))
    assert done.returncode in (1, 2)
    assert b"Too many open files" in done.stderr
    assert b"ulimit -n" in done.stderr
    done = run(*words, "--workers", "1", preexec_fn=few(64), code=0)
    assert b"W the system allows 64 open files (ulimit -n)" in done.stderr
    assert b"ingest: 24 samples in 12 shards" in done.stdout


def test_a_level_of_logs_that_is_none():
    assert "CLIPMILL_LOG=LOUD: there are" in refusal("check", "x", env={"CLIPMILL_LOG": "loud"})


# words of others


def test_foreign_names_do_nothing_to_a_terminal_and_secrets_stay_out(tmp_path, images):
    root, token = str(tmp_path / "D"), "c2VjcmV0"
    said = run("ingest", root, "--source", f"https://me:{token}@127.0.0.1:1/a.tsv?X-Amz-Signature={token}&sig={token}")
    assert said.returncode == 2
    assert token.encode() not in said.stdout + said.stderr
    assert b"https://***@127.0.0.1:1/a.tsv?X-Amz-Signature=***&sig=***" in said.stderr
    odd = tmp_path / "\x1b[31modd\x07"
    shutil.copytree(images, odd)
    (odd / "\x1b]0;title\x07.jpg").write_bytes(b"no image")
    done = run("ingest", root, "--source", str(odd), code=0)
    for text in (done.stdout, done.stderr, run("check", root).stdout, run("report", root).stdout):
        assert b"\x1b" not in text
        assert b"\x07" not in text
    assert b"\\x1b[31modd\\x07: folder" in done.stderr
    page = Path(root, "report.html").read_bytes()
    assert b"\x1b" not in page
    assert b"\x07" not in page


def test_secrets_of_a_source_are_not_written(tmp_path, images):
    """A chained address, which reads a local file and all the same has a password and a signature in it."""
    from shards_spec.manifest import write_stage

    root = str(tmp_path / "D")
    write_stage(root, "ingest", {"config": {}}, "https://me:pass@h/x.tsv?token=abc&page=2")
    assert read_json(f"{root}/dataset.json")["source"] == "https://***@h/x.tsv?token=***&page=2"


# a folder that has our names


@pytest.fixture
def crowded(tmp_path) -> Path:
    """Where somebody has packages and modules of his own that are named as ours."""
    folder = tmp_path / "work"
    for name in ("training", "pipeline", "slurm"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise RuntimeError('not ours')")
    (folder / "shards_spec.py").write_text("raise RuntimeError('not ours')")
    return folder


@pytest.mark.slow
def test_a_folder_that_has_our_names_changes_nothing(crowded, images):
    for env in ({}, {"PYTHONPATH": f"{crowded}:{ROOT}"}):
        run("ingest", "D", "--source", images, "--overwrite", code=0, cwd=crowded, env=env)
        done = run("pack", "D", "--captioner", "none", "--workers", "2", "--overwrite", code=0, cwd=crowded, env=env)
        assert b"pack: 24 samples" in done.stdout
        assert b"no recipe 'x'" in run("train", "x", code=2, cwd=crowded, env=env).stderr
        assert b"--data" in run("train", "clip", "--help", code=0, cwd=crowded, env=env).stdout
    words = ("submit", "pack", "D", "--captioner", "none", "--recheck", "--cluster", "local", "--wait", "--time", "2")
    run(*words, code=0, cwd=crowded)


@pytest.mark.slow
def test_torchrun_in_such_a_folder(crowded, data, tmp_path):
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "clipmill", "train", "clip", "--smoke"]
    done = subprocess.run(
        [sys.executable, *words, "--data", data, "--folder", "raw", "--model", tiny_clip(tmp_path / "m"), "--out", "R"],
        cwd=crowded,
        env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (crowded / "R" / "metrics.jsonl").exists()
