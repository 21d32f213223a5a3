#!/usr/bin/env python3
"""`select`: samples/s per core by cached cosines, and semantic duplicates against the loop that a user would write.

    python tests/bench/selection.py [--samples 10000] [--rounds 3] [--vectors 1000000] [--dim 512]

Conditions: final shards with five synthetic captions and caches of eight views, made up; CPU seconds of all that
`select` does with a shard but the start of the process, files in the page cache.

Duplicates: embeddings around 20,000 centres, a tenth of them copies with a little noise. Ours reads them from a file
and keeps them in one; the plain way is SemDeDup's as a script over one float32 array: k-means over all of it in batches
(as many rounds), then each cell's whole matrix of cosines. Equal numbers of cells. Each runs in a process of its own,
which says its seconds and its peak of memory.
"""

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.select.cells import ROUNDS, Embeddings
from pipeline.select.config import SelectConfig
from pipeline.select.semantic_duplicates import DuplicateRule, repeated_rows
from pipeline.select.stage import select
from shards_spec.embeddings import Dtype, encode_vectors, write_vectors
from shards_spec.files import atomic_writer, join, sha256_file
from shards_spec.layout import final_parquet, parquet_path, raw_parquet, shard_name, tar_path, teacher_parquet
from shards_spec.manifest import Done, write_stage

VIEWS = 8
CAPTIONS = 6  # the original one and five
WORDS = ("photo", "red", "blue", "small", "dog", "cat", "house", "street", "table", "near", "woman", "child", "car")
WNIDS = [f"n{number:08d}" for number in range(5000)]
ABOVE = 0.95
CENTRES = 20_000


