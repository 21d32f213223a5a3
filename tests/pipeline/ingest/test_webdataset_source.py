"""Tars as others make them: every member is read or named, one key may hold several samples, damage never hangs."""

import gzip
import io
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections import Counter

import pytest
from small_tars import image, pair, rows_of, tar_of, told

from pipeline.ingest.detect import detect
from pipeline.ingest.image_bytes import read_image_bytes
from shards_spec.files import DataError, UserError
from shards_spec.sample import subsamples
from shards_spec.tar import read_shard

LIMIT = 1 << 30


# one key, several samples


DOTTED = ("track 2.0", "track 2.1", "track 2.10", "Dr. Who", "a.b.c")


def test_dots_in_names_make_no_sample_vanish(tmp_path):
    members = []
    for n, stem in enumerate(DOTTED):
        members += [(f"{stem}.jpg", image(n)), (f"{stem}.txt", stem)]
    (tmp_path / "x.tar").write_bytes(tar_of(*members))
    rows = rows_of(tmp_path / "x.tar")
    assert [row.caption for row in rows] == list(DOTTED)
    assert all(row.problem is None for row in rows)
    assert [read_image_bytes(row.image_ref, LIMIT) for row in rows] == [image(n) for n in range(5)]
    assert [row.url for row in rows][:3] == [f"x.tar/{stem}" for stem in DOTTED[:3]]


def test_dots_in_names_of_an_evaluation_tar(tmp_path):
    members = [
        ("t 2.0.jpg", image(0)),
        ("t 2.0.cls", "4"),
        ("t 2.0.txt", "a"),
        ("t 2.1.jpg", image(1)),
        ("t 2.1.cls", "5"),
        ("t 2.1.txt", "b"),
    ]
    (tmp_path / "x.tar").write_bytes(tar_of(*members))
    samples = list(read_shard(str(tmp_path / "x.tar")))
    assert [(sample.key, sample.image, sample.caption, sample.members["cls"]) for sample in samples] == [
        ("t 2.0", image(0), "a", b"4"),
        ("t 2.1", image(1), "b", b"5"),
    ]


ONE = [  # webdataset's ordinary samples stay one
    ("jpg", "txt"),
    ("jpg", "seg.png", "txt"),
    ("jpg", "cls"),
    ("txt",),
    ("jpg", "json", "mask.png"),
    ("image.jpg", "caption.txt"),
    ("image.jpg", "mask.png", "cls"),
    ("rgb.jpg", "depth.png", "txt"),
    ("0.jpg", "0.txt"),
    ("jpg", "jpg.txt"),
    ("jpg", "0.txt", "1.txt"),
    ("jpg", "png", "txt"),
    ("seg.png", "seg.json", "jpg", "txt"),
    ("input.jpg", "output.jpg", "edit.txt"),
]
SEVERAL = {
    ("0.jpg", "0.txt", "1.jpg", "1.txt"): {"k.0": {"jpg", "txt"}, "k.1": {"jpg", "txt"}},
    ("0.jpg", "0.jpg.txt", "1.jpg", "1.jpg.txt"): {"k.0": {"jpg", "txt"}, "k.1": {"jpg", "txt"}},
    ("0.jpg", "0.txt", "1.jpg"): {"k.0": {"jpg", "txt"}, "k.1": {"jpg"}},
    ("0.jpg", "1.jpg"): {"k.0": {"jpg"}, "k.1": {"jpg"}},
    ("0.jpg", "1.jpg", "txt", "json"): {"k.0": {"jpg", "txt", "json"}, "k.1": {"jpg", "txt", "json"}},
    ("0.jpg", "0.txt", "1.txt"): {"k.0": {"jpg", "txt"}, "k.1": {"txt"}},
    ("jpg", "txt", "0.jpg", "0.txt"): {"k": {"jpg", "txt"}, "k.0": {"jpg", "txt"}},
    ("left.jpg", "left.json", "right.jpg", "right.json"): {"k.left": {"jpg", "json"}, "k.right": {"jpg", "json"}},
    (" Jones.jpg", " Smith.jpg"): {"k. Jones": {"jpg"}, "k. Smith": {"jpg"}},
    (" A.jpg", " A.txt", " B.jpg"): {"k. A": {"jpg", "txt"}, "k": {" B.jpg"}},
    ("v1.0.jpg", "v1.0.txt", "v1.1.jpg", "v1.1.txt", "cls"): {
        "k.v1.0": {"jpg", "txt", "cls"},
        "k.v1.1": {"jpg", "txt", "cls"},
    },
}


