"""Image-text pairs by position: one view and one caption of a sample per epoch.

What a sample becomes is a pure function of (dataset, seed, position), so the number of worker processes and the moment
of a resume change nothing. A worker has about streams · window shards mapped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from torch.utils.data import Dataset

from shards_spec.counter_rng import draw_index
from shards_spec.files import DataError, UserError, exists, join, names
from shards_spec.images import decode_rgb
from shards_spec.layout import RAW, SHARDS, VOCAB, vocabulary_tsv
from shards_spec.manifest import read_dataset
from shards_spec.models import LoadedModel
from shards_spec.sample import Sample
from shards_spec.views import RecordedView, View, ViewSpec, apply_view, draw_view
from shards_spec.vocab import Vocabulary, read_vocabulary
from training.config import DataConfig, LabelConfig, SideConfig, TeacherCacheConfig, ViewConfig
from training.data.batches import Index, Item, Skipped, to_pixels
from training.data.local_copies import LocalFileCache
from training.data.lru import LRUCache
from training.data.order import BatchPlan, Order, SampleLocation
from training.data.paired_views import PairedViews
from training.data.selected import SamplePlace, SelectionReader, order_of
from training.data.shard_reader import ShardReader, dataset_sizes
from training.data.teacher_cache import LackingFeatures, TeacherCache, TeacherCaches

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


def draw_caption(seed: int, key: str, epoch: int, count: int) -> int:
    """Return which of ``count`` captions a sample shows in an epoch: uniform, a pure function of the arguments."""
    return draw_index(f"caption/{seed}/{key}/{epoch}", count)


@dataclass(frozen=True)
class CaptionChoice:
    """Which caption a sample shows in an epoch: the original one, or one of all its captions, drawn by ``seed``."""

    seed: int
    original_only: bool = False

    def captions(self, sample: Sample) -> list[str]:
        """Return the captions that are drawn from, the original one first. Raises DataError when they are damaged."""
        return [sample.caption] if self.original_only else sample.captions

    def draw(self, captions: list[str], key: str, epoch: int, allowed: list[int] | None = None) -> int:
        """Return the index of the caption, one of the ``allowed`` (None: all); an empty one where there is no other."""
        indices = range(len(captions)) if allowed is None else allowed
        candidates = [index for index in indices if index < len(captions) and captions[index].strip()] or [0]
        return candidates[draw_caption(self.seed, key, epoch, len(candidates))]


@dataclass(frozen=True)
class SampleLabels:
    """Class indices of a sample: of its original caption's synsets, or of those of all its captions."""

    vocabulary: Vocabulary
    original_only: bool = True

    def class_indices(self, sample: Sample) -> list[int]:
        """Return the indices, ascending, each once. Raises DataError when the sample has no synsets."""
        synsets = sample.meta.get("synsets")
        if not isinstance(synsets, list):
            raise DataError("its json member has no synsets; run `clipmill pack` again")
        used = synsets[:1] if self.original_only else synsets
        return self.vocabulary.labels(list(chain.from_iterable(used)))


@dataclass(frozen=True)
class _Described:
    """A row before its image is decoded."""

    item: dict[str, Any]  # its fields but for images
    caption: str
    shard: int
    index: int  # in the shard: its encoded image, which may be large, is read when its turn comes
    view: View | RecordedView
    side: int  # pixels a side of the student's images
    draw_name: str  # what `PairedViews` draws by


def _or_error(make: Callable[[_Given], _Made], given: _Given) -> _Made | Skipped | DataError | UserError:
    """What ``make`` returns, or its error as a value."""
    try:
        return make(given)
    except LackingFeatures as error:
        return Skipped(str(error))
    except (DataError, UserError) as error:
        return error


