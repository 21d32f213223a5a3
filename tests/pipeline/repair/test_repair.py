"""`check --repair`: every damage is named, and repaired or refused; what is whole is not touched."""

import contextlib
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from small_damage import damage, is_named, states
from small_data import draw, tar_bytes, tiny_coca
from small_datacompdr import reinforced, write_reinforced
from small_ingest import config, rows_of, write_list
from small_repair import ROWS, Dataset
from web_server import serve

import clipmill
from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
from pipeline.pack.stage import pack
from pipeline.repair.raw import LOST
from pipeline.repair.settings import pack_config
from pipeline.repair.stage import repair
from pipeline.select.config import SelectConfig
from pipeline.select.stage import select
from pipeline.takedown.config import TakedownConfig
from pipeline.takedown.stage import takedown
from pipeline.why.config import WhyConfig
from pipeline.why.stage import why
from shards_spec.files import read_json, write_json
from shards_spec.manifest import read_dataset

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server():
    with serve() as own:
        yield own


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, server, model) -> Dataset:
    return Dataset(tmp_path_factory.mktemp("uneven"), server.url, model, None)


@pytest.fixture(scope="module")
def equal(tmp_path_factory, server, model) -> Dataset:
    return Dataset(tmp_path_factory.mktemp("equal"), server.url, model, 4)


def assert_repaired(dataset: Dataset, seed: int, count: int) -> None:
    """Damage a copy ``count`` times and repair it; all is as before but what cannot be known any more."""
    root, rng = dataset.copy(), random.Random(seed)
    before = states(root)
    damages = [damage(root, rng) for _ in range(count)]
    touched = {name for _, names in damages for name in names}
    problems = check(CheckConfig(str(root)))
    for name in touched:
        assert is_named(problems, name), (damages, problems)
    damaged = states(root)
    said, left = dataset.repair(root, dry_run=True)
    assert said, damages
    assert states(root) == damaged, "a dry run wrote something"
    assert left == problems
    lines, left = dataset.repair(root)
    assert left == [], (damages, lines)
    assert {line for line in said if "; looked at when " not in line} <= set(lines), damages
    after = states(root)
    assert after.keys() == before.keys(), (damages, lines)
    assert [name for name in before.keys() - touched if after[name] != before[name]] == [], (damages, lines)
    different = {name for name in touched & before.keys() if after[name][0] != before[name][0]}
    # the times of a download are in its record alone, the source and versions in dataset.json
    lossy = {name for name in touched if name.startswith("raw/") and name.endswith("_stats.json")} | {"dataset.json"}
    assert different <= lossy | ({name for name in touched if name.startswith("raw/")} if len(damages) > 1 else set())


def test_a_dozen_random_damages_are_named_and_repaired(uneven):
    for seed in range(12):
        assert_repaired(uneven, seed, 1)


def test_the_block_of_a_deleted_folder_is_taken_out(uneven):
    """What was made with it stays; nothing is made again, with its model at hand or not."""
    root = uneven.copy()
    for folder in ("captions/cap", "teacher/tea", "select/some"):
        shutil.rmtree(root / folder)
    problems = check(CheckConfig(str(root)))
    assert len(problems) == 4  # those of the cache and of its lists
    assert all(f"`clipmill check {root} --repair`, which takes the block out" in problem for problem in problems)
    before = states(root)
    said, left = uneven.repair(root, dry_run=True)
    assert left == problems
    assert states(root) == before
    lines, left = uneven.repair(root)
    assert left == []
    assert lines == said
    made = "; shards: 00000, 00001, 00002, made with it, stay as they are"
    assert lines == [
        f"captions/cap is gone: its block is taken out of dataset.json{made}",
        "teacher/tea is gone: its block is taken out of dataset.json",
        "select/some is gone: its block is taken out of dataset.json",
        "teacher/tea/lists is gone: its block is taken out of dataset.json",
    ]
    assert sorted(read_dataset(str(root))["stages"]) == ["dedup", "ingest", "pack", "vocab/all"]
    after = states(root)
    assert {name for name in before if after[name] != before[name]} == {"dataset.json"}
    assert uneven.repair(root) == ([], [])


