#!/usr/bin/env python3
"""What a sample costs each stage: CPU milliseconds, bytes on disk; what a shard costs in operations on files.

    python tests/bench/costs.py [--photos 1000] [--rounds 2] [--work FOLDER]

Its figures stand in pipeline/plan/costs.py, docs/scale.md is computed from them.

Photos are those of `photos.py`, served over loopback as in `ingest.py`, captions those of `labels.py`, images have a
shorter side of 256. CPU seconds are those of the command's processes, less those of the same command with nothing left
to do, the fewest of the rounds; the web server's are not in them. What a GPU stage leaves to the CPU is measured here:
decoding for the captioner, rendering views for the teacher, reading for training. What the GPU does: `plan.py`.

Operations on files below ROOT, by strace: the difference between datasets of 20 and of 10 shards, divided by ten, with
small models and images; so what a command does once is not in them. The first word of each line is the stage.
"""

import argparse
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from arrays import PartsOf
from ingest import PORT, served
from labels import made_up
from photos import write_photos
from scale_measures import KINDS, operations_in, tracer

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from small_data import tiny_coca, write_raw

from pipeline.cache.incremental import ShardIndex
from pipeline.caption.preprocess import Preprocess
from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.core.runner import ALL, ShardResult, ShardTask, Stage, run_stage
from pipeline.dedup.config import DedupConfig
from pipeline.dedup.stage import dedup
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.images import ImageRules, convert
from pipeline.ingest.listing import Listing
from pipeline.labels.vocab_stage import VocabConfig, vocab
from pipeline.labels.wordnet import find_wordnet, load_wordnet
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.embeddings import Dtype, encode_vectors, write_vectors
from shards_spec.files import atomic_writer, join, sha256_file
from shards_spec.images import decode_rgb
from shards_spec.layout import shard_name
from shards_spec.manifest import Done, shard_sizes, write_stage
from shards_spec.models import LoadedModel
from shards_spec.sample import Sample
from shards_spec.tar import read_shard, shard_keys
from shards_spec.views import ViewSpec, render_views
from slurm.claims import Finished
from training.config import DataConfig, TeacherCacheConfig
from training.data.samples import open_samples

VIEWS = 10
CAPTIONS = 5
DIM = 768
COMMAND = [sys.executable, str(Path(__file__).parents[2] / "clipmill.py")]


def cpu_seconds(command: list[str]) -> float:
    """User and system seconds of a command and its children."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            sys.exit(f"{' '.join(command)}:\n{log.read().decode()[-3000:]}")
    return usage.ru_utime + usage.ru_stime


def stage_cost(words: list[str], made: str, rounds: int) -> float:
    """CPU seconds of ``clipmill WORDS`` that starts without the folder ``made``, less those with nothing to do."""
    taken = []
    for _ in range(rounds):
        shutil.rmtree(made, ignore_errors=True)
        taken.append(cpu_seconds([*COMMAND, *words]) - cpu_seconds([*COMMAND, *words]))
    return min(taken)


def per_item(work: Callable[[], Iterable[object]], rounds: int) -> float:
    """CPU milliseconds of this process per item of an iterable, the fewest of the rounds."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        number = sum(1 for _ in work())
        taken.append((time.process_time() - start) / number)
    return 1e3 * min(taken)


def own_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def add_captions(root: str) -> None:
    """ROOT/captions/made-up: CAPTIONS per image."""
    count = len(list(Path(root, "raw").glob("*.tar")))
    said = iter(made_up(find_wordnet(), 10**7, 1))

    def synthetic(_: str, task: ShardTask) -> ShardResult:
        keys = shard_keys(join(root, f"raw/{shard_name(task.shard)}.tar"))
        rows = [
            {
                "key": key,
                "captions": list(islice(said, CAPTIONS)),
                "logprobs": [-9.5] * CAPTIONS,
                "num_tokens": [10] * CAPTIONS,
            }
            for key in keys
        ]
        path = f"captions/made-up/{shard_name(task.shard)}.parquet"
        with atomic_writer(join(root, path)) as file:
            pq.write_table(pa.Table.from_pylist(rows), file)
        return ShardResult({"success": len(keys)}, {path: sha256_file(join(root, path))})

    run_stage(
        root, Stage("caption/made-up", "captions/made-up", {}), [ShardTask(n, {}) for n in range(count)], synthetic
    )


