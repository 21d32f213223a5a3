"""Evaluation sets made of what is published, and read back as CLIP_benchmark lays them out."""

import json
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_data import tree
from small_images import encoded

from pipeline.evalset.config import EvalsetConfig
from pipeline.evalset.stage import evalset
from shards_spec import imagenet
from shards_spec.files import UserError
from shards_spec.tar import read_shard
from training.data.labelled_images import open_images
from training.evaluation.clip_benchmark import captioned_samples, captions_of, check_root, dataset_task, read_classes

COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}
CAPTIONS = {"a.jpg": ["A dog, running.", "a  dog\nthat runs"], "b.jpg": ["a cat"], "c.jpg": ["a cow"]}


def image(colour="red", form="JPEG", size=(8, 6)):
    return encoded(Image.new("RGB", size, COLOURS[colour]), form)


def write_folders(root: Path, names, form="JPEG", ending="jpg"):
    for number, name in enumerate(names):
        folder = root / name
        folder.mkdir(parents=True)
        (folder / f"{name}_{number}.{ending}").write_bytes(image(form=form))
    return str(root)


def write_images(folder: Path, below=""):
    (folder / below).mkdir(parents=True, exist_ok=True)
    for name in CAPTIONS:
        (folder / below / name).write_bytes(image())
    return str(folder)


def coca(captions=None):
    """COCO's format."""
    images = [{"id": 7 * n, "file_name": name} for n, name in enumerate(CAPTIONS)]
    annotations = []
    for n, texts in enumerate((captions or CAPTIONS).values()):
        annotations += [{"image_id": 7 * n, "id": len(annotations), "caption": text} for text in texts]
    return json.dumps({"info": {}, "images": images, "annotations": annotations})


def karpathy(splits=("test", "test", "test"), folder=None):
    images = []
    for (name, texts), split in zip(CAPTIONS.items(), splits, strict=True):
        image = {"filename": name, "split": split, "sentences": [{"raw": text, "tokens": []} for text in texts]}
        images.append(image | ({"filepath": folder} if folder else {}))
    return json.dumps({"images": images, "dataset": "coco"})


def flickr_csv():
    rows = ["image_name| comment_number| comment"]
    for name, texts in CAPTIONS.items():
        rows += [f"{name}| {n}| {' '.join(text.split())}" for n, text in enumerate(texts)]
    return "\n".join(rows) + "\n"


def captions_txt(quoted):
    quote = '"' if quoted else ""
    rows = ["image,caption"]
    for name, texts in CAPTIONS.items():
        rows += [f"{name},{quote}{' '.join(text.split())}{quote}" for text in texts]
    return "\n".join(rows) + "\n"


def token():
    rows = list[str]()
    for name, texts in CAPTIONS.items():
        rows += [f"{name}#{n}\t{' '.join(text.split())}" for n, text in enumerate(texts)]
    return "\n".join(rows) + "\n"


def split_csv():
    """As Karpathy's Flickr30k is published on Hugging Face."""
    rows = ["raw,sentids,split,filename,img_id"]
    for n, (name, texts) in enumerate(CAPTIONS.items()):
        raw = json.dumps(texts).replace('"', '""')
        rows.append(f'"{raw}","[{n}]",test,{name},{n}')
    return "\n".join([*rows, '"[""x""]","[9]",train,z.jpg,9']) + "\n"


def read_captions(out):
    assert dataset_task(out) == "retrieval"
    return [captions_of(path, sample) for path, sample in captioned_samples(out)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions_val2014.json", coca()),
        ("dataset_flickr30k.json", karpathy()),
        ("dataset_coco.json", karpathy(folder="val2014")),
        ("results.csv", flickr_csv()),
        ("captions.txt", captions_txt(quoted=False)),
        ("captions.txt", captions_txt(quoted=True)),
        ("results_20130124.token", token()),
        ("flickr_annotations_30k.csv", split_csv()),
        ("list.jsonl", "\n".join(json.dumps({"file_name": n, "caption": t}) for n, t in CAPTIONS.items())),
    ],
)
def test_every_published_form_of_captions_is_one_set(tmp_path, name, text):
    images = write_images(tmp_path / "images", "val2014" if "val" in text else "deeper")
    (tmp_path / name).write_text(text)
    said = evalset(EvalsetConfig(str(tmp_path / "out"), images=images, captions=str(tmp_path / name)))
    assert said.startswith("evalset: 3 images with 4 captions in 1 shard")
    assert read_captions(str(tmp_path / "out")) == [["A dog, running.", "a dog that runs"], ["a cat"], ["a cow"]]
    check_root(str(tmp_path / "out"))


