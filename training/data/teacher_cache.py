"""The teacher cache, read beside the shards: every file is checked before its rows are used."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from shards_spec.embeddings import EmbeddingFile
from shards_spec.files import DataError, UserError, exists, join, names
from shards_spec.layout import (
    SHARDS,
    TEACHER,
    remake_advice,
    remake_folder_advice,
    resume_advice,
    shard_name,
    tar_path,
    teacher_folder,
    teacher_parquet,
)
from shards_spec.manifest import file_hash
from shards_spec.messages import counted, flag
from shards_spec.sample import check_keys
from shards_spec.teacher_shard import TeacherShard
from shards_spec.views import (
    RecordedSpec,
    RecordedView,
    View,
    ViewSpec,
    draw_view,
    parse_view_spec,
    unpack_recorded,
)
from training.data.local_copies import LocalFileCache
from training.data.lru import LRUCache

AGAIN = "delete it and run `clipmill cache` again with the --name and options it had"


class LackingFeatures(DataError):
    """An imported cache has nothing for a sample or a caption, because its source had none."""


@dataclass(frozen=True)
class ShardFeatures:
    """One shard's features in the shard's order, read row by row; ``files`` has the file of each column.

    ``is_imported``: what is null was not there to be taken (`clipmill cache --from`).
    """

    path: str
    keys: list[str]
    files: dict[str, EmbeddingFile]
    is_imported: bool = False

    def row(self, column: str, index: int) -> np.ndarray:
        """Return a row, (D,) float32.

        Raises DataError when the cache has no such row, LackingFeatures where an imported one may have none.
        """
        file = self.files.get(column)
        row = file.row(column, index) if file else None
        if row is None or math.isnan(row @ row):  # NaN where one of them is, in a third of the time of `isnan`
            raise self._lacking(column, index)
        return row

    def view(self, column: str, index: int) -> bytes:
        """Return a recorded view, packed. Raises as `row`."""
        stored = self.files[column].stored_row(column, index)
        if stored is None:
            raise self._lacking(column, index)
        return stored.tobytes()

    def _lacking(self, column: str, index: int) -> DataError:
        lack = f"{self.path}: key {self.keys[index]} has no {column}"
        return LackingFeatures(f"{lack} in --from") if self.is_imported else DataError(f"{lack}; {AGAIN}")


class CacheReader:
    """What readers of a cache ``ROOT/teacher/NAME`` have in common.

    ``views`` and ``num_views`` come from the first shard's metadata, ``meta``; every other shard must agree in what
    ``same`` names.

    Args:
        root: The dataset.
        name: Name of the cache; empty takes the only one there is.
        shards: Number of shards that the cache must have.
        file_cache: Where copies of remote files are kept.

    Raises:
        UserError: There is no such cache, or it does not serve.
        DataError: A file is damaged.
    """

    option: ClassVar[str]  # that names the cache
    same: ClassVar[tuple[str, ...]]  # metadata that all files of a cache have in common

    def __init__(self, root: str, name: str, shards: int, file_cache: LocalFileCache | None = None) -> None:
        self.root = root
        self.name = _pick(root, name, self.option)
        self.file_cache = file_cache or LocalFileCache()
        present = set(names(join(root, teacher_folder(self.name))))
        if missing := [shard for shard in range(shards) if f"{shard_name(shard)}.parquet" not in present]:
            path = self.path(missing[0])
            deleted = f"{shard_name(missing[0])}_stats.json" in present
            folder = join(root, teacher_folder(self.name))
            advice = remake_advice(path) if deleted else remake_folder_advice(folder)
            raise UserError(f"{path} is not there ({len(missing)} of {counted(shards, 'shard')} missing): {advice}")
        first = TeacherShard(root, self.name, 0, self.file_cache.get)
        self.meta = first.files[0].meta
        self.check_serves(first)
        if lacking := [field for field in (*self.same, "views") if field not in self.meta]:
            raise DataError(f"{self.path(0)}: its metadata has no {lacking[0]}; {AGAIN}")
        self.views = view_spec(self.path(0), self.meta)
        self.num_views: int = first.config["num_views"]

    def check_serves(self, first: TeacherShard) -> None:
        """Raise UserError where the cache, of which this is the first shard, holds something else."""
        raise NotImplementedError

    def path(self, shard: int) -> str:
        """Return the path or URL of the first Parquet file of a shard."""
        return teacher_parquet(self.root, self.name, shard)

    def open_shard(self, shard: int) -> TeacherShard:
        """Open a shard's files. Raises DataError when they are damaged, or of another tar or number of views."""
        path = self.path(shard)
        tar = tar_path(SHARDS, shard)
        if not exists(path):
            raise DataError(f"{path} is not there any more; {remake_advice(path)}")
        cached = TeacherShard(self.root, self.name, shard, self.file_cache.get)
        if cached.config["num_views"] != self.num_views:
            raise DataError(
                f"{path}: {counted(cached.config['num_views'], 'view')}, {self.path(0)} has {self.num_views}; "
                f"{resume_advice(join(self.root, teacher_folder(self.name)))}"
            )
        if cached.inputs.get(tar) != file_hash(self.root, SHARDS, shard, tar):
            advice = resume_advice(join(self.root, teacher_folder(self.name)))  # deleting would lose what it copies
            raise DataError(f"{path}: made from another {join(self.root, tar)} than the one there; {advice}")
        return cached

    def columns(self, cached: TeacherShard, names: list[str], keys: list[str]) -> dict[str, EmbeddingFile]:
        """Return the file of each column.

        Raises DataError when one is not there, or its file is of another teacher or view spec, or has other ``keys``
        than the shard.
        """
        files = {column: cached.file(column) for column in names}
        for file in {file.path: file for file in files.values()}.values():
            if different := [field for field in self.same if file.meta.get(field) != self.meta[field]]:
                raise DataError(
                    f"{file.path}: its {different[0]} is {file.meta.get(different[0])!r}, {self.path(0)} has "
                    f"{self.meta[different[0]]!r}; {AGAIN}"
                )
            check_keys(file.path, file.keys, keys, AGAIN)
        return files


