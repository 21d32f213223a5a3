"""Rows to images: links that occur twice, late shards, the progress line, images in place, a full disk, memory."""

import io
import itertools
import os
import re
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_ingest import config, rows_of, write_list
from web_server import make_image, serve

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.ingest.downloader import DownloadTally
from pipeline.ingest.raw_shard import SCHEMA
from pipeline.ingest.stage import ROWS_BEFORE_WARNING, _status_text, ingest
from shards_spec.sample import Sample
from shards_spec.tar import read_shard

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


def test_the_same_link_twice_is_fetched_once_and_keeps_both_captions(server, tmp_path):
    url = f"{server.url}/good/77?twice"
    rows = [(url, "one"), (f"{server.url}/good/78", "other"), (url, "two"), (f"{server.url}/gone?twice", "a")] * 2
    ingest(config(tmp_path / "D", write_list(tmp_path / "l.tsv", rows), dedup="near"))
    found = rows_of(tmp_path / "D")
    good = [row["caption"] for row in found if row["status"] == "success"]
    assert good == ["one", "other", "two", "one", "other", "two"]
    assert server.requests["good/77?twice"] == server.requests["gone?twice"] == 1
    assert check(CheckConfig(str(tmp_path / "D"))) == []


def test_a_slow_shard_gives_its_late_links_up(server, tmp_path):
    rows = [(f"{server.url}/good/{n}", f"c{n}") for n in range(60)]
    rows += [(f"{server.url}/slow/20?{n}", "late") if n % 2 else (f"{server.url}/good/{n}", "g") for n in range(10)]
    start = time.monotonic()
    summary = ingest(config(tmp_path / "D", write_list(tmp_path / "l.tsv", rows), timeout_s=20, open_shards=2))
    assert time.monotonic() - start < 15
    assert summary.counts == {"success": 65, "timeout": 5}
    assert [row["error_message"] for row in rows_of(tmp_path / "D", 6)] == [None, "timeout"] * 5


def test_the_progress_line():
    tally = DownloadTally(started=time.monotonic() - 10)
    assert tally.format(None) == ""
    for outcome in ["HTTP 404"] * 2 + ["timeout"]:
        tally.add(outcome)
    from pipeline.ingest.images import EncodedImage

    for _ in range(7):
        tally.add(EncodedImage(b"x" * 100, 1, 1, 1, 1, "{}", "", None))
    assert (
        tally.format(3600) == "10 rows, 1 images/s, 70.0 % good, HTTP 404 20.0 %, timeout 10.0 %, about 1 h 00 min left"
    )
    assert tally.image_bytes == 700


def test_what_is_kept_of_an_image(server, tmp_path):
    ingest(config(tmp_path / "D", write_list(tmp_path / "l.tsv", [(f"{server.url}/noise/3", "x")])))
    (row,) = rows_of(tmp_path / "D")
    assert SCHEMA.names[-2:] == ["sha256", "phash"]
    assert len(row["phash"]) == 16
    (sample,) = read_shard(str(tmp_path / "D/raw/00000.tar"))
    assert sample.meta == row
    assert Image.open(io.BytesIO(sample.image)).size == (48, 48)