def test_a_parquet_of_names_and_captions(tmp_path):
    images = write_images(tmp_path / "images")
    names = [name for name, texts in CAPTIONS.items() for _ in texts]
    table = pa.table({"image": names, "caption": [text for texts in CAPTIONS.values() for text in texts]})
    pq.write_table(table, tmp_path / "list.parquet")
    evalset(EvalsetConfig(str(tmp_path / "out"), images=images, captions=str(tmp_path / "list.parquet")))
    assert read_captions(str(tmp_path / "out"))[1:] == [["a cat"], ["a cow"]]


def test_only_the_split_that_is_asked_for(tmp_path):
    images = write_images(tmp_path / "images")
    list_ = tmp_path / "dataset_coco.json"
    list_.write_text(karpathy(("test", "restval", "train")))
    fields = {"images": images, "captions": str(list_)}
    said = evalset(EvalsetConfig(str(tmp_path / "out"), **fields))
    assert said == "evalset: 1 image with 2 captions in 1 shard; left out: 2 image of another split"
    evalset(EvalsetConfig(str(tmp_path / "out"), split="train", **fields))
    assert len(list(read_shard(str(tmp_path / "out" / "train" / "0.tar")))) == 2
    list_.write_text(karpathy(("val", "val", "val")))
    with pytest.raises(UserError, match="no images of the split test; its splits are val"):
        evalset(EvalsetConfig(str(tmp_path / "none"), **fields))


def test_what_is_left_out_is_counted(tmp_path):
    images = Path(write_images(tmp_path / "images"))
    (images / "b.jpg").write_bytes(image()[:60])
    (images / "c.jpg").unlink()
    extra = {**CAPTIONS, "d.jpg": [" "]}
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({"file": n, "captions": t}) for n, t in extra.items()))
    said = evalset(EvalsetConfig(str(tmp_path / "out"), images=str(images), captions=str(tmp_path / "list.jsonl")))
    assert said.startswith("evalset: 1 image with 2 captions in 1 shard; left out: 1 ")
    record = json.loads((tmp_path / "out" / "test" / "evalset.json").read_text())
    assert record["left_out"] == {"does not decode: broken image": 1, "file not found": 1, "no caption": 1}
    assert record["examples"]["file not found"] == ["c.jpg"]


def test_class_folders_with_names_of_their_own(tmp_path):
    root = write_folders(tmp_path / "set", ["tabby_cat", "dog", "Zebra ü"])
    (tmp_path / "set" / "dog" / "notes.txt").write_text("x")
    (tmp_path / "set" / "loose.jpg").write_bytes(image())
    said = evalset(EvalsetConfig(str(tmp_path / "out"), classes=root))
    assert said == (
        "evalset: 3 images of 3 classes in 1 shard; left out: 1 image outside a class folder, 1 no image: .txt"
    )
    images = open_images(str(tmp_path / "out"), train=False)
    assert images.classes == ["Zebra ü", "dog", "tabby cat"]
    assert images.labels.tolist() == [0, 1, 2]
    assert read_classes(str(tmp_path / "out"), images)[1] == ["a photo of a {c}."]


def test_shards_hold_so_many_images_and_other_formats_become_png(tmp_path):
    root = Path(write_folders(tmp_path / "set", [f"c{n}" for n in range(5)]))
    (root / "c0" / "c0_0.jpg").write_bytes(image("green", "BMP"))
    (root / "c1" / "c1_1.jpg").write_bytes(image("blue", "PNG"))
    evalset(EvalsetConfig(str(tmp_path / "out"), classes=str(root), shard_size=2))
    shards = [list(read_shard(str(tmp_path / "out" / "test" / f"{n}.tar"))) for n in range(3)]
    assert [[sample.key for sample in shard] for shard in shards] == [
        ["s0000000", "s0000001"],
        ["s0000002", "s0000003"],
        ["s0000004"],
    ]
    assert [set(sample.members) for sample in shards[0] + shards[1]] == [{"png", "cls"}] * 2 + [{"jpg", "cls"}] * 2
    assert shards[0][1].image == image("blue", "PNG")
    assert (tmp_path / "out" / "test" / "nshards.txt").read_text() == "3\n"


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["n01443537", "n01440764", "n02123045"], ["tench", "goldfish", "tabby cat"]),
        ([str(n) for n in range(1000)], None),
    ],
)
def test_imagenets_folders_have_its_names_and_prompts(tmp_path, folders, names):
    root = tmp_path / "set"
    for name in folders:
        (root / name).mkdir(parents=True)
        (root / name / "0.jpg").write_bytes(image(size=(1, 1)))
    evalset(EvalsetConfig(str(tmp_path / "out"), classes=str(root)))
    images = open_images(str(tmp_path / "out"), train=False)
    assert images.classes == (names or list(imagenet.class_names()))
    assert len(read_classes(str(tmp_path / "out"), images)[1]) == 80
    assert images.labels.tolist() == list(range(len(folders)))


