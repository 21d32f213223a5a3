#!/usr/bin/env python3
"""Captions of others: what joining a long list costs, and what asking a server costs this side of the wire.

    python tests/bench/others.py [--rows 12000000] [--shards 200] [--images 960]

The list is Parquet with a link and a caption of a hundred letters per row; ``--shards`` raw shards of 1,000 images have
links of it, evenly spread. The server runs in a process of its own and answers at once without a look at the image:
five captions of a 256-pixel JPEG. Printed are seconds of all cores, and the most memory that
the process held.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from chat_server import MODEL, ChatHandler, serve_chat
from small_data import draw, write_raw

from pipeline.caption.config import CaptionConfig, ListOptions, ServerOptions
from pipeline.caption.stage import caption
from shards_spec.files import sha256_file
from shards_spec.manifest import Done, write_stage
from shards_spec.sample import Sample
from shards_spec.tar import write_shard

PER_SHARD = 1000
BLOCK = 500_000  # rows made at a time


def write_list(path: str, rows: int) -> None:
    """A list of links and captions."""
    writer = pq.ParquetWriter(path, pa.schema({"url": pa.string(), "re_caption": pa.string()}))
    for start in range(0, rows, BLOCK):
        number = pa.array(np.arange(start, min(rows, start + BLOCK))).cast(pa.string())
        text = "a photograph of a small wooden house beside a lake with mountains behind it, number "
        url = pc.binary_join_element_wise("https://images.example.org/a/b/c/photo-", number, ".jpg", "")
        writer.write_table(pa.table([url, pc.binary_join_element_wise(text, number, "")], schema=writer.schema))
    writer.close()


def write_shards(root: str, shards: int, rows: int) -> None:
    """Raw shards of one image, with links of the list."""
    image, _ = draw("x", 32)
    step = max(1, rows // (shards * PER_SHARD))
    for shard in range(shards):
        keys = [f"{shard:05d}{index:04d}" for index in range(PER_SHARD)]
        names = [f"raw/{shard:05d}.tar", f"raw/{shard:05d}.parquet"]
        write_shard(f"{root}/{names[0]}", (Sample(key, {"jpg": image, "json": b"{}"}) for key in keys))
        places = range(shard * PER_SHARD * step, (shard + 1) * PER_SHARD * step, step)
        urls = [f"https://images.example.org/a/b/c/photo-{place}.jpg" for place in places]
        pq.write_table(pa.table({"key": keys, "url": urls, "status": ["success"] * PER_SHARD}), f"{root}/{names[1]}")
        outputs = {name: sha256_file(f"{root}/{name}") for name in names}
        Done("ingest", shard, {}, {"success": PER_SHARD}, {"rows": ""}, outputs).write(f"{root}/raw")
    write_stage(root, "ingest", {"config": {}, "shards": shards, "counts": {"success": PER_SHARD * shards}}, "bench")


def measured(config: CaptionConfig) -> tuple[float, float, float]:
    """Run the stage in a process of its own: seconds, those of all cores, and the most memory in MiB."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, config).result()


def _measure(config: CaptionConfig) -> tuple[float, float, float]:
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    caption(config)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, after.ru_maxrss / 1024


def answer_at_once(self: ChatHandler, body: dict) -> None:
    """Five different captions without a look at the image."""
    words = f"a small wooden house beside a quiet lake, {body['seed']}"
    tokens = [{"token": "x", "logprob": -0.5}] * 12
    choices = [
        {"index": n, "message": {"content": f"{words} {n}"}, "finish_reason": "stop", "logprobs": {"content": tokens}}
        for n in range(body.get("n", 1))
    ]
    self.send_json(200, {"choices": choices})


def run_server(url: "multiprocessing.Queue[str]") -> None:
    """Serve until this process is ended."""
    ChatHandler.complete = answer_at_once
    with serve_chat() as server:
        url.put(server.url)
        while True:
            time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=12_000_000)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--images", type=int, default=960)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    address = context.Queue()
    server = context.Process(target=run_server, args=(address,), daemon=True)
    server.start()
    with tempfile.TemporaryDirectory() as folder:
        asked = f"{folder}/asked"
        write_raw(asked, shards=4, per_shard=options.images * 5 // 16, size=256)
        endpoint = ServerOptions(address.get(), MODEL)
        seconds, cpu, memory = measured(CaptionConfig(asked, endpoint=endpoint))
        server.terminate()
        each = 1000 * cpu / options.images
        print(f"--server: {options.images} images in {seconds:.1f} s, {each:.2f} ms of a core each, {memory:.0f} MiB")
        path = Path(folder, "list.parquet")
        write_list(str(path), options.rows)
        write_shards(f"{folder}/joined", options.shards, options.rows)
        joined = CaptionConfig(f"{folder}/joined", lists=ListOptions((str(path),)))
        seconds, cpu, memory = measured(joined)
        what = f"{options.rows:,} rows, {path.stat().st_size >> 20} MiB, and {options.shards * PER_SHARD:,} images"
        print(f"--from: {what} in {seconds:.0f} s, {cpu:.0f} s of a core, {memory:.0f} MiB")


if __name__ == "__main__":
    main()
