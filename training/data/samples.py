"""Samples by position, and batches of them: shards read in place, one view and one caption per epoch.

Everything a sample becomes is a pure function of (dataset, seed, position), so the number of worker processes and
the moment of a resume change nothing. A worker has about streams · window shards mapped.
"""

import hashlib
import logging
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shards_spec.files import DataError, UserError, exists, join, read_buffer, read_json
from shards_spec.images import decode_rgb
from shards_spec.layout import RAW, SHARDS, stats_path, tar_path, vocabulary_tsv
from shards_spec.manifest import read_dataset, shard_ids, shard_sizes
from shards_spec.models import LoadedModel
from shards_spec.sample import Sample
from shards_spec.tar import index_shard, read_sample
from shards_spec.tar_members import Member
from shards_spec.views import ViewSpec, apply_view, draw_view
from shards_spec.vocab import Vocabulary, read_vocabulary
from training.config import DataConfig, LabelConfig, SideConfig, TeacherCacheConfig, ViewConfig
from training.data.local_copies import LocalFileCache
from training.data.lru import LRUCache
from training.data.order import BatchPlan, Order, SampleLocation
from training.data.teacher_cache import TeacherCache
from training.losses.multilabel import PAD, pad_labels

log = logging.getLogger(__name__)
PIECE = 64  # samples that a worker makes at a time
TENSORS = ("images", "tokens", "teacher_image", "teacher_text", "features", "targets")
LISTS = ("keys", "epochs", "skipped", "blank")


@dataclass(frozen=True)
class _Open:
    buffer: memoryview
    keys: list[str]
    members: list[dict[str, Member]]


class ShardReader:
    """Samples of ``root/folder/NNNNN.tar`` by (shard, index); at most ``capacity`` shards are open."""

    def __init__(
        self, root: str, folder: str, sizes: list[int], capacity: int = 24, file_cache: LocalFileCache | None = None
    ) -> None:
        self.root, self.folder, self.sizes, self.file_cache = root, folder, sizes, file_cache or LocalFileCache()
        self.open: LRUCache[int, _Open] = LRUCache(capacity)

    def path(self, shard: int) -> str:
        """The tar of a shard."""
        return tar_path(join(self.root, self.folder), shard)

    def keys(self, shard: int) -> list[str]:
        """The shard's keys in file order."""
        return self._shard(shard).keys

    def sample(self, shard: int, index: int) -> Sample:
        """Raises DataError naming the file when the shard is not there, broken, or of another size."""
        opened = self._shard(shard)
        return read_sample(opened.buffer, opened.keys[index], opened.members[index])

    def _shard(self, shard: int) -> _Open:
        return self.open.get(shard, lambda: self._index(shard))

    def _index(self, shard: int) -> _Open:
        path = self.path(shard)
        try:
            with read_buffer(self.file_cache.get(path)) as buffer:
                found = list(index_shard(buffer, path))
        except FileNotFoundError as error:
            raise DataError(f"{path} is not there; run the stage that makes it again") from error
        if len(found) != self.sizes[shard]:
            raise DataError(f"{path}: {len(found)} samples, its records say {self.sizes[shard]}; make it again")
        return _Open(buffer, [key for key, _ in found], [members for _, members in found])


def dataset_sizes(root: str, folder: Literal["shards", "raw"]) -> list[int]:
    """Samples per shard. Raises UserError when the folder is empty or its stage has not finished."""
    if folder == SHARDS:
        return shard_sizes(root)
    shards = shard_ids(join(root, RAW))
    if not shards:
        raise UserError(f"{join(root, RAW)} has no finished shards: run `clipmill ingest {root}` first")
    return [read_json(stats_path(join(root, RAW), shard))["successes"] for shard in shards]