def label_schema(names, column="label"):
    feature = {"names": names, "_type": "ClassLabel"}
    meta = json.dumps({"info": {"features": {column: feature, "image": {"_type": "Image"}}}})
    cell = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.schema({"image": cell, column: pa.int64()}, metadata={"huggingface": meta})


def write_parquet(path: Path, labels, names=("red", "dark_green", "blue"), column="label"):
    rows = [{"image": {"bytes": image(), "path": None}, column: label} for label in labels]
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = label_schema(list(names), column) if names else label_schema([], column).remove_metadata()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=2)
    return str(path)


def test_parquet_of_hugging_face(tmp_path):
    write_parquet(tmp_path / "data" / "test-00000-of-00002.parquet", [2, 0, -1])
    write_parquet(tmp_path / "data" / "test-00001-of-00002.parquet", [1])
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [0, 0])
    said = evalset(EvalsetConfig(str(tmp_path / "out"), classes=str(tmp_path / "data")))
    assert said == "evalset: 3 images of 3 classes in 1 shard; left out: 1 no label"
    evalset(EvalsetConfig(str(tmp_path / "out"), classes=str(tmp_path / "data"), split="train"))
    test, train = (open_images(str(tmp_path / "out"), train=train) for train in (False, True))
    assert test.classes == train.classes == ["red", "dark green", "blue"]
    assert (test.labels.tolist(), train.labels.tolist()) == ([2, 0, 1], [0, 0])
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [0], ["x", "y", "z"])
    with pytest.raises(UserError, match="other ones or in another order"):
        evalset(EvalsetConfig(str(tmp_path / "out"), classes=str(tmp_path / "data"), split="train", overwrite=True))


def test_hugging_faces_imagenet_has_the_names_clip_is_evaluated_with(tmp_path):
    words = [imagenet._synsets().index_to_description(label) for label in range(1000)]
    file = write_parquet(tmp_path / "x.parquet", [3, 999], words)
    evalset(EvalsetConfig(str(tmp_path / "out"), classes=file))
    images = open_images(str(tmp_path / "out"), train=False)
    assert images.classes == list(imagenet.class_names())
    assert len(read_classes(str(tmp_path / "out"), images)[1]) == 80


def test_a_set_is_written_once_and_again_only_when_asked(tmp_path):
    root = Path(write_folders(tmp_path / "set", ["a", "b", "c"]))
    config = EvalsetConfig(str(tmp_path / "out"), classes=str(root), shard_size=1)
    evalset(config)
    before = tree(config.out)
    assert evalset(config).endswith("(there already)")
    (root / "c" / "c_2.jpg").unlink()
    (root / "c").rmdir()
    with pytest.raises(UserError, match="made from something else; --overwrite"):
        evalset(config)
    assert tree(config.out) == before
    evalset(EvalsetConfig(config.out, classes=str(root), shard_size=1, overwrite=True))
    assert sorted(path.name for path in Path(config.out, "test").iterdir()) == [
        "0.tar",
        "1.tar",
        "evalset.json",
        "nshards.txt",
    ]


def test_files_of_others_are_not_written_over(tmp_path):
    """Those of an interrupted set are: see the next but one."""
    write_folders(tmp_path / "good", "ab")
    given = {"classes": str(tmp_path / "good")}
    for path in ("texts/classnames.txt", "photos/1.jpg", "split/test/notes.md"):
        file = tmp_path / path
        file.parent.mkdir(parents=True)
        file.write_text("mine")
        with pytest.raises(UserError, match=f"{path} is .*give another EVAL, or --overwrite"):
            evalset(EvalsetConfig(str(tmp_path / path.split("/")[0]), **given))
        assert file.read_text() == "mine"
    for out in ("good", "good/inner"):
        with pytest.raises(UserError, match=r"is among the images of .*give an EVAL elsewhere"):
            evalset(EvalsetConfig(str(tmp_path / out), **given))
    assert sorted(path.name for path in (tmp_path / "good").iterdir()) == ["a", "b"]


