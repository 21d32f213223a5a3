"""ROOTs of labelled images: order, views and workers as of image-text pairs, the same images as class folders."""

import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_catlip import TINY, need_wordnet, write_folders
from small_data import vouch
from small_ingest import config

from pipeline.ingest.stage import ingest
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.files import DataError, UserError
from shards_spec.images import decode_rgb
from shards_spec.manifest import read_dataset, write_stage
from shards_spec.sample import Sample
from shards_spec.tar import read_shard, write_shard
from shards_spec.views import ViewSpec, apply_view, draw_view
from training.config import DataConfig, ViewConfig
from training.data.batches import Skipped, load_batches, to_pixels
from training.data.labelled_images import RootImages, open_images, open_train_and_test
from training.data.labelled_rows import LabelledImageRows, subset
from training.data.order import BatchPlan
from training.data.samples import open_samples
from training.evaluation.classification import plain_rows
from training.evaluation.clip_benchmark import PROMPT, check_root, read_classes
from training.models.classifier import new_classifier

TRAIN, TEST = 12, 6  # images of each of two classes
SPEC = ViewSpec(seed=3, scale=(0.5, 1.0))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """``folders`` of class folders, ``roots`` of the same images: train/ packed, five shards, and test/ as ingested."""
    need_wordnet()
    base = tmp_path_factory.mktemp("labelled")
    write_folders(base / "folders", TRAIN, TEST)
    for split in ("train", "test"):
        source = base / "folders" / split
        ingest(config(base / "roots" / split, source, format="classes", shard_size=5, image_size=256))
    pack(PackConfig(str(base / "roots/train"), workers=1))
    return base


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return new_classifier(TINY, 2)


def rows_of(data: Path, student, *, chosen=None, seed=0, **options) -> LabelledImageRows:
    """Drawn views of the training images, newly opened."""
    images = open_images(str(data / "roots"), True)
    chosen = np.arange(2 * TRAIN) if chosen is None else chosen
    return LabelledImageRows(images, student, BatchPlan(4, seed=seed), SPEC, chosen, **options)


def test_the_splits_are_found(data):
    train, test = open_train_and_test(str(data / "roots"))
    assert isinstance(train, RootImages)
    assert (train.folder, test.folder) == ("shards", "raw")
    assert train.classes == test.classes == ["blue", "red"]
    assert [np.bincount(images.labels).tolist() for images in (train, test)] == [[TRAIN] * 2, [TEST] * 2]
    assert open_images(str(data / "roots/test"), False).classes == test.classes, "a ROOT itself is a split"


def test_labels_are_read_without_the_tars(root):
    for path in Path(root, "shards").glob("*.tar"):
        path.unlink()
    assert len(RootImages(root).labels) == 2 * TRAIN


def test_every_image_comes_once_an_epoch(data, student):
    rows = rows_of(data, student)
    for epoch in range(3):
        items = [rows[position] for position in range(epoch * 24, epoch * 24 + 24)]
        assert {item["epoch"] for item in items} == {epoch}
        assert len({item["key"] for item in items}) == 24
        assert Counter(int(item["targets"]) for item in items) == {0: TRAIN, 1: TRAIN}
    assert [rows[position]["key"] for position in range(24)] != [rows[24 + position]["key"] for position in range(24)]


def test_a_part_of_the_images(data, student):
    images = open_images(str(data / "roots"), True)
    chosen = subset(images.labels, 0.3, 0)
    rows = rows_of(data, student, chosen=chosen)
    wanted = {images.image(int(number))[0] for number in chosen}
    assert {rows[position]["key"] for position in range(len(chosen))} == wanted
    assert Counter(int(rows[position]["targets"]) for position in range(len(chosen))) == {0: 4, 1: 4}


def test_a_position_is_the_same_in_any_process_and_after_a_resume(data, student):
    whole = rows_of(data, student, seed=5)
    items = {position: whole[position] for position in range(30, 42)}
    resumed = rows_of(data, student, seed=5)
    for position in (41, 30, 36):
        assert torch.equal(resumed[position]["images"], items[position]["images"])
    batches = [range(30, 36), range(36, 42)]
    read = list(load_batches(rows_of(data, student, seed=5), batches, workers=2, as_bytes=True))
    keys = [key for batch in read for key in batch["keys"]]
    assert keys == [items[position]["key"] for position in range(30, 42)]
    assert torch.equal(torch.cat([batch["images"] for batch in read])[7], items[37]["images"])


def test_views_and_order_are_those_of_image_text_pairs(data, student):
    views = ViewConfig(scale=SPEC.scale)
    pairs = open_samples(DataConfig(str(data / "roots/train"), batch_size=4), views, student, 3)
    images = open_images(str(data / "roots"), True)
    labelled = LabelledImageRows(images, student, BatchPlan(4, seed=3), pairs.views, np.arange(24))
    for position in (0, 7, 23, 50):
        ours, theirs = labelled[position], pairs[position]
        assert (ours["key"], ours["epoch"]) == (theirs["key"], theirs["epoch"])
        assert torch.equal(ours["images"], theirs["images"])


def test_views_are_drawn_by_key(data, student):
    rows = rows_of(data, student, repeats=2)
    for position in (0, 1, 11, 60):
        item = rows[position]
        sample = find(data, item["key"])
        view = draw_view(SPEC, sample.key, 2 * item["epoch"] + position % 2)
        assert torch.equal(
            item["images"], to_pixels(apply_view(decode_rgb(sample.image), SPEC, view, student.image_size))
        )