def test_a_folder_of_another_name_is_moved_back_and_no_block_is_taken_out(uneven):
    root = uneven.copy()
    (root / "captions/cap").rename(root / "captions/other")
    lines, left = uneven.repair(root)
    assert left == []
    assert len(lines) == 6
    assert all(line.endswith("; it is moved back there") for line in lines)


@pytest.mark.slow
def test_200_random_damages_are_named_and_repaired(uneven, equal):
    for seed in range(200):
        assert_repaired((uneven, equal)[seed % 2], seed, 1)


@pytest.mark.slow
def test_several_damages_at_once_are_repaired(uneven, equal):
    for seed in range(1000, 1040):
        assert_repaired((uneven, equal)[seed % 2], seed, 2 + seed % 3)


def spoil(tar: Path, member: str) -> None:
    """Overwrite part of a member of a tar."""
    data = bytearray(tar.read_bytes())
    start = data.index(member.encode()) + 512
    data[start + 100 : start + 400] = bytes(300)
    tar.write_bytes(data)


def spoil_image(root: Path, key: str) -> None:
    """Overwrite the image of a sample in its raw tar, and delete the final shard that has a copy."""
    spoil(root / "raw" / f"{key[:5]}.tar", f"{key}.jpg")
    (root / "shards" / f"{key[:5]}.tar").unlink()


def test_a_lost_image_is_fetched_again_and_no_other(uneven, server):
    root = uneven.copy()
    before = states(root)
    spoil_image(root, "000000001")
    server.requests.clear()
    lines, left = uneven.repair(root, models=())
    assert left == []
    assert dict(server.requests) == {"scene/1": 1}
    assert states(root) == before | {name: states(root)[name] for name in ("raw/00000.tar", "shards/00000.tar")}
    assert {name: own for name, (own, _) in states(root).items()} == {name: own for name, (own, _) in before.items()}
    assert (
        "raw/00000.tar is not the file that was written; 4 of 5 rows restored from what can be read, 1 is fetched again"
        in lines
    )


@contextlib.contextmanager
def gone(server, *paths: str):
    """The server answers 404 for some paths."""
    server.gone.update(paths)
    yield
    server.gone.clear()


def test_what_is_lost_for_good_is_cut_out_of_all_that_was_made_of_it(uneven, server):
    root = uneven.copy()
    before = states(root)
    spoil_image(root, "000000001")
    with gone(server, "scene/1"):
        lines, left = uneven.repair(root, models=())  # rows only vanish, so no model is needed
    assert left == []
    assert "raw/00000: 1 HTTP 404; the damaged files are in .repair/moved/raw/00000.tar" in lines
    assert (root / ".repair/moved/raw/00000.tar").exists()
    after = states(root)
    others = {name for name in before if "00000" not in name}
    assert {name for name in others if after[name][0] != before[name][0]} == {
        *(f"dedup/{shard}_stats.json" for shard in ("00001", "00002")),  # each list depends on all shards
        "dataset.json",
        "shards/sizes.json",
    }
    life = why(WhyConfig(str(root), "000000001"))
    assert "  left out: failed_to_download, HTTP 404" in life.lines
    assert read_dataset(str(root))["stages"]["ingest"]["counts"] == {"HTTP 404": 2, "success": ROWS - 2}


def test_a_raw_shard_that_is_gone_comes_back_from_its_final_shard(uneven, server):
    root = uneven.copy()
    for path in root.glob("raw/00000*"):
        path.unlink()
    with gone(server, *(f"scene/{number}" for number in range(ROWS))):
        lines, left = uneven.repair(root, models=())
    assert left == []
    assert "raw/00000: no sample lost" in lines
    assert hashes(root)["raw/00000.tar"] == hashes(uneven.root)["raw/00000.tar"]


class KilledError(BaseException):
    """In place of a signal."""


def die_at(monkeypatch, step: int) -> list[int]:
    """Let the process end before its ``step``-th change of a file; the list counts the changes."""
    changes = list[int]()

    def counting(change):
        def changed(*args, **options):
            changes.append(1)
            if len(changes) == step:
                raise KilledError
            return change(*args, **options)

        return changed

    for name in ("replace", "unlink"):
        monkeypatch.setattr(os, name, counting(getattr(os, name)))
    for name in ("rename", "unlink"):
        monkeypatch.setattr(Path, name, counting(getattr(Path, name)))
    return changes


