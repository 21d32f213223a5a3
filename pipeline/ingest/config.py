"""Options of `clipmill ingest`."""

import ipaddress
import os
import re
from dataclasses import dataclass
from typing import Literal

from pipeline.core.command_line import Root
from pipeline.ingest.additional_columns import ALL_COLUMNS
from pipeline.ingest.rows import Columns
from pipeline.ingest.source_files import Format
from shards_spec.files import UserError
from shards_spec.messages import require

AT_LEAST_ONE = ("shard_size", "image_size", "concurrency", "per_host", "max_bytes", "max_pixels")
AT_LEAST_ZERO = ("open_shards", "workers", "retries", "min_size", "min_caption_chars", "max_caption_chars", "near_bits")
SHARDS_PER_PROCESS = 4  # in progress at once, so that no core waits for the last slow host of a shard
FEWEST_SHARDS, MOST_SHARDS = 12, 64


@dataclass(frozen=True)
class IngestConfig:
    """Download a list, read a folder of images or import img2dataset's shards; write ROOT/raw."""

    root: Root
    """the dataset: a folder or an fsspec URL; writes raw/"""
    source: tuple[str, ...]
    """links in .tsv, .csv, .jsonl or .parquet (also .gz), a folder or glob of such files, Parquet files with images,
    a folder of images, WebDataset tars, or img2dataset's shards; local or an fsspec URL; several lists or tars are
    read as one"""
    format: Literal["auto"] | Format = "auto"
    """form of the source: cc3m is caption, tab, URL; cc12m is URL, tab, caption; classes is a folder of images per
    class, or CLIP_benchmark's tars with labels"""
    url_col: str | None = None
    """column with the link (or the image's bytes); found by its name when not given"""
    caption_col: str | None = None
    """column with the caption; found by its name when not given"""
    original_captions: str | None = None
    """of datacompdr: folder or glob of tars with the original captions, of the same names and uids as those of
    --source (mlfoundations/DataComp-12M)"""
    sha256_col: str | None = None
    """other column with the sha256 of the image's bytes, such as DataComp's; an image with another is left out"""
    shard_size: int = 1000
    """inputs per shard"""
    image_size: int = 256
    """pixels of the shorter side; smaller images are not enlarged"""
    concurrency: int = 1024
    """downloads in flight"""
    per_host: int = 16
    """downloads in flight from one host"""
    open_shards: int = 0
    """shards in progress at once, so that a slow host in one does not hold up the others; 0: four per core, from 12
    to 64"""
    workers: int = 0
    """processes that decode images; 0: one per core"""
    timeout_s: float = 10.0
    """seconds for one try, from name look-up to last byte"""
    decode_timeout_s: float = 30.0
    """seconds for decoding one image"""
    retries: int = 1
    """further tries, after a pause, where one can help: a timeout, a lost connection, an answer 429 or 5xx"""
    max_bytes: int = 20_000_000
    """larger files are left out"""
    max_pixels: int = 100_000_000
    """images with more are left out"""
    min_size: int = 0
    """images whose shorter side has fewer pixels are left out"""
    max_aspect_ratio: float = 0.0
    """images with a larger ratio of the sides are left out; 0: no limit"""
    min_caption_chars: int = 0
    """rows with a shorter caption are left out"""
    max_caption_chars: int = 0
    """rows with a longer caption are left out; 0: no limit"""
    sane_captions: bool = False
    """leave out captions without letters, addresses and file names, captions that repeat themselves or are symbols"""
    dedup: Literal["none", "exact", "near"] = "none"
    """leave out images that occur earlier in their shard under another link; `clipmill dedup` compares all shards"""
    near_bits: int = 3
    """bits of 64 by which perceptual hashes of near-duplicates differ at most"""
    where: tuple[str, ...] = ()
    """conditions on a list's other columns that a row has to meet, such as 'similarity >= 0.3' 'NSFW == UNLIKELY'"""
    save_additional_columns: tuple[str, ...] = (ALL_COLUMNS,)
    """which of a list's other columns raw/ keeps: names, all ('*'), or none (nothing after the option)"""
    exclude: tuple[str, ...] = ()
    """text files of links, or of sha256 of images, to leave out: one per line, also .gz"""
    allow_private: bool = False
    """also fetch from addresses that are not public, such as 127.0.0.1 or 10.0.0.0/8"""
    ignore_opt_out: bool = False
    """also take images whose X-Robots-Tag says noai, noimageai, noindex or noimageindex"""
    nameservers: tuple[str, ...] = ()
    """DNS servers to ask in place of the system's"""
    retry_failed: bool = False
    """after a finished run: try the rows again that failed for a reason that may pass, into additional shards"""
    overwrite: bool = False
    """make finished shards again"""

    def __post_init__(self) -> None:
        for fields, smallest in ((AT_LEAST_ONE, 1), (AT_LEAST_ZERO, 0)):
            for field in fields:
                value = getattr(self, field)
                require(value >= smallest, field, value, f"{smallest} or more")
        for field in ("timeout_s", "decode_timeout_s"):
            require(getattr(self, field) > 0, field, getattr(self, field), "seconds above 0")  # NaN is refused, too
        ratio = self.max_aspect_ratio
        require(not ratio or ratio >= 1, "max_aspect_ratio", ratio, "1 or more, or 0 for any")
        if not self.sources or not all(self.sources):
            raise UserError("--source is empty: give a list, a folder of images or a folder of img2dataset's shards")
        for nameserver in self.nameservers:
            if not is_nameserver(nameserver):
                raise UserError(f"--nameservers {nameserver}: give IP addresses, with :PORT where it is not 53")
        kept = self.save_additional_columns
        if self.sha256_col is not None and self.sha256_col not in kept and ALL_COLUMNS not in kept:
            raise UserError(
                f"--save-additional-columns without {self.sha256_col}, which --sha256-col names: raw/ has to keep it, "
                "because --retry-failed reads it there"
            )
        if self.retry_failed and self.overwrite:
            raise UserError("--retry-failed adds to finished shards, --overwrite makes them again: give one of them")

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources; Python callers may give a single one as a string."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def source_text(self) -> str:
        """All sources in one line, for messages and dataset.json."""
        return " ".join(self.sources)

    @property
    def columns(self) -> Columns:
        """The names given for the caption column and the link column."""
        return self.caption_col, self.url_col

    @property
    def decoder_processes(self) -> int:
        """Decoder processes: as asked, else one per core that this process may use."""
        if self.workers:
            return self.workers
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1

    @property
    def shards_in_progress(self) -> int:
        """Shards in progress at once."""
        by_cores = SHARDS_PER_PROCESS * self.decoder_processes
        return self.open_shards or min(MOST_SHARDS, max(FEWEST_SHARDS, by_cores))


def is_nameserver(text: str) -> bool:
    """Whether it names a DNS server: ``192.0.2.1``, ``192.0.2.1:5353``, ``2001:db8::1``, ``[2001:db8::1]:53``."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+))(?::(\d{1,5}))?|([0-9a-fA-F:.]+)", text)
    if match is None or int(match[3] or 53) > 65535:
        return False
    try:
        ipaddress.ip_address(match[1] or match[2] or match[4])
    except ValueError:
        return False
    return True