def find(data: Path, key: str) -> Sample:
    tars = sorted((data / "roots/train/shards").glob("*.tar"))
    return next(sample for path in tars for sample in read_shard(str(path)) if sample.key == key)


def losses(root: str, student, name_of) -> dict[str, float]:
    """Loss of each training image, plain crops, by the path of its file."""
    rows = plain_rows(open_images(root, True), student)
    items = [rows[position] for position in range(2 * TRAIN)]
    pixels = student.normalise(torch.stack([item["images"] for item in items]).float())
    with torch.no_grad():
        values = F.cross_entropy(
            student.model(pixels), torch.stack([item["targets"] for item in items]), reduction="none"
        )
    return {name_of(item["key"]): value for item, value in zip(items, values.tolist(), strict=True)}


def test_losses_are_those_of_the_class_folders(data, student, one_thread):
    """The order differs, since few shards are open at a time, and drawn views, since they go by key; crops do not."""
    ours = losses(str(data / "roots"), student, lambda key: find(data, key).meta["url"])
    theirs = losses(str(data / "folders"), student, lambda name: name)
    assert ours.keys() == theirs.keys()
    assert ours == pytest.approx(theirs, abs=1e-6)


# evaluation


@pytest.mark.parametrize("named", ["roots", "roots/test"])
def test_zero_shot_reads_the_test_root(data, tmp_path, named):
    root = str(shutil.copytree(data / "roots", tmp_path / "roots").parent / named)
    check_root(root)
    images = open_images(root, False)
    assert read_classes(root, images) == (["blue", "red"], [PROMPT])
    Path(root, "zeroshot_classification_templates.txt").write_text("a {c}.\n")
    assert read_classes(root, images)[1] == ["a {c}."]
    labels = [int(sample.members["cls"]) for _, sample in images.samples()]
    assert labels == images.labels.tolist()


# bad input


@pytest.fixture
def root(data, tmp_path) -> str:
    """A copy of the training ROOT that a test may damage."""
    return str(shutil.copytree(data / "roots/train", tmp_path / "D/train"))


def test_one_split_is_not_both(root):
    with pytest.raises(UserError, match=r"is a ROOT of labelled images, which is one split: give the folder above"):
        open_train_and_test(root)
    with pytest.raises(UserError, match=r"test/nshards.txt is not there"):
        open_train_and_test(str(Path(root).parent))


def test_a_root_of_pairs_has_no_classes(root):
    Path(root, "classnames.txt").unlink()
    with pytest.raises(UserError, match="It is a ROOT of image-text pairs, which have no classes"):
        open_images(root, True)
    block = read_dataset(root)["stages"]["pack"]
    del block["config"]["class_names_sha256"]
    write_stage(root, "pack", block)
    Path(root, "classnames.txt").write_text("a\n")
    with pytest.raises(UserError, match="the shards of pack have no classes; take the file away"):
        open_images(root, True)


def test_a_damaged_image_is_skipped_with_its_key(root, student):
    path = f"{root}/shards/00001.tar"
    first, *others = read_shard(path)
    write_shard(path, [Sample(first.key, {**first.members, "jpg": b"broken"}), *others])
    vouch(root, "shards", 1, "shards/00001.tar")
    rows = LabelledImageRows(open_images(root, True), student, BatchPlan(4), SPEC, np.arange(24))
    skipped = [item for item in map(rows.__getitem__, range(24)) if isinstance(item, Skipped)]
    assert [item.reason.partition(":")[0] for item in skipped] == [first.key]
    batch = next(load_batches(rows, [range(24)]))
    assert (len(batch["keys"]), len(batch["skipped"])) == (23, 1)


def test_a_damaged_shard_stops_the_run_with_its_name(root, student):
    path = Path(root, "shards/00001.tar")
    path.write_bytes(path.read_bytes()[:2000])
    rows = LabelledImageRows(open_images(root, True), student, BatchPlan(4), SPEC, np.arange(24))
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"shards/00001.tar"):
            list(islice(load_batches(rows, [range(24)], workers=workers), 1))
    path.unlink()
    fresh = LabelledImageRows(open_images(root, True), student, BatchPlan(4), SPEC, np.arange(24))
    with pytest.raises(DataError, match=r"00001.tar is not there; delete"):
        list(load_batches(fresh, [range(24)]))


def test_a_file_that_is_gone_is_named(tmp_path, student):
    root = write_folders(tmp_path / "folders", 2, 1)
    rows = plain_rows(open_images(root, True), student)
    (tmp_path / "folders/train/blue").rename(tmp_path / "blue")
    with pytest.raises(
        DataError, match=r"train/blue/\d+.jpg cannot be read \(No such file or directory\); put it back"
    ):
        list(load_batches(rows, [range(4)], workers=1))


def test_a_table_of_other_labels_is_named(root):
    source = Path(root, "shards/00000.parquet")
    shutil.copy(Path(root, "raw/00000.parquet"), source)
    images = RootImages(root)
    assert images.labels is not None, "a raw table has the same classes in the same order"
    shutil.copy(Path(root, "shards/00004.parquet"), source)
    with pytest.raises(DataError, match=r"00000.parquet: its column cls has not 5 numbers below 2"):
        _ = RootImages(root).labels