def add_teacher(root: str, dtype: Dtype = "float16") -> None:
    """ROOT/teacher/wide: noise as wide as ViT-L/14's vectors, VIEWS views and all captions."""
    spec, draw = ViewSpec(), np.random.default_rng(0)
    meta = {
        "model": "wide",
        "pretrained": None,
        "weights_sha256": "0",
        "logit_scale": 100.0,
        "views": spec.as_json(),
        "views_sha256": spec.sha256,
        "num_views": VIEWS,
    }
    columns = [*(f"image_{view}" for view in range(VIEWS)), *(f"text_{text}" for text in range(CAPTIONS + 1))]
    sizes = shard_sizes(root)
    for shard in range(len(sizes)):
        tar, path = f"shards/{shard_name(shard)}.tar", f"teacher/wide/{shard_name(shard)}.parquet"
        there = ShardIndex(join(root, tar))
        keys, ids = there.keys, there.ids
        rows = {name: draw.normal(size=(len(keys), DIM)).astype(np.float32) for name in columns}
        encoded = {name: encode_vectors(own, dtype) for name, own in rows.items()}
        write_vectors(join(root, path), keys, encoded, ids, meta)
        digests = ({tar: sha256_file(join(root, tar))}, {path: sha256_file(join(root, path))})
        Done("cache/wide", shard, meta, {"success": len(keys)}, *digests).write(join(root, "teacher/wide"))
    block = {"config": meta, "shards": len(sizes), "counts": {"success": sum(sizes)}}
    write_stage(root, "cache/wide", block)


# what is printed


def tell(stage: str, what: str, value: float, unit: str) -> None:
    """One line, at once."""
    print(f"{stage:8} {what:62} {value:10.4g} {unit}", flush=True)


def tell_bytes(root: str, folder: str, samples: int) -> None:
    """Bytes per sample of a folder's files, by ending."""
    found = Counter[str]()
    for path in Path(root, folder).iterdir():
        ending = "_stats.json" if path.name.endswith("_stats.json") else path.suffix
        found[ending] += path.stat().st_size
    for ending, total in sorted(found.items()):
        tell(folder.partition("/")[0], f"on disk in {folder}: {ending}", total / samples, "bytes a sample")


def commands(work: Path, options: argparse.Namespace) -> None:
    """Ingest, pack, check on photos."""
    root = str(work / "ds")
    number = options.photos
    rounds = options.rounds
    total = write_photos(work / "photos", number)
    tell("ingest", "downloaded, kB", total / number / 1e3, "a photo")
    lines = [
        f"http://127.0.0.1:{PORT}/{n:05d}.jpg\t{said}\n" for n, said in enumerate(made_up(find_wordnet(), number, 0))
    ]
    (work / "list.tsv").write_text("url\tcaption\n" + "".join(lines))
    with served(work):
        words = ["ingest", root, "--source", str(work / "list.tsv"), "--allow-private", "--shard-size", "250"]
        seconds = stage_cost(words, root, rounds)
    add_captions(root)
    load_wordnet(str(find_wordnet()))
    first, again = (own_seconds(lambda: pack(PackConfig(root, workers=1, overwrite=True))) for _ in range(2))
    samples = sum(shard_sizes(root))
    tell("ingest", "CPU ms", 1e3 * seconds / samples, "a sample")
    tell("pack", "CPU ms, all captions new", 1e3 * first / samples, "a sample")
    tell("pack", "CPU ms, all their pieces known", 1e3 * again / samples, "a sample")
    add_teacher(root)
    assert not (problems := check(CheckConfig(root))), problems[:3]
    again = min(own_seconds(lambda: check(CheckConfig(root))) for _ in range(rounds))
    tell("check", "CPU ms, everything in the page cache", 1e3 * again / samples, "a sample")
    for folder in ("raw", "captions/made-up", "shards", "teacher/wide"):
        tell_bytes(root, folder, samples)
    shutil.rmtree(f"{root}/teacher")
    add_teacher(root, "int8")
    tell_bytes(root, "teacher/wide", samples)