class TeacherCache(CacheReader):
    """A cache of features of images and captions.

    Attributes:
        logit_scale: The teacher's scale itself, not its logarithm.
        dim: Numbers of a feature.

    Args:
        root: The dataset.
        name: Name of the cache; empty takes the only one there is.
        shards: Number of shards that the cache must have.
        capacity: Number of shards whose files stay open, counted per view.
        original_only: Do without the features of synthetic captions.
        file_cache: Where copies of remote files are kept.

    Raises:
        UserError: There is no such cache, or it does not serve.
        DataError: A file is damaged.
    """

    option = "--teacher"
    same = ("model", "pretrained", "weights_sha256", "logit_scale", "views_sha256", "dim")

    def __init__(
        self,
        root: str,
        name: str,
        shards: int,
        *,
        capacity: int = 24,
        original_only: bool = False,
        file_cache: LocalFileCache | None = None,
    ) -> None:
        super().__init__(root, name, shards, file_cache)
        self.original_only = original_only
        self.logit_scale: float = self.meta["logit_scale"]
        self.dim: int = self.meta["dim"]
        self._features: LRUCache[tuple[int, int], ShardFeatures] = LRUCache(capacity)

    def check_serves(self, first: TeacherShard) -> None:
        """Raise UserError where the cache has no features of captions."""
        if first.find("text_0") is None:
            held = "an image-only teacher's cache" if first.find("image_0") else "a cache of soft labels"
            raise UserError(f"--teacher {self.name!r} is {held}; take one that has captions too")

    def features(self, shard: int, view: int, keys: list[str]) -> ShardFeatures:
        """Return the features of one view and of the captions of a shard.

        Args:
            shard: The shard.
            view: The view.
            keys: The keys of the shard's samples, in the order of its tar.

        Raises:
            DataError: The cache's files are damaged, or of another shard, teacher or view spec.
        """
        return self._features.get((shard, view), lambda: self._read(shard, view, keys))

    def _read(self, shard: int, view: int, keys: list[str]) -> ShardFeatures:
        cached = self.open_shard(shard)
        texts = [f"text_{i}" for i in range(1 if self.original_only else cached.captions)]
        files = self.columns(cached, [f"image_{view}", *texts], keys)
        if isinstance(self.views, RecordedSpec):
            column = f"view_{view}"
            files[column] = cached.file(column)
            check_keys(files[column].path, files[column].keys, keys, AGAIN)
        return ShardFeatures(self.path(shard), keys, files, is_imported="imported" in self.meta)


def teacher_fields(number: int) -> tuple[str, str]:
    """Return the names of the image and text features of a teacher, by its number from 0.

    ``teacher_image`` and ``teacher_text`` of the first one, with ``_2`` of the second.
    """
    ending = f"_{number + 1}" if number else ""
    return f"teacher_image{ending}", f"teacher_text{ending}"


