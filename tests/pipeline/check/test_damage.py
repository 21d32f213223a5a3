"""`check` under damage: any one bit, in any file that a stage wrote, is named, and the rest is still checked."""

import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from small_data import build_all, draw, tiny_coca

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.dedup.config import DedupConfig
from pipeline.dedup.stage import dedup
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
from pipeline.select.config import SelectConfig
from pipeline.select.stage import select
from shards_spec.files import read_json, write_json
from shards_spec.manifest import SEAL

pytestmark = pytest.mark.integration

IMAGES = 12


@pytest.fixture(scope="module", params=[None, 4], ids=["uneven", "equal"])
def whole(tmp_path_factory, request) -> Path:
    """A dataset of every stage, made by the product's own commands; final shards of equal size bring a plan."""
    base = tmp_path_factory.mktemp("whole")
    (base / "images").mkdir()
    for index in range(IMAGES):
        data, caption = draw(f"damage/{index}")
        (base / "images" / f"{index:02}.jpg").write_bytes(data)
        (base / "images" / f"{index:02}.txt").write_text(caption)
    shutil.copy(base / "images/00.jpg", base / "images/99.jpg")  # for dedup
    (base / "images/99.txt").write_text("the same again")
    root = str(base / "ds")
    ingest(IngestConfig(root, str(base / "images"), shard_size=7, workers=1))
    dedup(DedupConfig(root, workers=1))
    build_all(root, tiny_coca(base / "coca"), views=2, shard_size=request.param)
    assert check(CheckConfig(root)) == []
    return base / "ds"


def files(root: Path) -> list[Path]:
    """All that a stage wrote and `check` validates: not the logs of times."""
    return sorted(path for path in root.rglob("*") if path.is_file() and "logs" not in path.parts)


def flip(path: Path, rng: random.Random) -> bytes:
    """Flip one bit of a file; what it was before."""
    before = path.read_bytes()
    after, place = bytearray(before), rng.randrange(len(before))
    after[place] ^= 1 << rng.randrange(8)
    path.write_bytes(after)
    return before


def names(problems: list[str], root: Path, path: Path) -> bool:
    inside = path.relative_to(root).as_posix()
    return any(inside in problem for problem in problems)


def missed(root: Path, per_file: int, seed: int) -> list[str]:
    """Flips that went unnamed. Each is one of two in the dataset, the other one in a file of another shard."""
    rng, unseen = random.Random(seed), list[str]()
    paths = [path for path in files(root) for _ in range(per_file)]
    rng.shuffle(paths)
    for one, other in pairwise([*paths, paths[0]]):
        pair = [one] if one.parent == other.parent and one.name[:5] == other.name[:5] else [one, other]
        before = {path: flip(path, rng) for path in pair}
        problems = check(CheckConfig(str(root)))
        for path in pair:
            if not names(problems, root, path):
                place = next(i for i, (a, b) in enumerate(zip(before[path], path.read_bytes(), strict=True)) if a != b)
                unseen.append(f"{path.relative_to(root)} byte {place}: {before[path][place - 20 : place + 20]!r}")
            path.write_bytes(before[path])
    return unseen


def test_a_bit_anywhere_is_named(whole):
    assert len(files(whole)) > 25
    assert missed(whole, 1, seed=0) == []
    assert check(CheckConfig(str(whole))) == []


