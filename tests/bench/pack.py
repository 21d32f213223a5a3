#!/usr/bin/env python3
"""Pack: samples/s on one core against a plain copy of the same tars, in one run.

    python tests/bench/pack.py [--shards 8] [--per-shard 1000] [--captions 5] [--rounds 5] [--shard-size N] [--profile]

The copy is the limit of any stage that writes images again under this format's promises: read, SHA-256, write, flush
to disk, rename. Images are JPEGs of 256 px and 25 kB or so (`photos.py`). Captions are made up as in `labels.py`: one
original per image, and five synthetic ones in lower-case ASCII without entities, as a captioner writes them; the json
member has ingest's fields. Raw tars are in the page
cache, both sides write to the same disk (TMPDIR). One core; a round packs and copies everything, in turn. The first
round labels words for the first time and is told apart; the others know all pieces of their captions already, as after
some hundred thousand real ones. Seconds of the CPU and of the clock: on a machine with other work only the former mean
something, unless the disk is the limit.
"""

import argparse
import cProfile
import hashlib
import io
import os
import pstats
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from labels import made_up
from photos import photo
from PIL import Image

from pipeline.core.runner import ShardResult, ShardTask, Stage, run_stage
from pipeline.ingest.images import EncodedImage
from pipeline.ingest.raw_shard import RawShardInput, sample_key, write_raw_shard
from pipeline.ingest.rows import Row
from pipeline.labels.wordnet import find_wordnet, load_wordnet
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.files import atomic_writer, join, sha256_file
from shards_spec.layout import shard_name

DISTINCT = 200  # images, again and again: pack does not look into them
PLAIN = re.compile(r"[a-z0-9 ,.'\-]+")


def small_photo(seed: int) -> bytes:
    """A photo scaled to 256 px on its shorter side."""
    image = Image.open(io.BytesIO(photo(seed, 400, 800)))
    side = 256 / min(image.size)
    image = image.resize((round(image.width * side), round(image.height * side)), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def write_dataset(root: str, shards: int, per_shard: int, captions: int) -> None:
    """ROOT/raw and ROOT/captions/made-up as `ingest` and `caption` leave them."""
    images = [small_photo(seed) for seed in range(DISTINCT)]
    said = list(made_up(find_wordnet(), shards * per_shard, 0))
    plain = (text.lower() for text in made_up(find_wordnet(), 2 * shards * per_shard * captions, 1))
    written = list(islice((text for text in plain if PLAIN.fullmatch(text)), shards * per_shard * captions))
    fields = {"width": 256, "height": 256, "original_width": 800, "original_height": 800, "exif": "{}"}

    def image(index: int) -> EncodedImage:
        data = images[index % DISTINCT]
        return EncodedImage(data, **fields, sha256=hashlib.sha256(data).hexdigest(), phash="0123456789abcdef")

    def raw(_: str, task: ShardTask) -> ShardResult:
        start = task.shard * per_shard
        keys = [sample_key(task.shard, index, per_shard) for index in range(per_shard)]
        rows = [
            Row(said[start + i], f"https://images.example.com/2016/08/{keys[i]}-large.jpg") for i in range(per_shard)
        ]
        return write_raw_shard(root, task.shard, RawShardInput(keys, rows), [image(i) for i in range(per_shard)])

    def synthetic(_: str, task: ShardTask) -> ShardResult:
        rows = []
        for i in range(per_shard):
            first = (task.shard * per_shard + i) * captions
            rows.append({"key": sample_key(task.shard, i, per_shard), "captions": written[first : first + captions]})
        path = f"captions/made-up/{shard_name(task.shard)}.parquet"
        with atomic_writer(join(root, path)) as file:
            pq.write_table(pa.Table.from_pylist(rows), file)
        return ShardResult({"success": per_shard}, {path: sha256_file(join(root, path))})

    tasks = [ShardTask(shard, {}) for shard in range(shards)]
    run_stage(root, Stage("ingest", "raw", {}), tasks, raw)
    run_stage(root, Stage("caption/made-up", "captions/made-up", {}), tasks, synthetic)


def copy(root: str, target: str) -> None:
    """Every raw tar: read, hashed, written, flushed, renamed."""
    for path in sorted(Path(root, "raw").glob("*.tar")):
        digest = hashlib.sha256()
        with open(path, "rb") as source, atomic_writer(join(target, path.name)) as file:
            while piece := source.read(1 << 20):
                digest.update(piece)
                file.write(piece)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """(CPU, clock) seconds."""
    cpu, clock = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - clock


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--per-shard", type=int, default=1000, help="samples per raw shard")
    parser.add_argument("--captions", type=int, default=5, help="synthetic captions per sample")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shard-size", type=int, help="re-shard to final shards of so many samples")
    parser.add_argument("--profile", action="store_true", help="of one more round")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        root, target = f"{folder}/ds", f"{folder}/copy"
        write_dataset(root, options.shards, options.per_shard, options.captions)
        more = {"shard_size": options.shard_size} if options.shard_size else {}
        config = PackConfig(root, workers=1, overwrite=True, **more)
        load_wordnet(str(find_wordnet()))
        rounds = [((0.0, 0.0), seconds(lambda: copy(root, target)))]  # the raw tars are in the page cache now
        for _ in range(options.rounds + 1):
            os.sync()
            packed = seconds(lambda: pack(config))
            os.sync()
            rounds.append((packed, seconds(lambda: copy(root, target))))
        report(root, options, rounds[1:])
        if options.profile:
            profile = cProfile.Profile()
            profile.runcall(pack, config)
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def report(root: str, options: argparse.Namespace, rounds: list[tuple[tuple[float, float], ...]]) -> None:
    """Print rates, min / median / max over the rounds."""
    samples = options.shards * options.per_shard
    size = sum(path.stat().st_size for path in Path(root, "raw").glob("*.tar"))
    final = sum(path.stat().st_size for path in Path(root, "shards").glob("*.tar"))
    print(
        f"{samples} samples with {options.captions} synthetic captions in {options.shards} raw shards, "
        f"{size / samples / 1000:.1f} kB a sample there, {final / samples / 1000:.1f} kB packed"
    )
    first, *rest = rounds
    for kind, name in ((0, "CPU seconds"), (1, "seconds of the clock")):
        pack_rates = sorted(samples / packed[kind] for packed, _ in rest)
        copy_rates = sorted(samples / copied[kind] for _, copied in rest)
        ratios = sorted(copied[kind] / packed[kind] for packed, copied in rest)
        print(
            f"  by {name}: pack {samples / first[0][kind]:,.0f} samples/s in its first round, then "
            f"{spread(pack_rates)}; copy {spread(copy_rates)} "
            f"({size / samples * statistics.median(copy_rates) / 1e6:.0f} MB/s); "
            f"pack runs at {spread(ratios, '.2f')} of the copy's rate"
        )


def spread(values: list[float], form: str = ",.0f") -> str:
    """Return "min / median / max" of sorted values."""
    return " / ".join(format(value, form) for value in (values[0], statistics.median(values), values[-1]))


if __name__ == "__main__":
    main()
