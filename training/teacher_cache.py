"""The teacher cache read beside the shards: what is in it is checked before a row is believed."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL

from shards_spec.embeddings import read_embeddings, read_meta
from shards_spec.files import DataError, UserError, exists, join, names
from shards_spec.manifest import file_hash, shard_name
from shards_spec.views import RENDERING, ViewSpec
from training.recent import Recent

SAME = ("model", "pretrained", "weights_sha256", "logit_scale", "views_sha256", "num_views", "dim")
AGAIN = "delete it and run `clipmill cache` again"


@dataclass(frozen=True)
class Rows:
    """One shard's features in the shard's order: ``image`` (n, D), ``texts`` one (n, D) per caption, NaN if none."""

    path: str
    keys: list[str]
    image: np.ndarray
    texts: list[np.ndarray]

    def text(self, index: int, caption: int) -> np.ndarray:
        """(D,) float32. Raises DataError when the cache has no row for that caption."""
        row = self.texts[caption][index] if caption < len(self.texts) else None
        if row is None or np.isnan(row).any():
            raise DataError(f"{self.path}: key {self.keys[index]} has no text_{caption}; {AGAIN}")
        return row.astype(np.float32)


class TeacherCache:
    """The cache ``ROOT/teacher/NAME``. Holds the rows of at most ``capacity`` shards.

    ``views``, ``num_views``, ``logit_scale`` (the scale itself) and ``dim`` come from the first shard's metadata;
    every other shard must agree. Raises UserError when there is no such cache, DataError when it is broken.
    """

    def __init__(self, root: str, name: str, shards: int, capacity: int = 8, original_only: bool = False) -> None:
        self.root, self.name, self.original_only = root, _pick(root, name), original_only
        present = set(names(join(root, "teacher", self.name)))
        if missing := [shard for shard in range(shards) if f"{shard_name(shard)}.parquet" not in present]:
            raise UserError(
                f"{self.path(missing[0])} is not there ({len(missing)} of {shards} shards are missing): "
                f"run `clipmill cache {root}` to its end"
            )
        self.meta = read_meta(self.path(0))
        if lacking := [field for field in (*SAME, "views", "shard_sha256") if field not in self.meta]:
            raise DataError(f"{self.path(0)}: its metadata has no {lacking[0]}; {AGAIN}")
        self.views = view_spec(self.path(0), self.meta)
        self.num_views: int = self.meta["num_views"]
        self.logit_scale: float = self.meta["logit_scale"]
        self.dim: int = self.meta["dim"]
        self._rows: Recent[tuple[int, int], Rows] = Recent(capacity)

    def path(self, shard: int) -> str:
        """The Parquet file of a shard."""
        return join(self.root, "teacher", self.name, f"{shard_name(shard)}.parquet")

    def rows(self, shard: int, view: int, keys: list[str]) -> Rows:
        """Features of one view and of the captions, in the order of ``keys`` (the shard's).

        Raises DataError naming file, key and mend when they are not that shard's.
        """
        return self._rows.get((shard, view), lambda: self._read(shard, view, keys))

    def _read(self, shard: int, view: int, keys: list[str]) -> Rows:
        path, tar = self.path(shard), f"shards/{shard_name(shard)}.tar"
        if not exists(path):
            raise DataError(f"{path} is not there any more; run `clipmill cache {self.root}` again")
        meta = read_meta(path)
        if different := [field for field in SAME if meta.get(field) != self.meta[field]]:
            raise DataError(
                f"{path}: its {different[0]} is {meta.get(different[0])!r}, {self.path(0)} has "
                f"{self.meta[different[0]]!r}; {AGAIN}"
            )
        if meta["shard_sha256"] != file_hash(self.root, "shards", shard, tar):
            raise DataError(f"{path}: made from another {join(self.root, tar)} than the one there; {AGAIN}")
        texts = ["text_0"] if self.original_only else [f"text_{i}" for i in range(meta["num_captions"])]
        stored, columns, _ = read_embeddings(path, [f"image_{view}", *texts])
        _check_keys(path, stored, keys)
        image = columns[f"image_{view}"]
        if (bad := np.isnan(image).any(axis=1)).any():
            raise DataError(f"{path}: key {keys[int(bad.argmax())]} has no image_{view}; {AGAIN}")
        return Rows(path, keys, image, [columns[name] for name in texts])


def _pick(root: str, name: str) -> str:
    found = [entry for entry in names(join(root, "teacher")) if "." not in entry or name == entry]
    if name in found or (not name and len(found) == 1):
        return name or found[0]
    there = ", ".join(found) or "none"
    asked = f"--teacher {name!r} is not there" if name else "--teacher is needed"
    raise UserError(f"{asked}: teacher caches in {root} are: {there}; make one with `clipmill cache {root}`")


def _check_keys(path: str, stored: list[str], keys: list[str]) -> None:
    for row, (ours, theirs) in enumerate(zip(stored, keys, strict=False)):
        if ours != theirs:
            raise DataError(f"{path}: row {row} is key {ours}, the shard has {theirs} there; {AGAIN}")
    if len(stored) != len(keys):
        first = (stored if len(stored) > len(keys) else keys)[min(len(stored), len(keys))]
        raise DataError(f"{path}: {len(stored)} rows, the shard has {len(keys)}, first odd key {first}; {AGAIN}")


def view_spec(path: str, meta: dict[str, Any]) -> ViewSpec:
    """The ViewSpec of a cache. Raises DataError when this Pillow would render other pixels from it."""
    stored = dict(meta["views"])
    made_with = (stored.pop("pillow", None), stored.pop("rendering", None))
    if made_with != (PIL.__version__, RENDERING):
        raise DataError(
            f"{path}: its views were rendered by Pillow {made_with[0]} (rendering {made_with[1]}), here is Pillow "
            f"{PIL.__version__} (rendering {RENDERING}), which may give other pixels: install pillow=={made_with[0]}, "
            "or delete the cache and run `clipmill cache` again"
        )
    tuples: dict[str, Any] = {
        field: tuple(value) if isinstance(value, list) else value for field, value in stored.items()
    }
    try:
        spec = ViewSpec(**tuples)
    except TypeError as error:
        raise DataError(f"{path}: its view spec is of another version ({error}); {AGAIN}") from error
    if spec.sha256 != meta["views_sha256"]:
        raise DataError(f"{path}: its view spec does not match its hash; {AGAIN}")
    return spec