def images_in_tars(folder: Path) -> None:
    """Two WebDataset tars as others make them: keys that collide, png and webp, captions in txt and in json."""
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"part-{number}.tar", "w") as tar:
            for n in range(15):
                form = ("PNG", "WEBP")[n % 2]
                text = {"txt": f"{number} {n}".encode()} if n % 3 else {"json": b'{"caption": "%d %d"}' % (number, n)}
                for ending, data in {form.lower(): make_image(100 * number + n, form=form), **text}.items():
                    member = tarfile.TarInfo(f"same/{n:03d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def images_in_parquet(folder: Path) -> None:
    """Two Parquet files as Hugging Face's image datasets have them."""
    folder.mkdir()
    for number in range(2):
        images = [{"bytes": make_image(100 * number + n, form="PNG"), "path": f"{n}.png"} for n in range(15)]
        table = {"image": images, "text": [f"{number} {n}" for n in range(15)]}
        pq.write_table(pa.table(table), folder / f"train-{number}.parquet", row_group_size=4)


@pytest.mark.parametrize("make", [images_in_tars, images_in_parquet])
def test_images_that_need_no_download(tmp_path, make):
    source, root = tmp_path / "S", tmp_path / "D"
    make(source)
    summary = ingest(config(root, source, shard_size=8))
    assert (summary.shards, summary.made, summary.counts) == (4, 4, {"success": 30})
    samples = list[Sample]()
    for shard in range(4):
        samples += read_shard(str(root / f"raw/{shard:05d}.tar"))
    captions = [f"{number} {n}" for number, n in itertools.product(range(2), range(15))]
    assert [sample.caption for sample in samples] == captions
    assert len({sample.image for sample in samples}) == 30
    assert samples[8].key == "000010000"
    source.rename(tmp_path / "moved")
    assert ingest(config(root, tmp_path / "moved", shard_size=8)).made == 0
    assert check(CheckConfig(str(root))) == []


FULL = """
import resource, sys
from pipeline.ingest import raw_shard
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ROWS_BEFORE_WARNING, _status_text, ingest
from shards_spec.files import UserError
raw_shard.SPARE_BYTES = int(sys.argv[3])
if sys.argv[4] == "limited":
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    ingest(IngestConfig(sys.argv[1], sys.argv[2], shard_size=10, allow_private=True, workers=1, open_shards=1))
except UserError as error:
    sys.exit(f"2 {error}")
"""


@pytest.mark.parametrize("spare", [1 << 20, 0])
def test_a_full_disk_is_told_and_leaves_whole_shards(server, tmp_path, spare):
    """On a real small disk, told ahead by the room that is left or by the write that fails.

    Where none may be mounted, files may not grow beyond a limit: the write fails in the same way.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", disk]
    mounted = os.geteuid() == 0 and not subprocess.run(mount, capture_output=True).returncode
    try:
        rows = [(f"{server.url}/noise/{n}", f"c{n}") for n in range(200)]
        source = write_list(tmp_path / "l.tsv", rows)
        arguments = [str(disk / "D"), source, str(spare), "" if mounted else "limited"]
        done = subprocess.run([sys.executable, "-c", FULL, *arguments], capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        assert "2 " in done.stderr
        assert "MiB left" in done.stderr or "no space left" in done.stderr
        assert re.search(r"rerun the same command to resume|run the same command again, it goes on", done.stderr)
        left = sorted(path.name for path in (disk / "D/raw").iterdir())
        assert not [name for name in left if name.startswith(".")]
        shards = [int(name[:5]) for name in left if name.endswith("_stats.json")]
        assert bool(shards) == mounted
        for shard in shards:
            assert len(list(read_shard(str(disk / f"D/raw/{shard:05d}.tar")))) == 10
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        assert ingest(config(disk / "D", source, image_size=256)).counts == {"success": 200}
        assert check(CheckConfig(str(disk / "D"))) == []
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=False)


MEMORY = """
import re, resource, sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ROWS_BEFORE_WARNING, _status_text, ingest
if __name__ == "__main__":
    ingest(IngestConfig(sys.argv[1], sys.argv[2], shard_size=25, allow_private=True, workers=1, open_shards=3))
    own = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
    print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_forty_shards_take_the_memory_of_six(server, tmp_path):
    script, peaks = tmp_path / "memory.py", {}
    script.write_text(MEMORY)
    for shards in (6, 40):
        rows = [(f"{server.url}/noise/{n}", f"c{n}") for n in range(25 * shards)]
        source = write_list(tmp_path / f"{shards}.tsv", rows)
        done = subprocess.run(
            [sys.executable, script, tmp_path / str(shards), source], capture_output=True, text=True, check=True
        )
        peaks[shards] = [int(kib) / 1024 for kib in done.stdout.split()]
    written = sum(path.stat().st_size for path in (tmp_path / "40/raw").glob("*.tar")) / 2**20
    print(f"own and decoder's MiB: {peaks}, {written:.0f} MiB written by the larger run")
    for small, large in zip(*peaks.values(), strict=True):
        assert large - small < written / 3


def test_a_run_without_an_image_says_so_once_long_before_its_end(tmp_path, caplog):
    tally = DownloadTally()
    run = partial(_status_text, SimpleNamespace(rows=9000, read=3000), SimpleNamespace(tally=tally), str(tmp_path))
    for _ in range(ROWS_BEFORE_WARNING):
        tally.add("not a public address")
    run()
    assert caplog.text == ""
    tally.add("timeout")
    assert "0.0 % good" in run()
    run()
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("not one image so far, mostly for 'not a public address': --allow-private fetches")