def draw_caption(seed: int, key: str, epoch: int, count: int) -> int:
    """Which of ``count`` captions a sample shows in an epoch: uniform, a pure function of its arguments."""
    digest = hashlib.blake2b(f"caption/{seed}/{key}/{epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % count


@dataclass(frozen=True)
class SampleLabels:
    """Class indices of a sample: of its original caption's synsets, or of those of all its captions."""

    vocabulary: Vocabulary
    original_only: bool = True

    def class_indices(self, sample: Sample) -> list[int]:
        """Ascending, each once. Raises DataError when the sample has no synsets."""
        synsets = sample.meta.get("synsets")
        if not isinstance(synsets, list):
            raise DataError("its json member has no synsets; run `clipmill pack` again")
        return self.vocabulary.labels([wnid for own in synsets[: 1 if self.original_only else None] for wnid in own])


def find_vocabulary(data: DataConfig, labels: LabelConfig) -> Vocabulary:
    """The vocabulary of a config.

    Raises UserError when there is none, the shards are labelled by another rule, or it was counted on other captions.
    """
    if not data.data or data.folder != SHARDS:
        raise UserError("--data is needed with --folder shards: labels are in packed shards only (`clipmill pack`)")
    path = vocabulary_tsv(data.data, labels.vocabulary)
    if not exists(path):
        raise UserError(f"{path} is not there: `clipmill vocab {data.data} --name {labels.vocabulary}` makes it")
    vocabulary = read_vocabulary(path)
    vocabulary.check_rule(read_dataset(data.data)["stages"].get("pack", {}).get("config", {}), path)
    vocabulary.check_captions(labels.label_captions, path)
    return vocabulary


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be used; ``reason`` names file and key."""

    reason: str


Item = dict[str, Any] | Skipped | DataError | UserError


class TrainingRows(Protocol):
    """What `load_batches` and the trainer read by position: `Samples`, or images of classes."""

    @property
    def student(self) -> LoadedModel: ...
    @property
    def order(self) -> Order: ...
    @property
    def plan(self) -> BatchPlan: ...
    def __getitem__(self, index: int | tuple[int, int | None]) -> Item: ...


class Samples(Dataset[Item]):
    """Map-style over positions of the endless stream.

    An item is a batch's row: ``images`` (3, S, S) uint8, ``tokens`` (context,) int64 for a student that reads,
    ``key``, ``position``, ``epoch``, with a cache ``teacher_image`` and ``teacher_text`` (D,) float32, and with labels
    the list ``labels``. An index may be a pair of position and side S. Errors come back as values: raised in a worker
    process they would reach the user wrapped in its traceback.
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
        labels: SampleLabels | None = None,
        plan: BatchPlan | None = None,
    ) -> None:
        self.reader, self.order, self.views, self.cache = reader, order, views, cache
        self.student, self.seed, self.original_only = student, seed, original_only
        self.labels, self.plan = labels, plan or BatchPlan(1)
        self._begun: LRUCache[tuple[int, tuple[int, int]], bool] = LRUCache(2 * order.streams)

    def __getitem__(self, index: int | tuple[int, int | None]) -> Item:
        position, side = index if isinstance(index, tuple) else (index, None)
        try:
            return self._item(position, side or self.student.image_size)
        except (DataError, UserError) as error:
            return error

    def _item(self, position: int, side: int) -> dict[str, Any] | Skipped:
        place = self.order.locate(position)
        self._begun.get((place.epoch, place.window), lambda: self._read_ahead(place))
        sample = self.reader.sample(place.shard, place.index)
        try:
            image = decode_rgb(sample.image)
            captions = [sample.caption] if self.original_only else sample.captions
            labels = {"labels": self.labels.class_indices(sample)} if self.labels else {}
        except DataError as error:
            return Skipped(f"{self.reader.path(place.shard)}: key {sample.key}: {error}")
        view = place.epoch % self.cache.num_views if self.cache else place.epoch
        rendered = apply_view(image, self.views, draw_view(self.views, sample.key, view), side)
        written = [index for index, text in enumerate(captions) if text.strip()] or [0]  # an original may be empty
        caption = written[draw_caption(self.seed, sample.key, place.epoch, len(written))]
        item = {
            "key": sample.key,
            "position": position,
            "epoch": place.epoch,
            "images": to_pixels(rendered),
            **labels,
        }
        if self.student.tokenizer is not None:
            item["tokens"] = self.student.tokenizer([captions[caption]])[0]
            item["blank"] = not captions[caption].strip()
        if self.cache:
            rows = self.cache.rows(place.shard, view, self.reader.keys(place.shard))
            item["teacher_image"] = torch.from_numpy(rows.row(f"image_{view}", place.index))
            item["teacher_text"] = torch.from_numpy(rows.row(f"text_{caption}", place.index))
        return item

    def _read_ahead(self, place: SampleLocation) -> bool:
        """Bring the shards near that the stream of ``place`` opens next."""
        shards = self.order.next_shards(place)
        self.reader.file_cache.prefetch([self.reader.path(shard) for shard in shards])
        if self.cache:
            self.reader.file_cache.prefetch([self.cache.path(shard) for shard in shards])
        return True


