"""Lists, configs, rows and downloads for tests of `ingest`."""

import asyncio
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.ingest.backpressure import AdmissionGate
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.http_client import Fetcher, FetchError, FetchRules


def write_list(path: Path, rows: list[tuple[str, str]]) -> str:
    """A list in CC12M's form: URL, tab, caption."""
    path.write_text("".join(f"{url}\t{caption}\n" for url, caption in rows))
    return str(path)


def config(root: object, source: object, **options) -> IngestConfig:
    """For a server on loopback: one decoder, ten rows per shard, 48 pixels."""
    defaults = {"root": str(root), "allow_private": True, "workers": 1, "shard_size": 10, "image_size": 48}
    return IngestConfig(source=str(source), **{**defaults, **options})


def rows_of(root: Path, shard: int = 0) -> list[dict]:
    """All rows of a raw shard."""
    return pq.read_table(root / "raw" / f"{shard:05d}.parquet").to_pylist()


def gather(urls: list[str], gate: AdmissionGate | None = None, **rules) -> list[bytes | str]:
    """Bodies or reasons of many links at once, with one Fetcher."""

    async def one(fetcher: Fetcher, url: str) -> bytes | str:
        try:
            return await fetcher.get(url)
        except FetchError as error:
            return str(error)

    async def run() -> list[bytes | str]:
        async with Fetcher(FetchRules(**{"timeout_s": 2, "allow_private": True, **rules}), gate) as fetcher:
            return list(await asyncio.gather(*(one(fetcher, url) for url in urls)))

    return asyncio.run(run())
