"""What users see of Clipmill, frozen: help pages, recipes' defaults, the files of every stage, training curves.

    python tests/freeze.py OUT [--checkout DIR]   write it all to OUT, as the code in DIR (default: this one) has it
    python tests/freeze.py --against COMMIT       compare this checkout with a commit; exit 1 if more than words differ

It uses the command line and the format on disk alone and imports no module but ``clipmill``, so one script serves trees
whose modules lie elsewhere. What the commands read, `freeze_inputs.py` draws. OUT has

    help/*.txt         wording: ``clipmill COMMAND --help``, what the commands say at their end (said.txt), the words of
                       the reports (page-*.txt)
    recipes/NAME.json  a recipe's default config, flat: config.json as a run writes it, and for the few options that the
                       run was given what --help says
    dataset.sha256     every file of three small datasets and of the runs: its hash with what no run repeats taken out
                       (`VARYING`, hashes of files that hold floats, floats in files of `MEASURED`), "-" where nothing
                       is left to hash
    floats.json        what a model computed: captions' figures, teachers' vectors, evaluations
    curves.json        each recipe's losses step by step, and the tensors of its checkpoint and of an export

`tests/test_freeze.py` compares OUT with `tests/golden/freeze/`: floats nearly, all else exactly.

The golden files are written by ``python tests/freeze.py tests/golden/freeze``, in the commit that changes what users
see and says so: an option, a default, a byte of the format, a loss on purpose, new versions in constraints.txt. Never
to make a refactoring pass: one that changes them has changed the product.
"""

import argparse
import contextlib
import difflib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from freeze_inputs import write_inputs

HERE = Path(__file__).resolve().parents[1]
SECTIONS = {
    "help": ("help/*.txt",),
    "recipes": ("recipes/*.json",),
    "dataset": ("dataset.sha256", "floats.json"),
    "curves": ("curves.json",),
}
MARK = "*"
# JSON fields that another time, place or version changes, and hashes over them
VARYING = {
    "time",
    "start_time",
    "end_time",
    "duration",
    "seconds",
    "samples_per_s",
    "data_share",
    "embedding_s",
    "waited_s",  # the clock
    "host",
    "pid",
    "python",
    "versions",
    "software",
    "git",
    "device",
    "cpus",
    "threads",
    "command",  # the machine
    "self_sha256",
    "measured_with",  # of an evaluation: weights, which differ on another processor, and times of files
}
MEASURED = ("metrics.jsonl", "eval/*.json")  # their floats belong to floats.json and curves.json
OF_FLOATS = ("captions/", "teacher/")  # hashes of files there are not the same on another processor
COCA, STUDENT = "local-dir:models/coca", "local-dir:models/student"
DATA = ("--data", "ds", "--workers", "0")
SMALL = ("--steps", "6", "--batch-size", "8", "--lr", "1e-3", "--warmup", "2", "--log-every", "1")
PLAIN = ("--precision", "fp32", "--device", "cpu", *SMALL)
LABELLED = ("--data", "eval/zeroshot", "--workers", "0", "--sides", "48", "--base-side", "48", "--batch-parts", "1")
RECIPES = {
    "clip": (*DATA, "--model", STUDENT),
    "tinyclip": (*DATA, "--model", STUDENT),
    "siclip": (
        *DATA,
        "--model",
        "local-dir:models/siclip",
        "--base",
        "local-dir:models/mobileclip",
        "--base-weights",
        "random",
    ),
    "catlip": (
        *DATA,
        "--model",
        "timm:catlip_vit_tiny",
        "--sides",
        "48",
        "64",
        "--base-side",
        "48",
        "--batch-parts",
        "1",
    ),
    "tinymim": (*DATA, "--model", "timm:test_vit", "--teacher", "timm:test_vit", "--teacher-weights", "random"),
    "minivit": (
        *LABELLED[:4],
        "--model",
        "timm:mini_swin_test",
        "--teacher",
        "timm:mini_swin_test",
        "--teacher-weights",
        "random",
    ),
    "coca": (*DATA, "--model", COCA),
    "probe": (*LABELLED, "--model", "runs/catlip"),
    "finetune": (*LABELLED, "--model", "runs/catlip"),
}
STAGES = (
    ("ingest", "ds", "--source", "folder", "--shard-size", "14", "--workers", "1", "--sane-captions"),
    ("ingest", "tars", "--source", "foreign", "--shard-size", "10", "--workers", "1", "--image-size", "64"),
    ("ingest", "table", "--source", "table.parquet", "--shard-size", "20", "--workers", "1", "--dedup", "near"),
    ("dedup", "ds", "--workers", "1"),
    (
        "caption",
        "ds",
        "--model",
        COCA,
        "--name",
        "cap",
        "--num-captions",
        "2",
        "--max-tokens",
        "8",
        "--similarity",
        "--device",
        "cpu",
    ),
    (
        "caption",
        "tars",
        "--model",
        COCA,
        "--name",
        "beam",
        "--num-captions",
        "2",
        "--max-tokens",
        "8",
        "--device",
        "cpu",
        "--method",
        "beam",
    ),
    ("pack", "ds", "--workers", "1"),
    ("pack", "tars", "--workers", "1", "--shard-size", "8"),
    ("pack", "table", "--workers", "1"),
    ("vocab", "ds", "--min-count", "0"),
    ("classes", "classes.txt", "--vocabulary", "ds/vocab/all.tsv", "--out", "classes.tsv"),
    ("cache", "ds", "--model", COCA, "--name", "tea", "--views", "2", "--ops", "2", "--device", "cpu"),
    ("cache", "tars", "--model", COCA, "--name", "int", "--views", "1", "--dtype", "int8", "--device", "cpu"),
    ("check", "ds"),
    ("check", "tars"),
    ("check", "table"),
)
AFTER = (
    ("eval", "runs/clip", "--data", "eval/zeroshot", "eval/retrieval", "--device", "cpu"),
    ("export", "runs/clip", "--to", "exported"),
    ("report", "ds"),
    ("report", "runs/clip"),
)


