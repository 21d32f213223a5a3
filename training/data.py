"""Samples by position, and batches of them: shards read in place, one view and one caption per epoch.

Everything a sample becomes is a pure function of (dataset, seed, position), so the number of worker processes and
the moment of a resume change nothing. A worker holds at most ``window`` shards (mapped, when local).
"""

import hashlib
import logging
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shards_spec.files import DataError, UserError, join, read_buffer, read_json
from shards_spec.manifest import shard_ids, shard_name, shard_sizes
from shards_spec.models import LoadedModel
from shards_spec.sample import Sample
from shards_spec.tar import Member, index_shard
from shards_spec.views import ViewSpec, apply_view, decode_rgb, draw_view
from training.config import CacheConfig, DataConfig, ViewConfig
from training.order import Order
from training.recent import Recent
from training.teacher_cache import TeacherCache

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Open:
    buffer: memoryview
    keys: list[str]
    members: list[dict[str, Member]]


class ShardReader:
    """Samples of ``root/folder/NNNNN.tar`` by (shard, index); at most ``capacity`` shards are open."""

    def __init__(self, root: str, folder: str, sizes: list[int], capacity: int = 8) -> None:
        self.root, self.folder, self.sizes = root, folder, sizes
        self.open: Recent[int, _Open] = Recent(capacity)

    def path(self, shard: int) -> str:
        """The tar of a shard."""
        return join(self.root, self.folder, f"{shard_name(shard)}.tar")

    def keys(self, shard: int) -> list[str]:
        """The shard's keys in file order."""
        return self._shard(shard).keys

    def sample(self, shard: int, index: int) -> Sample:
        """Raises DataError naming the file when the shard is not there, broken, or of another size."""
        opened = self._shard(shard)
        members = opened.members[index].items()
        return Sample(
            opened.keys[index], {ext: bytes(opened.buffer[m.offset : m.offset + m.size]) for ext, m in members}
        )

    def _shard(self, shard: int) -> _Open:
        return self.open.get(shard, lambda: self._index(shard))

    def _index(self, shard: int) -> _Open:
        path = self.path(shard)
        try:
            with read_buffer(path) as buffer:
                found = list(index_shard(buffer, path))
        except FileNotFoundError as error:
            raise DataError(f"{path} is not there; run the stage that makes it again") from error
        if len(found) != self.sizes[shard]:
            raise DataError(f"{path}: {len(found)} samples, its records say {self.sizes[shard]}; make it again")
        return _Open(buffer, [key for key, _ in found], [members for _, members in found])


def dataset_sizes(root: str, folder: Literal["shards", "raw"]) -> list[int]:
    """Samples per shard. Raises UserError when the folder is empty or its stage has not finished."""
    if folder == "shards":
        return shard_sizes(root)
    shards = shard_ids(join(root, "raw"))
    if not shards:
        raise UserError(f"{join(root, 'raw')} has no finished shards: run `clipmill ingest {root}` first")
    return [read_json(join(root, "raw", f"{shard_name(shard)}_stats.json"))["successes"] for shard in shards]


