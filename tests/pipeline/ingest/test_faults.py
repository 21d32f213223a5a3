"""`ingest` against trouble: every kind of bad server and bad bytes, dying servers, dying decoders, late links."""

import hashlib
import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bench.faults import pair
from conftest import skip_or_fail
from fault_server import (
    CERTIFIED,
    DEFAULTS,
    HOSTS,
    KINDS,
    MAX_BYTES,
    OPENSSL,
    TIMEOUT_S,
    TROUBLES,
    FaultServer,
    finish_ingest,
    good_body,
    ingest_apart,
    marked_photo,
    outcome,
    rows_of,
    start_ingest,
)
from fault_server import serve_faults as serve
from marked_decoder import MARKING, MARKS

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest

pytestmark = pytest.mark.integration

RULES = {"timeout_s": TIMEOUT_S, "retries": 1, "max_bytes": MAX_BYTES}
HANG_S = 90  # a run of seconds that takes this long hangs
CRASHED, TOO_LONG = "resize: decoder crashed", "resize: decoding took too long"
GONE = {"success", "connection refused", "connection lost", "connection failed", "timeout"}  # while a server dies


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("server")) as running:
        yield running


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wrong_bytes(rows: list[dict], bodies: list[bytes]) -> list[str]:
    """Links whose image is not the one that was asked for."""
    pairs = zip(rows, bodies, strict=True)
    return [row["url"] for row, body in pairs if outcome(row) == "success" and row["sha256"] != sha256(body)]


# every kind of trouble


@pytest.fixture(scope="module")
def troubles(server, tmp_path_factory) -> dict[str, dict]:
    """The row of each kind after one run over all of them."""
    root = tmp_path_factory.mktemp("troubles") / "D"
    report = ingest_apart(root, [server.link(name) for name in TROUBLES], HANG_S, **RULES)
    print(f"{len(TROUBLES)} kinds of trouble: {report}")
    assert max(report["MiB"], report["decoder MiB"]) < 1000, "bombs and floods must not fill the memory"
    assert check(CheckConfig(str(root))) == []
    return dict(zip(TROUBLES, rows_of(root), strict=True))


@pytest.mark.parametrize("name", TROUBLES)
def test_each_kind_of_trouble_ends_as_it_should(troubles, server, name):
    row = troubles[name]
    assert outcome(row) in TROUBLES[name], name
    assert row["url"] == server.link(name)
    assert wrong_bytes([row], [KINDS[name].body]) == []


def test_no_link_is_asked_for_too_often(troubles, server):
    counts = server.counts()
    own = {name: counts[f"/{name}?n=0"] for name in TROUBLES if "{kind}" in KINDS[name].url}
    assert {name: n for name, n in own.items() if n > 4} == {}, "one retry; aiohttp itself repeats lost connections"
    never = {name: n for name, n in own.items() if n > 1 and {"HTTP 404", "HTTP 403", "too large"} & {*TROUBLES[name]}}
    assert never == {}, "no retry where it cannot help"
    assert (own["status_500"], own["stalled_body"], own["status_429_after_hour"]) == (2, 2, 1)


def test_a_link_after_each_trouble_on_the_same_connection_gets_its_own_image(server, tmp_path):
    """With one request at a time per host a connection is used again: what trouble left in it must not be read."""
    names = [name for name, entry in KINDS.items() if "{kind}" in entry.url and not entry.at_accept and not entry.tls]
    names = [name for name in names if name not in ("refused", "blackhole")]
    links, bodies = [], []
    for name in names:
        links += [server.link(name, 1), *(server.good(f"{name}-{n}", HOSTS[name]) for n in range(3))]
        bodies += [KINDS[name].body, *(good_body(f"{name}-{n}") for n in range(3))]
    ingest_apart(tmp_path / "D", links, HANG_S, **{**RULES, "timeout_s": 4}, per_host=1)
    rows = rows_of(tmp_path / "D")
    assert [row["url"] for row in rows if "/good/" in row["url"] and outcome(row) != "success"] == []
    assert wrong_bytes(rows, bodies) == []


