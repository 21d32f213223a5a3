"""ROOT and --source on S3: a real S3 protocol server (moto's), clients that know nothing of each other, kills."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import boto3
import moto.settings
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from small_slurm import clipmill as on_cluster
from small_slurm import log_of, submit
from small_training import tiny_clip, write_packed, write_teacher
from web_server import serve
from werkzeug.serving import WSGIRequestHandler, make_server

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from pipeline.takedown.config import TakedownConfig
from pipeline.takedown.stage import takedown
from shards_spec import files
from shards_spec.files import UserError
from shards_spec.models import load_model
from training.config import DataConfig, TeacherCacheConfig
from training.data.batches import load_batches
from training.data.order import batch_positions
from training.data.samples import open_samples

pytestmark = pytest.mark.integration

GOLDEN = Path(__file__).parent / "golden" / "img2dataset-1.47"
numbers = itertools.count()
TIMES = ("duration", "start_time", "end_time")


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_) -> None:
        pass


class Store:
    """The server as a WSGI application that notes every request; ``refusals`` answers to come are 503 SlowDown."""

    def __init__(self) -> None:
        self.requests, self.got = Counter[str](), Counter[str]()
        self.refusals = 0
        self._moto = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ, start_response):
        self.requests[environ["REQUEST_METHOD"]] += 1
        if environ["REQUEST_METHOD"] == "GET":
            self.got[environ["PATH_INFO"]] += 1
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
            "AWS_ENDPOINT_URL": app.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
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
def bucket(other) -> str:
    """A new bucket's name."""
    name = f"bucket-{next(numbers)}"
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
    """The command in a process of its own; an empty variable is taken away."""
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value}
    command = [sys.executable, "-m", "clipmill", *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_takedown_changes_what_it_has_to_and_leaves_nothing_beside(bucket, other, web):
    root, source = f"s3://{bucket}/ds", put_list(other, bucket, web.url)
    ingest(config(root, source))
    pack(PackConfig(root, captioner=("none",), workers=1))
    before = objects(other, bucket, "ds/")
    other.put_object(Bucket=bucket, Key="requests.txt", Body=f"{web.url}/good/3\n".encode())
    takedown(TakedownConfig(root, f"s3://{bucket}/requests.txt"))
    assert check(CheckConfig(root)) == []
    after = objects(other, bucket, "ds/")
    changed = {key for key in {*before, *after} if before.get(key) != after.get(key)}
    shards = {
        f"{folder}/00000{ending}" for folder in ("raw", "shards") for ending in (".tar", ".parquet", "_stats.json")
    }
    others = {"dataset.json", "shards/sizes.json", "takedown/hashes.json", "takedown/report-1.json"}
    assert changed == shards | others
    ingest(config(root, source))
    pack(PackConfig(root, captioner=("none",), workers=1))
    assert objects(other, bucket, "ds/") == after


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
    store.refusals = 1
    files.write_bytes(f"s3://{bucket}/x", b"1")
    store.refusals = 1
    assert files.read_bytes(f"s3://{bucket}/x") == b"1"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_after_their_parent_has_read(bucket, method, tmp_path):
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
    (tmp_path / "workers.py").write_text(textwrap.dedent(code))
    subprocess.run([sys.executable, tmp_path / "workers.py"], timeout=60, check=True)


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
    assert sum((web.requests - fetched).values()) == 4, "only that shard's images are fetched again"
    assert objects(other, bucket, "ds/") == before
    summary = pack(PackConfig(root, captioner=("none",), workers=2))
    assert (summary.made, summary.counts) == (3, {"success": 10})
    assert check(CheckConfig(root)) == []
    assert pack(PackConfig(root, captioner=("none",), workers=2)).made == 0
    assert json.loads(objects(other, bucket, "ds/shards/")["sizes.json"]) == {
        "00000.tar": 4,
        "00001.tar": 4,
        "00002.tar": 2,
    }


def test_s3_and_a_local_folder_get_the_same_bytes(bucket, other, web, tmp_path):
    source = put_list(other, bucket, web.url)
    ingest(config(f"s3://{bucket}/ds", source))
    for root in (str(tmp_path / "ds"), f"file://{tmp_path}/url"):
        ingest(config(root, source))
        for key, data in objects(other, bucket, "ds/raw/").items():
            if not key.endswith("_stats.json"):
                assert files.read_bytes(f"{root}/raw/{key}") == data, key


def test_img2datasets_shards_on_s3_are_a_source_and_imported_in_place(bucket, other, tmp_path):
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


@pytest.mark.slow
def test_a_killed_ingest_and_its_rerun_leave_the_objects_of_an_undisturbed_run(bucket, other, web):
    source = put_list(other, bucket, web.url, 40)
    command = ["ingest", "--source", source, "--allow-private", "--shard-size", "4", "--image-size", "48"]
    command += ["--workers", "1", "--concurrency", "2"]
    assert clipmill(*command, f"s3://{bucket}/whole").returncode == 0
    whole, web.delay_s = objects(other, bucket, "whole/"), 0.1
    try:
        for there in (1, 11):  # objects that the killed run has put
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
    for there in (1, 11):
        done = clipmill(*command, f"s3://{bucket}/{there}/ds")
        assert done.returncode == 0, done.stderr
        again = objects(other, bucket, f"{there}/ds/")
        assert {**again, "dataset.json": b""} == {**whole, "dataset.json": b""}
    assert check(CheckConfig(f"s3://{bucket}/11/ds")) == []


def test_a_finished_dataset_is_passed_over_with_few_requests(bucket, store):
    """The runner's own requests; its tasks do nothing."""
    from pipeline.core.runner import ShardResult, ShardTask, Stage, run_stage

    root, stage = f"s3://{bucket}/ds", Stage("nothing", "raw", {})
    tasks = [ShardTask(number, {"rows": str(number)}) for number in range(200)]

    def work(root: str, task: ShardTask) -> ShardResult:
        return ShardResult({"success": 1}, {})

    assert run_stage(root, stage, tasks, work).made == 200
    store.requests.clear()
    assert run_stage(root, stage, tasks, work).made == 0
    assert store.requests.total() <= 4 * 200 + 20, "each record twice, each time with its size first"


# errors


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_a_training_run_fetches_every_shard_once_for_all_its_workers_and_epochs(bucket, store, tmp_path):
    """Remote shards and caches give the batches that local ones do; copies serve the next epochs, too."""
    here, there = str(tmp_path / "here"), f"s3://{bucket}/ds"
    write_teacher(here, write_packed(here, [9, 8, 7, 6]))
    for path in Path(here).rglob("*"):
        if path.is_file():
            files.write_bytes(f"{there}/{path.relative_to(here)}", path.read_bytes())
    student = load_model(tiny_clip(tmp_path / "model"), random_weights=True)
    store.got.clear()

    def batches(root: str):
        data = DataConfig(data=root, streams=2, window=1, scratch=str(tmp_path / "near"))
        samples = open_samples(data, TeacherCacheConfig(), student, seed=0)
        return load_batches(samples, batch_positions(0, 12, 5), workers=3)

    for one, other in zip(batches(here), batches(there), strict=True):
        assert one["keys"] == other["keys"]
        names = ("images", "tokens", "teacher_image", "teacher_text")
        assert all(one[name].equal(other[name]) for name in names)
    once = {path: times for path, times in store.got.items() if path.endswith((".tar", ".parquet"))}
    assert once == {
        f"/{bucket}/ds/{folder}/{shard:05d}.{kind}": 1
        for folder, kind in (("shards", "tar"), ("teacher/planted", "parquet"))
        for shard in range(4)
    }


def test_the_command_says_in_one_line_what_is_wrong(bucket, other, web):
    done = clipmill("ingest", "s3://no-such-bucket/ds", "--source", put_list(other, bucket, web.url), "--allow-private")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        r"clipmill: s3://no-such-bucket/ds/raw/00000\.\w+: "
        "The specified bucket does not exist; make the bucket, or check its name",
        line,
    ), line
    assert "no-such-bucket" not in [entry["Name"] for entry in other.list_buckets()["Buckets"]]


