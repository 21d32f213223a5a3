"""Captions by a server: a real one on loopback that speaks the protocol, in good order and with every fault."""

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from chat_server import MODEL, serve_chat
from small_data import run_stage, tree, vouch, write_raw

from pipeline.caption import chat_client
from pipeline.caption.chat_client import KEY_VARIABLE
from pipeline.caption.config import CaptionConfig, ServerOptions
from pipeline.caption.decoding import Decoding
from pipeline.caption.stage import caption
from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.core.no_success import explain_no_success
from pipeline.why.config import WhyConfig
from pipeline.why.stage import why
from shards_spec.files import UserError, join, read_json
from shards_spec.manifest import read_dataset, read_done
from shards_spec.sample import Sample
from shards_spec.tar import read_shard, write_shard

pytestmark = pytest.mark.integration
NUCLEUS = Decoding()


@pytest.fixture
def server():
    with serve_chat() as chat:
        yield chat


@pytest.fixture
def root(tmp_path) -> str:
    """Two raw shards of five images each."""
    write_raw(str(tmp_path / "ds"), shards=2, per_shard=6)
    return str(tmp_path / "ds")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses between tries, and no key of whoever runs the tests."""
    monkeypatch.setattr(chat_client, "FIRST_PAUSE_S", 0.02)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def config(root: str, server, *, decoding: Decoding = NUCLEUS, **options) -> CaptionConfig:
    url = server if isinstance(server, str) else server.url
    own = {"num_captions": options.pop("num_captions", 3), "redraws": options.pop("redraws", 2)}
    endpoint = ServerOptions(
        **{"server": url, "server_model": MODEL, "request_timeout_s": 5.0, "retries": 2, **options}
    )
    return CaptionConfig(root, endpoint=endpoint, decoding=decoding, **own)


def rows_of(root: str, name: str = "looker-7b") -> dict[str, dict]:
    rows = {}
    for shard in range(2):
        rows |= {
            row["key"]: row for row in pq.read_table(join(root, f"captions/{name}/{shard:05d}.parquet")).to_pylist()
        }
    return rows


def images(server) -> list[dict]:
    """The requests but those that tried the server with an image of its own."""
    return [body for body in server.bodies if body["size"] != (224, 224)]


def test_captions_come_from_the_images(root, server):
    summary = caption(config(root, server, prompt="What is it?"))
    rows = rows_of(root)
    assert summary.counts == {"success": len(rows)}
    for shard in range(2):
        for sample in read_shard(join(root, f"raw/{shard:05d}.tar")):
            width = sample.meta["width"]
            row = rows[sample.key]
            assert len(set(row["captions"])) == 3
            assert all(text.endswith(f"thing of {width} by 48") for text in row["captions"])
            assert row["num_tokens"] == [9] * 3
            assert row["logprobs"] == [-2.25] * 3
            assert row["reason"] is None
    body = images(server)[0]
    assert {name: body[name] for name in ("model", "messages", "max_tokens", "temperature", "top_p")} == {
        "model": MODEL,
        "messages": "What is it?",
        "max_tokens": 30,
        "temperature": 1.0,
        "top_p": 0.9,
    }
    stored = pq.read_schema(join(root, "captions/looker-7b/00000.parquet")).metadata[b"clipmill"]
    assert json.loads(stored)["prompt"] == "What is it?"
    assert json.loads(stored) == read_dataset(root)["stages"]["caption/looker-7b"]["config"]
    assert check(CheckConfig(root)) == []
    assert any("-0.25 nats a token" in line for line in why(WhyConfig(root, sample.key)).lines)


def test_the_same_captions_at_any_concurrency_and_after_a_kill(root, server):
    caption(config(root, server, concurrency=1))
    before = tree(root)
    Path(root, "captions/looker-7b/00001_stats.json").unlink()
    server.behave = lambda body, image, time: "slow"
    assert caption(config(root, server, concurrency=16)).made == 1
    assert tree(root) == before
    assert 2 < server.most_at_once <= 16
    asked = len(server.bodies)
    assert caption(config(root, server)).made == 0
    assert len(server.bodies) == asked, "nothing is asked when all is there"
    with pytest.raises(UserError, match=r"--prompt: .* before, 'Say more' now"):
        caption(config(root, server, prompt="Say more"))


@pytest.mark.parametrize("takes_n", [True, False])
@pytest.mark.parametrize("takes_extras", [True, False])
def test_servers_that_understand_less_are_asked_in_their_way(root, server, takes_n, takes_extras):
    server.takes_n, server.takes_extras = takes_n, takes_extras
    caption(config(root, server))
    assert all(len(set(row["captions"])) == 3 for row in rows_of(root).values())
    assert {"n" in body for body in images(server)} >= {takes_n}
    assert {"min_tokens" in body for body in images(server)} == {takes_extras}


def test_unusable_captions_are_asked_for_again(root, server):
    wrong = ("same", "loop", "silent")
    server.behave = lambda body, image, time: wrong[image.width % 3] if time == 1 and image.width != 224 else "ok"
    summary = caption(config(root, server))
    assert summary.counters["redrawn"] >= 2 * summary.counts["success"]
    assert set(summary.counters) <= {"captions", "redrawn", "repeated"}
    texts = [text for row in rows_of(root).values() for text in row["captions"]]
    assert not {"", "a dog a dog a dog a dog"} & set(texts)
    server.behave = lambda body, image, time: "same"
    again = replace(config(root, server, redraws=1), name="stubborn")
    counters = caption(again).counters
    assert counters["repeated"] == counters["redrawn"] == 2 * summary.counts["success"]


def test_lengths_and_greedy_decoding(root, server):
    short = Decoding(min_tokens=1, max_tokens=4)
    assert caption(config(root, server, decoding=short, num_captions=1)).counters["cut at max_tokens"] == len(
        rows_of(root)
    )
    greedy = config(root, server, decoding=Decoding("greedy", repetition_penalty=1.2), num_captions=1)
    server.bodies.clear()
    caption(replace(greedy, name="greedy"))
    assert {(body["temperature"], body["repetition_penalty"], "top_p" in body) for body in server.bodies} == {
        (0, 1.2, False)
    }
    top_k = replace(config(root, server, decoding=Decoding("top_k", top_k=7)), name="top-k")
    server.bodies.clear()
    caption(top_k)
    assert {(body["top_k"], "top_p" in body) for body in server.bodies} == {(7, False)}


def test_strange_answers_become_captions_that_can_be_stored(root, server):
    server.behave = lambda body, image, time: "strange"
    caption(config(root, server, num_captions=1))
    for row in rows_of(root).values():
        assert row["captions"] == ['a "dog" & cat']
        assert row["logprobs"] == row["num_tokens"] == [None]


@pytest.mark.parametrize("fault", ["busy", "broken", "reset", "nonsense", "odd", "none", "hang"])
def test_a_fault_that_passes_costs_no_caption(root, server, fault):
    caption(config(root, server))
    expected = rows_of(root)
    server.times.clear()
    server.behave = lambda body, image, time: fault if time == 1 else "ok"
    summary = caption(replace(config(root, server, request_timeout_s=0.3 if fault == "hang" else 5.0), name="again"))
    assert summary.counts == {"success": len(expected)}
    assert rows_of(root, "again") == expected


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("busy", "server: HTTP 429"),
        ("broken", "server: HTTP 500"),
        ("reset", "server: connection lost"),
        ("nonsense", "server: malformed answer"),
        ("hang", "server: timeout"),
        ("unwanted", "server: HTTP 400"),
        ("flood", "server: answer too large"),
    ],
)
def test_an_image_that_keeps_failing_has_a_reason_and_the_others_their_captions(root, server, fault, reason):
    poison = next(read_shard(join(root, "raw/00000.tar")))
    width = poison.meta["width"]
    server.behave = lambda body, image, time: fault if image.width == width else "ok"
    summary = caption(config(root, server, concurrency=1, request_timeout_s=0.3 if fault == "hang" else 5.0))
    rows = rows_of(root)
    failed = [key for key, row in rows.items() if row["reason"] is not None]
    assert poison.key in failed
    assert len(failed) < len(rows)
    assert summary.counts == {"success": len(rows) - len(failed), reason: len(failed)}
    assert rows[poison.key] | {"key": ""} == {
        "key": "",
        "captions": None,
        "logprobs": None,
        "num_tokens": None,
        "reason": reason,
    }
    assert check(CheckConfig(root)) == []
    run_stage("pack", root)
    final = pq.read_table(join(root, "shards/00000.parquet")).to_pylist()
    assert final[0]["key"] == poison.key, "an image without a foreign caption keeps its own"
    assert final[0]["synthetic"] == []


def test_a_server_that_is_busy_with_others_is_waited_for(root, server, monkeypatch):
    monkeypatch.setattr(chat_client, "LONGEST_PAUSE_S", 0.2)
    refused = list[bytes]()

    def behave(body, image, time):
        """The first image is refused more often than there are retries, until nearly all others are answered."""
        if image.width != 224 and not refused:
            refused.append(image.tobytes())
        return "busy" if image.tobytes() in refused and server.answers < 9 else "slow"

    server.behave = behave
    summary = caption(config(root, server, concurrency=2, retries=3))
    assert summary.counts == {"success": len(rows_of(root))}
    assert max(server.times.values()) > 1


def test_images_that_failed_are_asked_about_again_and_no_others(root, server):
    wanted = config(root, server, decoding=Decoding(min_tokens=1, max_tokens=4))
    calm = replace(wanted, name="calm")
    expected = caption(calm)
    widths = sorted({sample.meta["width"] for sample in read_shard(join(root, "raw/00000.tar"))})
    server.behave = lambda body, image, time: "unwanted" if image.width in widths[:2] else "ok"
    failed = caption(wanted).counts["server: HTTP 400"]
    assert failed
    server.behave = lambda body, image, time: "ok"
    assert caption(wanted).made == 0
    server.times.clear()
    again = replace(wanted, endpoint=replace(wanted.endpoint, retry_failed=True))
    summary = caption(again)
    assert len(server.times) == failed + 1, "and the image that tries the server"
    assert (summary.counts, summary.counters) == (expected.counts, expected.counters)
    assert rows_of(root) == rows_of(root, "calm")
    assert caption(again).made == 0
    assert check(CheckConfig(root)) == []


@pytest.mark.parametrize(
    ("fault", "reason"), [("null", "server: empty answer"), ("endless", "server: caption too long")]
)
def test_answers_that_are_no_captions_have_a_reason_and_are_asked_for_again(root, server, fault, reason, caplog):
    server.behave = lambda body, image, time: fault
    wanted = config(root, server, num_captions=2, redraws=1)
    never_ran = replace(wanted, endpoint=replace(wanted.endpoint, retry_failed=True))
    with pytest.raises(UserError, match=r"^caption/looker-7b has not finished in .* without --retry-failed first"):
        caption(never_ran)
    summary = caption(wanted)
    rows = rows_of(root)
    assert summary.counts == {reason: len(rows)}
    assert {row["reason"] for row in rows.values()} == {reason}
    assert [row["captions"] for row in rows.values()] == [None] * len(rows)
    assert summary.counters.get("too long, left out", 0) == (2 * len(rows) if fault == "endless" else 0)
    assert ("the answer to a first image is empty" in caplog.text) == (fault == "null")
    assert {"null": "--max-tokens", "endless": "--prompt"}[fault] in (
        explain_no_success("caption", summary.counts) or ""
    )
    assert check(CheckConfig(root)) == []
    server.behave = lambda body, image, time: "ok"
    summary = caption(never_ran)
    assert summary.counts == {"success": len(rows)}
    assert "too long, left out" not in summary.counters


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("nonsense", "is no OpenAI-compatible endpoint .*ends in /v1"),
        ("busy", "refuses every request .HTTP 429"),
        ("broken", "has answered no request .HTTP 500.*/v1"),
    ],
)
def test_a_server_that_never_answers_is_not_one_that_is_gone(root, server, fault, said):
    server.behave = lambda body, image, time: fault
    with pytest.raises(UserError, match=said):
        caption(config(root, server, retries=0))


def test_white_space_around_the_key_is_no_part_of_it(root, server, monkeypatch):
    server.key = "secret-key-1234"
    monkeypatch.setenv(KEY_VARIABLE, f" {server.key}\r\n")
    caption(config(root, server, num_captions=1))
    monkeypatch.setenv(KEY_VARIABLE, "secret\r\nX-Other: 1")
    with pytest.raises(UserError, match=f"^{KEY_VARIABLE} has a line break") as error:
        caption(config(root, server, num_captions=1))
    assert "secret" not in str(error.value)


def test_an_image_that_does_not_decode_is_what_it_is_with_a_model_here(root, server):
    path = join(root, "raw/00001.tar")
    samples = list(read_shard(path))
    broken = samples[1].key
    samples[1] = Sample(broken, {**samples[1].members, "jpg": b"\xff\xd8\xff no image"})
    write_shard(path, samples)
    vouch(root, "raw", 1, "raw/00001.tar")
    summary = caption(config(root, server))
    assert summary.counts["picture does not decode"] == 1
    assert rows_of(root)[broken]["captions"] == []
    assert check(CheckConfig(root)) == []
    run_stage("pack", root)
    assert read_done(join(root, "shards"), 1).counts["picture does not decode"] == 1


@pytest.mark.parametrize("fault", ["broken", "reset", "hang", "nonsense", "gone", "elsewhere"])
def test_a_server_that_is_gone_stops_the_command_and_loses_no_shard(root, server, fault):
    server.behave = lambda body, image, time: "ok" if server.answers < 4 else fault
    timeout = 0.3 if fault == "hang" else 5.0
    with pytest.raises(UserError, match=r"--server http://127.0.0.1:\d+/v1 ") as error:
        caption(config(root, server, concurrency=2, request_timeout_s=timeout))
    assert {"gone": "answers HTTP 404", "elsewhere": "redirects to"}.get(fault, "rerun the same") in str(error.value)
    assert not list(Path(root).glob("captions/*/*_stats.json"))
    server.behave = lambda body, image, time: "ok"
    assert caption(config(root, server)).counts == {"success": len(rows_of(root))}


def test_a_server_that_is_not_there_is_an_error_at_once(root, server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with pytest.raises(UserError, match=r"does not answer .connection refused.*vllm serve"):
        caption(config(root, f"http://127.0.0.1:{port}/v1", retries=9))
    with pytest.raises(UserError, match="does not serve it; there are acme/looker-7b"):
        caption(config(root, server, server_model="tree"))
    with pytest.raises(UserError, match=r"HTTP 404"):
        caption(config(root, server.url.replace("/v1", "/v2")))
    server.behave = lambda body, image, time: "unwanted"
    with pytest.raises(UserError, match=r"the image is too large for the model.; does it take images"):
        caption(config(root, server))
    assert not Path(root, "captions").exists()


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(root, server, monkeypatch, caplog, capfd):
    server.key = "secret-key-1234"
    with pytest.raises(UserError, match=f"{KEY_VARIABLE}, which is not set"):
        caption(config(root, server))
    monkeypatch.setenv(KEY_VARIABLE, "secret-wrong")
    with pytest.raises(UserError, match=r"HTTP 401: Incorrect API key provided: \*\*\*") as error:
        caption(config(root, server))
    assert "secret" not in str(error.value)
    monkeypatch.setenv(KEY_VARIABLE, server.key)
    caption(config(root, server))
    for path in Path(root).rglob("*"):
        if path.is_file():
            assert b"secret" not in path.read_bytes(), path
    assert "secret" not in caplog.text + "".join(capfd.readouterr())
    assert server.url.split("/")[2] not in json.dumps(read_json(join(root, "dataset.json")))


def test_images_are_sent_no_larger_than_asked_for(tmp_path, server):
    root = str(tmp_path / "large")
    write_raw(root, shards=1, per_shard=2, size=96)
    caption(config(root, server, image_side=40))
    assert {max(body["size"]) for body in images(server)} == {40}


def configured(root: str, endpoint: dict, **more) -> CaptionConfig:
    """A config of a server, with options of it and of the stage."""
    options = {"server": "http://localhost/v1", "server_model": MODEL, **endpoint}
    return CaptionConfig(root, endpoint=ServerOptions(**options), **more)


def test_options_that_mean_nothing_for_a_server_are_refused(root):
    for wrong, said in (
        ({"endpoint": {"server": None, "server_model": "", "prompt": "x"}}, "--prompt goes with --server"),
        ({"endpoint": {"server": "localhost:8000"}}, "--server 'localhost:8000'"),
        ({"endpoint": {"server": "http://u:p@localhost/v1"}}, "--server"),
        ({"endpoint": {"server": "http://localhost/v1", "server_model": ""}}, "--server-model"),
        ({"endpoint": {"concurrency": 0}}, "--concurrency 0"),
        ({"endpoint": {"request_timeout_s": float("nan")}}, "--request-timeout-s"),
        ({"endpoint": {"retries": -1}}, "--retries"),
        ({"endpoint": {}, "decoding": Decoding("beam")}, "--method"),
        ({"endpoint": {}, "decoding": Decoding(prefix="a")}, "--prefix"),
        ({"endpoint": {}, "decoding": Decoding("greedy")}, "--num-captions 5"),
    ):
        with pytest.raises(UserError, match=said):
            configured(root, **wrong)
    assert os.environ.get(KEY_VARIABLE) is None