def to_pixels(image: Any) -> Tensor:
    """A PIL image as (3, S, S) uint8."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def check_data(data: DataConfig) -> list[int]:
    """Samples of each shard that is read. Raises UserError when no dataset is named or its stage has not finished."""
    if not data.data:
        raise UserError("--data is needed: the ROOT of a dataset, as `clipmill pack` or `clipmill ingest` left it")
    return dataset_sizes(data.data, data.folder)[: data.shards]


def open_samples(
    data: DataConfig,
    views: ViewConfig | TeacherCacheConfig,
    student: LoadedModel,
    seed: int,
    labels: SampleLabels | None = None,
    sides: SideConfig | None = None,
) -> Samples:
    """The reader that a config asks for. Raises UserError and DataError when the dataset does not serve it."""
    sizes = check_data(data)
    file_cache = LocalFileCache(data.scratch, int(data.scratch_gb * 1e9))
    capacity = data.streams * (data.window + 1)
    reader = ShardReader(data.data, data.folder, sizes, capacity, file_cache)
    order = Order(sizes, seed, data.streams, data.window)
    plan = batch_plan(data.batch_size, sides, seed)
    original_only = data.captions == "original" or data.folder == RAW
    if isinstance(views, ViewConfig):
        return Samples(reader, order, student, views.spec(seed), seed, original_only, None, labels, plan)
    if data.folder != SHARDS:
        raise UserError(f"--folder {data.folder!r}: a teacher cache belongs to packed shards; use --folder shards")
    cache = TeacherCache(data.data, views.teacher, len(sizes), capacity, original_only, file_cache)
    return Samples(reader, order, student, cache.views, seed, original_only, cache, labels, plan)


def batch_plan(batch_size: int, sides: SideConfig | None, seed: int) -> BatchPlan:
    """The sizes of a run's batches."""
    if sides is None:
        return BatchPlan(batch_size)
    return BatchPlan(batch_size, sides.sides, sides.base_side, sides.batch_parts, seed)


def collate(items: list[Item]) -> dict[str, Any]:
    """A piece of a batch: ``images`` (B, 3, S, S) uint8 and so on, as `load_batches` says, ``skipped`` (reasons).

    Or {"error": DataError or UserError} when there is one, for `load_batches` to raise.
    """
    good, skipped = list[dict[str, Any]](), list[str]()
    for item in items:
        if isinstance(item, DataError | UserError):
            return {"error": item}
        if isinstance(item, Skipped):
            skipped.append(item.reason)
        else:
            good.append(item)
    piece: dict[str, Any] = {"keys": [i["key"] for i in good], "epochs": [i["epoch"] for i in good], "skipped": skipped}
    piece["blank"] = [item["key"] for item in good if item.get("blank")]
    if good:
        piece["positions"] = torch.tensor([item["position"] for item in good])
        piece |= {name: torch.stack([item[name] for item in good]) for name in TENSORS if name in good[0]}
        if "labels" in good[0]:
            piece["labels"] = pad_labels([item["labels"] for item in good])
    return piece