@pytest.mark.parametrize(
    "reason", ["nothing is there", "Could not connect", "Forbidden", "Unable to locate credentials"]
)
def test_what_is_wrong_with_the_store_is_said_of_source_and_of_root(bucket, other, web, tmp_path, monkeypatch, reason):
    source, root = put_list(other, bucket, web.url), f"s3://{bucket}/ds"
    (tmp_path / "list.tsv").write_bytes(files.read_bytes(source))
    if reason == "nothing is there":
        files.remove(source)
    elif reason == "Could not connect":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the pauses between them are long
    else:
        monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)  # from now on moto checks signatures
    if reason == "Unable to locate credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.aws
    new_client()
    try:
        with pytest.raises(UserError, match=f"{source}: .*{reason}"):
            ingest(config(root, source))
        if reason != "nothing is there":
            said = "The AWS Access Key Id you provided does not exist" if reason == "Forbidden" else reason
            with pytest.raises(UserError, match=f"{root}/.*: {said}.*; check the address, the store's credentials"):
                ingest(config(root, str(tmp_path / "list.tsv")))
    finally:
        new_client()


def new_client() -> None:
    """Let go of the client, which keeps the environment it was made in."""
    type(files.filesystem("s3://x")[0]).clear_instance_cache()


@pytest.mark.parametrize("call", ["read_bytes", "exists", "names", "open_read", "remove", "write_bytes"])
def test_refused_credentials_name_the_url(bucket, call, monkeypatch):
    path = f"s3://{bucket}/x"
    files.write_bytes(path, b"1")
    monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)  # from now on moto checks signatures
    with pytest.raises(UserError, match=rf"{path}: .*; check the address, the store's credentials") as caught:
        getattr(files, call)(path, *([b"2"] if call == "write_bytes" else []))
    assert "\n" not in str(caught.value)


