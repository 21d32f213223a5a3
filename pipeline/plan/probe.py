"""What a minute on this machine tells: a list's first rows, a core's speed on real images, a device's ceiling."""

import logging
import statistics
import time
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.core.runner import ShardAssignment
from pipeline.ingest.source_files import Format
from pipeline.ingest.stage import LIST_FORMS, ingest
from pipeline.ingest.url_lists import list_rows
from pipeline.plan.config import PlanConfig
from shards_spec.files import DataError, json_bytes
from shards_spec.images import decode_rgb
from shards_spec.layout import raw_parquet, raw_tar
from shards_spec.models import pick_device
from shards_spec.parquet import read_table
from shards_spec.tar import read_shard
from shards_spec.views import ViewSpec, render_views

log = logging.getLogger(__name__)
VIEW_SIZE = 224  # pixels a side of the views whose cost is known
MOST_IMAGES = 100
RENDER_SECONDS = 8.0
PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices whose product gives the ceiling
PRODUCTS = 5


@dataclass(frozen=True)
class FirstRows:
    """What the first rows of a source came to.

    Attributes:
        rows: Their number.
        samples: Those that became samples.
        seconds: That took, network included.
        images: (key, encoded image as stored) of up to `MOST_IMAGES` samples.
        image_bytes: Mean bytes of an image as stored.
        most_frequent_reason: Of the rows that did not.
    """

    rows: int
    samples: int
    seconds: float
    images: list[tuple[str, bytes]]
    image_bytes: float
    most_frequent_reason: str


class _FirstShard(ShardAssignment):
    """Makes shard 0 alone."""

    @property
    def is_complete(self) -> bool:
        """Whether all shards exist at the end."""
        return False

    def claim(self, shard: int) -> bool:
        """Whether this process may make the shard."""
        return shard == 0


def try_first_rows(config: PlanConfig, form: Format) -> FirstRows | None:
    """Ingest the first rows of a source of that form into a temporary folder; None where none of them is asked for."""
    if not config.probe_rows:
        return None
    with TemporaryDirectory() as folder:
        root = str(Path(folder, "root"))
        whole = replace(config.ingest(root), shard_size=config.probe_rows, retries=0)
        start = time.monotonic()
        if form in (*LIST_FORMS, "datacompdr"):  # not all of its rows are listed first
            rows = islice(list_rows(config.source, form, whole.columns), config.probe_rows)
            head = Path(folder, "head.jsonl")
            head.write_bytes(
                b"".join(json_bytes({"url": row.url, "caption": row.caption}, indent=None) for row in rows)
            )
            ingest(replace(whole, source=(str(head),), format="jsonl", url_col=None, caption_col=None))
        else:
            ingest(whole, _FirstShard())
        return _first_rows(root, time.monotonic() - start)


def _first_rows(root: str, seconds: float) -> FirstRows:
    statuses = read_table(raw_parquet(root, 0), ["status", "error_message"]).to_pylist()
    reasons = [row["error_message"] or "" for row in statuses if row["status"] != "success"]
    images = stored_images([raw_tar(root, 0)])
    mean = statistics.fmean(len(image) for _, image in images) if images else 0.0
    frequent = statistics.mode(reasons) if reasons else ""
    return FirstRows(len(statuses), len(statuses) - len(reasons), seconds, images, mean, frequent)


def stored_images(paths: list[str]) -> list[tuple[str, bytes]]:
    """(key, encoded image) of up to `MOST_IMAGES` samples of tars. Raises DataError for a damaged one."""
    samples = chain.from_iterable(map(read_shard, paths))
    return [(sample.key, sample.image) for sample in islice(samples, MOST_IMAGES)]


def view_milliseconds(images: list[tuple[str, bytes]], views: int) -> float | None:
    """The median milliseconds of one core for a view, decoding shared by all views; None without an image."""
    spec = ViewSpec(ops=2)
    taken = list[float]()
    end = time.monotonic() + RENDER_SECONDS
    for key, data in images:
        start = time.thread_time()
        try:
            render_views(decode_rgb(data), spec, key, range(views), VIEW_SIZE)
        except DataError:
            continue
        taken.append((time.thread_time() - start) * 1000 / views)
        if time.monotonic() > end:
            break
    return statistics.median(taken) if taken else None


def device_ceiling(device: str) -> tuple[str, float]:
    """The device's name, and its operations per second in a large product: bf16 on CUDA, fp32 on a CPU.

    Raises UserError for a device that is not there.
    """
    import torch

    device = pick_device(device)
    kind = torch.device(device).type
    side = PRODUCT_SIDE[kind]
    matrix = torch.ones(side, side, device=device, dtype=torch.bfloat16 if kind == "cuda" else torch.float32)
    taken = []
    for _ in range(PRODUCTS + 1):
        start = time.perf_counter()
        product = matrix @ matrix
        float(product[0, 0])  # waits for the device
        taken.append(time.perf_counter() - start)
    name = torch.cuda.get_device_name(device) if kind == "cuda" else "CPU"
    return name, 2 * side**3 / min(taken[1:])