@pytest.mark.parametrize("extensions", ONE)
def test_a_sample_of_several_members_is_one(extensions):
    members = {extension: extension for extension in extensions}
    assert subsamples("k", members) == [("k", members)]


@pytest.mark.parametrize("extensions", SEVERAL)
def test_several_samples_under_one_key(extensions):
    parted = subsamples("k", {extension: extension for extension in extensions})
    assert {key: set(members) for key, members in parted} == SEVERAL[extensions]
    taken = set[str]().union(*(members.values() for _, members in parted))
    assert taken == set(extensions)


def test_a_whole_tar_under_one_key(tmp_path):
    """``frame.000001.jpg`` is a usual name: as many samples as there are, in time that grows as they do."""
    members = []
    for n in range(20_000):
        members += [(f"frame.{n:06d}.jpg", b"x"), (f"frame.{n:06d}.txt", b"x")]
    found = subsamples("frame", {name.partition(".")[2]: name for name, _ in members})
    assert [key for key, _ in found] == [f"frame.{n:06d}" for n in range(20_000)]
    lone = {f"{n}.jpg": n for n in range(20_000)} | {f"a{n}.txt": n for n in range(20_000)}
    found = subsamples("x", lone)
    assert sum(len(own) for _, own in found) == len(lone)
    (tmp_path / "x.tar").write_bytes(tar_of(*members[:4000], form=tarfile.USTAR_FORMAT))
    assert len(rows_of(tmp_path / "x.tar")) == len(list(read_shard(str(tmp_path / "x.tar")))) == 2000


def test_what_stays_ambiguous_is_counted(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_of(("x.left.jpg", image(0)), ("x.right.jpg", image(1)), ("x.txt", "both")))
    assert told(tmp_path / "x.tar") == [("x", "both", None), ("x.right", None, "several images under one key")]


def test_the_caption_is_the_one_of_the_images_own_stem(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_of(("x.a.txt", "a"), ("x.b.jpg", image(0)), ("x.b.txt", "b")))
    assert [row[1] for row in told(tmp_path / "x.tar")] == ["b"]


def test_a_byte_order_mark_is_no_part_of_a_caption_or_json(tmp_path):
    members = [
        ("0.jpg", image(0)),
        ("0.txt", "\ufeffa cat"),
        ("1.jpg", image(1)),
        ("1.json", '\ufeff{"caption": "a dog"}'),
    ]
    (tmp_path / "x.tar").write_bytes(tar_of(*members))
    assert [(caption, why) for _, caption, why in told(tmp_path / "x.tar")] == [("a cat", None), ("a dog", None)]


def test_a_tar_of_macos_keeps_its_captions(tmp_path):
    members = [
        ("._0.jpg", b"junk"),
        ("0.jpg", image(0)),
        ("._0.txt", b"junk"),
        ("0.txt", "zero"),
        ("__MACOSX/0.jpg", b"junk"),
        (".DS_Store", b"junk"),
        ("a/._1.jpg", b"junk"),
        ("a/1.jpg", image(1)),
        ("a/.ipynb_checkpoints/1.jpg", b"junk"),
        ("a/1.txt", "one"),
    ]
    (tmp_path / "x.tar").write_bytes(tar_of(*members))
    assert told(tmp_path / "x.tar") == [("0", "zero", None), ("1", "one", None)]
    assert [sample.caption for sample in read_shard(str(tmp_path / "x.tar"))] == ["zero", "one"]


def test_a_tar_of_a_hidden_folder_says_so(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_of((".data/0.jpg", image(0)), (".data/0.txt", "zero")))
    assert told(tmp_path / "x.tar") == [("x.tar", None, "only hidden or system files")]


# forms of tar