# --- the command line ---------------------------------------------------------------------------------------------


def said(*words: str) -> str:
    """What ``clipmill WORDS`` prints, in this process. Raises RuntimeError when it fails."""
    import clipmill

    out, before = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), sys.argv
    sys.argv, code = ["clipmill", *words], 0
    try:
        with contextlib.redirect_stdout(out):
            clipmill.main()
    except SystemExit as leave:
        code = int(leave.code or 0)
    finally:
        sys.argv = before
    out.flush()
    text = out.buffer.getvalue().decode()  # type: ignore[attr-defined]
    if code:
        raise RuntimeError(f"clipmill {' '.join(words)}: exit code {code}\n{text}")
    return text


def listed(*words: str) -> list[str]:
    """The names in the first list of a help page that has one."""
    return re.findall(r"(?m)^  (\w+) ", said(*words, "--help"))


def help_pages() -> dict[str, str]:
    """Page by the words of its command; commands and recipes are those that the help itself names."""
    commands, recipes = listed(), listed("train")
    pages = [(), *((name,) for name in commands), *(("train", name) for name in recipes)]
    stages = re.findall(r"\b(?:ingest|dedup|caption|pack|vocab|cache)\b", " ".join(commands))
    pages += [("submit", name) for name in [*stages, "train"]]
    return {"-".join(words) or "clipmill": said(*words, "--help") for words in pages}


def default_of(field: str, value: Any, page: str) -> Any:
    """The default of an option as its help says it, of the type of the ``value`` that a run had."""
    flag = f"--{field.replace('_', '-')}"
    own = next(part for part in re.split(r"\n│ (?=--)", page) if re.match(rf"{flag}[ ,]", part))
    told = re.findall(r"\((required|default: [^)]*)\)", " ".join(own.replace("│", " ").split()))[0]
    shown = told.removeprefix("default: ")
    if shown == "None":
        return None
    if told == "required" or isinstance(value, str):
        return shown.strip("'")
    return [type(value[0])(word) for word in shown.split()] if isinstance(value, list) else type(value)(shown)


