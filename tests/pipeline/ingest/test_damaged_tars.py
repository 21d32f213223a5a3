"""Damaged and hostile members of tars fail only their own sample, and reading them always ends."""

import io
import json
import logging
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tars import image, pair, tar_of, told

from pipeline.ingest.url_lists import list_rows
from shards_spec.files import DataError
from shards_spec.sample import Sample
from shards_spec.tar import read_shard


def pax(records: bytes, name: bytes = b"1.jpg", data: bytes = b"") -> bytes:
    """A pax header with these records, and the member it is for."""
    parts = []
    for kind, content, own in ((b"x", records, b"pax"), (b"0", data, name)):
        header = bytearray(512)
        header[: len(own)] = own
        header[124:136] = b"%011o\0" % len(content)
        header[156:157] = kind
        header[257:265] = b"ustar\x0000"
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        parts += [bytes(header), content, bytes(-len(content) % 512)]
    return b"".join(parts)


BAD_PAX = [
    b"0 path=x.jpg\n",
    b"00 a=b\n",
    b"-5 a=b\n",
    b"x a=b\n",
    b"99 a=b\n",
    b"3 a=b\n",
    b"8 a=bc\n",
    b"1" * 5000 + b" a=b\n",
    b"12 size=abc\n",
    b"11 size=-1\n",
    b"path=x.jpg\n",
    b"\xff" * 600,
    b"5 ab\n",
    b"%d size=%s\n" % (5008, b"9" * 4996),
]


@pytest.mark.parametrize("records", BAD_PAX)
def test_a_pax_record_that_is_none_fails_only_its_sample(tmp_path, records):
    before = tar_of(*pair(0), form=tarfile.USTAR_FORMAT).rstrip(b"\0")
    whole = before + bytes(-len(before) % 512) + pax(records, data=image(1)) + tar_of(*pair(2))
    (tmp_path / "x.tar").write_bytes(whole)
    assert told(tmp_path / "x.tar") == [("0", "c0", None), ("1", None, "damaged pax header"), ("2", "c2", None)]
    with pytest.raises(DataError, match=r"member 1\.jpg: damaged pax header"):
        list(read_shard(str(tmp_path / "x.tar")))


BAD_SPARSE = [
    {"GNU.sparse.major": "1", "GNU.sparse.realsize": "x"},
    {"GNU.sparse.major": "1", "GNU.sparse.realsize": "100"},
    {"GNU.sparse.size": str(1 << 60), "GNU.sparse.map": "0,10"},
    {"GNU.sparse.size": "9", "GNU.sparse.map": "0,10"},
    {"GNU.sparse.size": "100", "GNU.sparse.map": "50,10,0,10"},
    {"GNU.sparse.size": "100", "GNU.sparse.map": "0,90"},
    {"GNU.sparse.size": "100", "GNU.sparse.map": "0"},
    {"GNU.sparse.size": "100", "GNU.sparse.map": "a,b"},
]


@pytest.mark.parametrize("records", BAD_SPARSE)
def test_a_sparse_map_that_does_not_fit_fails_only_its_sample(tmp_path, records):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("1.jpg")
        info.size, info.pax_headers = 20, records
        tar.addfile(info, io.BytesIO(b"9" * 20))
    (tmp_path / "x.tar").write_bytes(file.getvalue() + tar_of(*pair(2)))
    (url, _, problem), good = told(tmp_path / "x.tar")
    assert (url, good) == ("1", ("2", "c2", None))
    assert problem in ("damaged pax header", "damaged sparse member")


DEEP = "[" * 5000 + "]" * 5000
BAD_JSON = [
    '{"n": ' + "9" * 5000 + "}",
    '{"a": ' + DEEP + "}",
    '{"a": ' + "[" * 300 + "]" * 300 + "}",
    "[1]",
    "{",
    "\xff",
]


@pytest.mark.parametrize("text", BAD_JSON, ids=range(6))
def test_a_json_member_that_cannot_be_used_fails_only_its_sample(tmp_path, text):
    (tmp_path / "x.tar").write_bytes(tar_of(("0.jpg", image(0)), ("0.json", text), *pair(1)))
    assert told(tmp_path / "x.tar") == [("0", None, "json member is not a JSON object"), ("1", "c1", None)]
    sample = Sample("0", {"jpg": b"", "json": text.encode()})
    for read in (lambda: sample.meta, lambda: sample.captions):
        with pytest.raises(DataError, match=r"^key 0: its json member .{5,160}$"):
            read()


def test_json_members_that_are_large_and_sound_are_read():
    boxes = {"boxes": [[n, [n, {"a": [n]}]] for n in range(1000)], "n": int("9" * 4000)}
    assert Sample("0", {"json": json.dumps(boxes).encode()}).meta == boxes


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_noise_anywhere_in_a_tar_of_every_form_ends(tmp_path_factory, data):
    """Whatever the bytes: rows with reasons, or DataError; nothing else, and no hang."""
    path = tmp_path_factory.mktemp("t") / "x.tar"
    whole = bytearray(EVERY_FORM)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        noise = data.draw(st.binary(min_size=1, max_size=20))
        whole[place : place + len(noise)] = noise
    path.write_bytes(whole)
    logging.disable()
    try:
        assert json.dumps([row.url for row in list_rows(str(path), "webdataset")])
        list(read_shard(str(path)))
    except DataError:
        pass
    finally:
        logging.disable(logging.NOTSET)


def _every_form() -> bytes:
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s.jpg", "GNU.sparse.realsize": "9"}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, headers, content in (
            ("x", sparse, b"1\n0\n9\n" + bytes(506) + b"123456789"),
            ("é" * 120 + ".jpg", {}, b"2"),
        ):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(content), headers
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()[:5120] + tar_of(*pair(0), ("n" * 150 + ".txt", "long"), form=tarfile.GNU_FORMAT)


EVERY_FORM = _every_form()
