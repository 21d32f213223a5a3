"""Parts of `ingest`: limits of downloads, DNS, decoder processes, late requests, retries, filters, a full disk."""

import asyncio
import hashlib
import io
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dns_server import NXDOMAIN, SERVFAIL, SILENT, serve_names
from PIL import Image
from small_ingest import config, rows_of, write_list
from web_server import make_image, serve

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.ingest import decode_pool, http_client
from pipeline.ingest.backpressure import AdmissionGate, PrioritySemaphore
from pipeline.ingest.decode_pool import DecodePool, DecoderFailed
from pipeline.ingest.downloader import DownloadTally
from pipeline.ingest.http_client import Fetcher, FetchError, FetchRules
from pipeline.ingest.raw_shard import SCHEMA
from pipeline.ingest.stage import ingest
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.files import UserError
from shards_spec.sample import Sample
from shards_spec.tar import read_shard


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


def gather(urls: list[str], gate: AdmissionGate | None = None, **rules) -> list[bytes | str]:
    """Bodies or reasons of many links at once, with one Fetcher."""

    async def one(fetcher: Fetcher, url: str) -> bytes | str:
        try:
            return await fetcher.get(url)
        except FetchError as error:
            return str(error)

    async def run() -> list[bytes | str]:
        async with Fetcher(FetchRules(**{"timeout_s": 2, "allow_private": True, **rules}), gate) as fetcher:
            return list(await asyncio.gather(*(one(fetcher, url) for url in urls)))

    return asyncio.run(run())


# names


def test_a_name_is_asked_for_once(server):
    with serve_names({"good.test": ["127.0.0.1"], "gone.test": NXDOMAIN, "broken.test": SERVFAIL}) as dns:
        nameservers = (f"127.0.0.1:{dns.port}",)
        port = server.server_port
        urls = [
            f"http://{host}.test:{port}/good/{n}"
            for n, host in itertools.product(range(30), ("good", "gone", "broken"))
        ]
        found = gather(urls, nameservers=nameservers, retries=0, per_host=3)
        assert found[::3] == [make_image(n) for n in range(30)]
        assert set(found[1::3]) == {"name not found"}
        assert set(found[2::3]) == {"name look-up failed"}
        # an A and an AAAA question each, twice where the server failed; not once per row
        assert 1 <= dns.queries["good.test"] <= 2
        assert 1 <= dns.queries["gone.test"] <= 2 * 3
        assert 1 <= dns.queries["broken.test"] <= 4 * 3


def test_a_dns_server_that_never_answers_ends_in_time():
    with serve_names({"silent.test": SILENT}) as dns:
        start = time.monotonic()
        assert (
            gather(["http://silent.test/x"] * 5, nameservers=(f"127.0.0.1:{dns.port}",), timeout_s=1, retries=0)
            == ["timeout"] * 5
        )
        assert time.monotonic() - start < 10


def test_names_that_change_their_address_reach_nothing_private(server):
    """DNS rebinding: a name that was public a moment ago is checked again at each connection."""
    with serve_names({"rebind.test": [["127.0.0.1"]], "mixed.test": ["127.0.0.1", "10.0.0.1"]}) as dns:
        urls = [f"http://{host}.test:{server.server_port}/good/901" for host in ("rebind", "mixed")]
        found = gather(urls, nameservers=(f"127.0.0.1:{dns.port}",), allow_private=False)
        assert found == ["not a public address"] * 2
    assert server.requests["good/901"] == 0


def test_a_redirect_to_a_name_that_is_private(server, monkeypatch):
    monkeypatch.setattr(http_client, "is_public", lambda address: address == "127.0.0.1")
    with serve("127.0.0.2") as inner, serve_names({"inner.test": ["127.0.0.2"]}) as dns:
        url = f"{server.url}/redirect/http://inner.test:{inner.server_port}/good/5"
        found = gather([url], nameservers=(f"127.0.0.1:{dns.port}",), allow_private=False)
        assert found == ["not a public address"]
        assert not inner.requests


# limits and retries


def test_requests_to_one_host_are_limited(server):
    server.delay_s, server.most_at_once = 0.02, 0
    try:
        gather([f"{server.url}/good/{n}" for n in range(40)], per_host=5)
        assert 2 <= server.most_at_once <= 5
        server.most_at_once = 0
        gather([f"{server.url}/good/{n}" for n in range(40)], per_host=40, concurrency=3)
        assert 2 <= server.most_at_once <= 3
    finally:
        server.delay_s = 0.0


