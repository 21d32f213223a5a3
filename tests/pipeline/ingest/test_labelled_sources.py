"""`ingest --format classes`: class folders and CLIP_benchmark's shards as a ROOT with classes, checked and packed."""

import multiprocessing
import os
import re
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_catlip import need_wordnet, write_bench
from small_data import draw, tree, vouch
from small_ingest import config, rows_of

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.ingest import stage
from pipeline.ingest.labelled_sources import class_rows, source_classes
from pipeline.ingest.stage import ingest
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.files import DataError, UserError
from shards_spec.sample import Sample
from shards_spec.tar import read_shard, write_shard
from training.data.labelled_images import FolderImages, ShardImages, open_images

CLASSES = [
    "Äpfel und  Birnen",
    "golden_retriever",
    "n01440764",
    "zebra",
]
ORDERED = sorted(CLASSES)  # by code points: Ä comes last


def write_classes(folder: Path) -> Path:
    """Four class folders with odd names and images at several depths, a file that is no image, an empty class."""
    for number, name in enumerate(CLASSES[:3]):
        for index in range(5):
            path = folder / name / ("", "deep/er")[index % 2] / f"{number}{index} ü.JPG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(draw(f"{number}/{index}", 24)[0])
    (folder / "zebra").mkdir()
    (folder / "golden_retriever/cut.jpg").write_bytes(b"no image")
    (folder / "golden_retriever/phone.heic").write_bytes(b"heic")
    (folder / "golden_retriever/notes.txt").write_text("not a caption")
    (folder / ".cache").mkdir()
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """ROOT of these folders, three shards of six inputs, packed."""
    need_wordnet()
    base = tmp_path_factory.mktemp("labelled")
    source = write_classes(base / "source")
    ingest(config(base / "root", source, format="classes", shard_size=6))
    pack(PackConfig(str(base / "root"), workers=1))
    return base


@pytest.fixture
def root(built, tmp_path) -> str:
    """A copy that a test may damage."""
    return str(shutil.copytree(built / "root", tmp_path / "root"))


def samples(root: Path, folder: str) -> list[Sample]:
    tars = sorted((root / folder).glob("*.tar"))
    return [sample for path in tars for sample in read_shard(str(path))]


# what is written


def test_a_sample_has_its_class_in_all_places(built):
    root = built / "root"
    assert (root / "classnames.txt").read_text() == "".join(f"{name}\n" for name in ORDERED)
    rows = [row for shard in range(3) for row in rows_of(root, shard)]
    assert Counter(row["error_message"] for row in rows) == {
        None: 15,
        "resize: not an image": 1,
        "format not decoded: heic": 1,
    }
    assert {(row["cls"], row["class_folder"]) for row in rows} == set(enumerate(ORDERED)) - {(2, "zebra")}
    by_key = {row["key"]: row for row in rows}
    for sample in samples(root, "raw"):
        row = by_key[sample.key]
        assert sorted(sample.members) == ["cls", "jpg", "json", "txt"]
        label = int(sample.members["cls"])
        assert (row["cls"], sample.meta["cls"]) == (label, label)
        assert row["url"].startswith(f"{ORDERED[label]}/")
        assert sample.meta["class_folder"] == ORDERED[label]
        assert sample.caption == ORDERED[label].replace("_", " ")


def test_packed_samples_keep_their_class(built):
    root = built / "root"
    raw = {sample.key: sample for sample in samples(root, "raw")}
    packed = samples(root, "shards")
    assert len(packed) == len(raw) == 15
    assert all(sample.members["cls"] == raw[sample.key].members["cls"] for sample in packed)
    tables = [pq.read_table(path) for path in sorted((root / "shards").glob("*.parquet"))]
    columns = [value for table in tables for value in table.column("cls").to_pylist()]
    assert columns == [int(sample.members["cls"]) for sample in packed]
    assert check(CheckConfig(str(root))) == []


def test_shards_mix_the_classes(built):
    order = [row["cls"] for shard in range(3) for row in rows_of(built / "root", shard)]
    assert order != sorted(order)
    assert [row.url for row in class_rows(str(built / "source"))] == [
        row["url"] for shard in range(3) for row in rows_of(built / "root", shard)
    ]


def test_labels_are_those_of_the_class_folders(built):
    folder = FolderImages(built / "source")
    ours = open_images(str(built / "root"), True)
    assert ours.classes == folder.classes == source_classes(str(built / "source"))
    of_path = {folder.image(index)[0]: label for index, label in enumerate(folder.labels)}
    for sample, label in zip(samples(built / "root", "shards"), ours.labels, strict=True):
        assert of_path[sample.meta["url"]] == label


def test_classes_without_images_and_other_files_are_named(built, caplog):
    list(class_rows(str(built / "source")))
    assert "1 class folder without an image: zebra" in caplog.text
    assert "files that are not taken: 1 .txt" in caplog.text
    assert "beside the class folders" not in caplog.text