def test_a_link_twice_is_two_rows_and_one_request(server, tmp_path):
    links = [server.good(7001), server.link("status_404", 9), server.good(7001), server.link("status_404", 9)]
    ingest_apart(tmp_path / "D", links, HANG_S, **RULES)
    assert [outcome(row) for row in rows_of(tmp_path / "D")] == ["success", "HTTP 404"] * 2
    assert server.counts()["/good/7001"] == 1


@pytest.mark.parametrize("trusted", [False, True])
def test_certificates(tmp_path, trusted):
    if not OPENSSL:
        skip_or_fail("no openssl command to make a certificate with")
    expected = dict(CERTIFIED)
    if trusted:  # the one that vouches for another address stays refused
        expected |= {"tls_self_signed": ("success",), "tls_close_mid_body": ("connection lost",)}
        expected["tls_reset_mid_body"] = ("connection lost",)
    with serve(tmp_path) as server:
        environment = {"SSL_CERT_FILE": str(tmp_path / "cert.pem")} if trusted else {}
        links = [server.link(name) for name in expected]
        ingest_apart(tmp_path / "D", links, HANG_S, environment=environment, **RULES)
    found = dict(zip(expected, map(outcome, rows_of(tmp_path / "D")), strict=True))
    assert {name: end for name, end in found.items() if end not in expected[name]} == {}


# good links beside bad ones


@pytest.mark.slow
def test_good_links_beside_troubles(server, tmp_path):
    ratios = pair(server, tmp_path, 8000, TIMEOUT_S, 1000)
    print(f"good images per second with a tenth of troubles by without: {ratios}")
    assert ratios["steady"] > 0.4, "tests/bench/faults.py measures it in earnest"


def test_a_busy_host_gives_second_tries_their_turn(server, tmp_path):
    """Ten links are asked to come again while thousands wait for the same host."""
    links = [server.good(n, "127.0.0.1") for n in range(4000)]
    again = random.Random(1).sample(range(500), 10)
    for n in again:
        links[n] = server.way(f"once/{n}")
    ingest_apart(tmp_path / "D", links, HANG_S, timeout_s=8, retries=1, shard_size=500)
    rows = rows_of(tmp_path / "D")
    assert Counter(map(outcome, rows)) == {"success": 4000}
    assert wrong_bytes(rows, [good_body(n) for n in range(4000)]) == []


def test_a_shard_with_late_links_does_not_hold_the_run(server, tmp_path):
    links = [server.good(n) for n in range(500)]
    late = [100 + 2 * n for n in range(20)]
    for n in late:
        links[n] = server.way(f"late/20/{n}", HOSTS["fine"])
    start = time.monotonic()
    ingest_apart(tmp_path / "D", links, HANG_S, timeout_s=60, retries=1, shard_size=50)
    assert time.monotonic() - start < 15, "twenty seconds would be waiting for them"
    rows = rows_of(tmp_path / "D")
    assert {n: outcome(rows[n]) for n in late} == dict.fromkeys(late, "timeout")
    assert Counter(map(outcome, rows)) == {"success": 480, "timeout": 20}
    assert check(CheckConfig(str(tmp_path / "D"))) == []


# servers that die


def killed_server(folder: Path, seed: int) -> Counter[str]:
    """Ingest sixty links while their server is killed at a random moment, and in half the cases comes back."""
    rng, folder = random.Random(seed), folder / str(seed)
    folder.mkdir()
    paths = [f"late/{rng.uniform(0, 0.4):.2f}/{n}" if n % 2 else f"good/{n}" for n in range(60)]
    with serve(folder, good_only=True) as server:
        links = [server.way(path, f"127.0.0.{1 + n % 4}") for n, path in enumerate(paths)]
        (folder / "list.tsv").write_text("".join(f"{link}\tc\n" for link in links))
        config = IngestConfig(str(folder / "D"), str(folder / "list.tsv"), timeout_s=0.7, retries=1, **DEFAULTS)
        run = threading.Thread(target=ingest, args=(config,), daemon=True)
        run.start()
        time.sleep(rng.uniform(0, 0.6))
        server.process.kill()
        if seed % 2:
            time.sleep(rng.uniform(0, 0.5))
            server.kill()
            server.start()
        run.join(HANG_S)
        assert not run.is_alive(), f"seed {seed}: ingest hangs"
    rows = rows_of(folder / "D")
    assert [row["url"] for row in rows] == links
    assert wrong_bytes(rows, [good_body(n) for n in range(60)]) == []
    assert {outcome(row) for row in rows} <= GONE
    assert check(CheckConfig(str(folder / "D"))) == []
    return Counter(map(outcome, rows))