def test_links_that_wait_for_a_busy_host_hold_no_slot(server):
    with serve("127.0.0.2") as slow:
        urls = [f"{slow.url}/slow/0.5?{n}" for n in range(8)] + [f"{server.url}/good/{n}" for n in range(20)]

        async def run() -> float:
            rules = FetchRules(timeout_s=10, allow_private=True, concurrency=2, per_host=1)
            async with Fetcher(rules) as fetcher:
                slow_ones = [asyncio.create_task(fetcher.get(url)) for url in urls[:8]]
                start = time.monotonic()
                await asyncio.gather(*(fetcher.get(url) for url in urls[8:]))
                seconds = time.monotonic() - start
                assert not all(task.done() for task in slow_ones)
                for task in slow_ones:
                    task.cancel()
                await asyncio.gather(*slow_ones, return_exceptions=True)
                return seconds

        assert asyncio.run(run()) < 4 * 0.5  # eight slow ones in a row take 4 s


def test_no_request_starts_while_too_many_bodies_wait(server):
    def begun() -> int:
        return sum(server.requests[f"good/{n}?gate"] for n in range(3, 30))

    async def run() -> None:
        gate, decoded = AdmissionGate(3), asyncio.Event()
        async with Fetcher(FetchRules(allow_private=True, concurrency=50, per_host=50), gate) as fetcher:

            async def one(n: int) -> None:
                await fetcher.get(f"{server.url}/good/{n}?gate")
                async with gate.decoding():
                    await decoded.wait()

            first = [asyncio.create_task(one(n)) for n in range(3)]
            while gate.waiting < 3:
                await asyncio.sleep(0.01)
            others = [asyncio.create_task(one(n)) for n in range(3, 30)]
            await asyncio.sleep(0.3)
            assert begun() == 0
            others[5].cancel()
            decoded.set()
            await asyncio.gather(*first, *others, return_exceptions=True)
            assert begun() == 26

    asyncio.run(run())


def test_slots_go_to_the_earliest_request_also_at_a_second_try():
    async def run() -> list[int]:
        slots = PrioritySemaphore(1)
        served = list[int]()

        async def one(number: int) -> None:
            async with slots.hold(number):
                served.append(number)
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(one(number)) for number in (5, 9, 7, 1, 8, 3)]
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(5), slots.hold(0):
            return served

    assert asyncio.run(run()) == [5, 1, 3, 8, 9]


def test_a_host_that_never_answers_is_given_up():
    with socket.create_server(("127.0.0.1", 0), backlog=1) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        assert gather([f"{url}/{n}" for n in range(200)], timeout_s=0.5, per_host=4) == ["timeout"] * 200
        assert time.monotonic() - start < 10, "200 links, 4 at a time, two tries of 0.5 s take 50 s"


def test_retry_after_is_obeyed_when_it_is_short(server):
    server.retry_after = "1"
    start = time.monotonic()
    assert gather([f"{server.url}/busy/1"]) == [make_image(1)]
    assert time.monotonic() - start >= 1
    server.retry_after = "3600"
    start = time.monotonic()
    assert gather([f"{server.url}/busy/2"]) == ["HTTP 429"]
    assert time.monotonic() - start < 2
    assert server.requests["busy/2"] == 1


@pytest.mark.parametrize(
    ("path", "tries"),
    [("status/500", 3), ("status/404", 1), ("status/403", 1), ("lost", 3), ("html", 1), ("status/410", 1)],
)
def test_only_what_may_pass_is_tried_again(server, path, tries):
    before = server.requests[f"{path}?again"]
    gather([f"{server.url}/{path}?again"], retries=2)
    assert server.requests[f"{path}?again"] - before == tries


# decoder processes


