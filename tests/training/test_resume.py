"""The reader over real processes: ranks and workers deliver what one process does; killed, it goes on bit for bit."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_training import tiny_clip, write_packed, write_teacher

from shards_spec.files import write_json
from shards_spec.models import load_model
from training.config import DataConfig, TeacherCacheConfig
from training.data.batches import load_batches
from training.data.order import batch_positions
from training.data.samples import open_samples

FORK = multiprocessing.get_context("fork")
SIZES, BATCH = [11, 7, 9, 4, 13, 6], 10
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    write_teacher(str(folder), write_packed(str(folder), SIZES, broken=("000020003",)))
    return str(folder), load_model(tiny_clip(folder / "model"), random_weights=True)


def batches(data, start, number, workers=0, rank=0, world_size=1):
    root, student = data
    samples = open_samples(DataConfig(data=root, streams=2), TeacherCacheConfig(), student, seed=4)
    yield from load_batches(samples, batch_positions(start, number, BATCH, rank, world_size), workers=workers)


def rows(batch):
    """What a batch holds, one digest per sample, by its position."""
    tensors = [batch[name] for name in ("images", "tokens", "teacher_image", "teacher_text")]
    digests = [
        hashlib.sha256(b"".join(t[i].numpy().tobytes() for t in tensors)).hexdigest() for i in range(len(tensors[0]))
    ]
    return {
        position: (key, digest)
        for position, key, digest in zip(batch["positions"].tolist(), batch["keys"], digests, strict=True)
    }


def rank_of_two(rank, data, meeting, start, number, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for batch in batches(data, start, number, 3, rank, 2):
        found = [None, None]
        dist.all_gather_object(found, (rows(batch), batch["skipped"]))
        if rank == 0:
            queue.put(found)
    dist.destroy_process_group()


def test_two_ranks_of_three_workers_deliver_what_one_process_does(data, tmp_path):
    start, number = 20, 12  # from the middle, over more than two epochs
    queue = FORK.Queue()
    ranks = [
        FORK.Process(target=rank_of_two, args=(r, data, tmp_path / "meeting", start, number, queue)) for r in range(2)
    ]
    for process in ranks:
        process.start()
    got = [queue.get(timeout=60) for _ in range(number)]
    for process in ranks:
        process.join(20)
        assert process.exitcode == 0
    for batch, ((first, skipped), (second, more)) in zip(batches(data, start, number), got, strict=True):
        assert not set(first) & set(second)
        assert first | second == rows(batch)
        assert sorted(skipped + more) == sorted(batch["skipped"])
    assert sum(len(batch["skipped"]) for batch in batches(data, 0, 10)) == 2, "once in each of two epochs"


def go_on(data, folder, workers, number):
    """Read batches from where the state stands, noting each before the state moves on."""
    torch.set_num_threads(1)
    state = json.loads((folder / "state.json").read_text())
    for batch in batches(data, state["samples_seen"], number - state["samples_seen"] // BATCH, workers):
        with open(folder / "log.jsonl", "a") as log:
            log.write(json.dumps([state["samples_seen"], sorted(rows(batch).items())]) + "\n")
        state["samples_seen"] += BATCH
        write_json(str(folder / "state.json"), {**state, "epoch": state["samples_seen"] // sum(SIZES)})


def test_killed_at_ten_random_steps_it_goes_on_bit_for_bit(data, tmp_path):
    number, draw = 60, random.Random(0)
    write_json(str(tmp_path / "state.json"), {"epoch": 0, "samples_seen": 0})
    kills = [*sorted(draw.sample(range(1, number - 1), 10)), None]
    log = tmp_path / "log.jsonl"
    for kill in kills:
        child = FORK.Process(target=go_on, args=(data, tmp_path, draw.choice([0, 1, 3]), number))
        child.start()
        while kill is not None and lines(log) < kill and child.is_alive():
            time.sleep(0.002)
        if kill is not None:
            os.kill(child.pid, signal.SIGKILL)
        child.join()  # with a timeout it would wait for orphaned workers, too, which end some seconds later
        assert child.exitcode == (0 if kill is None else -signal.SIGKILL)
    got = [json.loads(line) for line in log.read_text().splitlines()]
    wanted = [
        json.loads(json.dumps([i * BATCH, sorted(rows(b).items())])) for i, b in enumerate(batches(data, 0, number))
    ]
    assert {seen for seen, _ in got} == {seen for seen, _ in wanted}
    assert all(entry == wanted[entry[0] // BATCH] for entry in got)
    assert number <= len(got) <= number + len(kills), "a batch may come again when the kill fell before the state"


def lines(log: Path) -> int:
    return log.read_text().count("\n") if log.exists() else 0


def test_another_world_size_goes_on_with_the_same_global_batches(data):
    undisturbed = [rows(batch) for batch in batches(data, 0, 9)]
    for done, world_size in ((3, 2), (5, 5), (8, 1)):
        ranks = [
            [rows(b) for b in batches(data, done * BATCH, 9 - done, 0, rank, world_size)] for rank in range(world_size)
        ]
        joined = [dict(item for share in shares for item in share.items()) for shares in zip(*ranks, strict=True)]
        assert joined == undisturbed[done:]