def load_batches(
    samples: TrainingRows,
    positions: Iterable[range],
    workers: int = 0,
    device: str = "cpu",
    sides: Iterable[int | None] | None = None,
    as_bytes: bool = False,
) -> Iterator[dict[str, Any]]:
    """One batch per range of positions, in order, on ``device``, read ahead by ``workers`` processes.

    A batch has ``images`` (B, 3, S, S) float32 normalised (uint8 as they are where ``as_bytes``),
    ``tokens`` (B, T), ``positions`` (B,), ``keys``, ``epochs``,
    with a cache ``teacher_image`` and ``teacher_text`` (B, D), with labels ``labels`` (B, L) int64 filled up with -1,
    and ``skipped``: the reasons why it is smaller than its range; they are logged, too, and the first empty text is.
    ``blank`` are the keys of those. ``sides`` are the batches' S.
    Workers make pieces of `PIECE` samples: the first batch is there the sooner, and two batches are in flight however
    many workers there are. Raises DataError and UserError.
    """
    counts, ranges = deque[int](), iter(positions)
    if (first := next(ranges, None)) is None:
        return

    def pieces() -> Iterator[list[tuple[int, int | None]]]:
        for batch, side in zip(chain([first], ranges), sides or repeat(None), strict=False):
            cut = [batch[start : start + PIECE] for start in range(0, len(batch), PIECE)]
            counts.append(len(cut))
            yield from ([(position, side) for position in piece] for piece in cut)

    loader: DataLoader[Any] = DataLoader(
        samples,  # type: ignore[arg-type]  # a Dataset in all but name
        batch_sampler=pieces(),
        num_workers=workers,
        prefetch_factor=max(2, -(-2 * len(first) // (PIECE * workers))) if workers else None,
        collate_fn=collate,
        pin_memory=device != "cpu",
        worker_init_fn=_leave_signals_to_parent,
        generator=torch.Generator(),  # its own: the default would draw from the training's random stream
    )
    parts, told = list[dict[str, Any]](), False
    for part in loader:
        if "error" in part:
            raise part["error"]
        for reason in part["skipped"]:
            log.warning("sample skipped: %s", reason)
        if part["blank"] and not told:
            told = True
            log.warning("key %s has no caption, so its text is empty (as of others maybe: said once)", part["blank"][0])
        parts.append(_move(part, device))
        if len(parts) == counts[0]:
            counts.popleft()
            yield _join(parts, samples.student, as_bytes)
            parts = []


def first_batch(samples: TrainingRows, count: int, side: int | None = None) -> dict[str, Any]:
    """The first samples as `load_batches` gives them, on the CPU and without a word. Raises DataError and UserError."""
    piece = collate([samples[(position, side)] for position in range(count)])
    if "error" in piece:
        raise piece["error"]
    return _join([piece], samples.student, as_bytes=False)


def _move(part: dict[str, Any], device: str) -> dict[str, Any]:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in part.items()
    }


def _join(parts: list[dict[str, Any]], student: LoadedModel, as_bytes: bool) -> dict[str, Any]:
    batch: dict[str, Any] = {name: [one for part in parts for one in part[name]] for name in LISTS}
    if not (full := [part for part in parts if "positions" in part]):
        skipped = batch["skipped"]
        raise DataError(f"none of the {len(skipped)} samples of a batch can be used, first {skipped[0]}")
    if "labels" in full[0]:
        longest = max(part["labels"].shape[1] for part in full)
        for part in full:
            part["labels"] = F.pad(part["labels"], (0, longest - part["labels"].shape[1]), value=PAD)
    tensors = [name for name in full[0] if name not in (*LISTS, "images")]
    batch |= {name: torch.cat([part[name] for part in full]) for name in tensors}
    if "images" in full[0]:
        pieces = [part["images"] for part in full]
        if as_bytes:
            return batch | {"images": torch.cat(pieces)}
        pixels = torch.empty(len(batch["keys"]), *pieces[0].shape[1:], device=pieces[0].device)
        for place, piece in zip(pixels.split([len(piece) for piece in pieces]), pieces, strict=True):
            place.copy_(piece)  # in one go from bytes: joining these first would read and write them once more
        batch["images"] = student.normalise(pixels)
    return batch


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C and Slurm signal the whole group; a worker that died would take the last checkpoint with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