@pytest.mark.parametrize("padding", [b"", bytes(512), bytes(10240), bytes(300_000 // 512 * 512)])
def test_concatenated_tars_are_read_whole(tmp_path, padding):
    halves = [tar_of(*pair(0), *pair(1)), padding, tar_of(*pair(2)), tar_of(*pair(3))]
    (tmp_path / "x.tar").write_bytes(b"".join(halves))
    assert told(tmp_path / "x.tar") == [(f"{n}", f"c{n}", None) for n in range(4)]
    assert [sample.caption for sample in read_shard(str(tmp_path / "x.tar"))] == ["c0", "c1", "c2", "c3"]


def test_what_follows_the_end_and_is_no_tar_is_named(tmp_path):
    whole = tar_of(*pair(0))
    (tmp_path / "x.tar").write_bytes(whole + b"\1" * 2048)
    assert told(tmp_path / "x.tar")[1:] == [("x.tar", None, "damaged tar")]
    (tmp_path / "x.tar").write_bytes(whole + bytes(2 << 20) + tar_of(*pair(1)))  # a hole in a file
    assert told(tmp_path / "x.tar")[1:] == [("x.tar", None, "damaged tar")]
    with pytest.raises(DataError, match="more zeros than any tar has after member 0"):
        list(read_shard(str(tmp_path / "x.tar")))


def test_a_tar_that_ends_in_terabytes_of_zeros_is_read(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_of(*pair(0)))
    os.truncate(tmp_path / "x.tar", 1 << 40)  # a hole: no byte on the disk
    assert told(tmp_path / "x.tar") == [("0", "c0", None)]
    with open(tmp_path / "x.tar", "r+b") as file:
        file.seek(-100, io.SEEK_END)
        file.write(b"x")
    assert told(tmp_path / "x.tar")[1:] == [("x.tar", None, "damaged tar")]


SPARSE = [("gnu",), ("pax", "--sparse-version=0.0"), ("pax", "--sparse-version=0.1"), ("pax", "--sparse-version=1.0")]


@pytest.mark.parametrize("form", SPARSE)
@pytest.mark.parametrize("pieces", [1, 3, 40])
def test_sparse_members_are_read(tmp_path, form, pieces):
    """GNU tar's own sparse members, of files with real holes: more than the map in one header holds."""
    names = []
    for number in range(3):
        with open(tmp_path / f"{number}.jpg", "wb") as file:
            file.write(image(number))
            for piece in range(1, pieces):
                file.seek(piece << 16)
                file.write(bytes([piece]) * 4096)
            file.truncate((pieces << 16) + 4096 * number)  # a hole at the end
        (tmp_path / f"{number}.txt").write_text(f"c{number}")
        names += [f"{number}.jpg", f"{number}.txt"]
    command = ["tar", "-C", str(tmp_path), "--sparse", f"--format={form[0]}", *form[1:], "-cf", f"{tmp_path}/x.tar"]
    subprocess.run([*command, *names], check=True)
    assert (tmp_path / "x.tar").stat().st_size < 3 * (pieces << 16)
    rows = rows_of(tmp_path / "x.tar")
    assert [(row.caption, row.problem) for row in rows] == [(f"c{n}", None) for n in range(3)]
    data = [(tmp_path / f"{number}.jpg").read_bytes() for number in range(3)]
    assert [read_image_bytes(row.image_ref, LIMIT) for row in rows] == data
    assert [sample.image for sample in read_shard(str(tmp_path / "x.tar"))] == data


def test_links_in_a_tar_are_the_members_they_lead_to(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in pair(0):
            info = tarfile.TarInfo(f"d/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data if isinstance(data, bytes) else data.encode()))
        links = {
            "e/1.jpg": (tarfile.LNKTYPE, "d/0.jpg"),
            "e/1.txt": (tarfile.SYMTYPE, "../d/0.txt"),
            "e/2.jpg": (tarfile.SYMTYPE, "1.jpg"),
            "e/3.jpg": (tarfile.SYMTYPE, "later.jpg"),
            "e/4.jpg": (tarfile.SYMTYPE, "/etc/passwd"),
            "e/5.jpg": (tarfile.SYMTYPE, "5.jpg"),
            "d/0.jpg": (tarfile.LNKTYPE, "d/0.jpg"),
        }
        for name, (kind, target) in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        info = tarfile.TarInfo("e/later.jpg")
        info.size = len(image(9))
        tar.addfile(info, io.BytesIO(image(9)))
    (tmp_path / "x.tar").write_bytes(file.getvalue())
    rows = rows_of(tmp_path / "x.tar")
    nowhere = "link to what is not in the tar"
    assert [(row.url, row.caption, row.problem) for row in rows] == [
        ("x.tar/d/0", "c0", None),
        ("x.tar/e/1", "c0", None),
        ("x.tar/e/2", None, None),
        ("x.tar/e/3", None, None),
        ("x.tar/e/4", None, nowhere),
        ("x.tar/e/5", None, nowhere),
        ("x.tar/e/later", None, None),
    ]
    found = [read_image_bytes(rows[index].image_ref, LIMIT) for index in (0, 1, 2, 3, 6)]
    assert found == [image(0), image(0), image(0), image(9), image(9)]


def test_hard_links_as_gnu_tar_writes_them(tmp_path):
    (tmp_path / "a.jpg").write_bytes(image(0))
    (tmp_path / "a.txt").write_text("a")
    for ending in ("jpg", "txt"):
        (tmp_path / f"b.{ending}").hardlink_to(tmp_path / f"a.{ending}")
    names = ["a.jpg", "a.txt", "b.jpg", "b.txt"]
    subprocess.run(["tar", "-C", str(tmp_path), "-cf", f"{tmp_path}/x.tar", *names, *names[:2]], check=True)
    assert told(tmp_path / "x.tar") == [("a", "a", None), ("b", "a", None)]
    assert [sample.image for sample in read_shard(str(tmp_path / "x.tar"))] == [image(0)] * 2


def test_images_first_with_dots_in_their_names(tmp_path):
    members = []
    for m in range(2):  # no two of a key side by side
        members += [(f"t {n}.{m}.jpg", image(10 * n + m)) for n in range(12)]
    members += [(name.replace("jpg", "txt"), name) for name, _ in members]
    (tmp_path / "x.tar").write_bytes(tar_of(*members))
    assert sorted(row[1] for row in told(tmp_path / "x.tar")) == sorted(name for name, _ in members[:24])


@pytest.mark.parametrize("first", ["jpg", "txt"])
def test_all_images_first_then_all_captions(tmp_path, first):
    members = []
    for number in range(50):
        members += pair(number)
    members.sort(key=lambda member: not member[0].endswith(first))
    data = tar_of(*members)
    (tmp_path / "x.tar").write_bytes(data)
    rows = rows_of(tmp_path / "x.tar")
    assert [(row.url, row.caption, row.problem) for row in rows] == [(f"x.tar/{n}", f"c{n}", None) for n in range(50)]
    assert [read_image_bytes(row.image_ref, LIMIT) for row in rows] == [image(n) for n in range(50)]
    with pytest.raises(DataError, match="not beside each other"):
        list(read_shard(str(tmp_path / "x.tar")))
    (tmp_path / "x.tar").write_bytes(data[: data.rindex(b"49") - 2000])  # some of the later members are cut off
    rows = rows_of(tmp_path / "x.tar")
    assert Counter(row.problem for row in rows)["truncated tar"] > 1
    assert all(row.caption for row in rows if row.problem is None)


def test_packed_tars_and_zips_are_named(tmp_path, caplog):
    whole = tar_of(*pair(0))
    folder = tmp_path / "packed"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.tar.gz").write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match=r"packed: has 3 .tar.gz, which cannot be read in place; unpack them"):
        detect(str(folder))
    (folder / "3.tar").write_bytes(whole)
    assert told(folder) == [("0", "c0", None)]
    assert caplog.text.count("files that are not taken: 3 .tar.gz; unpack what is packed") == 1
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("0.jpg", image(0))
    with pytest.raises(UserError, match=r"x.zip: a zip file .or a spreadsheet.; unpack it"):
        detect(str(tmp_path / "x.zip"))
    shutil.copy(tmp_path / "x.zip", folder / "4.tar")
    (folder / "5.tar").write_bytes(gzip.compress(whole))
    problems = [problem for _, _, problem in told(folder)]
    assert problems == [None, "a zip file (or a spreadsheet), not a tar", "packed with gzip, not a tar"]


def test_what_was_taken_for_a_tar_is_named(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name, data in {"0": tar_of(*pair(0)), "1": pointer.encode(), "2": b"<!DOCTYPE html><html>", "3": b""}.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
    reasons = ["a Git LFS pointer, not the file itself", "a web page, not the file itself", "truncated tar"]
    assert [problem for *_, problem in told(tmp_path)] == [None, *reasons]


def test_images_that_are_not_decoded_have_a_reason_that_says_so(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_of(("0.heic", b"x"), ("0.txt", "zero"), *pair(1), ("2.jxl", b"x")))
    assert told(tmp_path / "x.tar") == [
        ("0", "zero", "format not decoded: heic"),
        ("1", "c1", None),
        ("2", None, "format not decoded: jxl"),
    ]


def test_a_tar_without_captions_says_what_it_has(tmp_path, caplog):
    (tmp_path / "x.tar").write_bytes(tar_of(("0.jpg", image(0)), ("0.json", '{"n": 1}'), ("1.jpg", image(1))))
    assert [row[1] for row in told(tmp_path / "x.tar")] == [None, None]
    assert "no row has a caption: members seen were jpg, json" in caplog.text
    caplog.clear()
    (tmp_path / "x.tar").write_bytes(tar_of(("0.jpg", image(0)), *pair(1)))
    rows_of(tmp_path / "x.tar")
    assert "no row has a caption" not in caplog.text