def default_config(name: str, run: Path, page: str) -> dict[str, Any]:
    """config.json of a run, with the options that it was given as their help has them."""
    config = json.loads((run / "config.json").read_text())
    given = [word.removeprefix("--").replace("-", "_") for word in train_words(name) if word.startswith("--")]
    return config | {field: default_of(field, config[field], page) for field in given}


def train_words(name: str) -> tuple[str, ...]:
    return ("train", name, *RECIPES[name], *PLAIN, "--out", f"runs/{name}")


# --- what they wrote ----------------------------------------------------------------------------------------------


def plain(value: Any, floats: bool = True) -> Any:
    """JSON without what no other run repeats; ``floats`` false: without floats."""
    if isinstance(value, dict):
        return {name: MARK if _varies(name, own) else plain(own, floats) for name, own in value.items()}
    if isinstance(value, list):
        return [plain(own, floats) for own in value]
    return MARK if isinstance(value, float) and not floats else value


def _varies(name: str, value: Any) -> bool:
    return name in VARYING or (name.startswith(OF_FLOATS) and isinstance(value, str))


def sha256(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def hash_json(path: Path) -> str:
    """Of the text of a JSON or JSON Lines file: the order of fields counts."""
    floats = not any(path.match(pattern) for pattern in MEASURED)
    text = path.read_text(encoding="utf-8")
    parts = text.splitlines() if path.suffix == ".jsonl" else [text]
    return sha256("\n".join(json.dumps(plain(json.loads(part), floats), ensure_ascii=False) for part in parts))


def hash_parquet(path: Path) -> str:
    """Of the bytes; where floats of a model are in it, of the schema and the other columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not f"{path}".split("/", 1)[-1].startswith(OF_FLOATS):
        return sha256(path.read_bytes())
    table = pq.read_table(path)
    notes = {
        name.decode(): plain(json.loads(own)) if own[:1] == b"{" else own.decode()
        for name, own in (table.schema.metadata or {}).items()
        if not name.startswith(b"ARROW")
    }
    fields = [(field.name, str(field.type)) for field in table.schema]
    columns = [
        table[name].to_pylist()
        for name, kind in fields
        if not re.search("float|double|fixed_size_binary", kind) and not pa.types.is_binary(table[name].type)
    ]
    return sha256(json.dumps([notes, fields, columns]))


def page_text(path: Path) -> str:
    """The words of an HTML report, without figures (times, speeds and losses are among them), its images as hashes."""
    text = re.sub(r"(?s)<(style|svg).*?</\1>", "", path.read_text(encoding="utf-8"))
    text = re.sub(r'(data-label="(?:Seconds|Samples/s)">)[^<]*', rf"\1{MARK}", text)
    text = re.sub("(<dt>Device</dt><dd>)[^<]*", rf"\1{MARK}", text)
    names = "|".join(sorted(VARYING))
    text = re.sub(rf'(<th scope="row">(?:{names})(?:\.\w+)?</th><td>)[^<]*', rf"\1{MARK}", text)
    text = re.sub(r"[-+]?\d[\d.,:]*(e-?\d+)?([kMG]\b)?", "0", re.sub(r'"data:[^"]*"', _short_hash, text))
    lines = (line.strip() for line in re.sub(r"<[^>]*>", "\n", text.replace("<IMAGE ", "")).splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def _short_hash(found: re.Match[str]) -> str:
    letters = sha256(found[0])[:24].translate(str.maketrans("0123456789", "ghijklmnop"))
    return f'""><IMAGE image {letters}<i '


HASHES = {".json": hash_json, ".jsonl": hash_json, ".parquet": hash_parquet}
ONLY_THERE = (".pt", ".safetensors", ".sha256", ".html", ".md")  # floats, hashes of them; `page_text`; versions


def hashes() -> Iterator[str]:
    """A line for every file of the datasets and runs."""
    found = [path for top in ("ds", "tars", "table", "runs", "exported") for path in Path(top).rglob("*")]
    for path in sorted((path for path in [*found, Path("classes.tsv")] if path.is_file()), key=str):
        if path.name.startswith("events.out.tfevents"):
            yield f"{'-':64}  {path.parent}/events.out.tfevents.{MARK}"
        elif path.suffix in ONLY_THERE:
            yield f"{'-':64}  {path}"
        else:
            yield f"{HASHES.get(path.suffix, lambda path: sha256(path.read_bytes()))(path)}  {path}"


def numbers() -> dict[str, Any]:
    """Figures of the models: of a Parquet file the float columns, of a cache's vectors some and a hash of all."""
    found: dict[str, Any] = {}
    for path in sorted([*Path().glob("*/captions/*/*.parquet"), *Path().glob("*/teacher/*/*.parquet")], key=str):
        found |= {f"{path} {name}": own for name, own in float_columns(path)}
    for path in sorted(Path("runs").glob("*/eval/*.json")):
        found[str(path)] = plain(json.loads(path.read_text()))
    return found


def float_columns(path: Path) -> Iterator[tuple[str, Any]]:
    import numpy as np
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    for field in table.schema:
        own = table[field.name].to_pylist()
        if re.search("float|double", str(field.type)):
            yield field.name, own
        elif "fixed_size_binary" in str(field.type):
            data = [row for row in own if row is not None]
            kind, whole = (np.int8, 127) if f"{field.name}_scale" in table.column_names else (np.float16, 1)
            shown = [[float(x) / whole for x in np.frombuffer(row, kind)[:4]] for row in data[:3]]
            yield field.name, {"rows": len(data), "sha256": sha256(b"".join(data)), "first": shown}


def tensors(path: Path) -> list[str]:
    """``name dtype shape`` of every tensor of a checkpoint, and the names of what else is in it."""
    import torch

    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return sorted(_shapes("", load_file(path)))
    return sorted(_shapes("", torch.load(path, map_location="cpu", weights_only=True)))


def _shapes(name: str, value: Any) -> Iterator[str]:
    if hasattr(value, "shape"):
        yield f"{name} {value.dtype} {list(value.shape)}"
    elif isinstance(value, dict) and value and name != "config":
        for key, own in value.items():
            yield from _shapes(f"{name}.{key}" if name else str(key), own)
    else:
        yield f"{name} {type(value).__name__}"


def curve(run: Path) -> dict[str, Any]:
    """The lines of metrics.jsonl, without the clock's, and the tensors of the last checkpoint."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: own for name, own in line.items() if name not in VARYING} for line in lines]
    newest = max((run / "checkpoints").glob("step_*.pt"))
    return {"metrics": kept, "checkpoint": newest.name, "tensors": tensors(newest)}


def last_line(words: tuple[str, ...]) -> str:
    """Run a command; a line of its words and of the last line that it printed, without times."""
    lines = said(*words).strip().splitlines() or [""]
    print(*words, file=sys.stderr)
    return f"{' '.join(words)}: {re.sub(r'[0-9.]+ s, [0-9]+ samples/s', MARK, lines[-1])}"


# --- all of it ----------------------------------------------------------------------------------------------------


def freeze(out: Path) -> None:
    """Write everything to ``out``; the commands run in the current folder, so that no path of a machine is anywhere."""
    pages = help_pages()
    write(out, {f"help/{name}.txt": page for name, page in pages.items()})
    write_inputs()
    talk = [last_line(words) for words in STAGES]
    talk += [last_line(train_words(name)) for name in listed("train")]
    talk += [last_line(words) for words in AFTER]
    configs = {name: default_config(name, Path("runs", name), pages[f"train-{name}"]) for name in RECIPES}
    curves = {name: curve(Path("runs", name)) for name in sorted(RECIPES)}
    curves["export"] = {"tensors": tensors(Path("exported/open_clip_model.safetensors"))}
    files = {f"recipes/{name}.json": _json(config) for name, config in configs.items()}
    files |= {f"help/page-{path.parent.name}.txt": page_text(path) for path in Path().glob("**/report.html")}
    files |= {"help/said.txt": "\n".join(talk) + "\n", "dataset.sha256": "\n".join(hashes()) + "\n"}
    write(out, files | {"floats.json": _json(numbers()), "curves.json": _json(curves)})


def _json(value: Any) -> str:
    """Indented but for lists of numbers, which are a line each."""
    text = json.dumps(value, indent=1)
    return re.sub(r"\[[^][{}\"]*\]", lambda own: " ".join(own[0].split()), text) + "\n"


def write(out: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")


def own_metadata(checkout: Path, folder: Path) -> None:
    """A dist-info of the checkout: the entry points that the installed one has may be another tree's."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    info = folder / f"clipmill-{project['version']}.dist-info"
    points = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in own.items())
        for group, own in project.get("entry-points", {}).items()
    ]
    head = f"Metadata-Version: 2.1\nName: clipmill\nVersion: {project['version']}\n"
    write(info, {"METADATA": head, "entry_points.txt": "\n".join(points)})