def hashes(root: Path) -> dict[str, str]:
    return {name: own for name, (own, _) in states(root).items()}


def damaged_copy(dataset: Dataset) -> Path:
    """A copy that lost an image for good, a record, a list of duplicates, and has two files in each other's place."""
    root = dataset.copy()
    spoil_image(root, "000000001")
    (root / "raw/00002_stats.json").write_bytes((root / "raw/00002_stats.json").read_bytes()[:-20])
    (root / "dedup/00001.parquet").write_bytes(b"")
    one, other = root / "teacher/tea/00001.parquet", root / "captions/cap/00001.parquet"
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return root


def assert_a_kill_changes_nothing(dataset: Dataset, server, steps: range) -> None:
    with gone(server, "scene/1"):
        root = damaged_copy(dataset)
        with pytest.MonkeyPatch.context() as patch:
            changes = die_at(patch, 0)
            assert dataset.repair(root)[1] == []
        expected = hashes(root)
        assert len(changes) > max(steps)
        for step in steps:
            root = damaged_copy(dataset)
            with pytest.MonkeyPatch.context() as patch:
                die_at(patch, step)
                with pytest.raises(KilledError):
                    dataset.repair(root)
            assert dataset.repair(root)[1] == [], step
            assert hashes(root) == expected, step


def test_a_killed_repair_ends_as_if_it_had_not_been_killed(uneven, server):
    assert_a_kill_changes_nothing(uneven, server, range(12, 24, 9))


@pytest.mark.slow
def test_a_repair_may_be_killed_at_any_change_of_a_file(uneven, server):
    assert_a_kill_changes_nothing(uneven, server, range(1, 60))


def test_without_the_recorded_model_captions_and_caches_are_refused_by_name(uneven, tmp_path):
    root = uneven.copy()
    for name in ("captions/cap/00000.parquet", "teacher/tea/00001.parquet"):
        (root / name).write_bytes(b"")
    before = states(root)
    other = tiny_coca(tmp_path / "coca", seed=1)  # of the same name
    lines, left = uneven.repair(root, models=(other,))
    assert states(root) == before
    assert all("captions/cap/00000" in problem or "teacher/tea/00001" in problem for problem in left)
    for stage, command in (("captions/cap", "caption"), ("teacher/tea", "cache")):
        (line,) = [line for line in lines if line.startswith(f"{stage}: refused")]
        assert f"{other} differs in weights_sha256" in line
        assert f"`clipmill {command} {root} --model local-dir:PATH/coca --name {stage[-3:]} " in line
    assert uneven.repair(root)[1] == []


def folder_dataset(folder: Path) -> Path:
    """Raw shards of a folder of images that `ingest` shrank, so that no row has the hash of an image's bytes."""
    source = folder / "images"
    source.mkdir()
    for number in range(7):
        image, caption = draw(f"folder/{number}", 96)
        (source / f"{number}.jpg").write_bytes(image)
        (source / f"{number}.txt").write_text(caption)
    ingest(IngestConfig(str(folder / "whole"), (str(source),), shard_size=4, workers=1, image_size=48))
    return folder / "whole"


def repaired(root: Path, **options) -> list[str]:
    """The lines of a repair after which nothing is wrong."""
    lines = list[str]()
    assert repair(CheckConfig(str(root), repair=True, **options), lines.append) == []
    return lines


def test_images_of_a_folder_are_read_again_or_dropped_with_a_reason(tmp_path):
    whole = folder_dataset(tmp_path)
    spoiled = shutil.copytree(whole, tmp_path / "spoiled")
    spoil(spoiled / "raw/00000.tar", "000000001.jpg")
    again = shutil.copytree(spoiled, tmp_path / "again")
    assert "raw/00000: as it was written" in repaired(again)
    assert hashes(again) == hashes(whole)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    lost = shutil.copytree(spoiled, tmp_path / "lost")
    lines = repaired(lost)
    (line,) = [line for line in lines if line.startswith("raw/00000: ")]
    assert line.startswith(f"raw/00000: 1 {LOST}; 3 images kept for their looks alone; the damaged files are in ")
    assert read_dataset(str(lost))["stages"]["ingest"]["counts"] == {LOST: 1, "success": 6}
    for path in spoiled.glob("raw/00001*"):
        path.unlink()
    assert repair(CheckConfig(str(spoiled), repair=True), lines.append)
    assert "its source is not there; say where it is with --source" in lines[-1]
    repaired(spoiled, source=str(tmp_path / "elsewhere"))
    assert states(spoiled).keys() == states(whole).keys()