class TeacherCaches:
    """The caches of one or several teachers, of the same views.

    Attributes:
        members: The caches, in the order of their teachers.
        views: What the views were drawn from.
        num_views: Number of views that all of them have.

    Raises:
        UserError: A cache is named twice, or two are of other views.
    """

    def __init__(self, members: Sequence[TeacherCache]) -> None:
        self.members = tuple(members)
        first = self.members[0]
        self.views = first.views
        self.num_views = min(member.num_views for member in self.members)
        for number, member in enumerate(self.members[1:], 1):
            if member.name in [other.name for other in self.members[:number]]:
                raise UserError(f"--teacher {member.name!r} is named twice: name each teacher once")
            if member.views.sha256 != first.views.sha256:
                raise UserError(_other_views(first, member))

    def features(self, shard: int, index: int, view: int, caption: int, keys: list[str]) -> dict[str, Tensor]:
        """Return a sample's features by every teacher, (D,) float32, named by `teacher_fields`.

        Args:
            shard: The shard.
            index: The sample's row.
            view: The view.
            caption: The caption.
            keys: The keys of the shard's samples, in the order of its tar.

        Raises:
            DataError: A cache's files are damaged, or of another shard, teacher or view spec.
        """
        fields = {}
        for number, member in enumerate(self.members):
            rows = member.features(shard, view, keys)
            columns = (f"image_{view}", f"text_{caption}")
            for name, column in zip(teacher_fields(number), columns, strict=True):
                fields[name] = torch.from_numpy(rows.row(column, index))
        return fields

    def view(self, shard: int, index: int, view: int, keys: list[str]) -> View | RecordedView:
        """Return a sample's view, drawn or as the caches recorded it.

        Args:
            shard: The shard.
            index: The sample's row.
            view: The view.
            keys: The keys of the shard's samples, in the order of its tar.

        Raises:
            LackingFeatures: The source of an imported cache had none.
            DataError: A cache's files are damaged, or two recorded different views.
        """
        if not isinstance(self.views, RecordedSpec):
            return draw_view(self.views, keys[index], view)
        packed = [member.features(shard, view, keys).view(f"view_{view}", index) for member in self.members]
        if len(set(packed)) > 1:
            paths = " and ".join(member.path(shard) for member in self.members)
            raise DataError(
                f"{paths}: key {keys[index]} has another view_{view} in each: their sources differ; {AGAIN}"
            )
        try:
            return unpack_recorded(packed[0])
        except DataError as error:
            raise DataError(f"{self.members[0].path(shard)}: key {keys[index]}: {error}; {AGAIN}") from error

    def paths(self, shard: int) -> list[str]:
        """Return the path or URL of the first file of a shard in each cache."""
        return [member.path(shard) for member in self.members]


def _other_views(first: TeacherCache, other: TeacherCache) -> str:
    """The message for two caches whose views were drawn in another way, with the option that tells them apart."""
    one, two = asdict(first.views), asdict(other.views)
    different = [f"{flag(name)} {_shown(one[name])} and {_shown(two[name])}" for name in one if one[name] != two[name]]
    if isinstance(first.views, RecordedSpec) != isinstance(other.views, RecordedSpec):
        different = ["recorded ones of `clipmill cache --from`, and drawn ones"]
    return (
        f"--teacher {first.name!r} and {other.name!r} are of other views ({', '.join(different)}): teachers must have "
        "seen the same ones; make one of the caches again with the options of the other"
    )


def _shown(value: Any) -> str:
    """A value as a command line has it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _pick(root: str, name: str, option: str) -> str:
    """The name of a cache that is there. Raises UserError."""
    found = [entry for entry in names(join(root, TEACHER)) if "." not in entry or name == entry]
    if name in found or (not name and len(found) == 1):
        return name or found[0]
    there = ", ".join(found) or "none"
    asked = f"{option} {name!r} is not there" if name else f"{option} is needed"
    kind = " --model timm:NAME --soft-labels K" if option == "--soft-labels" else ""
    raise UserError(f"{asked}: teacher caches in {root} are: {there}; make one with `clipmill cache {root}{kind}`")


def view_spec(path: str, meta: dict[str, Any]) -> ViewSpec:
    """Return the ViewSpec of a cache. Raises DataError when this Pillow would render other pixels from it."""
    spec = parse_view_spec(path, meta["views"])
    if spec.sha256 != meta["views_sha256"]:
        raise DataError(f"{path}: its view spec does not match its hash; {AGAIN}")
    return spec