def write_dataset(root: str, samples: int, dim: int, dtype: Dtype) -> None:
    """A dataset of two shards as far as `select` reads it."""
    rng = np.random.default_rng(0)
    for shard in range(2):
        keys = [f"{shard_name(shard)}{row:05d}" for row in range(samples // 2)]
        texts = [" ".join(rng.choice(WORDS, 10)) for _ in range(CAPTIONS * len(keys))]
        labels = rng.choice(WNIDS, (CAPTIONS * len(keys), 3)).tolist()
        rows = range(0, len(texts), CAPTIONS)
        table = {
            "key": keys,
            "caption": [texts[row] for row in rows],
            "synthetic": [texts[row + 1 : row + CAPTIONS] for row in rows],
            "synsets": [labels[row : row + CAPTIONS] for row in rows],
            "width": pa.array(rng.integers(200, 500, len(keys)), pa.int32()),
            "height": pa.array(rng.integers(200, 500, len(keys)), pa.int32()),
        }
        raw = {
            "key": keys,
            "status": ["success"] * len(keys),
            "url": [f"https://images.example.com/{key}.jpg" for key in keys],
            "sha256": [f"{number:064x}" for number in rng.integers(0, 1 << 62, len(keys)).tolist()],
            "similarity": rng.random(len(keys)),
        }
        for path, own in ((final_parquet(root, shard), table), (raw_parquet(root, shard), raw)):
            with atomic_writer(path) as file:
                pq.write_table(pa.table(own), file)
        hashes = dict.fromkeys((tar_path("raw", shard), parquet_path("raw", shard)), "0")
        Done("ingest", shard, {}, {"success": len(keys)}, {}, hashes).write(join(root, "raw"))
        finals = dict.fromkeys((tar_path("shards", shard), parquet_path("shards", shard)), "0")
        inputs = {tar_path("raw", shard): "0"}
        Done("pack", shard, {}, {"success": len(keys)}, inputs, finals).write(join(root, "shards"))
        names = [f"image_{view}" for view in range(VIEWS)] + [f"text_{number}" for number in range(CAPTIONS)]
        vectors = {name: encode_vectors(rng.standard_normal((len(keys), dim), np.float32), dtype) for name in names}
        ids = {
            name: np.arange(1, len(keys) + 1, dtype=np.uint64)
            for name in ("id_image", *(f"id_{n}" for n in names[VIEWS:]))
        }
        path = teacher_parquet(root, "tea", shard)
        write_vectors(path, keys, vectors, ids, {})
        cache = parquet_path("teacher/tea", shard)
        done = Done(
            "cache/tea", shard, {"num_views": VIEWS}, {}, {tar_path("shards", shard): "0"}, {cache: sha256_file(path)}
        )
        done.write(join(root, "teacher/tea"))
    for stage in ("ingest", "pack"):
        write_stage(root, stage, {"config": {}, "shards": 2, "counts": {"success": samples}})


def seconds_of(work: Callable[[], object], rounds: int) -> float:
    """CPU seconds, the fewest of the rounds."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def measure_conditions(folder: Path, options: argparse.Namespace) -> None:
    """Print samples/s for rules of several kinds."""
    listed = folder / "list.txt"
    for dim in (512, 768):
        for dtype in ("float16", "int8"):
            root = str(folder / f"{dim}{dtype}")
            write_dataset(root, options.samples, dim, dtype)
            keys = pq.read_table(final_parquet(root, 0), columns=["key"]).column(0).to_pylist()
            listed.write_text("\n".join(keys))
            rules = {
                "cosine > 0": {"where": ("cosine > 0",)},
                "each caption's cosine > 0": {"captions_where": ("cosine > 0",)},
            }
            if dim == 512 and dtype == "float16":
                rules |= {
                    "words > 5 and aspect < 2": {"where": ("words > 5 and aspect < 2",)},
                    "a column of the list": {"where": ("similarity > 0.3",)},
                    "language == 'en'": {"where": ("language == 'en'",)},
                    "synsets > 2": {"where": ("synsets > 2",)},
                    "--top 0.3 --by cosine": {"top": 0.3, "by": "cosine"},
                    "--balance 100": {"balance": 100},
                    "--from": {"from_": (str(listed),)},
                }
            for text, rule in rules.items():
                config = SelectConfig(root, workers=1, overwrite=True, **rule)
                rate = options.samples / seconds_of(lambda config=config: select(config), options.rounds)
                print(f"select {VIEWS} views x {dim} {dtype}, {text}: {rate:,.0f} samples/s")
            shutil.rmtree(root)


def embeddings_of(number: int, dim: int) -> np.ndarray:
    """Unit embeddings around centres, float32 (number, dim); a tenth are copies with a cosine of about 0.98."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CENTRES, dim), np.float32)
    values = centres[rng.integers(0, CENTRES, number)]
    for start in range(0, number, 1 << 16):
        part = values[start : start + (1 << 16)]
        part += 0.8 * rng.standard_normal(part.shape, np.float32)
    copies = rng.permutation(number)[: number // 5].reshape(2, -1)
    values[copies[1]] = values[copies[0]] + 0.25 * rng.standard_normal((copies.shape[1], dim), np.float32)
    for start in range(0, number, 1 << 16):
        part = values[start : start + (1 << 16)]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return values


def own_way(path: str, cells: int) -> int:
    """Ours; returns how many go."""
    folder = tempfile.mkdtemp()
    number = len(np.load(path, mmap_mode="r"))
    embeddings = Embeddings(join(folder, "embeddings"))
    for start in range(0, number, 10_000):  # as from shards; mapped anew, or all that was read would count as memory
        embeddings.append(np.array(np.load(path, mmap_mode="r")[start : start + 10_000]))
        if start == 0:
            embeddings.reserve(number)
    gone = int((repeated_rows(embeddings, DuplicateRule("", ABOVE, cells)) >= 0).sum())
    shutil.rmtree(folder)
    return gone


def plain_way(path: str, cells: int) -> int:
    """SemDeDup as a script with numpy; returns how many go."""
    values = np.load(path)
    centres = values[np.linspace(0, len(values) - 1, cells).astype(int)]
    for _ in range(ROUNDS):
        nearest = np.concatenate([(values[i : i + 8192] @ centres.T).argmax(1) for i in range(0, len(values), 8192)])
        order = np.argsort(nearest, kind="stable")
        found, first = np.unique(nearest[order], return_index=True)
        centres[found] = np.stack([part.sum(0) for part in np.split(values[order], first[1:])])
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    gone = 0
    for cell in range(cells):
        own = values[nearest == cell]
        own = own[np.argsort(own @ centres[cell])]
        gone += int((np.triu(own @ own.T, 1).max(axis=0, initial=0) > ABOVE).sum())
    return gone


def in_a_process(way: Callable[[str, int], int], path: str, cells: int) -> tuple[float, float, float, int]:
    """Seconds, CPU seconds, GB at the peak (all of the process), and what the way returns."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measured, (way, path, cells))


def _measured(way: Callable[[str, int], int], path: str, cells: int) -> tuple[float, float, float, int]:
    start, cpu = time.perf_counter(), time.process_time()
    gone = way(path, cells)
    # not getrusage, whose peak begins with that of the process that started this one
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024 / 1e9
    return time.perf_counter() - start, time.process_time() - cpu, peak, gone


def measure_duplicates(folder: Path, options: argparse.Namespace) -> None:
    """Print what both ways take."""
    path = str(folder / "embeddings.npy")
    np.save(path, embeddings_of(options.vectors, options.dim))
    cells = round(options.vectors**0.5)
    ways = {"select": own_way, "plain numpy": plain_way}
    for name in options.ways:
        way = ways[name]
        seconds, cpu, peak, gone = in_a_process(way, path, cells)
        print(
            f"semantic duplicates of {options.vectors:,} x {options.dim} in {cells} cells, {name}: {seconds:.0f} s "
            f"({cpu:.0f} s of CPU), peak {peak:.2f} GB, {gone:,} go",
            flush=True,
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--ways", nargs="*", default=["select", "plain numpy"])
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as work:
        if options.samples:
            measure_conditions(Path(work), options)
        if options.vectors:
            measure_duplicates(Path(work), options)


if __name__ == "__main__":
    main()