class Samples(Dataset[Item]):
    """Samples by position of the endless stream.

    An item has ``key``, ``position``, ``epoch`` and ``images`` (3, S, S) uint8; for a student with a tokenizer
    ``tokens`` (context,) int64 and ``blank``, whether the text is empty; with a teacher cache ``teacher_image`` and
    ``teacher_text`` (D,) float32, with several caches also ``teacher_image_2`` ...; with labels the list ``labels``. An
    index is a position, or a pair of a position and the side S.

    Args:
        reader: The shards.
        order: Which sample stands at which position.
        student: The model; items have its image size unless an index names another.
        views: What views are drawn from.
        captions: Which caption is shown.
        cache: The teachers' features and views; None draws a new view each epoch.
        labels: Which classes a sample has; None leaves labels out.
        plan: Sizes of the batches.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: Order,
        student: LoadedModel,
        *,
        views: ViewSpec,
        captions: CaptionChoice,
        cache: TeacherCaches | None,
        labels: SampleLabels | None,
        plan: BatchPlan,
    ) -> None:
        self.reader = reader
        self.order = order
        self.student = student
        self.views = views
        self.captions = captions
        self.cache = cache
        self.labels = labels
        self.plan = plan
        self.selection: SelectionReader | None = None  # set where ``order`` counts selected samples only
        self.paired: PairedViews | None = None  # set where a teacher sees other pixels than the student
        # windows of the order whose successors were prefetched; two per stream, as a batch may cross epochs
        self._prefetched: LRUCache[tuple[int, tuple[int, int]], None] = LRUCache(2 * order.streams)

    def __getitem__(self, index: Index) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Index]) -> list[Item]:
        """Return the rows of a piece, which is what a DataLoader asks for.

        All rows are described before the first image is decoded: an image pushes out of the processor's caches whatever
        Python needs for the rest, which took a third of the time of a row when each was made on its own.
        """
        rows = [_or_error(self._describe, index) for index in indices]
        described = [row for row in rows if isinstance(row, _Described)]
        if described and self.student.tokenizer is not None:
            tokens = self.student.tokenizer([row.caption for row in described])
            for row, own in zip(described, tokens, strict=True):
                row.item.update(tokens=own, blank=not row.caption.strip())
        return [_or_error(self._render, row) if isinstance(row, _Described) else row for row in rows]

    def _describe(self, index: Index) -> "_Described | Skipped":
        """All of a row but what is made of its image and of its caption. Raises DataError, UserError."""
        position, side = index if isinstance(index, tuple) else (index, None)
        location = self.order.locate(position)
        self._prefetched.get((location.epoch, location.window), lambda: self._prefetch_next(location))
        keys = self.reader.keys(location.shard)
        chosen = SamplePlace(location.index, location.index)
        if self.selection is not None:
            chosen = self.selection.sample(location.shard, location.index, keys)
        turn = chosen.turn(location.epoch)
        sample = self.reader.sample(location.shard, chosen.index)
        try:
            captions = self.captions.captions(sample)
            labels = {"labels": self.labels.class_indices(sample)} if self.labels else {}
        except DataError as error:
            return self._skipped(location.shard, sample.key, error)
        view = turn % self.cache.num_views if self.cache else turn
        caption = self.captions.draw(captions, sample.key, turn, chosen.captions)
        item = {"key": sample.key, "position": position, "epoch": location.epoch, **labels}
        if self.cache:
            drawn = self.cache.view(location.shard, chosen.index, view, keys)
            item |= self.cache.features(location.shard, chosen.index, view, caption, keys)
        else:
            drawn = draw_view(self.views, sample.key, view)
        return _Described(
            item,
            captions[caption],
            location.shard,
            chosen.index,
            drawn,
            side or self.student.image_size,
            f"{sample.key}/{turn}",
        )

    def _render(self, row: "_Described") -> dict[str, Any] | Skipped:
        """The row with its images. Raises DataError, UserError."""
        sample = self.reader.sample(row.shard, row.index)
        try:
            image = decode_rgb(sample.image)
        except DataError as error:
            return self._skipped(row.shard, sample.key, error)
        if self.paired is None:
            images = {"images": to_pixels(apply_view(image, self.views, row.view, row.side))}
        else:
            images = self.paired.render(image, self.views, row.view, row.side, row.draw_name)
        return row.item | images

    def _skipped(self, shard: int, key: str, error: DataError) -> Skipped:
        return Skipped(f"{self.reader.path(shard)}: key {key}: {error}")

    def _prefetch_next(self, location: SampleLocation) -> None:
        """Prefetch the files of the shards that the stream of ``location`` opens next."""
        shards = self.order.next_shards(location)
        self.reader.file_cache.prefetch([self.reader.path(shard) for shard in shards])
        if self.cache:
            paths = chain.from_iterable(self.cache.paths(shard) for shard in shards)
            self.reader.file_cache.prefetch(list(paths))


def check_data(data: DataConfig) -> list[int]:
    """Return the number of samples of each shard that is read.

    Raises UserError when no dataset is named, its stage has not finished, or has no selections.
    """
    if not data.data:
        raise UserError("--data is needed: the ROOT of a dataset, as `clipmill pack` or `clipmill ingest` left it")
    if data.select is not None and data.folder != SHARDS:
        raise UserError(
            f"--folder {data.folder}, the default of coca: a selection belongs to packed shards; use --folder shards"
        )
    return dataset_sizes(data.data, data.folder)[: data.shards]


def open_samples(
    data: DataConfig,
    views: ViewConfig | TeacherCacheConfig,
    student: LoadedModel,
    seed: int,
    *,
    labels: SampleLabels | None = None,
    sides: SideConfig | None = None,
) -> Samples:
    """Open the samples that a config asks for.

    Args:
        data: The dataset and how it is read.
        views: What views are drawn from, or a teacher cache, whose views they are.
        student: The model that they are made for.
        seed: Seed of order, captions and drawn views.
        labels: Which classes a sample has.
        sides: Sizes of images; None is the student's own.

    Raises:
        UserError: The dataset does not serve this config.
        DataError: The dataset is damaged.
    """
    sizes = check_data(data)
    file_cache = LocalFileCache(data.scratch, int(data.scratch_gb * 1e9))
    capacity = data.streams * (data.window + 1)
    original_only = data.captions == "original" or data.folder == RAW
    cache = None
    if isinstance(views, TeacherCacheConfig):
        if data.folder != SHARDS:
            raise UserError(f"--folder {data.folder!r}: a teacher cache belongs to packed shards; use --folder shards")
        cache = TeacherCaches(
            [
                TeacherCache(
                    data.data,
                    name,
                    len(sizes),
                    capacity=capacity,
                    original_only=original_only,
                    file_cache=file_cache,
                )
                for name in views.names
            ]
        )
        view_spec = cache.views
    else:
        view_spec = views.spec(seed)
    selection = open_selection(data, len(sizes), capacity)
    samples = Samples(
        ShardReader(data.data, data.folder, sizes, capacity, file_cache),
        order_of(sizes, selection, seed, data.streams, data.window),
        student,
        views=view_spec,
        captions=CaptionChoice(seed, original_only),
        cache=cache,
        labels=labels,
        plan=batch_plan(data.batch_size, sides, seed),
    )
    samples.selection = selection
    return samples


def open_selection(data: DataConfig, shards: int, capacity: int) -> SelectionReader | None:
    """Return the selection of the first so many shards. Raises UserError and DataError as `SelectionReader` does."""
    if data.select is None:
        return None
    return SelectionReader(data.data, data.select, shards, capacity)


def batch_plan(batch_size: int, sides: SideConfig | None, seed: int) -> BatchPlan:
    """Return the sizes of a run's batches."""
    if sides is None:
        return BatchPlan(batch_size)
    return BatchPlan(batch_size, sides.sides, sides.base_side, sides.batch_parts, seed)


def find_vocabulary(data: DataConfig, labels: LabelConfig) -> Vocabulary:
    """Return the vocabulary of a config.

    Raises:
        UserError: There is none, the shards are labelled by another rule, or it was counted on other captions.
    """
    if not data.data or data.folder != SHARDS:
        raise UserError("--data is needed with --folder shards: labels are in packed shards only (`clipmill pack`)")
    path = vocabulary_tsv(data.data, labels.vocabulary)
    if not exists(path):
        there = [name.removesuffix(".tsv") for name in names(join(data.data, VOCAB)) if name.endswith(".tsv")]
        others = f"; --vocabulary may be {' or '.join(there)}" if there else ""
        raise UserError(
            f"{path} is not there: `clipmill vocab {data.data} --name {labels.vocabulary}` makes it{others}"
        )
    vocabulary = read_vocabulary(path)
    vocabulary.check_rule(read_dataset(data.data)["stages"].get("pack", {}).get("config", {}), path)
    vocabulary.check_captions(labels.label_captions, path)
    return vocabulary