def counting(work: Path, rounds: int, shards: int = 10, per_shard: int = 20_000) -> None:
    """Dedup and vocab, which only read Parquet, on shards of that many made-up rows."""
    root, draw = str(work / "rows"), np.random.default_rng(0)
    synsets = pq.read_table(str(work / "ds/shards/00000.parquet"), columns=["synsets"])
    tiled = pa.concat_tables([synsets] * (-(-per_shard // len(synsets)))).slice(0, per_shard).combine_chunks()
    for shard in range(shards):
        numbers, name = draw.integers(0, 1 << 63, (per_shard, 4)).tolist(), shard_name(shard)
        table = pa.Table.from_pylist(
            [
                {
                    "key": f"{name}{row:05d}",
                    "status": "success",
                    "url": f"http://images.example.com/{a:x}.jpg",
                    "sha256": f"{a:016x}{b:016x}{c:016x}{d:016x}",
                    "phash": f"{d:016x}",
                }
                for row, (a, b, c, d) in enumerate(numbers)
            ]
        )
        for folder, stage, own in (("raw", "ingest", table), ("shards", "pack", tiled)):
            with atomic_writer(f"{root}/{folder}/{name}.parquet") as file:
                pq.write_table(own, file)
            hashes = {f"{folder}/{name}{ending}": "0" for ending in (".tar", ".parquet")}
            Done(stage, shard, {}, {"success": per_shard}, {}, hashes).write(f"{root}/{folder}")
    counts = {"success": shards * per_shard}
    for stage in ("ingest", "pack"):
        write_stage(root, stage, {"config": {}, "shards": shards, "counts": counts})
    config = DedupConfig(root, workers=1, overwrite=True)
    for share in (1, 4, 16):
        fits = counts["success"] // share
        seconds = min(own_seconds(lambda n=fits: dedup(config, images_in_memory=n)) for _ in range(rounds))
        what = "CPU ms" if share == 1 else f"CPU ms, with memory for one in {share}"
        tell("dedup", what, 1e3 * seconds / counts["success"], "a sample")
    for source in ("original", "all"):
        words = VocabConfig(root, min_count=0, source=source, workers=1)
        seconds = min(own_seconds(lambda c=words: vocab(c)) for _ in range(rounds))
        tell("vocab", f"CPU ms, {source} captions", 1e3 * seconds / counts["success"], "a sample")
        seconds = min(sum_seconds(vocab, words, shards) for _ in range(rounds))
        tell("vocab", f"CPU ms, {source} captions, the sum alone", 1e3 * seconds / counts["success"], "a sample")
    lists = DedupConfig(root, workers=1)
    seconds = min(sum_seconds(dedup, lists, shards) for _ in range(rounds))
    tell("dedup", "CPU ms, the search alone", 1e3 * seconds / counts["success"], "a sample")


def sum_seconds(stage: Callable[..., object], config: DedupConfig | VocabConfig, shards: int) -> float:
    """CPU of a stage whose parts are there."""
    shutil.rmtree(f"{config.root}/dedup", ignore_errors=True)
    stage(config, PartsOf(0, 1, shards))
    return own_seconds(lambda: stage(config))


def list_rows_cost(work: Path, rounds: int, number: int = 200_000) -> None:
    """What a task of ingest's array spends on rows that others make, and on its own before it fetches them."""
    urls = [f"https://cdn.images.example.com/2016/08/{n}/{n * 7919 % 10**9}-large.jpg" for n in range(number)]
    table = pa.table({"url": urls, "text": list(made_up(find_wordnet(), number, 0))})
    pq.write_table(table, str(work / "list.parquet"))
    gc.freeze()  # what the bench holds: it would be gone through again and again
    config = IngestConfig(str(work / "none"), str(work / "list.parquet"), shard_size=20_000)
    for share, whose in ((Finished(str(work / "none")), "others'"), (ALL, "its own")):
        seconds = min(own_seconds(lambda s=share: deque(Listing(config, "parquet").tasks(s), 0)) for _ in range(rounds))
        tell("ingest", f"list of links, rows that are {whose}", number / seconds, "rows/s")
    gc.unfreeze()


def rendered(samples: list[Sample], spec: ViewSpec) -> Iterator[np.ndarray]:
    """The views of each."""
    return (render_views(decode_rgb(sample.image), spec, sample.key, range(VIEWS), 224) for sample in samples)


def parts(work: Path, options: argparse.Namespace) -> None:
    """What GPU stages leave to the CPU, and bytes of images by size."""
    root, rounds = str(work / "ds"), options.rounds
    torch.set_num_threads(1)  # as a process of the stages has
    photos = [path.read_bytes() for path in sorted((work / "photos").iterdir())[:300]]
    for size in (224, 256, 336, 384, 512):
        sizes = [len(convert(data, ImageRules(size)).data) for data in photos]
        tell("ingest", f"image, shorter side {size}, kB", sum(sizes) / len(sizes) / 1e3, "a sample")
    samples = list(read_shard(f"{root}/shards/00000.tar"))
    preprocess = Preprocess(224, "bicubic", "shortest", 0)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    cost = per_item(lambda: (preprocess(decode_rgb(sample.image)) for sample in samples), rounds)
    tell("caption", "decode and resize for the captioner, CPU ms", cost, "a sample")
    for ops in (0, 2):
        render = partial(rendered, samples, ViewSpec(ops=ops))
        tell("cache", f"decode, {VIEWS} views of 224, {ops} operations, CPU ms", per_item(render, rounds), "a sample")
    texts = list(chain.from_iterable(sample.captions for sample in samples))
    cost = per_item(lambda: (tokenizer([text]) for text in texts), rounds)
    tell("cache", "tokens, CPU ms", cost, "a text")
    student = LoadedModel(None, tokenizer, {}, 224, (0.5,) * 3, (0.5,) * 3)

    def read() -> Iterable[object]:
        rows = open_samples(DataConfig(data=root), TeacherCacheConfig(("wide",)), student, 0)
        return (rows[position] for position in range(len(samples)))

    tell("train", "read, crop to 224, tokens, cache row, CPU ms", per_item(read, rounds), "a sample")
    (work / "noise").write_bytes(os.urandom(1 << 27))
    cost = per_item(lambda: [sha256_file(str(work / "noise"))], rounds)
    tell("any", "sha256 of a file in the page cache", (1 << 27) / 1e3 / cost, "MB/s")


def file_operations(work: Path) -> None:
    """Per shard and stage, by strace."""
    model = tiny_coca(work / "coca")
    found: dict[str, list[Counter[str]]] = {}
    for shards in (10, 20):
        root, log = str(work / f"small-{shards}"), str(work / "trace")
        write_raw(f"{root}-from", shards=shards, per_shard=3, seed=shards, size=48)
        stages = {
            "ingest": ["--source", f"{root}-from/raw/*.tar", "--shard-size", "3", "--format", "webdataset"],
            "dedup": [],
            "caption": ["--model", model, "--num-captions", "2", "--max-tokens", "8", "--name", "cap"],
            "pack": ["--workers", "1"],
            "vocab": ["--min-count", "1"],
            "cache": ["--model", model, "--views", "2", "--name", "tea"],
            "check": [],
        }
        for stage, words in stages.items():
            done = subprocess.run([*tracer(log), *COMMAND, stage, root, *words], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{stage}:\n{done.stdout}{done.stderr[-3000:]}")
            found.setdefault(stage, []).append(operations_in(Path(log), f"{root}/"))
    for stage, (few, more) in found.items():
        for kind in KINDS:
            if number := (more[kind] - few[kind]) / 10:
                tell(stage, f"files: {kind}", number, "a shard")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", default=tempfile.gettempdir(), help="a folder for it; what is made is removed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clipmill-costs-", dir=options.work) as folder:
        work = Path(folder)
        commands(work, options)
        counting(work, options.rounds)
        list_rows_cost(work, options.rounds)
        parts(work, options)
        if shutil.which("strace"):
            file_operations(work)


if __name__ == "__main__":
    main()
