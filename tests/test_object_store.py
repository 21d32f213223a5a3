"""ROOT and --source on S3: a real S3 protocol server (moto's), clients that know nothing of each other, kills."""

import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import boto3
import fsspec
import pyarrow.parquet as pq
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from web_server import serve
from werkzeug.serving import WSGIRequestHandler, make_server

from pipeline.check import CheckConfig, check
from pipeline.ingest import IngestConfig, ingest
from pipeline.pack import PackConfig, pack
from shards_spec import files, manifest
from shards_spec.files import DataError, UserError

GOLDEN = Path(__file__).parent / "golden" / "img2dataset-1.47"
TIMES = ("duration", "start_time", "end_time")
FILL_DISK = "import sys; from shards_spec import files; files.write_bytes(sys.argv[1], bytes(4 << 20))"


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_) -> None:
        pass


class Store:
    """The server as a WSGI application that notes every request; ``refusals`` answers to come are 503 SlowDown."""

    def __init__(self) -> None:
        self.requests = Counter[str]()
        self.refusals = 0
        self._moto = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ, start_response):
        self.requests[environ["REQUEST_METHOD"]] += 1
        if self.refusals > 0:
            self.refusals -= 1
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        return self._moto(environ, start_response)


@pytest.fixture(scope="module")
def store():
    app = Store()
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        app.url = f"http://127.0.0.1:{server.server_port}"
        environment = {
            "AWS_ENDPOINT_URL": app.url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
        for name, value in environment.items():
            patch.setenv(name, value)
        yield app
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def other(store):
    """A client of its own, as another machine would be."""
    return boto3.client("s3")


@pytest.fixture
def bucket(other, request) -> str:
    """A new bucket's name."""
    name = f"test-{abs(hash(request.node.name)):x}"
    other.create_bucket(Bucket=name)
    return name


@pytest.fixture(scope="module")
def web():
    with serve() as running:
        yield running


def objects(other, bucket: str, prefix: str = "") -> dict[str, bytes]:
    """Key to content, below the prefix; the stats without their time fields, and no logs, which hold times only."""
    found = {}
    for page in other.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", []):
            key = entry["Key"].removeprefix(prefix)
            data = other.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
            if key.endswith("_stats.json"):
                stats = json.loads(data)
                data = json.dumps({name: value for name, value in stats.items() if name not in TIMES}).encode()
            if "logs/" not in key:
                found[key] = data
    return found


def put_list(other, bucket: str, url: str, count: int = 10) -> str:
    """A list in CC12M's form on the store."""
    lines = "".join(f"{url}/good/{n}\tred ball number {n}\n" for n in range(count))
    other.put_object(Bucket=bucket, Key="list.tsv", Body=lines.encode())
    return f"s3://{bucket}/list.tsv"


def config(root: str, source: str, **options) -> IngestConfig:
    defaults = {"allow_private": True, "workers": 1, "shard_size": 4, "image_size": 48, "concurrency": 8}
    return IngestConfig(root, source, **{**defaults, **options})


def clipmill(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "clipmill", *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


# files


def test_an_object_is_whole_or_absent(bucket, other):
    path = f"s3://{bucket}/a/b.bin"

    def die_half_way():
        with files.atomic_writer(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        die_half_way()
    assert objects(other, bucket) == {}
    assert not files.exists(path)
    files.write_bytes(path, b"one")
    files.write_bytes(path, b"two")
    assert objects(other, bucket) == {"a/b.bin": b"two"}
    assert files.read_bytes(path) == b"two"
    assert files.sha256_file(path) == files.sha256_bytes(b"two")
    for data in (b"two", b""):
        files.write_bytes(path, data)
        with files.read_buffer(path) as buffer:
            assert bytes(buffer) == data
    assert files.names(f"s3://{bucket}") == ["a"]
    assert files.names(path) == []
    files.remove(path)
    files.remove(path)
    assert not files.exists(path)


def test_large_objects_are_put_and_read_whole(bucket):
    """Above s3fs's limit for one request: parts, on both ways."""
    path, data = f"s3://{bucket}/large", random.Random(0).randbytes(101 << 20)
    files.write_bytes(path, data)
    assert files.sha256_file(path) == files.sha256_bytes(data)
    assert files.read_bytes(path) == data


def test_what_others_write_and_delete_is_seen_at_once(bucket, other):
    folder = f"s3://{bucket}/raw"
    assert files.names(folder) == []
    assert not files.exists(f"{folder}/x")
    other.put_object(Bucket=bucket, Key="raw/x", Body=b"1")
    assert files.names(folder) == ["x"]
    assert files.exists(f"{folder}/x")
    assert files.exists(folder)
    other.put_object(Bucket=bucket, Key="raw/y", Body=b"2")
    other.put_object(Bucket=bucket, Key="raw/x", Body=b"longer")
    other.put_object(Bucket=bucket, Key="raw/", Body=b"")  # as consoles make folders
    assert files.names(folder) == ["x", "y"]
    assert files.read_bytes(f"{folder}/x") == b"longer"
    with files.open_read(f"{folder}/x") as file:
        assert file.read() == b"longer"
    other.delete_object(Bucket=bucket, Key="raw/x")
    assert files.names(folder) == ["y"]
    assert not files.exists(f"{folder}/x")
    with pytest.raises(FileNotFoundError, match=f"s3://{bucket}/raw/x"):
        files.read_bytes(f"{folder}/x")


def test_readers_of_objects_are_ordinary_files(bucket):
    path = f"s3://{bucket}/x"
    files.write_bytes(path, b"0123456789\nabc\n")
    with files.open_read(path) as file:
        assert file.readline() == b"0123456789\n"
        assert file.tell() == 11
        file.seek(-4, os.SEEK_END)
        assert list(file) == [b"abc\n"]
    assert file.closed


def test_a_store_that_is_busy_for_a_moment_is_asked_again(bucket, store):
    store.refusals = 3
    files.write_bytes(f"s3://{bucket}/x", b"1")
    store.refusals = 3
    assert files.read_bytes(f"s3://{bucket}/x") == b"1"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_after_their_parent_has_read(bucket, method):
    files.write_bytes(f"s3://{bucket}/x", b"1")
    code = f"""
        import multiprocessing, sys
        from shards_spec import files
        def read(_):
            return files.read_bytes("s3://{bucket}/x")
        if __name__ == "__main__":
            assert read(0) == b"1"
            with multiprocessing.get_context("{method}").Pool(2) as pool:
                assert pool.map(read, range(8)) == [b"1"] * 8
            assert read(0) == b"1"
    """
    path = f"/tmp/{bucket}.py"
    files.write_bytes(path, textwrap.dedent(code).encode())
    try:
        subprocess.run([sys.executable, path], timeout=60, check=True)
    finally:
        files.remove(path)


# stages


def test_a_list_on_s3_becomes_a_dataset_on_s3(bucket, other, web, store):
    source, root = put_list(other, bucket, web.url), f"s3://{bucket}/ds"
    summary = ingest(config(root, source))
    assert (summary.shards, summary.made, summary.counts) == (3, 3, {"success": 10})
    assert check(CheckConfig(root)) == []
    before = objects(other, bucket, "ds/")
    assert ingest(config(root, source)).made == 0
    assert objects(other, bucket, "ds/") == before
    other.delete_object(Bucket=bucket, Key="ds/raw/00001_stats.json")
    fetched = Counter(web.requests)
    assert ingest(config(root, source)).made == 1
    assert sum((web.requests - fetched).values()) == 4, "only that shard's pictures are fetched again"
    assert objects(other, bucket, "ds/") == before
    summary = pack(PackConfig(root, captioner="none", workers=2))
    assert (summary.made, summary.counts) == (3, {"success": 10})
    assert check(CheckConfig(root)) == []
    assert pack(PackConfig(root, captioner="none", workers=2)).made == 0
    assert json.loads(objects(other, bucket, "ds/shards/")["sizes.json"]) == {
        "00000.tar": 4, "00001.tar": 4, "00002.tar": 2
    }  # fmt: skip


def test_s3_and_a_local_folder_get_the_same_bytes(bucket, other, web, tmp_path):
    source = put_list(other, bucket, web.url)
    ingest(config(f"s3://{bucket}/ds", source))
    for root in (str(tmp_path / "ds"), f"file://{tmp_path}/url"):
        ingest(config(root, source))
        for key, data in objects(other, bucket, "ds/raw/").items():
            if not key.endswith("_stats.json"):
                assert files.read_bytes(f"{root}/raw/{key}") == data, key


def test_img2datasets_shards_on_s3_are_a_source_and_adopted_in_place(bucket, other, tmp_path):
    for path in GOLDEN.iterdir():
        other.put_object(Bucket=bucket, Key=f"ds/raw/{path.name}", Body=path.read_bytes())
    source, copy = f"s3://{bucket}/ds/raw", f"s3://{bucket}/copy"
    summary = ingest(config(copy, source, workers=2))
    assert summary.made == len(list(GOLDEN.glob("*.tar")))
    assert check(CheckConfig(copy)) == []
    assert ingest(config(copy, source)).made == 0
    before = objects(other, bucket, "ds/")
    assert ingest(config(f"s3://{bucket}/ds", source)).made == summary.made
    after = objects(other, bucket, "ds/")
    assert {key: data for key, data in after.items() if key.endswith((".tar", ".parquet"))} == {
        key: data for key, data in before.items() if key.endswith((".tar", ".parquet"))
    }
    assert check(CheckConfig(f"s3://{bucket}/ds")) == []


def test_a_killed_ingest_and_its_rerun_leave_the_objects_of_an_undisturbed_run(bucket, other, web):
    source = put_list(other, bucket, web.url, 40)
    command = ["ingest", "--source", source, "--allow-private", "--shard-size", "4", "--image-size", "48"]
    command += ["--workers", "1", "--concurrency", "2"]
    assert clipmill(*command, f"s3://{bucket}/whole").returncode == 0
    whole, web.delay_s = objects(other, bucket, "whole/"), 0.1
    try:
        for there in (1, 4, 11):  # objects that the killed run has put
            child = subprocess.Popen([sys.executable, "-m", "clipmill", *command, f"s3://{bucket}/{there}/ds"])
            while len(files.names(f"s3://{bucket}/{there}/ds/raw")) < there:
                assert child.poll() is None
                time.sleep(0.01)
            child.kill()
            child.wait()
            left = objects(other, bucket, f"{there}/ds/")
            assert there <= len(left) < len(whole)
            assert {key: whole[key] for key in left} == left, "what a kill leaves is whole"
    finally:
        web.delay_s = 0
    for there in (1, 4, 11):
        done = clipmill(*command, f"s3://{bucket}/{there}/ds")
        assert done.returncode == 0, done.stderr
        again = objects(other, bucket, f"{there}/ds/")
        assert {**again, "dataset.json": b""} == {**whole, "dataset.json": b""}
    assert check(CheckConfig(f"s3://{bucket}/11/ds")) == []


def test_a_finished_dataset_is_passed_over_with_few_requests(bucket, store):
    """Stats of another stage's shape, but the same runner: what a rerun over 200 finished shards asks."""
    from pipeline.stage import Result, Stage, Task, run_stage

    root, stage = f"s3://{bucket}/ds", Stage("nothing", "raw", {})
    tasks = [Task(number, {"rows": str(number)}) for number in range(200)]

    def work(root: str, task: Task) -> Result:
        return Result({"success": 1}, {})

    store.requests.clear()
    assert run_stage(root, stage, tasks, work).made == 200
    first = Counter(store.requests)
    store.requests.clear()
    start = time.monotonic()
    assert run_stage(root, stage, tasks, work).made == 0
    print("first", first, "again", store.requests, time.monotonic() - start)
    assert store.requests.total() <= 4 * 200 + 20


# errors


def test_every_failure_is_one_line_that_names_the_url(bucket, other, web, store):
    source, root = put_list(other, bucket, web.url), f"s3://{bucket}/ds"

    def fails(*arguments: str, **environment: str) -> str:
        done = clipmill("ingest", *arguments, "--allow-private", "--workers", "1", **environment)
        assert done.returncode == 2, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("clipmill: "), done.stderr
        assert "Traceback" not in done.stderr
        return last

    line = fails("s3://no-such-bucket/ds", "--source", source)
    assert "s3://no-such-bucket/ds/" in line
    assert "The specified bucket does not exist; make the bucket" in line
    line = fails(root, "--source", f"s3://{bucket}/nope.tsv")
    assert f"s3://{bucket}/nope.tsv: no such file" in line
    line = fails(root, "--source", source, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    print(line)
    assert f"s3://{bucket}/list.tsv" in line
    assert "127.0.0.1:9" in line


def test_refused_credentials_and_lost_connections_name_the_url(bucket, other, store):
    """moto checks signatures after so many requests as it is told."""
    files.write_bytes(f"s3://{bucket}/x", b"1")
    code = "import sys; from shards_spec import files; getattr(files, sys.argv[1])(sys.argv[2], *sys.argv[3:])"
    reset(store, "0")
    try:
        for call in (["read_bytes"], ["exists"], ["names"], ["open_read"], ["remove"]):
            done = subprocess.run([sys.executable, "-c", code, call[0], f"s3://{bucket}/x"], capture_output=True, text=True)
            last = done.stderr.strip().splitlines()[-1]
            assert last.startswith(f"shards_spec.files.UserError: s3://{bucket}/x: "), done.stderr
            assert "check the address, the store's credentials" in last
    finally:
        reset(store, "inf")


def reset(store: Store, count: str) -> None:
    import urllib.request

    request = urllib.request.Request(f"{store.url}/moto-api/reset-auth", count.encode(), method="POST")
    urllib.request.urlopen(request).close()


def test_a_store_whose_client_is_not_installed_says_which_one():
    with pytest.raises(UserError, match=r"gs://b/x: .*gcsfs.*pip install 'clipmill\[s3\]'"):
        files.exists("gs://b/x")
    with pytest.raises(UserError, match="nope://b/x: .*nope"):
        files.write_bytes("nope://b/x", b"")