def test_damaged_rows_come_back_from_the_tar_and_the_retries_from_earlier_shards(tmp_path, server):
    rows = [(f"{server.url}/{'flaky' if number % 3 == 1 else 'scene'}/{number}", "a ball") for number in range(9)]
    source, whole = write_list(tmp_path / "list.tsv", rows), tmp_path / "whole"
    for retry_failed in (False, True):
        ingest(config(whole, source, shard_size=5, retries=0, retry_failed=retry_failed))
    assert read_dataset(str(whole))["stages"]["ingest"]["shards"] == 3
    Path(source).unlink()
    for names in (["00000.parquet"], ["00002.parquet"], ["00002_stats.json"], ["00002.tar", "00002.parquet"]):
        root = shutil.copytree(whole, tmp_path / names[0])
        for name in names:
            (root / "raw" / name).unlink()
        repaired(root)
        lossy = {"raw/00002_stats.json"}  # times of the download
        if names == ["00000.parquet"]:
            lossy = {"raw/00000.parquet", "raw/00000_stats.json"}  # links of what failed
        assert {name for name, own in hashes(whole).items() if hashes(root)[name] != own} <= lossy, names


def test_shards_of_img2dataset_lose_what_cannot_be_read(tmp_path):
    root = folder_dataset(tmp_path)
    for path in root.glob("raw/*_stats.json"):
        stats = read_json(str(path))
        del stats["clipmill"]
        write_json(str(path), stats)
    (root / "dataset.json").unlink()
    assert check(CheckConfig(str(root))) == []
    tar = root / "raw/00000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.read_bytes().index(b"000000003.jpg") + 600])
    (root / "raw/00001_stats.json").unlink()
    lines = repaired(root)
    assert f"raw/00000: 1 {LOST}; the damaged files are in .repair/moved/raw/00000.tar" in "\n".join(lines)
    stats = read_json(str(root / "raw/00000_stats.json"))
    assert (stats["successes"], stats["status_dict"]) == (3, {LOST: 1, "success": 3})
    assert not (root / "dataset.json").exists()


def test_images_of_datacompdr_are_fetched_again_by_their_links(tmp_path, server):
    """Its rows have original captions, so that the source alone does not give them."""
    samples = [reinforced(number, server.url) for number in range(3)]
    source = write_reinforced(tmp_path / "dr", [samples])
    (tmp_path / "originals").mkdir()
    members = [(f"{sample.uid}.txt", "an original") for sample in samples]
    (tmp_path / "originals/00000000.tar").write_bytes(tar_bytes(members))
    root = tmp_path / "ds"
    ingest(config(root, source, original_captions=str(tmp_path / "originals")))
    before = hashes(root)
    (root / "raw/00000.tar").unlink()
    assert "raw/00000: as it was written" in repaired(root)
    assert hashes(root) == before
    (root / "raw/00000.tar").unlink()
    (root / "raw/00000.parquet").unlink()
    lines = list[str]()
    assert repair(CheckConfig(str(root), repair=True), lines.append)
    assert "the links of 3 rows cannot be read there" in lines[-1]


def test_class_names_come_back_from_the_source_or_are_refused(tmp_path):
    for name in ("red_ball", "box", "void"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2 * (name != "void")):
            (tmp_path / "images" / name / f"{number}.jpg").write_bytes(draw(f"{name}{number}")[0])
    root = tmp_path / "ds"
    ingest(IngestConfig(str(root), (str(tmp_path / "images"),), format="classes", workers=1))
    before = (root / "classnames.txt").read_bytes()
    (root / "classnames.txt").write_text("box\nred_bell\nvoid\n")
    assert repaired(root) == ["classnames.txt: not the classes that the shards were labelled by; written again"]
    assert (root / "classnames.txt").read_bytes() == before
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    (root / "classnames.txt").unlink()
    lines = list[str]()
    assert len(repair(CheckConfig(str(root), repair=True), lines.append)) == 1
    assert lines == ["classnames.txt: is not there; refused: no source and no rows tell all classes; put the list back"]