@pytest.mark.slow
def test_420_bits_are_named(whole):
    assert missed(whole, -(-420 // len(files(whole))), seed=1) == []


@pytest.mark.slow
def test_every_byte_of_the_small_records_is_named(whole):
    """Text that nothing derives again: all bytes of one record of each folder, of dataset.json and the vocabulary."""
    chosen = {path.parent: path for path in files(whole) if path.name.endswith("_stats.json")}
    rng, unseen = random.Random(2), list[str]()
    for path in [*chosen.values(), whole / "dataset.json", whole / "shards/sizes.json", *whole.glob("vocab/*")]:
        before = path.read_bytes()
        for place in range(0, len(before), 7):
            path.write_bytes(before[:place] + bytes([before[place] ^ 1 << rng.randrange(8)]) + before[place + 1 :])
            if not names(check(CheckConfig(str(whole))), whole, path):
                unseen.append(f"{path.relative_to(whole)} byte {place}: {before[place - 20 : place + 20]!r}")
        path.write_bytes(before)
    assert unseen == []


def edited(path: Path, edit) -> None:
    value = read_json(str(path))
    edit(value)
    write_json(str(path), value)


def unsealed(whole: Path, tmp_path: Path) -> Path:
    """The dataset as a clipmill before the seals left it."""
    root = shutil.copytree(whole, tmp_path / "old")
    for path in root.rglob("*_stats.json"):
        edited(path, lambda stats: stats["clipmill"].pop(SEAL))
    edited(
        root / "dataset.json", lambda dataset: (dataset.pop(SEAL), [b.pop(SEAL) for b in dataset["stages"].values()])
    )
    return root


def test_a_dataset_without_seals_is_valid_and_held_to_what_can_be_derived(whole, tmp_path):
    root = unsealed(whole, tmp_path)
    assert check(CheckConfig(str(root))) == []
    for edit, said in [
        (lambda s: s["clipmill"].update(shard=1), "says dedup shard 1"),
        (lambda s: s["clipmill"].update(stage="pack"), "says pack shard 0"),
        (lambda s: s["clipmill"]["config"].update(near_bits=4), "its config does not fit its hash"),
        (lambda s: s.update(count=99), "inputs 99"),
        (lambda s: s.update(failed_to_resize=1), "+ 1 failed"),
        (lambda s: s["status_dict"].update(success="7"), "is damaged"),
        (lambda s: s["clipmill"].update(more=1), "unknown field 'more'"),
        (lambda s: s["clipmill"].pop("inputs"), "has no 'inputs'"),
        (lambda s: s.pop("clipmill"), "no done-record in it"),
    ]:
        record = root / "dedup/00000_stats.json"
        before = record.read_bytes()
        edited(record, edit)
        problems = check(CheckConfig(str(root)))
        assert any(said in problem and "dedup/00000_stats.json" in problem for problem in problems), (said, problems)
        record.write_bytes(before)
    captions = root / "captions/cap/00000_stats.json"
    edited(captions, lambda s: s["clipmill"]["facts"].update(captions=999))
    (problem,) = check(CheckConfig(str(root)))
    assert "dataset.json: caption/cap says" in problem


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path.unlink(), path.mkdir()), " cannot be read (Is a directory); move the folder away, then "),
        (lambda path: path.write_bytes(b""), ": not the file that was written: has 0 bytes; "),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), ": not the file that was written: not a readable Pa"),
        (lambda path: path.unlink(), ": is not there; "),
    ],
    ids=["folder", "empty", "cut", "gone"],
)
def test_a_damaged_file_is_named_once_with_what_brings_it_back(whole, tmp_path, damage, said):
    root = shutil.copytree(whole, tmp_path / "ds")
    path = root / "dedup/00000.parquet"
    damage(path)
    problems = [problem for problem in check(CheckConfig(str(root))) if "00000.parquet" in problem]
    advice = f"delete {root}/dedup/00000_stats.json and run `clipmill dedup {root}` again"
    assert any(problem.startswith(f"{path}{said}") and problem.endswith(advice) for problem in problems), problems
    assert all(problem.count(advice) <= 1 for problem in problems)


@pytest.mark.parametrize(
    "path", ["raw/00000.tar", "dedup/00000.parquet", "shards/00000.tar", "teacher/tea/00000.parquet"]
)
def test_a_damaged_file_has_one_line_whoever_reads_it(whole, path):
    """What was made from it does not fit it, and is as it was written."""
    file = whole / path
    before = file.read_bytes()
    middle = len(before) // 2
    try:
        for damaged in (b"", before[:-9], before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :]):
            file.write_bytes(damaged)
            (problem,) = check(CheckConfig(str(whole)))
            assert problem.startswith(f"{file}: not the file that was written: ")
        file.unlink()
        (problem,) = check(CheckConfig(str(whole)))
        assert problem.startswith(f"{file}: is not there; ")
    finally:
        file.write_bytes(before)


def test_what_does_not_fit_a_sound_file_is_named(whole, tmp_path):
    """Another raw shard in the place of one, with a record that fits it: what was made from the first says so."""
    root = Path(shutil.copytree(whole, tmp_path / "ds"))
    (tmp_path / "images").mkdir()
    for index in range(7):
        data, caption = draw(f"others/{index}")
        (tmp_path / "images" / f"{index:02}.jpg").write_bytes(data)
        (tmp_path / "images" / f"{index:02}.txt").write_text(caption)
    ingest(IngestConfig(str(tmp_path / "other"), str(tmp_path / "images"), shard_size=7, workers=1))
    for name in ("00000.tar", "00000.parquet", "00000_stats.json"):
        shutil.copy(tmp_path / "other/raw" / name, root / "raw" / name)
    problems = check(CheckConfig(str(root)))
    assert any("shards/00000.tar: key 000000000 has another image than raw/00000" in one for one in problems), problems


def test_old_records_get_seals_when_they_are_written_again(whole, tmp_path):
    root = unsealed(whole, tmp_path)
    dedup(DedupConfig(str(root), workers=1))
    dataset = read_json(str(root / "dataset.json"))
    assert SEAL in dataset
    assert [stage for stage, block in dataset["stages"].items() if SEAL in block] == ["dedup"]
    assert check(CheckConfig(str(root))) == []


def test_damage_to_a_block_is_not_sealed_by_the_next_stage(whole, tmp_path):
    root = str(shutil.copytree(whole, tmp_path / "ds"))
    edited(
        Path(root, "dataset.json"), lambda d: (d.update(name="other"), d["stages"]["pack"]["versions"].update(x="1"))
    )
    dedup(DedupConfig(root, workers=1))
    assert len(check(CheckConfig(root))) == 2


