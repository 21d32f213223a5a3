"""Batches that are taken one ahead for a device; the streams of CUDA are stood in for."""

import multiprocessing
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from small_training import assert_same_run, tiny_config

from shards_spec.files import DataError
from training import trainer
from training.data import batches as module
from training.trainer import train


class Stream:
    """Notes what waits for it."""

    def __init__(self, log):
        self.log = log

    def wait_stream(self, other):
        self.log.append("wait")


@pytest.fixture
def log(monkeypatch):
    """What happened: a batch was read, the computing stream waited, a tensor was recorded on it."""
    seen = []
    computing = Stream(seen)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(seen))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: seen.append("record"))
    return seen


def pieces_of(count, log, fail_at=None):
    for number in range(count):
        if number == fail_at:
            raise DataError("damaged")
        log.append(f"read {number}")
        yield [{"keys": [str(number)], "images": torch.full((1,), number)}]


def test_the_next_batch_is_read_while_one_is_used(log):
    ahead = module._copied_ahead(pieces_of(3, log), "cuda")
    found = []
    for pieces in ahead:
        following = f"read {len(found) + 1}"
        end = time.monotonic() + 10
        while following not in log and len(found) < 2 and time.monotonic() < end:
            time.sleep(0.001)  # the thread reads it without being asked
        assert following in log or len(found) == 2
        found.append(pieces[0]["images"].item())
    assert found == [0, 1, 2]
    assert log.count("wait") == log.count("record") == 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_an_error_comes_where_its_batch_would_have(log):
    ahead = module._copied_ahead(pieces_of(3, log, fail_at=2), "cuda")
    assert next(ahead)[0]["keys"] == ["0"]
    assert next(ahead)[0]["keys"] == ["1"]
    with pytest.raises(DataError, match="damaged"):
        next(ahead)


def test_leaving_early_ends_the_reader(log):
    closed = []

    def endless():
        try:
            yield from pieces_of(10**9, log)
        finally:
            closed.append(True)

    ahead = module._copied_ahead(endless(), "cuda")
    next(ahead)
    ahead.close()
    del ahead
    assert closed == [True]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_a_run_counts_the_batches_that_it_used(log, clip_root, tmp_path, monkeypatch):
    """Its checkpoint of step 2 was written while the third batch was there already."""
    fields = {"steps": 4, "checkpoint_steps": 2, "keep_checkpoints": 9}
    usual = train("clip", tiny_config("clip", clip_root, str(tmp_path / "usual"), **fields))

    def ahead(*words, **options):
        one_by_one = ([batch] for batch in module.load_batches(*words, **options))
        for [batch] in module._copied_ahead(one_by_one, "cuda"):
            yield batch

    monkeypatch.setattr(trainer, "load_batches", ahead)
    out = tmp_path / "ahead"
    train("clip", tiny_config("clip", clip_root, str(out), **fields))
    assert log.count("wait") == 4
    (out / "checkpoints" / "step_000004.pt").unlink()
    train("clip", tiny_config("clip", clip_root, str(out), **fields))
    assert log.count("wait") == 6
    assert_same_run(out, usual)


class Rows:
    """Rows of a number each; the 5th is damaged."""

    student = None

    def __getitem__(self, index):
        position, _ = index
        if position == 5:
            return DataError("damaged")
        return {"key": str(position), "position": position, "epoch": 0, "number": torch.tensor(position)}


def test_worker_processes_are_started_from_the_thread(log):
    """They ignore signals, which only a main thread may ask for: theirs is one."""
    batches = iter([(range(2), None), (range(2, 4), None), (range(4, 6), None)])
    ahead = module._copied_ahead(module._read_batches(Rows(), batches, 2, "cpu"), "cuda")
    assert [next(ahead)[0]["number"].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(DataError, match="damaged"):
        next(ahead)
    for _ in range(100):  # on a busy machine they take a moment to end
        if not multiprocessing.active_children():
            break
        time.sleep(0.1)
    assert not multiprocessing.active_children()
