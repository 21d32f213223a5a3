"""Memory does not grow with the number of shards: the peak of 50 shards is that of 5."""

import multiprocessing
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_data import tiny_coca, write_raw
from small_training import tiny_clip
from warm_process import warm_context

from pipeline.cache.config import CacheConfig
from pipeline.cache.stage import cache
from pipeline.caption.config import CaptionConfig
from pipeline.caption.decoding import Decoding
from pipeline.caption.stage import caption
from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.dedup.config import DedupConfig
from pipeline.dedup.stage import dedup
from pipeline.labels.vocab_stage import VocabConfig, vocab
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack

pytestmark = pytest.mark.integration

MIB = 1024  # ru_maxrss is in KiB
SIZE = 128  # pixels, which take 50 kB as they are decoded
STAGES = ("dedup", "caption", "pack", "vocab", "cache", "check", "train")
PADDING = 65_000  # bytes of an encoded image besides: a shard of 12 is about 0.8 MB


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[int, str]:
    roots = {}
    for shards in (5, 50):
        root = str(tmp_path_factory.mktemp("data") / f"ds{shards}")
        write_raw(root, shards, per_shard=15, size=SIZE, padding=PADDING)
        roots[shards] = root
    return roots


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models")
    tiny_clip(folder / "student")
    return tiny_coca(folder / "coca")


def _work(stage: str, root: str, model: str, pipe) -> None:
    torch.set_num_threads(1)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if stage == "caption":
        caption(CaptionConfig(root, model, name="cap", num_captions=1, decoding=Decoding(max_tokens=6), threads=1))
    elif stage == "dedup":
        dedup(DedupConfig(root, workers=1))
    elif stage == "pack":
        pack(PackConfig(root, workers=1))
    elif stage == "vocab":
        vocab(VocabConfig(root, min_count=1, workers=1))
    elif stage == "cache":
        cache(CacheConfig(root, model, name="tea", views=1, threads=1))
    elif stage == "train":
        train_clip(root, str(Path(root, "run")), str(Path(model.removeprefix("local-dir:")).parent / "student"))
    else:
        assert check(CheckConfig(root, workers=1)) == []
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)


def train_clip(root: str, out: str, student: str) -> None:
    """An epoch and more of either dataset, in equally many steps."""
    from training.config import smoke
    from training.configs import default_config
    from training.trainer import train

    config = smoke(default_config("clip"))
    data = replace(config.data, data=root, batch_size=24, streams=2)
    run = replace(config.run, out=out, steps=30, log_every=30)
    train("clip", replace(config, data=data, run=run, student=replace(config.student, model=f"local-dir:{student}")))


def peak(stage: str, root: str, model: str) -> float:
    """MiB that the stage adds to the resident set of a fork of this process at its worst moment."""
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_work, args=(stage, root, model, send))
    child.start()
    send.close()  # so that a child that dies ends the wait
    grown = receive.recv() / MIB
    child.join()
    return grown


def _send_peaks(roots: list[str], model: str, pipe) -> None:
    """The peaks of each stage with each dataset; this process has imported everything and does nothing else."""
    for stage in STAGES:
        pipe.send([peak(stage, root, model) for root in roots])


def test_fifty_shards_take_the_memory_of_five(roots, model):
    """The processes are no forks of this one, whose freed memory they would take first, at another moment each time."""
    total = sum(path.stat().st_size for path in Path(roots[50], "raw").glob("*.tar")) / 2**20
    receive, send = multiprocessing.Pipe(duplex=False)
    parent = warm_context().Process(target=_send_peaks, args=([roots[5], roots[50]], model, send))
    parent.start()
    send.close()
    for stage in STAGES:
        small, large = receive.recv()
        print(f"{stage}: {small:.0f} MiB for 5 shards, {large:.0f} MiB for 50 ({total:.0f} MiB of raw tars)")
        assert large - small < total / 4, stage
    parent.join()
    for root in roots.values():
        shutil.rmtree(root)
