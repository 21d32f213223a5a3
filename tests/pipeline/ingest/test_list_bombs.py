"""Small lists that unpack to more than a machine has: read in bounded memory, each row with its reason."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from web_server import make_image

pytestmark = pytest.mark.integration

URL = "http://127.0.0.1:9/1"
MOST_MIB = 1024  # of any process; VmHWM, because ru_maxrss knows of the process before the exec
HUGE = 300 << 20  # bytes of a cell
RUN = r"""
import collections, json, re, sys
from pipeline.ingest.image_bytes import ImageReadError, read_image_bytes
from pipeline.ingest.detect import detect
from pipeline.ingest.estimate import estimate_rows
from pipeline.ingest.url_lists import list_rows

def outcome(row):
    try:
        return row.problem or (read_image_bytes(row.image_ref, 20_000_000) and "read" if row.image_ref else "link")
    except ImageReadError as error:
        return str(error)

found = {}
for source in sys.argv[1:]:
    form = detect(source)
    estimate_rows(source, form)
    found[source] = collections.Counter(outcome(row) for row in list_rows(source, form))
print(json.dumps([found, int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) >> 10]))
"""
INGEST = r"""
import json, re, sys
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
if __name__ == "__main__":
    config = IngestConfig(sys.argv[1], sys.argv[2], allow_private=True, workers=1, retries=0)
    counts = ingest(config).counts
    print(json.dumps([counts, int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) >> 10]))
"""


def run(script: str, *arguments: object) -> tuple[dict, int]:
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def write_gzip(path: Path, *parts: bytes) -> None:
    with gzip.open(path, "wb", 1) as file:
        for part in parts:
            file.write(part)


def write_parquet(path: Path, columns: dict[str, object], **options) -> None:
    small = {"compression": "zstd", "store_schema": False, "dictionary_pagesize_limit": 1 << 30}
    pq.write_table(pa.table(columns), path, **{**small, **options})


def test_text_lists_with_one_huge_field(tmp_path):
    piece = b"x" * (1 << 20)
    huge = [piece] * (HUGE >> 20)
    rest = f"ok,{URL}\n".encode()
    write_gzip(tmp_path / "quoted.csv.gz", b'caption,url\n"', *huge, b'",http://h/1\n', rest)
    write_gzip(tmp_path / "open.csv.gz", b'caption,url\n"', *huge, b",http://h/1\n", rest)
    write_gzip(tmp_path / "raw.tsv.gz", rest.replace(b",", b"\t"), *huge, b"\thttp://h/1\n", rest.replace(b",", b"\t"))
    sources = [tmp_path / name for name in ("quoted.csv.gz", "open.csv.gz", "raw.tsv.gz")]
    found, mib = run(RUN, *sources)
    assert [found[str(source)]["line too long"] for source in sources] == [1, 1, 1]
    assert [found[str(source)]["link"] for source in sources] == [1, 1, 2]
    assert mib < MOST_MIB / 4


def test_a_list_of_long_captions_is_ingested_in_bounded_memory(tmp_path):
    line = ("\U0001f600" + "y" * 30_000).encode() + f"\t{URL}\n".encode()
    write_gzip(tmp_path / "l.tsv.gz", *[line] * 14_000)
    counts, mib = run(INGEST, tmp_path / "D", tmp_path / "l.tsv.gz")
    assert sum(counts.values()) == 14_000
    assert set(counts) == {"caption too long", "connection refused"}
    assert mib < MOST_MIB


def test_parquet_files_with_huge_cells_and_dictionaries(tmp_path):
    links, huge = [URL] * 4000, pa.array(["a", "x" * HUGE], pa.large_string())
    large = pa.array(["x" * (10 << 20)])
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), large)
    lists = pa.ListArray.from_arrays(
        pa.array(range(0, 8001, 2), pa.int32()),
        pa.DictionaryArray.from_arrays(pa.array([0] * 8000, pa.int32()), large),
    )
    plain = {"use_dictionary": False}
    tables = {
        "cell": ({"caption": huge, "url": links[:2]}, plain),
        "url": ({"caption": ["a", "b"], "url": huge}, plain),
        "other": ({"caption": ["a", "b"], "url": links[:2], "more": huge}, plain),
        "dictionary": ({"caption": shared, "url": links}, {}),
        "stored": ({"caption": shared, "url": links}, {"store_schema": True}),
        "others": ({"caption": links, "url": links, "more": shared, "lists": lists}, {}),
        "lists": ({"caption": lists, "url": links}, {}),
    }
    for name, (columns, options) in tables.items():
        write_parquet(tmp_path / f"{name}.parquet", columns, **options)
        assert (tmp_path / f"{name}.parquet").stat().st_size < 100_000
    found, mib = run(RUN, *(tmp_path / f"{name}.parquet" for name in tables))
    assert {Path(path).stem: counts for path, counts in found.items()} == {
        "cell": {"cell too large": 2},
        "url": {"cell too large": 2},
        "other": {"link": 2},
        "dictionary": {"caption too long": 4000},
        "stored": {"caption too long": 4000},
        "others": {"link": 4000},
        "lists": {"caption too long": 8000},
    }
    assert mib < MOST_MIB / 2


def test_good_row_groups_beside_one_that_is_too_large(tmp_path):
    caption = pa.array(["a", "b", "x" * HUGE, "c"], pa.large_string())
    columns = {"caption": caption, "url": [URL] * 4}
    write_parquet(tmp_path / "l.parquet", columns, use_dictionary=False, row_group_size=2)
    found, mib = run(RUN, tmp_path / "l.parquet")
    assert list(found.values()) == [{"link": 2, "cell too large": 2}]
    assert mib < MOST_MIB / 2


@pytest.mark.parametrize("form", ["plain", "struct"])
def test_a_huge_image_in_a_parquet_file(tmp_path, form):
    images = pa.array([make_image(1), make_image(2), b"x" * HUGE, make_image(3)], pa.large_binary())
    column = images if form == "plain" else pa.StructArray.from_arrays([images], ["bytes"])
    columns = {"image": column, "caption": list("abcd")}
    write_parquet(tmp_path / "l.parquet", columns, use_dictionary=False, row_group_size=2)
    found, mib = run(RUN, tmp_path / "l.parquet")
    assert list(found.values()) == [{"read": 2, "too large": 2}]
    assert mib < MOST_MIB / 2
