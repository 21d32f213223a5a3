"""The ground floor: files, tar, keys, manifest, embeddings, vocabulary, views."""

import io
import os
import string
import subprocess
import sys
import tarfile

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_data import draw

from shards_spec import embeddings, files, manifest, tar, views, vocab
from shards_spec.files import DataError, UserError
from shards_spec.images import decode_rgb
from shards_spec.sample import Sample, check_key, check_keys, split_name
from shards_spec.tar import _header


def samples(count: int = 5) -> list[Sample]:
    return [Sample(f"{i:09d}", {"jpg": draw(str(i))[0], "txt": f"ø {i}".encode()}) for i in range(count)]


@pytest.fixture(params=["local", "url"])
def root(request, tmp_path) -> str:
    if request.param == "local":
        return str(tmp_path)
    fs = fsspec.filesystem("memory")
    if fs.exists("/t"):
        fs.rm("/t", recursive=True)
    return "memory://t"


def test_no_torch_at_import():
    code = (
        "import sys, importlib, pkgutil, shards_spec\n"
        "for m in pkgutil.iter_modules(shards_spec.__path__): importlib.import_module('shards_spec.' + m.name)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_files_are_whole_or_absent(root):
    path = files.join(root, "a", "b.bin")

    def die_half_way():
        with files.atomic_writer(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        die_half_way()
    assert not files.exists(path)
    assert files.names(files.join(root, "a")) == []
    files.write_bytes(path, b"one")
    files.write_bytes(path, b"two")
    assert files.read_bytes(path) == b"two"
    assert files.names(files.join(root, "a")) == ["b.bin"]
    assert files.sha256_file(path) == files.sha256_bytes(b"two")
    with files.read_buffer(path) as buffer:
        assert bytes(buffer) == b"two"
    files.remove(path)
    files.remove(path)
    assert not files.exists(path)


def test_stale_temporaries_of_dead_processes_go(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = files.socket.gethostname()
    mine, gone = (tmp_path / f".x.tar.{host}.{pid}.tmp" for pid in (os.getpid(), dead.pid))
    mine.touch(), gone.touch()
    files.remove_stale(str(tmp_path))
    assert mine.exists()
    assert not gone.exists()


def test_a_temporary_file_is_made_under_a_name_that_no_other_process_foresees(tmp_path, monkeypatch):
    tokens, seen, victim = iter(["same", "same", "other"]), list[str](), tmp_path / "victim"
    victim.write_bytes(b"mine")
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: next(tokens))
    with files.atomic_writer(str(tmp_path / "a")):
        seen += [name for name in os.listdir(tmp_path) if name.startswith(".a.")]
    (tmp_path / seen[0]).symlink_to(victim)  # even one that foresaw it gains nothing
    with pytest.raises(FileExistsError), files.atomic_writer(str(tmp_path / "a")) as file:
        file.write(b"through the link")
    assert victim.read_bytes() == b"mine"
    files.write_bytes(str(tmp_path / "a"), b"whole")
    assert sorted(os.listdir(tmp_path)) == ["a", "victim"]
    monkeypatch.undo()
    names = set[str]()
    for _ in range(2):
        with files.atomic_writer(str(tmp_path / "a")):
            names |= {name for name in os.listdir(tmp_path) if name.startswith(".a.")}
    assert len(names) == 2


def test_stale_temporaries_on_their_way_to_a_url_go_too(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    kill = "import os; from shards_spec import files\nwith files.atomic_writer('memory://x'): os.kill(os.getpid(), 9)"
    dead = subprocess.run([sys.executable, "-c", kill], env={**os.environ, "TMPDIR": str(tmp_path)})
    assert dead.returncode == -9
    assert len(os.listdir(tmp_path)) == 1
    with files.atomic_writer("memory://t/y"):
        files.remove_stale("memory://t")
        assert len(os.listdir(tmp_path)) == 1, "that of a process that lives"
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A folder, and what must stand before a command so that it has no room there for 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True).returncode == 0:
        yield str(disk), "pass"
        subprocess.run(["umount", disk], check=True)
    else:  # not root: a limit on a file's size fails in the same places
        yield str(disk), "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))"


@pytest.mark.parametrize("how", ["bytes", "tar", "parquet", "url"])
def test_a_full_disk_is_said_and_leaves_nothing(small_disk, how):
    disk, limit = small_disk
    path = "memory://full/x.bin" if how == "url" else f"{disk}/sub/x.bin"
    code = f"""
{limit}
import numpy as np, os, tempfile
from shards_spec import embeddings
from shards_spec import files
from shards_spec import sample
from shards_spec import tar
tempfile.tempdir = {disk!r}
files.write_bytes({path!r}, b"as before")
large = np.random.default_rng(0).normal(size=(1 << 13, 256))
try:
    if {how!r} == "tar":
        tar.write_shard({path!r}, [sample.Sample(str(n), {{"bin": bytes(1 << 20)}}) for n in range(4)])
    elif {how!r} == "parquet":
        embeddings.write_embeddings({path!r}, [str(n) for n in range(1 << 13)], {{"image_0": large}}, {{}})
    else:
        files.write_bytes({path!r}, bytes(4 << 20))
except files.UserError as error:
    print(error)
assert files.read_bytes({path!r}) == b"as before"
files.write_bytes({path!r}, bytes(1 << 19))  # there is room again
print(sorted(name for _, _, names in os.walk({disk!r}) for name in names))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"no space left on the disk of {disk if how == 'url' else path}: free some and rerun the same command "
        "to resume",
        "[]" if how == "url" else "['x.bin']",
    ], done.stderr


def test_free_bytes(tmp_path, small_disk):
    disk, limit = small_disk
    assert files.free_bytes("s3://bucket/x") is None
    free = files.free_bytes(str(tmp_path / "not" / "there" / "yet"))
    assert free is not None
    assert free > 0
    if limit == "pass":
        assert files.free_bytes(f"{disk}/x") == 2 << 20
    assert files.free_bytes("x") is not None


def test_json_that_is_none_is_named(tmp_path):
    files.write_bytes(str(tmp_path / "x.json"), b"{")
    with pytest.raises(DataError, match=r"x\.json: not a readable JSON file"):
        files.read_json(str(tmp_path / "x.json"))


def test_tar_round_trip_and_hash(root):
    path = files.join(root, "00000.tar")
    count, digest = tar.write_shard(path, samples())
    assert (count, digest) == (5, files.sha256_file(path))
    assert list(tar.read_shard(path)) == samples()
    tar.write_shard(path, samples())
    assert files.sha256_file(path) == digest


def test_a_shard_can_be_read_from_the_middle(tmp_path):
    path = str(tmp_path / "a.tar")
    tar.write_shard(path, samples())
    with files.read_buffer(path) as buffer:
        members = [members for _, members in tar.index_shard(buffer, path)]
    for index, found in enumerate(members):
        start = min(member.offset for member in found.values()) - tar.BLOCK
        assert list(tar.read_shard(path, start)) == samples()[index:]


def test_members_larger_than_a_write_keep_their_order(tmp_path):
    large = [Sample(str(i), {"jpg": bytes([i]) * (tar.AT_ONCE * i // 2 + i), "txt": b"x"}) for i in range(5)]
    path = str(tmp_path / "a.tar")
    assert tar.write_shard(path, large) == (5, files.sha256_file(path))
    assert list(tar.read_shard(path)) == large


def test_a_size_below_zero_is_a_damaged_header_and_no_endless_loop(tmp_path):
    path = tmp_path / "a.tar"
    tar.write_shard(str(path), samples())
    data = bytearray(path.read_bytes())
    data[124:136] = b"-0000001000\0"
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    path.write_bytes(data)
    with pytest.raises(files.DataError, match="no tar header after member"):
        list(tar.read_shard(str(path)))


@given(st.text(string.ascii_letters + string.digits + "_-/.", min_size=1, max_size=160), st.integers(0, 8**11 - 1))
def test_headers_are_tarfiles(name, size):
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o444, 0
    try:
        expected = info.tobuf(tarfile.USTAR_FORMAT)
    except ValueError:  # too long for USTAR
        return
    assert _header(name, size) == expected


def test_tar_is_read_by_tarfile_and_webdataset(tmp_path):
    import webdataset as wds

    path = str(tmp_path / "00000.tar")
    tar.write_shard(path, samples())
    with tarfile.open(path) as plain:
        assert plain.getnames()[:2] == ["000000000.jpg", "000000000.txt"]
        assert {(m.mtime, m.uid, m.mode) for m in plain.getmembers()} == {(0, 0, 0o444)}
    assert os.path.getsize(path) % tarfile.RECORDSIZE == 0
    read = list(wds.WebDataset(path, shardshuffle=False))
    assert [(s["__key__"], s["txt"]) for s in read] == [(s.key, s.members["txt"]) for s in samples()]


def test_foreign_tars_with_long_names_are_read(tmp_path):
    name = "folder/" + "x" * 140
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as file:
            info = tarfile.TarInfo(f"{name}.txt")
            info.size = 3
            file.addfile(info, io.BytesIO(b"abc"))
        assert [(s.key, s.members) for s in tar.read_shard(str(tmp_path / "a.tar"))] == [(name, {"txt": b"abc"})]


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, "end"])
def test_truncated_tar_names_the_last_whole_member(tmp_path, cut):
    path = tmp_path / "00000.tar"
    tar.write_shard(str(path), samples())
    whole = path.read_bytes()
    content = len(whole.rstrip(b"\0"))
    content = content + 1024 if cut == "end" else int(content * cut)
    path.write_bytes(whole[: content // 512 * 512 + (100 if cut == 0.5 else 0)])
    with pytest.raises(
        DataError, match=r"00000\.tar: truncated tar, last whole member (00000000\d\.(jpg|txt)|\(none\))"
    ):
        list(tar.read_shard(str(path)))


def test_damaged_header_is_found(tmp_path):
    path = tmp_path / "00000.tar"
    tar.write_shard(str(path), samples())
    data = bytearray(path.read_bytes())
    second = data.index(b"000000000.txt")
    data[second + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"damaged tar header after member 000000000\.jpg"):
        list(tar.read_shard(str(path)))


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        (["a", "c", "b"], "row 1 is key c, the shard has b there"),
        (["a", "b"], "2 rows, the shard has 3, first odd key c"),
        (["a", "b", "c", "d"], "4 rows, the shard has 3, first odd key d"),
    ],
)
def test_keys_of_another_shard_are_told_by_their_row(stored, found):
    with pytest.raises(DataError) as error:
        check_keys("D/x.parquet", stored, ["a", "b", "c"], "make it again")
    assert str(error.value) == f"D/x.parquet: {found}; make it again"
    check_keys("D/x.parquet", ("a", "b"), ["a", "b"], "make it again")


def test_bad_and_repeated_keys_are_refused(tmp_path):
    path = str(tmp_path / "x.tar")
    for key in ("a.b", "", "é", "a b", "x" * 100, "/a"):
        with pytest.raises(DataError, match="no dots"):
            check_key(key)
    with pytest.raises(DataError, match="key a twice"):
        tar.write_shard(path, [Sample("a", {"txt": b""}), Sample("a", {"txt": b""})])
    assert not os.path.exists(path)
    with tarfile.open(path, "w") as file:
        for name in ("a.txt", "b.txt", "a.jpg"):
            file.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match="key a is there twice"):
        list(tar.read_shard(path))


def test_split_name_is_webdatasets_rule():
    assert split_name("a.b/c.d.JPG") == ("a.b/c", "d.jpg")


def test_sample_problems_name_the_key():
    with pytest.raises(DataError, match="key k: its txt member is not UTF-8"):
        _ = Sample("k", {"txt": b"\xff"}).caption
    with pytest.raises(DataError, match="key k: its json member does not parse"):
        _ = Sample("k", {"json": b"{"}).meta
    with pytest.raises(DataError, match="key k: no image member"):
        _ = Sample("k", {"json": b"{}"}).image


def test_done_records_and_gaps(root):
    folder = files.join(root, "shards")
    for shard in (0, 1, 3):
        manifest.Done(
            "pack", shard, {"a": 1}, {"success": 2, "resize: odd": 1, "gone": 4}, {"i": "x"}, {"o": "y"}
        ).write(folder)
    done = manifest.read_done(folder, 1)
    assert done is not None
    assert (done.successes, done.config, done.inputs) == (2, {"a": 1}, {"i": "x"})
    stats = files.read_json(files.join(folder, "00001_stats.json"))
    assert (stats["count"], stats["successes"], stats["failed_to_download"], stats["failed_to_resize"]) == (7, 2, 4, 1)
    with pytest.raises(DataError, match=r"shards \[2\] are missing or unfinished"):
        manifest.shard_ids(folder)
    assert manifest.read_done(folder, 2) is None


def test_another_spec_version_is_refused(tmp_path):
    files.write_json(str(tmp_path / "dataset.json"), {"spec_version": 99})
    with pytest.raises(UserError, match="spec version 99, this clipmill reads 1"):
        manifest.read_dataset(str(tmp_path))
    with pytest.raises(UserError, match="run `clipmill pack"):
        manifest.shard_sizes(str(tmp_path))


@pytest.mark.parametrize(
    "text", ["3.5", "[", "{}", '{"00001.tar": 3}', '{"a": 3}', '{"00000.tar": "3"}', '{"00000.tar": -1}']
)
def test_damaged_sizes_of_shards_are_named(tmp_path, text):
    files.write_bytes(str(tmp_path / "shards/sizes.json"), text.encode())
    with pytest.raises(DataError, match=r"shards/sizes.json.*delete it and run `clipmill pack"):
        manifest.shard_sizes(str(tmp_path))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("int8", 5e-3)])
def test_embeddings_round_trip(root, dtype, tolerance):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(7, 16)).astype(np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    sparse = values.copy()
    sparse[3] = np.nan
    path = files.join(root, "t", "00000.parquet")
    keys = [f"k{i}" for i in range(7)]
    embeddings.write_embeddings(path, keys, {"image_0": values, "text_0": sparse}, {"model": "m"}, dtype)
    read_keys, columns, meta = embeddings.read_embeddings(path, ["text_0", "image_0"])
    assert read_keys == keys
    assert (meta["model"], meta["dim"], meta["dtype"]) == ("m", 16, dtype)
    assert np.abs(columns["image_0"] - values).max() < tolerance
    assert np.isnan(columns["text_0"][3]).all()
    assert np.abs(np.delete(columns["text_0"], 3, 0) - np.delete(values, 3, 0)).max() < tolerance
    with pytest.raises(DataError, match="no column image_9"):
        embeddings.read_embeddings(path, ["image_9"])


def test_embeddings_of_other_files_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    files.write_bytes(str(tmp_path / "a.parquet"), b"PAR1 not at all")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        embeddings.read_meta(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="not a teacher cache"):
        embeddings.read_meta(str(tmp_path / "b.parquet"))


def test_vocabulary_order_threshold_and_round_trip(tmp_path):
    counts = {"n3": 5, "n1": 9, "n2": 9, "n4": 2}
    built = vocab.build_vocabulary(counts, counts, {w: w for w in counts}, {"rule": "r"}, min_count=2)
    shuffled = vocab.build_vocabulary(
        dict(reversed(counts.items())), counts, {w: w for w in counts}, {"rule": "r"}, min_count=2
    )
    assert [row[0] for row in built.rows] == ["n1", "n2", "n3"]  # count > threshold, ties by WNID
    assert built.sha256 == shuffled.sha256
    assert built.labels(["n3", "n9", "n1", "n3"]) == [0, 2]
    path = tmp_path / "v.tsv"
    built.write(str(path))
    assert vocab.read_vocabulary(str(path)) == built
    path.write_text(path.read_text().replace("n3\t", "n5\t"))
    with pytest.raises(DataError, match="it was edited"):
        vocab.read_vocabulary(str(path))
    path.write_text("a\tb\n")
    with pytest.raises(DataError, match="not a clipmill vocabulary"):
        vocab.read_vocabulary(str(path))
    with pytest.raises(UserError, match="--min-count 9 leaves no synset: the most frequent one counts 9"):
        vocab.build_vocabulary(counts, counts, {}, {}, min_count=9)


def test_views_are_pure_and_differ():
    spec = views.ViewSpec(seed=1, ops=2)
    assert views.draw_view(spec, "k", 3) == views.draw_view(spec, "k", 3)
    drawn = {views.draw_view(spec, key, v) for key in "ab" for v in range(4)}
    drawn.add(views.draw_view(views.ViewSpec(seed=2, ops=2), "a", 0))
    assert len(drawn) == 9


def test_views_follow_their_ranges():
    spec = views.ViewSpec(scale=(0.3, 0.6), flip=0.25, ops=1)
    drawn = [views.draw_view(spec, "k", v) for v in range(4000)]
    boxes = np.array([views.crop_box(spec, view, 300, 200) for view in drawn])
    assert boxes.min() >= 0
    assert boxes[:, [0, 2]].max() <= 300 + 1e-6
    assert boxes[:, [1, 3]].max() <= 200 + 1e-6
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 60000
    assert areas.min() > 0.29
    assert areas.max() < 0.605  # sides are whole pixels
    assert abs(np.mean([view.flip for view in drawn]) - 0.25) < 0.03
    assert {operation for view in drawn for operation, _ in view.ops} == set(range(14))


def test_view_spec_without_augmentation_is_the_centre_crop():
    image = Image.open(io.BytesIO(draw("c", 64)[0]))
    spec = views.ViewSpec(scale=None)
    left = (image.width - 64) / 2
    expected = image.resize((32, 32), Image.Resampling.BICUBIC, box=(left, 0, left + 64, 64))
    assert views.apply_view(image, spec, views.draw_view(spec, "k", 0), 32).tobytes() == expected.tobytes()


def test_the_same_view_at_two_sizes_shows_the_same_crop():
    noise = np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8)
    image = Image.fromarray(noise).resize((400, 320), Image.Resampling.BICUBIC)
    spec = views.ViewSpec(scale=(0.2, 0.5), flip=0.5)
    for v in range(5):
        view = views.draw_view(spec, "k", v)
        small = np.asarray(views.apply_view(image, spec, view, 32), float)
        large = np.asarray(views.apply_view(image, spec, view, 128).resize((32, 32), Image.Resampling.BOX), float)
        assert np.abs(small - large).mean() < 2


def test_bad_view_specs_are_refused():
    with pytest.raises(UserError, match="scale"):
        views.ViewSpec(scale=(0.5, 0.1))
    with pytest.raises(UserError, match="magnitude"):
        views.ViewSpec(magnitude=31)


def test_images_that_do_not_decode_say_why():
    good, _ = draw("x")
    assert decode_rgb(good).mode == "RGB"
    for bad in (b"", b"<html>", good[: len(good) // 2]):
        with pytest.raises(DataError, match="does not decode"):
            decode_rgb(bad)