def test_what_fails_while_reading_names_the_url(bucket, other):
    path = f"s3://{bucket}/x"
    files.write_bytes(path, bytes(60 << 20))
    with files.open_read(path) as file:
        assert file.read(1) == b"\0"
        other.put_object(Bucket=bucket, Key="x", Body=bytes(60 << 20) + b"another")
        with pytest.raises(UserError, match=f"{path}: .*"):
            file.read()
        other.delete_object(Bucket=bucket, Key="x")
        with pytest.raises(FileNotFoundError, match=path):
            file.read()


def test_a_store_whose_client_is_not_installed_says_which_one():
    with pytest.raises(UserError, match=r"gs://b/x: .*gcsfs") as refused:
        files.exists("gs://b/x")
    assert "s3" not in str(refused.value)
    code = "import sys; sys.modules['s3fs'] = None; from shards_spec import files; files.exists('s3://b/x')"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.splitlines()[-1]
    assert "UserError: s3://b/x: " in said
    assert said.endswith("(pip install s3fs, or in a checkout of clipmill pip install -e '.[s3]')")
    with pytest.raises(UserError, match=r"nope://b/x: .*nope"):
        files.write_bytes("nope://b/x", b"")


# jobs


@pytest.mark.slow
def test_arrays_on_slurm_fill_an_object_store(slurm, bucket, other, web, tmp_path):
    """Ingest and pack as arrays on a ROOT that is a URL; claims, logs and code are in the site's folder for jobs."""
    there, here, source = f"s3://{bucket}/there/ds", f"s3://{bucket}/here/ds", put_list(other, bucket, web.url, 20)
    site = tmp_path / "site.toml"
    site.write_text(f'jobs = "{tmp_path}/jobs"\n')
    ingest = ("ingest", "--source", source, "--allow-private", "--workers", "1", "--shard-size", "4")
    chain = ("--", *ingest, "--image-size", "48", "--", "pack", "--captioner", "none", "--workers", "1")
    made = submit(slurm, "pipeline", there, "--array", "3", "--time", "5", "--site", str(site), *chain)
    on_cluster(slurm, "submit", "pipeline", here, "--cluster", "debug", *chain)
    place = tmp_path / "jobs" / f"s3_{bucket}_there_ds"
    for _, last in made:
        assert set(slurm.ended(last, 120).values()) == {"COMPLETED"}, log_of(str(place), last)
    found = objects(other, bucket, "there/")
    assert found == objects(other, bucket, "here/")
    assert len([key for key in found if re.fullmatch(r"ds/(raw|shards)/\d{5}\.tar", key)]) == 10
    told = on_cluster(slurm, "jobs", there, "--site", str(site))
    assert "shards: 5 of 5 shards" in told
    assert (place / "claims" / "shards").is_dir()