def kill_servers(folder: Path, kills: int) -> None:
    """Two at a time."""
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda seed: killed_server(folder, seed), range(kills)))
    ends = sum(found, Counter[str]())
    print(f"{kills} servers killed: {dict(ends)}")
    assert sum(ends.values()) == 60 * kills
    assert ends["success"] > 0
    assert sum(ends.values()) > ends["success"], "no kill struck"


def test_a_server_killed_while_it_answers(tmp_path):
    kill_servers(tmp_path, 6)


@pytest.mark.slow
def test_a_server_killed_fifty_times(tmp_path):
    kill_servers(tmp_path, 50)


# decoders that die


def decoder_processes(parent: int) -> list[int]:
    """The spawned children of a process, but not multiprocessing's resource tracker."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(state[1]) == parent and state[0] != "Z" and b"spawn_main" in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue  # it ended meanwhile
    return found


def disturb(parent, marks: Path, signals: list[int], rng: random.Random) -> int:
    """Send a running `ingest`'s decoders signals, one after the other; how many were sent.

    Only to those that have decoded an image: five that die before are taken for a bug, and a busy machine starts them
    slowly.
    """
    sent = 0
    while parent.poll() is None and sent < len(signals):
        time.sleep(rng.uniform(0.2, 0.45))
        if victims := [pid for pid in decoder_processes(parent.pid) if (marks / str(pid)).exists()]:
            os.kill(rng.choice(victims), signals[sent])
            sent += 1
    return sent


@pytest.mark.parametrize(("kind", "allowed"), [(signal.SIGKILL, {CRASHED}), (signal.SIGSTOP, {CRASHED, TOO_LONG})])
def test_a_decoder_that_dies_or_hangs_costs_its_image_alone(server, tmp_path, kind, allowed):
    if not Path("/proc/self/stat").exists():
        skip_or_fail("no /proc to find the decoders in")
    links = [server.way(f"photo/{n}", f"127.0.0.{1 + n % 8}") for n in range(160)]
    options = {"timeout_s": 30, "decode_timeout_s": 3, "workers": 2, "shard_size": 40, "image_size": 400}
    marks = tmp_path / "marks"
    marks.mkdir()
    path = os.pathsep.join([str(Path(__file__).parents[2] / "support"), os.environ.get("PYTHONPATH", "")])
    process = start_ingest(tmp_path / "D", links, {MARKS: str(marks), "PYTHONPATH": path}, MARKING, **options)
    try:
        sent = disturb(process, marks, [kind] * 6, random.Random(kind))
        left = decoder_processes(process.pid)
    finally:
        finish_ingest(process, HANG_S)
    rows = rows_of(tmp_path / "D")
    assert wrong_bytes(rows, [marked_photo(n) for n in range(160)]) == []
    ends = Counter(map(outcome, rows))
    print(f"{sent} x {kind.name}: {dict(ends)}")
    assert sent >= 2, "too fast to be disturbed"
    assert set(ends) <= {"success", *allowed}
    assert 160 - ends["success"] <= sent
    assert not [pid for pid in left if Path(f"/proc/{pid}").exists()], "no decoder outlives the run"
    assert check(CheckConfig(str(tmp_path / "D"))) == []


def test_the_server_is_killed_with_its_test(tmp_path):
    """Nothing is left behind when a test run is killed."""
    server = FaultServer(tmp_path, good_only=True)
    server.process.stdin.close()
    assert server.process.wait(20) == -signal.SIGKILL
    server.process.stdout.close()