def draw_caption(seed: int, key: str, epoch: int, count: int) -> int:
    """Which of ``count`` captions a sample shows in an epoch: uniform, a pure function of its arguments."""
    digest = hashlib.blake2b(f"caption/{seed}/{key}/{epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % count


def to_tensor(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(3, S, S) float32, normalised per channel."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be used; ``reason`` names file and key."""

    reason: str


Item = dict[str, Any] | Skipped | DataError


class Samples(Dataset[Item]):
    """Map-style over positions of the endless stream.

    An item has ``image`` (3, S, S), ``tokens`` (context,) int64, ``key``, ``epoch``, and with a cache
    ``teacher_image`` and ``teacher_text`` (D,) float32. Errors come back as values: raised in a worker process they
    would reach the user wrapped in its traceback.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: Order,
        student: LoadedModel,
        views: ViewSpec,
        seed: int,
        original_only: bool = False,
        cache: TeacherCache | None = None,
    ) -> None:
        self.reader, self.order, self.views, self.cache = reader, order, views, cache
        self.tokenizer, self.size = student.tokenizer, student.image_size
        self.mean, self.std = student.mean, student.std
        self.seed, self.original_only = seed, original_only

    def __getitem__(self, position: int) -> Item:
        try:
            return self._item(position)
        except DataError as error:
            return error

    def _item(self, position: int) -> dict[str, Any] | Skipped:
        place = self.order.locate(position)
        sample = self.reader.sample(place.shard, place.index)
        try:
            image = decode_rgb(sample.image)
            captions = [sample.caption] if self.original_only else sample.captions
        except DataError as error:
            return Skipped(f"{self.reader.path(place.shard)}: key {sample.key}: {error}")
        view = place.epoch % self.cache.num_views if self.cache else place.epoch
        rendered = apply_view(image, self.views, draw_view(self.views, sample.key, view), self.size)
        written = [index for index, text in enumerate(captions) if text.strip()] or [0]  # an original may be empty
        caption = written[draw_caption(self.seed, sample.key, place.epoch, len(written))]
        item = {
            "key": sample.key,
            "epoch": place.epoch,
            "image": to_tensor(rendered, self.mean, self.std),
            "tokens": self.tokenizer([captions[caption]])[0],
        }
        if self.cache:
            rows = self.cache.rows(place.shard, view, self.reader.keys(place.shard))
            item["teacher_image"] = torch.from_numpy(rows.image[place.index].astype(np.float32))
            item["teacher_text"] = torch.from_numpy(rows.text(place.index, caption))
        return item


def open_samples(data: DataConfig, views: ViewConfig | CacheConfig, student: LoadedModel, seed: int) -> Samples:
    """The reader that a config asks for. Raises UserError and DataError when the dataset does not serve it."""
    if not data.data:
        raise UserError("--data is needed: the ROOT of a dataset, as `clipmill pack` or `clipmill ingest` left it")
    sizes = dataset_sizes(data.data, data.folder)[: data.shards]
    reader = ShardReader(data.data, data.folder, sizes, data.window)
    order = Order(sizes, seed, data.window)
    original_only = data.captions == "original" or data.folder == "raw"
    if isinstance(views, ViewConfig):
        return Samples(reader, order, student, views.spec(seed), seed, original_only)
    if data.folder != "shards":
        raise UserError(f"--folder {data.folder!r}: a teacher cache belongs to packed shards; use --folder shards")
    cache = TeacherCache(data.data, views.teacher, len(sizes), data.window, original_only)
    return Samples(reader, order, student, cache.views, seed, original_only, cache)


def collate(items: list[Item]) -> dict[str, Any]:
    """``images`` (B, 3, S, S), ``tokens`` (B, T), ``keys``, ``epochs``, ``skipped`` (reasons), teacher features.

    Or {"error": DataError} when there is one, for `load_batches` to raise.
    """
    good, skipped = [], []
    for item in items:
        if isinstance(item, DataError):
            return {"error": item}
        if isinstance(item, Skipped):
            skipped.append(item.reason)
        else:
            good.append(item)
    if not good:
        return {"error": DataError(f"none of the {len(items)} samples of a batch can be used, first {skipped[0]}")}
    batch = {
        "images": torch.stack([item["image"] for item in good]),
        "tokens": torch.stack([item["tokens"] for item in good]),
        "keys": [item["key"] for item in good],
        "epochs": [item["epoch"] for item in good],
        "skipped": skipped,
    }
    teacher = ("teacher_image", "teacher_text") if "teacher_image" in good[0] else ()
    return batch | {name: torch.stack([item[name] for item in good]) for name in teacher}


def load_batches(
    samples: Samples, positions: Iterable[range], workers: int = 0, pin: bool = False
) -> Iterator[dict[str, Any]]:
    """One batch per range of positions, in order, read ahead by ``workers`` processes.

    Skipped samples are logged, the batch is smaller by them. Raises DataError.
    """
    loader = DataLoader(
        samples,
        batch_sampler=positions,  # type: ignore[arg-type]  # any iterable of index sequences will do
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_parent,
        generator=torch.Generator(),  # its own: the default would draw from the training's random stream
    )
    for batch in loader:
        if "error" in batch:
            raise batch["error"]
        for reason in batch["skipped"]:
            log.warning("sample skipped: %s", reason)
        yield batch


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C and Slurm signal the whole group; a worker that died would take the last checkpoint with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
