"""Large arrays on a real Slurm: more tasks than shards, more than one array may have, a slow node among others."""

import os
import shutil
import time

import pytest
from small_data import tree, write_raw
from small_slurm import TAGGED, log_of, submit

from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack

pytestmark = pytest.mark.integration


def local_tree(root: str) -> dict[str, str]:
    """What the plain command makes of a copy."""
    other = f"{root}-local/ds"
    shutil.copytree(root, other, ignore=shutil.ignore_patterns("logs", "shards"))
    pack(PackConfig(other, ("none",), nouns_only=True, tagger="slow_tagger:tag", workers=1))
    return tree(other)


@pytest.mark.slow
def test_no_more_tasks_than_shards(slurm, tmp_path):
    """200 tasks over 5 shards: where the number of shards is known, the array is cut to it."""
    root = str(tmp_path / "ds")
    write_raw(root, shards=5, per_shard=2)
    [(arrays, last)] = submit(slurm, "pack", root, *TAGGED, "--array", "200", "--time", "9")
    assert set(slurm.ended(last).values()) == {"COMPLETED"}
    assert len(slurm.states(arrays[0])) == 5


def packs_in_arrays_of(sizes: list[int], slurm, root: str, *words: str) -> None:
    """`submit pack` makes arrays of so many tasks, all end well, and the shards are the plain command's."""
    start = time.monotonic()
    [(arrays, last)] = submit(slurm, "pack", root, *TAGGED, "--time", "9", *words)
    print(f"submitted in {time.monotonic() - start:.1f} s")
    assert [len(slurm.states(array)) for array in arrays] == sizes
    assert set(slurm.ended(last, 600).values()) == {"COMPLETED"}, log_of(root, last)
    print(f"{time.monotonic() - start:.0f} s")
    for array in arrays:
        assert set(slurm.states(array).values()) == {"COMPLETED"}
    assert tree(root) == local_tree(root)


@pytest.mark.slow
def test_more_tasks_than_shards(slurm, tmp_path):
    """200 tasks over 50 shards, in two arrays of 100: their number is not known, as in a chain after an ingest."""
    root = str(tmp_path / "ds")
    write_raw(root, shards=50, per_shard=2)
    [(_, first)] = submit(slurm, "pack", root, "--captioner", "nobody", "--shard-size", "2", "--time", "9")  # fails
    packs_in_arrays_of([100, 100], slurm, root, "--array", "200", "--after", first, "--incomplete")


@pytest.mark.slow
def test_an_array_beyond_the_limit_is_split(slurm, tmp_path):
    """300 tasks for 300 shards where an array may have 100 (the test's cluster says so)."""
    root = str(tmp_path / "ds")
    write_raw(root, shards=300, per_shard=2)
    packs_in_arrays_of([100, 100, 100], slurm, root, "--array", "300")


@pytest.mark.slow
def test_a_slow_node_costs_little(slurm, tmp_path):
    """One of eight tasks at a fifth of the speed: the makespan is near what the sum of the speeds allows."""
    root, shards, each = str(tmp_path / "ds"), 320, 0.2
    write_raw(root, shards=shards, per_shard=2)
    [(_, last)] = submit(
        slurm,
        "pack",
        root,
        *TAGGED,
        "--array",
        "8",
        "--time",
        "9",
        "--claim-s",
        "20",
        slow_s=each,
        CLIPMILL_SLOW_TASK="0",
    )
    assert set(slurm.ended(last, 300).values()) == {"COMPLETED"}
    ends = sorted(os.stat(f"{root}/shards/{shard:05d}_stats.json").st_mtime for shard in range(shards))
    makespan, ideal = ends[-1] - ends[0], shards * 2 * each / 7.2
    print(f"makespan {makespan:.1f} s, ideal {ideal:.1f} s, {time.strftime('%H:%M:%S')}")
    assert makespan < 1.15 * ideal