def test_the_command_prints_every_action_and_exits_as_check_does(uneven, capsys):
    root = uneven.copy()
    (root / "dedup/00001.parquet").write_bytes(b"")
    assert clipmill._run(["check", str(root), "--repair", "--dry-run"]) == 1
    said = "dedup/00001.parquet is not the file that was written; to be made again"
    assert said in capsys.readouterr().out
    assert clipmill._run(["check", str(root), "--repair"]) == 0
    assert capsys.readouterr().out == f"{said}\n{root}: all promises hold\n"
    assert clipmill._run(["check", str(root), "--dry-run"]) == 2
    assert "belong to --repair" in capsys.readouterr().err


def test_a_takedown_deletes_what_a_repair_moved_away(uneven, tmp_path):
    root = uneven.copy()
    shutil.copy(root / "raw/00000.tar", root / "raw/00070.tar")
    assert uneven.repair(root)[1] == []
    assert (root / ".repair/moved/raw/00070.tar").exists()
    (tmp_path / "list.txt").write_text("000000000\n")
    takedown(TakedownConfig(str(root), str(tmp_path / "list.txt")))
    assert [path for path in (root / ".repair").rglob("*") if path.is_file()] == []
    (root / "raw/00000.parquet").unlink()
    lines, left = uneven.repair(root)
    assert left == [], lines
    (row,) = [row for row in rows_of(root) if row["key"] == "000000000"]
    assert (row["error_message"], row["url"], row["caption"]) == ("taken down", None, None)


def test_folders_in_the_place_of_files_are_moved_away(uneven):
    root = uneven.copy()
    for name in ("raw/00000_stats.json", "shards/00001.tar", "vocab/all.tsv", "dataset.json"):
        (root / name).unlink()
        (root / name).mkdir()
        (root / name / "note").write_text("mine")
    lines, left = uneven.repair(root)
    assert left == [], lines
    assert len(list((root / ".repair/moved").rglob("note"))) == 4


def test_after_pack_by_a_selection_each_cache_and_selection_has_one_line(uneven, capsys):
    """Other and fewer final shards: no advice per shard, the selection that was applied stays, a dry run says all."""
    root = uneven.copy()
    build_config = pack_config(str(root), read_dataset(str(root))["stages"]["pack"]["config"], "")
    select(SelectConfig(str(root), "other", where=("width > 50",), workers=1))
    pack(replace(build_config, select="some", shard_size=9, overwrite=True))
    applied = (root / "select/some/00002_stats.json").read_bytes()
    problems = [problem for problem in check(CheckConfig(str(root))) if "/lists" not in problem]
    said = ": made from other shards than those in"
    assert [problem.partition(said)[0] for problem in problems] == [f"{root}/teacher/tea", f"{root}/select/other"]
    assert f"run `clipmill cache {root} --name tea` again" in problems[0]
    assert "before `clipmill pack`; delete the folder" in problems[1]
    before = states(root)
    assert clipmill._run(["check", str(root), "--repair", "--dry-run"]) == 1
    said = capsys.readouterr().out
    assert "select/other: 00000, 00001, 00002 were made of what has changed" in said
    assert "refused: its model is not at hand" in said
    assert "--model local-dir:PATH/coca --name tea" in said
    assert "select/some" not in said
    assert len(said.splitlines()) == len(set(said.splitlines()))
    assert states(root) == before
    assert uneven.repair(root)[1] == []
    assert (root / "select/some/00002_stats.json").read_bytes() == applied
    assert clipmill._run(["check", str(root)]) == 0
    (root / "shards/00000.tar").unlink()
    assert clipmill._run(["check", str(root)]) == 1
    assert f"`clipmill check {root} --repair` mends what it can" in capsys.readouterr().out


def test_files_that_no_stage_writes_are_named_and_moved(uneven):
    root = uneven.copy()
    extra = ["captions/cap/zz.parquet", "shards/notes.txt", "shards/more.json", "teacher/tea/00000.parquet.bak"]
    for name in extra:
        (root / name).write_text("mine")
    problems = check(CheckConfig(str(root)))
    assert sorted(problem.partition(": ")[0] for problem in problems) == sorted(f"{root}/{name}" for name in extra)
    lines, left = uneven.repair(root)
    assert left == [], lines
    for name in extra:
        assert (root / ".repair/moved" / name).read_text() == "mine"
