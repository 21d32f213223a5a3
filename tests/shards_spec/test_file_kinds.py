"""What a file is, by its first bytes, and what readers of text say of one that is none."""

import gzip
import io
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.ingest.config import IngestConfig
from pipeline.ingest.filters import read_exclusions
from pipeline.ingest.stage import ingest
from pipeline.pack.config import PackConfig
from shards_spec.class_names import read_class_names
from shards_spec.file_kinds import binary_kind, known_kind
from shards_spec.files import DataError, UserError, read_json
from shards_spec.vocab import read_vocabulary


def image(form: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, form)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("x"))
    return file.getvalue()


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"caption": ["a"], "url": ["http://x/y.jpg"]}), file)
    return file.getvalue()


NOISE = bytes(range(256)) * 2


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (image("JPEG"), "a JPEG image"),
        (image("PNG"), "a PNG image"),
        (image("GIF"), "a GIF image"),
        (image("WEBP"), "a WebP image"),
        (image("TIFF"), "a TIFF image"),
        (parquet(), "a Parquet file"),
        (tar(), "a tar"),
        (gzip.compress(b"x" * 100, mtime=0), "packed with gzip"),
        (b"PK\x03\x04" + bytes(30), "a zip file (or a spreadsheet)"),
        (NOISE, "binary"),
        (b"", None),
        (b"\xff\xfe", None),
        (b"caption\turl\n" * 20, None),
        ("caf\xe9 na\xefve\thttp://x/y\n".encode("latin-1") * 20, None),
        ("一只猫\thttp://x/y\n".encode() * 40, None),
        ("一只猫\thttp://x/y\n".encode("gb18030") * 40, None),
        (b"a\0b\thttp://x/y\n" * 20, None),
    ],
)
def test_the_kind_of_a_file(data, kind):
    assert binary_kind(data[:512]) == kind
    assert known_kind(data[:512]) == (None if kind == "binary" else kind)


@pytest.mark.parametrize(
    ("data", "said"), [(image("JPEG"), "a JPEG image"), (NOISE, "is binary, not"), (parquet(), "a Parquet file")]
)
def test_binary_files_are_named_and_never_printed(tmp_path, data, said):
    path = tmp_path / "x.tsv"
    path.write_bytes(data)
    readers = {
        "list": lambda: ingest(IngestConfig(str(tmp_path / "D"), (str(path),), format="cc3m")),
        "exclusions": lambda: read_exclusions([str(path)]),
        "stop words": lambda: PackConfig("R", stop_words=str(path)).rule,
        "class names": lambda: read_class_names(str(path)),
        "vocabulary": lambda: read_vocabulary(str(path)),
        "json": lambda: read_json(str(path)),
    }
    if said != "a Parquet file":
        readers["any list"] = lambda: ingest(IngestConfig(str(tmp_path / "D"), (str(path),)))
    for name, read in readers.items():
        with pytest.raises((UserError, DataError)) as found:
            read()
        assert said in str(found.value), name
        assert str(path) in str(found.value), name
        assert str(found.value).isascii(), name


def test_a_damaged_file_of_ours_is_to_be_made_again_and_a_list_to_be_converted(tmp_path):
    path = tmp_path / "all.tsv"
    path.write_bytes(b"# clipmill vocabulary {}\n\xe9\n")
    with pytest.raises(DataError, match=r"line 2 is not UTF-8 \(byte 0xe9\); make it again with `clipmill vocab`"):
        read_vocabulary(str(path))
    with pytest.raises(UserError, match=r"line 2 is not UTF-8 .*`iconv -f LATIN1 -t UTF-8 \S+.tsv > NEW` converts it"):
        read_class_names(str(path))