def test_a_class_of_which_no_image_decodes_is_named(tmp_path, caplog):
    write_folders(tmp_path / "source", "ab")
    for image in (tmp_path / "source" / "b").iterdir():
        image.write_bytes(b"\xff\xd8\xff cut")
    evalset(EvalsetConfig(str(tmp_path / "out"), classes=str(tmp_path / "source")))
    assert "1 class without an image that decodes" in caplog.text


def test_an_interrupted_set_is_none_and_is_written_whole(tmp_path):
    config = EvalsetConfig(str(tmp_path / "out"), classes=write_folders(tmp_path / "set", "abc"), shard_size=1)
    evalset(config)
    whole = tree(config.out)
    for name in ("nshards.txt", "evalset.json", "1.tar"):
        Path(config.out, "test", name).unlink()
    Path(config.out, "test", f".1.tar.00000000.{socket.gethostname()}.4999999.tmp").write_bytes(b"x")  # of one killed
    evalset(config)
    assert tree(config.out) == whole


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "needs either --classes"),
        ({"images": "i"}, "needs either --classes"),
        ({"classes": "c", "captions": "x"}, "needs either --classes"),
        ({"classes": "nosuch"}, "nosuch is not there"),
        ({"classes": "images"}, r"no class folders \(3 images lie in it\)"),
        ({"classes": "coco.json"}, "is a file"),
        ({"classes": "splits"}, "has the splits train, val"),
        ({"classes": "hollow"}, r"1 class folder without an image that can be decoded \(b\)"),
        ({"classes": "wnids"}, r"1 class folder of 2 \(n99999999\) named by a WNID that is none"),
        ({"classes": "nolabel.parquet"}, r"no column of integer labels .* image .*, other \(int64\)"),
        ({"classes": "nonames.parquet"}, "labels are numbers up to 4 without names"),
        ({"classes": "few.parquet"}, "names 3 classes, but there is a label 3"),
        ({"classes": "good", "class_names": "two.txt"}, "two.txt has 2 lines, .* 3 classes"),
        ({"classes": "good", "prompts": "two.txt"}, r"'one' has no \{c\}"),
        ({"classes": "good", "label_col": "x"}, "--label-col 'x' would not be used"),
        ({"images": "images", "captions": "coco.json", "prompts": "two.txt"}, "--prompts .* would not be used"),
        ({"images": "images", "captions": "nosuch"}, "--captions .*nosuch is not there"),
        ({"images": "nosuch", "captions": "coco.json"}, "is no folder"),
        ({"images": "images", "captions": "instances.json"}, "unknown form: it has the keys 'images', 'annotations'"),
        ({"images": "images", "captions": "two.txt"}, "unknown form: its first line is 'one'"),
        ({"images": "images", "captions": "empty.txt"}, "unknown form"),
        ({"images": "good", "captions": "coco.json"}, r"none of the 3 images .* is in .*good \(the first is 'a.jpg'\)"),
        ({"images": "images", "captions": "broken.json"}, "broken.json"),
    ],
)
def test_bad_input_is_named(tmp_path, fields, said):
    write_images(tmp_path / "images")
    write_folders(tmp_path / "good", "abc")
    write_folders(tmp_path / "wnids", ["n01440764", "n99999999"])
    write_folders(tmp_path / "splits", ["train", "val"])
    write_folders(tmp_path / "hollow", "ac")
    (tmp_path / "hollow" / "b").mkdir()
    (tmp_path / "hollow" / "b" / "x.heic").write_bytes(b"x")
    write_parquet(tmp_path / "nolabel.parquet", [1], column="other", names=())
    write_parquet(tmp_path / "nonames.parquet", [4], names=())
    write_parquet(tmp_path / "few.parquet", [3])
    (tmp_path / "coco.json").write_text(coca())
    (tmp_path / "broken.json").write_text(coca()[:-5])
    (tmp_path / "instances.json").write_text(json.dumps({"images": [], "annotations": [{"bbox": []}]}))
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    (tmp_path / "empty.txt").write_text("")
    paths = {key: str(tmp_path / value) if key != "label_col" else value for key, value in fields.items()}
    with pytest.raises(UserError, match=said):
        evalset(EvalsetConfig(str(tmp_path / "out"), **paths))
    assert not (tmp_path / "out").exists()