def test_images_beside_the_class_folders_are_counted(tmp_path, caplog):
    (tmp_path / "cat").mkdir()
    for path in ("cat/1.jpg", "stray.jpg", "other.png"):
        (tmp_path / path).write_bytes(draw(path)[0])
    assert [row.url for row in class_rows(str(tmp_path))] == ["cat/1.jpg"]
    assert "2 images beside the class folders, in none of them: not taken" in caplog.text


# again


def kill_in_the_second_shard(root: str, source: str) -> None:
    write = stage.write_raw_shard

    def killed(root, shard, *rest):
        if shard == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(root, shard, *rest)

    stage.write_raw_shard = killed
    ingest(config(root, source, format="classes", shard_size=6, open_shards=1))


def test_a_killed_run_and_its_rerun_leave_the_same_bytes(built, tmp_path):
    root = tmp_path / "root"
    arguments = (str(root), str(built / "source"))
    child = multiprocessing.get_context("fork").Process(target=kill_in_the_second_shard, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (root / "dataset.json").exists()
    with pytest.raises(UserError, match="ingest` has not finished"):
        open_images(str(root), True)
    summary = ingest(config(root, built / "source", format="classes", shard_size=6))
    assert (summary.shards, summary.counts["success"]) == (3, 15)
    ours, theirs = tree(str(root)), tree(str(built / "root"))
    files = ["classnames.txt", *(f"raw/0000{shard}.{form}" for shard in range(3) for form in ("tar", "parquet"))]
    assert [ours[name] for name in files] == [theirs[name] for name in files]


def test_another_list_of_classes_is_refused(built, root, tmp_path):
    source = shutil.copytree(built / "source", tmp_path / "source")
    (source / "aardvark").mkdir()
    with pytest.raises(UserError, match=r"classnames.txt: --source .* has other classes \(aardvark\); use another"):
        ingest(config(root, source, format="classes", shard_size=6))
    Path(root, "classnames.txt").unlink()
    with pytest.raises(UserError, match=r"00000 was made with another config .*class_names_sha256"):
        ingest(config(root, source, format="classes", shard_size=6))
    assert not Path(root, "classnames.txt").exists(), "nothing is written before the config is known to fit"


def test_a_rerun_puts_an_edited_list_back(built, root):
    path = Path(root, "classnames.txt")
    path.write_text("only\n")
    assert ingest(config(root, built / "source", format="classes", shard_size=6)).made == 0
    assert path.read_bytes() == (built / "root/classnames.txt").read_bytes()
    assert check(CheckConfig(root)) == []


# names


@pytest.mark.parametrize("where", ["source", "."])
def test_names_from_a_list(built, tmp_path, where):
    folder = tmp_path / "source"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "x.jpg").write_bytes(b"")
    (tmp_path / where / "classnames.txt").write_text("tench\ngold_fish\n")
    assert source_classes(str(folder)) == ["tench", "gold_fish"]
    captions = {row.extra["class_folder"]: row.caption for row in class_rows(str(folder))}
    assert captions == {"a": "tench", "b": "gold fish"}
    (tmp_path / where / "classnames.txt").write_text("tench\n")
    with pytest.raises(UserError, match=r"classnames.txt has 1 line, .* 2 class folders; give a line per folder"):
        source_classes(str(folder))


def test_folders_of_imagenet_get_its_names(tmp_path):
    for split, folders in {"a": ["n01443537", "n01440764"], "b": ["n01440764", "n00007846"]}.items():
        for folder in folders:
            (tmp_path / split / folder).mkdir(parents=True)
    assert source_classes(str(tmp_path / "a")) == ["tench", "goldfish"]
    assert source_classes(str(tmp_path / "b")) == ["n00007846", "n01440764"], "of ImageNet-21k"
    for label in range(1000):
        (tmp_path / "v2" / str(label)).mkdir(parents=True)
    (tmp_path / "v2/10/x.jpg").write_bytes(b"")
    assert source_classes(str(tmp_path / "v2"))[10] == "brambling"
    assert [(row.label, row.caption) for row in class_rows(str(tmp_path / "v2"))] == [(10, "brambling")]


def test_names_of_several_lines_and_of_none(tmp_path):
    (tmp_path / "two\nlines").mkdir()
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    assert source_classes(str(tmp_path)) == sorted(["two lines", "caf\ufffd"])
    (tmp_path / " ").mkdir()
    with pytest.raises(UserError, match="the folder ' ' has no name to call its class by; rename it"):
        source_classes(str(tmp_path))


@pytest.mark.parametrize("others", [["val"], ["test"], ["val", "test"]])
def test_splits_are_roots_of_their_own(tmp_path, others):
    for split in ("train", *others):
        (tmp_path / split / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="are splits, and a ROOT is one split") as error:
        source_classes(str(tmp_path))
    for split in ("train", *others):
        target = "train" if split == "train" else "test"
        command = f"clipmill ingest ROOT/{target} --format classes --source {tmp_path}/{split}`"
        assert command in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "nowhere cannot be listed"),
        (lambda folder: folder.mkdir(), "has no class folders: --format classes takes a folder"),
        (lambda folder: (folder / "a").mkdir(parents=True), "has no row and no image in it"),
        (lambda folder: folder.write_text("x"), "nowhere cannot be listed"),
    ],
)
def test_sources_without_images(tmp_path, make, message):
    make(tmp_path / "nowhere")
    with pytest.raises(UserError, match=message):
        ingest(config(tmp_path / "D", tmp_path / "nowhere", format="classes"))
    assert not (tmp_path / "D/dataset.json").exists()