def test_what_is_gone_or_does_not_belong_is_named(whole, tmp_path):
    root = shutil.copytree(whole, tmp_path / "ds")
    shutil.rmtree(root / "teacher/tea")
    (root / "vocab/all.tsv").unlink()
    (root / "vocab/odd.tsv").mkdir()
    (root / "raw/notes.json").write_text("{}")
    (root / "captions/cap/00007.parquet").write_bytes(b"")
    problems = "\n".join(check(CheckConfig(str(root))))
    for said in (
        "teacher/tea is not there",
        "vocab/all.tsv is not there",
        "odd.tsv is a folder",
        "raw/notes.json: no file of",
        "cap/00007.parquet: no done-record names",
    ):
        assert said in problems
    assert problems.count("\n") == 4


@pytest.mark.slow
def test_many_kinds_of_nonsense_are_named_without_a_traceback(whole, tmp_path):
    """Whole files replaced: the kinds of damage that parsers of JSON, Parquet, tar and TSV trip over."""
    root = shutil.copytree(whole, tmp_path / "ds")
    junk = [
        b"",
        b"null",
        b"[]",
        b'{"clipmill": 5}',
        b'{"clipmill": {}}',
        b"[" * 100_000,
        b"\xff" * 99,
        b"9" * 9999,
        b'{"stages": {"pack": 3}, "spec_version": 1}',
        b"PAR1",
        b"\x00" * 10240,
    ]
    for path in [root / "dataset.json", root / "shards/sizes.json", root / "vocab/all.tsv", *root.rglob("00000*")]:
        before = path.read_bytes()
        for data in junk:
            path.write_bytes(data)
            problems = check(CheckConfig(str(root)))
            assert names(problems, root, path), (path, data[:30], problems)
            assert max(map(len, problems)) < 2000
        path.write_bytes(before)
    assert check(CheckConfig(str(root))) == []


@pytest.fixture(scope="module")
def selected(whole, tmp_path_factory) -> Path:
    """The dataset with a selection."""
    root = shutil.copytree(whole, tmp_path_factory.mktemp("selected") / "ds")
    select(SelectConfig(str(root), name="s", where=("width > 1",), workers=1))
    return root


def replaced(folder: Path, name: str, data: bytes | None) -> list[str]:
    """What `check` says with other bytes in a file's place, or no file; the file is put back."""
    path, root = folder / name, next(parent for parent in folder.parents if (parent / "dataset.json").exists())
    before = path.read_bytes()
    path.unlink()
    try:
        if data is not None:
            path.write_bytes(data)
        return check(CheckConfig(str(root)))
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(before)


@pytest.mark.parametrize("folder", ["raw", "dedup", "captions/cap", "shards", "teacher/tea", "select/s"])
def test_a_record_that_is_not_its_shards_has_one_line(selected, folder):
    """The shard whose record lies in the place of another's is whole, and so are sums, sizes and counts."""
    own = selected / folder
    others = (own / "00001_stats.json").read_bytes()
    for data, said in ((others, "shard 1; delete"), (b"[]", ": no object of stats"), (b"{}", ": no count and success")):
        (problem,) = replaced(own, "00000_stats.json", data)
        assert problem.startswith(f"{own}/00000_stats.json: ")
        assert said in problem
    (problem,) = replaced(own, "00000_stats.json", None)
    assert problem.startswith(f"{own}: shards [0] are missing or unfinished; ")


def test_a_link_to_nowhere_and_a_missing_last_shard_have_one_line(selected):
    record = selected / "select/s/00000_stats.json"
    before = record.read_bytes()
    record.unlink()
    record.symlink_to("nowhere")
    (problem,) = check(CheckConfig(str(selected)))
    assert problem.startswith(f"{record} cannot be read (No such file or directory); delete {record} and run ")
    record.unlink()
    record.write_bytes(before)
    last = max((selected / "shards").glob("*_stats.json"))
    (problem,) = replaced(last.parent, last.name, None)
    assert problem.startswith(f"{selected}/shards: shards [{int(last.name[:5])}] are missing or unfinished; ")


def test_dataset_json_and_the_shards_of_a_folder_gone_have_one_line_with_the_fix(selected, tmp_path):
    root = shutil.copytree(selected, tmp_path / "ds")
    shutil.rmtree(root / "select/s")
    (root / "select/s").mkdir()
    (problem,) = check(CheckConfig(str(root)))
    number = len(list(selected.glob("select/s/*.parquet")))
    assert problem.startswith(f"{root}/select/s has none of its {number} shards; run `clipmill select {root} --name s`")
    assert problem.endswith(f"or `clipmill check {root} --repair`")
    (root / "dataset.json").unlink()
    shutil.copytree(selected / "select/s", root / "select/s", dirs_exist_ok=True)
    assert check(CheckConfig(str(root))) == [
        f"{root}/dataset.json is not there; put it back, or run `clipmill check {root} --repair`"
    ]
