"""Copies of remote files: whole, made once per machine, new when the file is, bounded, and named by their URL."""

import itertools
import multiprocessing
import os
import time

import fsspec
import pytest

from shards_spec.files import DataError, UserError
from training.data import local_copies
from training.data.local_copies import LocalFileCache
from training.data.shard_reader import ShardReader

FORK = multiprocessing.get_context("fork")
numbers = itertools.count()


@pytest.fixture
def url():
    """A new folder of the memory store."""
    return f"memory://remote{next(numbers)}"


def put(url, data):
    fsspec.filesystem("memory").pipe_file(url, data)
    return url


def copies(folder):
    return sorted(entry.name.split("-", 1)[1] for entry in folder.iterdir() if not entry.name.startswith("."))


def wait_for(folder, names):
    end = time.monotonic() + 10
    while copies(folder) != names and time.monotonic() < end:
        time.sleep(0.01)
    assert copies(folder) == names


def test_a_local_file_stays_where_it_is(tmp_path):
    assert LocalFileCache(str(tmp_path / "scratch")).get("/some/file") == "/some/file"
    assert not (tmp_path / "scratch").exists()


def test_a_remote_file_is_copied_once_and_again_when_it_changed(url, tmp_path, monkeypatch):
    path, read = put(f"{url}/a.tar", b"one"), []
    monkeypatch.setattr(
        local_copies, "read_bytes", lambda path: read.append(path) or fsspec.filesystem("memory").cat_file(path)
    )
    for one in (LocalFileCache(str(tmp_path)), LocalFileCache(str(tmp_path))):
        with open(one.get(path), "rb") as file:
            assert file.read() == b"one"
    assert read == [path]
    put(path, b"other")
    with open(LocalFileCache(str(tmp_path)).get(path), "rb") as file:
        assert file.read() == b"other"
    assert read == [path, path]


@pytest.mark.parametrize("planted", ["nothing", "readable", "writable", "link", "file", "other user's"])
def test_the_folder_among_temporary_files_is_this_users_alone(url, tmp_path, monkeypatch, planted, caplog):
    monkeypatch.setattr(local_copies.tempfile, "tempdir", str(tmp_path))
    usual, elsewhere = tmp_path / f"clipmill-{os.getuid()}", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if planted in ("readable", "writable", "other user's"):
        usual.mkdir()
        usual.chmod(0o755 if planted == "readable" else 0o777)
    if planted == "link":
        usual.symlink_to(elsewhere)
    if planted == "file":
        usual.touch()
    if planted == "other user's":
        usual.chmod(0o700)
        os.chown(usual, 12345, 12345) if os.getuid() == 0 else pytest.skip("only root gives folders away")
    copy = LocalFileCache().get(put(f"{url}/a.tar", b"one"))
    folder = os.path.dirname(copy)
    assert (os.stat(folder).st_uid, os.stat(folder).st_mode & 0o777) == (os.getuid(), 0o700)
    assert (folder == str(usual)) == (planted in ("nothing", "readable"))
    assert list(elsewhere.iterdir()) == []
    assert ("not this user's alone" in caplog.text) == (folder != str(usual))


def test_a_lock_is_no_way_to_another_file(url, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    for number in range(256):
        (tmp_path / f".lock-{number:02x}").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        LocalFileCache(str(tmp_path)).get(put(f"{url}/a.tar", b"one"))
    assert victim.read_bytes() == b"mine"


def test_files_of_one_name_in_two_places_are_two(url, tmp_path):
    one, other = (
        LocalFileCache(str(tmp_path)).get(put(f"{url}/{place}/a.tar", place.encode())) for place in ("x", "y")
    )
    assert one != other
    assert copies(tmp_path) == ["a.tar", "a.tar"]


def test_what_was_used_last_stays(url, tmp_path, monkeypatch):
    monkeypatch.setattr(local_copies, "KEEP_SECONDS", 0)
    cache = LocalFileCache(str(tmp_path), limit=25)
    for name in "abcd":
        copy = cache.get(put(f"{url}/{name}", bytes(10)))
        os.utime(copy, (0, time.time() - 100 + ord(name)))
        if name != "a":
            os.utime(cache.get(f"{url}/a"), (0, time.time() - 1))
    assert copies(tmp_path) == ["a", "d"]


def test_what_another_process_may_open_any_moment_stays(url, tmp_path):
    cache = LocalFileCache(str(tmp_path), limit=25)
    for name in "abcd":
        cache.get(put(f"{url}/{name}", bytes(10)))
    assert copies(tmp_path) == ["a", "b", "c", "d"]


def test_a_disk_without_room_is_named(url, tmp_path, monkeypatch):
    monkeypatch.setattr(local_copies, "SPARE_BYTES", 1 << 60)
    with pytest.raises(UserError, match=rf"{url}/a: its 3 bytes do not fit into {tmp_path}.*--scratch"):
        LocalFileCache(str(tmp_path)).get(put(f"{url}/a", b"one"))
    assert copies(tmp_path) == []


def test_ahead_brings_what_get_then_finds(url, tmp_path):
    cache, path = LocalFileCache(str(tmp_path)), put(f"{url}/a", b"one")
    cache.prefetch([f"{url}/missing", path, str(tmp_path / "local, and missing")])
    wait_for(tmp_path, ["a"])


def prefetch_and_read(folder, path, queue):
    cache = LocalFileCache(folder)
    cache.prefetch([path])
    with open(cache.get(path), "rb") as file:
        queue.put(file.read())


def test_a_forked_process_reads_ahead_too(url, tmp_path):
    cache = LocalFileCache(str(tmp_path))
    path = put(f"{url}/a", b"one")
    queue = FORK.Queue()
    cache.prefetch([put(f"{url}/first", b"")])  # now the parent has a thread, which is idle
    wait_for(tmp_path, ["first"])
    children = [FORK.Process(target=prefetch_and_read, args=(str(tmp_path), path, queue)) for _ in range(3)]
    for child in children:
        child.start()
    assert [queue.get(timeout=20) for _ in children] == [b"one"] * 3
    assert copies(tmp_path) == ["a", "first"]


def test_a_remote_shard_that_is_not_there_is_named_by_its_url(url, tmp_path):
    reader = ShardReader(url, "shards", [3], file_cache=LocalFileCache(str(tmp_path)))
    with pytest.raises(DataError, match=rf"{url}/shards/00000\.tar is not there"):
        reader.sample(0, 0)