def test_options_that_mean_nothing(tmp_path):
    (tmp_path / "in/a").mkdir(parents=True)
    for options in ({"caption_col": "x"}, {"url_col": "x"}, {"where": ("a > 1",)}, {"retry_failed": True}):
        with pytest.raises(UserError, match=next(iter(options)).replace("_", "-")):
            ingest(config(tmp_path / "D", tmp_path / "in", format="classes", **options))


def test_a_root_is_no_source_and_lies_in_none(built, tmp_path):
    with pytest.raises(UserError, match="is a ROOT itself, its folders are no classes"):
        ingest(config(tmp_path / "D", built / "root", format="classes"))
    with pytest.raises(UserError, match="where its folders are classes: move ROOT"):
        ingest(config(built / "source/new/D", built / "source", format="classes"))


# CLIP_benchmark's shards


def test_clip_benchmarks_shards_give_their_labels(tmp_path):
    bench = write_bench(tmp_path / "bench")
    ingest(config(tmp_path / "D", f"{bench}/train", format="classes"))
    ours, theirs = open_images(str(tmp_path / "D"), True), ShardImages(bench, "train")
    assert ours.classes == theirs.classes
    labels = dict(zip((theirs.image(index)[0] for index in range(24)), theirs.labels.tolist(), strict=True))
    for row in (row for shard in range(3) for row in rows_of(tmp_path / "D", shard)):
        assert row["cls"] == labels[row["url"].partition("/")[2]]
        assert row["caption"] == ours.classes[row["cls"]]
    assert np.bincount(ours.labels).tolist() == [12, 12]


def test_samples_without_a_class_are_counted(tmp_path):
    image = draw("0", 24)[0]
    members = [{"jpg": image, "cls": b"1\n"}, {"jpg": image, "cls": b"2"}, {"jpg": image}, {"cls": b"0"}]
    write_shard(str(tmp_path / "0.tar"), [Sample(f"s{number}", own) for number, own in enumerate(members)])
    (tmp_path / "nshards.txt").write_text("1")
    with pytest.raises(UserError, match=r"classnames.txt is not there: it holds one class name per line"):
        source_classes(str(tmp_path))
    (tmp_path / "classnames.txt").write_text("blue\nred\n")
    rows = {row.url: (row.label, row.problem) for row in class_rows(str(tmp_path))}
    missing = "no number of a class"
    assert rows == {
        "0.tar/s0": (1, None),
        "0.tar/s1": (None, missing),
        "0.tar/s2": (None, missing),
        "0.tar/s3": (0, "no picture"),
    }
    (tmp_path / "nshards.txt").write_text("2")
    with pytest.raises(UserError, match=r"1.tar is not there, though nshards.txt says 2"):
        list(class_rows(str(tmp_path)))


# check


def test_check_names_another_list_of_classes(root):
    path = Path(root, "classnames.txt")
    path.write_text("only\n")
    problems = check(CheckConfig(root))
    assert any("not the classes that the shards of ingest were labelled by" in problem for problem in problems)
    with pytest.raises(UserError, match="not the classes that the shards of pack were labelled by; put the list back"):
        open_images(root, True)
    path.unlink()
    assert any("classnames.txt is not there" in problem for problem in check(CheckConfig(root)))


def relabel(root: str, folder: str, change) -> None:
    """Write the first shard's tar again with other members, as if its stage had made it so."""
    path = f"{folder}/00000.tar"
    changed = [Sample(own.key, change(dict(own.members))) for own in read_shard(f"{root}/{path}")]
    write_shard(f"{root}/{path}", changed)
    vouch(root, folder, 0, path)


@pytest.mark.parametrize("folder", ["raw", "shards"])
@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (None, r"key 00000000\d has no class \(member cls\)"),
        (b"17", "has class '17', not a number below 4"),
        (b"2", r"has class 2, its Parquet row [013]"),
    ],
)
def test_check_names_a_wrong_class(root, folder, cls, message):
    def change(members):
        del members["cls"]
        return members if cls is None else {**members, "cls": cls}

    relabel(root, folder, change)
    problems = check(CheckConfig(root))
    assert any(f"{folder}/00000.tar" in problem and re.search(message, problem) for problem in problems), problems


def test_a_reader_sees_a_class_that_changed(root):
    relabel(root, "shards", lambda members: {**members, "cls": b"2"})
    images = open_images(root, True)
    with pytest.raises(DataError, match=r"key 00000000\d has another class than its Parquet row; delete"):
        images.image(0)