def run_in(checkout: Path, out: Path) -> None:
    """`freeze` with the code of ``checkout``, in this process: once only."""
    os.environ |= {"COLUMNS": "120", "LINES": "50", "NO_COLOR": "1", "TERM": "dumb", "CLIPMILL_LOG": "ERROR"}
    os.environ |= {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("help", "recipes"):
        shutil.rmtree(out / name, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        (work := Path(folder, "work")).mkdir()
        own_metadata(checkout, Path(folder))
        sys.path[:0] = [str(checkout), folder]
        os.chdir(work)
        try:
            freeze(out)
        finally:
            os.chdir(HERE)


# --- comparing two checkouts --------------------------------------------------------------------------------------


def read(out: Path, section: str) -> dict[str, list[str]]:
    """File name to lines."""
    found = [path for pattern in SECTIONS[section] for path in sorted(out.glob(pattern))]
    return {path.relative_to(out).as_posix(): path.read_text(encoding="utf-8").splitlines() for path in found}


def differences(one: Path, other: Path) -> dict[str, list[str]]:
    """Section to its unified diff."""
    found = dict[str, list[str]]()
    for section in SECTIONS:
        before, after = read(one, section), read(other, section)
        found[section] = []
        for name in sorted({*before, *after}):
            texts = before.get(name, []), after.get(name, [])
            found[section] += difflib.unified_diff(*texts, f"a/{name}", f"b/{name}", n=1, lineterm="")
    return found


def against(commit: str) -> int:
    """Compare this checkout with a commit; 1 when more than wording differs."""
    with tempfile.TemporaryDirectory() as folder:
        tree, outs = Path(folder, "tree"), (Path(folder, "before"), Path(folder, "after"))
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, commit], cwd=HERE, check=True)
        try:
            for checkout, out in zip((tree, HERE), outs, strict=True):
                subprocess.run([sys.executable, __file__, out, "--checkout", checkout], check=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=HERE, check=True)
        found = differences(*outs)
    for section, lines in found.items():
        print(f"== {section}: {'the same' if not lines else 'differs'}", *lines, sep="\n")
    return int(any(lines for section, lines in found.items() if section != "help"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", help="folder to write to")
    parser.add_argument("--checkout", type=Path, default=HERE, help="whose code (default: this one's)")
    parser.add_argument("--against", metavar="COMMIT", help="compare this checkout with a commit")
    asked = parser.parse_args()
    if asked.against:
        return against(asked.against)
    if asked.out is None:
        parser.error("OUT or --against COMMIT is needed")
    run_in(asked.checkout.resolve(), asked.out.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
