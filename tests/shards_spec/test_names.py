"""Which files count, in folders and in the walk that every reader of folders shares."""

import os
from collections import Counter

import pytest
from PIL import Image

from shards_spec.files import UserError
from shards_spec.folders import walk
from shards_spec.images import FORMATS
from shards_spec.names import (
    IMAGE_EXTENSIONS,
    UNDECODED_EXTENSIONS,
    endings_line,
    is_ignored,
    is_image,
    undecoded_ending,
)
from training.data.labelled_images import FolderImages

NOBODYS = [
    "._0.jpg",
    "a/._0.jpg",
    "__MACOSX/a/0.jpg",
    "a/.ipynb_checkpoints/0-checkpoint.jpg",
    ".Trash-1000/files/0.jpg",
    ".cache/huggingface/0.jpg",
    ".DS_Store",
    "a/Thumbs.db",
    "THUMBS.DB",
    "@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg",
    "$RECYCLE.BIN/0.jpg",
    ".00000.tar.host.17.tmp",
    "lost+found/0.jpg",
    "./._0.jpg",
    ".git/0.png",
]
SOMEBODYS = ["0.jpg", "./0.jpg", "a/../0.jpg", "a.b/0.jpg", "_0.jpg", "__init/0.jpg", "cache/0.jpg", "x.DS_Store.jpg"]


@pytest.mark.parametrize("path", NOBODYS)
def test_files_that_are_ignored(path):
    assert is_ignored(path)


@pytest.mark.parametrize("path", SOMEBODYS)
def test_files_that_are_somebodys(path):
    assert not is_ignored(path)


def test_endings_of_images():
    assert all(is_image(f"x.{ending}") and is_image(f"a/x.Y.{ending.upper()}") for ending in IMAGE_EXTENSIONS)
    assert is_image("jpg")
    assert is_image("image.jpg")  # a tar member's extension
    assert not any(map(is_image, ("xjpg", "x.jpg.txt", "x.heic", "x", "")))
    assert not set(IMAGE_EXTENSIONS) & set(UNDECODED_EXTENSIONS)
    assert undecoded_ending("x.HEIC") == undecoded_ending("heic") == ".heic"
    assert undecoded_ending("x.jpg") is None
    assert endings_line(Counter({".pdf": 12, ".heic": 3, "": 1})) == "12 .pdf, 3 .heic, 1 without an ending"
    many = Counter({f".{number}": 20 - number for number in range(12)})
    assert endings_line(many).endswith("11 .9, 19 with other endings")


def test_the_endings_are_those_of_the_formats_that_are_decoded():
    Image.init()
    formats = {ending[1:]: form for ending, form in Image.EXTENSION.items()}
    assert {formats.get(ending, "JPEG") for ending in IMAGE_EXTENSIONS} == set(FORMATS)
    assert not {formats.get(ending) for ending in UNDECODED_EXTENSIONS} & set(FORMATS)


def tree(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")


def walked(folder):
    return [prefix + name for prefix, files in walk(str(folder)) for name in files]


def test_a_walk_leaves_out_ignored_files_and_keeps_the_order(tmp_path):
    tree(tmp_path, "b.jpg", "a.jpg", "c/z.jpg", "c/d/a.jpg", "a/b.jpg", *NOBODYS)
    assert walked(tmp_path) == ["a.jpg", "b.jpg", "a/b.jpg", "c/z.jpg", "c/d/a.jpg"]
    assert walked("file://" + str(tmp_path)) == walked(tmp_path)


def test_a_source_may_itself_lie_in_a_hidden_folder(tmp_path):
    tree(tmp_path, ".cache/mine/0.jpg")
    assert walked(tmp_path / ".cache/mine") == ["0.jpg"]


def test_a_walk_enters_links_once(tmp_path):
    tree(tmp_path, "outside/1.jpg", "outside/deep/2.jpg", "in/0.jpg", "in/real/3.jpg")
    inside = tmp_path / "in"
    for link, target in {
        "linked": tmp_path / "outside",
        "again": tmp_path / "outside",
        "a": inside / "real",
        "loop": inside,
        "up": tmp_path,
        "nowhere": tmp_path / "gone",
        "self.jpg": inside / "self.jpg",
    }.items():
        (inside / link).symlink_to(target)
    (tmp_path / "outside/back").symlink_to(tmp_path)
    assert sorted(map(os.path.basename, walked(inside))) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "nowhere", "self.jpg"]
    (tmp_path / "name").symlink_to(inside)
    assert walked(tmp_path / "name") == walked(inside)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    with pytest.raises(UserError, match="gone cannot be listed"):
        walked(tmp_path / "gone")


def test_a_deep_folder_is_walked(tmp_path):
    deep = "/".join(["d"] * 300)
    for depth in range(300):
        os.mkdir(f"{tmp_path}/{deep[: 2 * depth + 1]}")
    tree(tmp_path, f"{deep}/0.jpg")
    assert walked(tmp_path) == [f"{deep}/0.jpg"]


def test_class_folders_take_the_endings_that_ingest_takes(tmp_path, caplog):
    tree(tmp_path / "pool", "3.bmp")
    endings = ["jpg", "JPE", "jfif", "bmp", "tif", "gif", "ppm", "ico"]
    tree(tmp_path / "train", *(f"cat/x.{ending}" for ending in endings), "cat/deep/1.png", "dog/0.heic", "dog/0.txt")
    tree(tmp_path / "train", "dog/1.txt", *(f"dog/{path}" for path in NOBODYS), ".cache/0.jpg")
    (tmp_path / "train/dog/linked").symlink_to(tmp_path / "pool")
    os.mkfifo(tmp_path / "train/dog/pipe.jpg")
    found = FolderImages(tmp_path / "train")
    assert found.classes == ["cat", "dog"]
    names = [found.image(index)[0] for index in range(len(found.paths))]
    assert sorted(names) == sorted([*(f"cat/x.{ending}" for ending in endings), "cat/deep/1.png", "dog/linked/3.bmp"])
    assert "files that are not taken: 2 .txt, 1 .heic" in caplog.text