def answer(data: bytes) -> bytes:
    """What the processes of these tests do."""
    if data.startswith(b"crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data.startswith(b"hang"):
        time.sleep(60)
    return data[::-1]


def converted(jobs: list[bytes], number: int = 2, timeout_s: float = 20.0) -> list[bytes | str]:
    async def one(pool: DecodePool, data: bytes) -> bytes | str:
        try:
            return await pool.convert(data)
        except DecoderFailed as error:
            return str(error)

    async def run() -> list[bytes | str]:
        async with DecodePool(answer, number, timeout_s) as pool:
            return list(await asyncio.gather(*(one(pool, data) for data in jobs)))

    return asyncio.run(run())


def test_answers_are_those_of_their_images():
    jobs = [bytes([n]) * (n * 7919 % 300_000) + b"x" for n in range(100)]
    assert converted(jobs) == [job[::-1] for job in jobs]


def test_a_crash_fails_only_the_image_that_caused_it():
    jobs = [b"crash" if n % 10 == 5 else b"good %d" % n for n in range(40)]
    assert converted(jobs) == ["decoder crashed" if job == b"crash" else job[::-1] for job in jobs]


def test_an_image_that_takes_too_long_fails_alone():
    jobs = [b"hang" if n == 3 else b"good %d" % n for n in range(12)]
    assert converted(jobs, timeout_s=2.0) == ["decoding took too long" if job == b"hang" else job[::-1] for job in jobs]


def never_called(data: bytes) -> bytes:
    raise AssertionError


def test_processes_that_cannot_start_are_a_bug_not_a_loop(monkeypatch):
    monkeypatch.setattr(decode_pool, "_serve", os.abort)  # not picklable as a target with arguments: dies at once

    async def run() -> None:
        async with DecodePool(never_called, 1, 5.0) as pool:
            await pool.convert(b"x")

    with pytest.raises(UserError, match="5 decoder processes died before they answered once, the last with exit code"):
        asyncio.run(run())


# shards


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


# selection


def test_selection_names_each_reason(server, tmp_path):
    wide = f"{server.url}/sized/200x50"
    rows = [
        (f"{server.url}/good/1", "a good caption"),
        (f"{server.url}/good/2?out", "no"),
        (f"{server.url}/good/3", "long " * 30),
        (f"{server.url}/good/4", "12345 !!! 678"),
        (f"{server.url}/good/5", "IMG_2041.jpg"),
        (f"{server.url}/sized/20x20", "a small image"),
        (wide, "a wide image"),
        (f"{server.url}/good/6?out", "an excluded link"),
        (f"{server.url}/good/9", "an excluded picture"),
        (f"{server.url}/good/1?copy", "a copy of the first"),
        (f"{server.url}/scene/1", "a scene"),
        (f"{server.url}/again/1", "the scene at another quality"),
        (f"{server.url}/scene/8", "another scene"),
    ]
    links, hashes = tmp_path / "links.txt", tmp_path / "hashes.txt"
    links.write_text(f"{server.url}/good/6?out\n\nhttp://elsewhere/x\n")
    hashes.write_text(hashlib.sha256(make_image(9)).hexdigest().upper() + "\n")
    source = write_list(tmp_path / "l.tsv", rows)
    options = {
        "min_caption_chars": 4,
        "max_caption_chars": 100,
        "sane_captions": True,
        "min_size": 30,
        "dedup": "near",
        "max_aspect_ratio": 3.0,
        "exclude": (str(links), str(hashes)),
        "shard_size": 50,
    }
    ingest(config(tmp_path / "D", source, **options))
    assert [row["error_message"] for row in rows_of(tmp_path / "D")] == [
        None,
        "caption too short",
        "caption too long",
        "caption has no letters",
        "caption is an address",
        "resize: picture too small",
        "resize: aspect ratio too large",
        "excluded address",
        "excluded picture",
        "duplicate image",
        None,
        "near-duplicate image",
        None,
    ]
    assert server.requests["good/6?out"] == server.requests["good/2?out"] == 0, "refused before a request"
    stats = json.loads((tmp_path / "D/raw/00000_stats.json").read_text())
    assert (stats["successes"], stats["failed_to_resize"], stats["failed_to_download"]) == (3, 2, 8)
    assert ingest(config(tmp_path / "D", source, **options)).made == 0
    links.write_text("http://elsewhere/x\n")
    with pytest.raises(UserError, match=r"another config .*exclusions: '[0-9a-f]{64}' before"):
        ingest(config(tmp_path / "D", source, **options))
    with pytest.raises(UserError, match=r"--exclude \S+nowhere: no such file"):
        ingest(config(tmp_path / "E", source, exclude=(str(tmp_path / "nowhere"),)))


def test_what_is_kept_of_an_image(server, tmp_path):
    ingest(config(tmp_path / "D", write_list(tmp_path / "l.tsv", [(f"{server.url}/noise/3", "x")])))
    (row,) = rows_of(tmp_path / "D")
    assert SCHEMA.names[-2:] == ["sha256", "phash"]
    assert len(row["phash"]) == 16
    (sample,) = read_shard(str(tmp_path / "D/raw/00000.tar"))
    assert sample.meta == row
    assert Image.open(io.BytesIO(sample.image)).size == (48, 48)


# images that are already there


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


# another try at what failed


def test_retry_failed_adds_shards_and_keeps_keys(server, tmp_path):
    root = tmp_path / "D"
    rows = [(f"{server.url}/flaky/{n}?r", f"flaky {n}") for n in range(12)]
    rows += [(f"{server.url}/good/{n}?r", f"good {n}") for n in range(10)]
    rows += [(f"{server.url}/status/503?{n}", f"down {n}") for n in range(4)] + [(f"{server.url}/gone", "gone")]
    run = config(root, write_list(tmp_path / "l.tsv", rows), retries=0)
    with pytest.raises(UserError, match=r"ingest has not finished in .*without --retry-failed first"):
        ingest(config(root, run.source, retries=0, retry_failed=True))
    assert ingest(run).counts == {"HTTP 404": 1, "HTTP 503": 16, "success": 10}
    before = {path.name: path.read_bytes() for path in (root / "raw").iterdir()}
    again = config(root, run.source, retries=0, retry_failed=True)
    summary = ingest(again)
    assert (summary.shards, summary.made) == (5, 2)
    assert summary.counts == {"HTTP 404": 1, "HTTP 503": 4, "success": 22}
    assert {name: (root / "raw" / name).read_bytes() for name in before} == before, "finished shards stay"
    assert [row["key"] for row in rows_of(root, 3)] == [f"00000{n:04d}" for n in range(10)]
    assert [row["key"] for row in rows_of(root, 4)] == [
        "000010000",
        "000010001",
        *(f"00002{n:04d}" for n in range(2, 6)),
    ]
    assert [sample.caption for sample in read_shard(str(root / "raw/00003.tar"))] == [f"flaky {n}" for n in range(10)]
    assert check(CheckConfig(str(root))) == []
    assert ingest(run).counts == summary.counts, "a plain run keeps what the retry made"
    third = ingest(again)
    assert (third.shards, third.made, third.counts) == (6, 1, summary.counts)
    assert check(CheckConfig(str(root))) == []
    pack(PackConfig(str(root), captioner=("none",), workers=1))
    assert check(CheckConfig(str(root))) == []
    write_list(tmp_path / "l.tsv", [*rows, *[(f"{server.url}/good/1", "new")] * 10])
    with pytest.raises(UserError, match="has more rows than when its failed rows were tried again"):
        ingest(run)


def test_a_killed_retry_resumes(server, tmp_path):
    root = tmp_path / "D"
    rows = [(f"{server.url}/flaky/{n}?k", f"flaky {n}") for n in range(60)]
    run = config(root, write_list(tmp_path / "l.tsv", rows), retries=0)
    assert ingest(run).counts == {"HTTP 503": 60}
    dataset = (root / "dataset.json").read_text()
    again = config(root, run.source, retries=0, retry_failed=True)
    assert ingest(again).shards == 12
    # as a kill leaves it: one additional shard is missing in the middle, the totals are those of before
    (root / "dataset.json").write_text(dataset)
    for ending in ("_stats.json", ".tar", ".parquet"):
        (root / "raw" / f"00008{ending}").unlink()
    for n in range(20, 30):
        server.requests[f"flaky/{n}?k"] = 5
    summary = ingest(again)
    assert (summary.shards, summary.made, summary.counts) == (12, 4, {"success": 60})
    assert check(CheckConfig(str(root))) == []
    keys_before = list[str]()
    keys_after = list[str]()
    for shard in range(6):
        keys_before += [row["key"] for row in rows_of(root, shard)]
        keys_after += [row["key"] for row in rows_of(root, 6 + shard)]
    assert keys_after == keys_before


# a full disk


FULL = """
import resource, sys
from pipeline.ingest import raw_shard
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
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
from pathlib import Path
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
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
