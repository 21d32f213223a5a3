"""Which samples and rows of a dataset a list names, and which others are like them."""

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.taken_down import TAKEN_DOWN
from pipeline.takedown.request import TakedownRequest
from shards_spec.files import exists, join, sha256_bytes
from shards_spec.layout import DEDUP, RAW, SHARDS, dedup_parquet, raw_parquet, tar_path
from shards_spec.manifest import finished_shards
from shards_spec.parquet import read_table
from shards_spec.tar import read_shard

OPTIONAL = ("url", "caption", "sha256", "uid", "error_message")
REASONS = {"key": "its key", "uid": "its key", "url": "its link", "sha256": "its image"}


@dataclass(frozen=True)
class RawRow:
    """A row of raw/ that goes: its shard and its number in the Parquet file, and what it holds."""

    shard: int
    number: int
    key: str
    status: str
    error_message: str | None
    url: str | None
    caption: str | None
    sha256: str | None
    uid: str | None


@dataclass
class Matches:
    """What goes.

    Attributes:
        reasons: Key to what named it.
        rows: Rows of raw/ by shard; a row that was tried again stands in several.
        last_shard: Key to the last raw shard that has a row of it, which counts.
        used: Entries of the list that named something, by kind.
        gone: Keys of rows that the list names and that were taken down before.
        shared: Links and image hashes that rows have which stay.
        same_image: Key that stays to the key that goes with whom it shares link or image.
        near_duplicates: Key that stays to the key that goes, of which it is a duplicate by dedup/.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    rows: dict[int, list[RawRow]] = field(default_factory=lambda: defaultdict(list))
    last_shard: dict[str, int] = field(default_factory=dict)
    used: set[tuple[str, str]] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)
    same_image: dict[str, str] = field(default_factory=dict)
    near_duplicates: dict[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        """Keys of all that goes."""
        return set(self.reasons)

    def is_last(self, row: RawRow) -> bool:
        """Whether the row is the last try of its input."""
        return self.last_shard[row.key] == row.shard

    def last_rows(self) -> Iterator[RawRow]:
        """Each input that goes, by its last try."""
        for rows in self.rows.values():
            yield from filter(self.is_last, rows)


def find_matches(root: str, request: TakedownRequest, duplicates: bool) -> Matches:
    """Look a list up in raw/, or in the final shards where there is no raw/. Raises DataError for a broken file.

    ``duplicates``: take the duplicates and near-duplicates of dedup/, too.
    """
    matches = Matches()
    if not exists(join(root, RAW)):
        _match_tars(root, SHARDS, request, matches, images=set(request.images))
        return matches
    wanted = {name: text_array(values) for name, values in _by_column(request).items() if values}
    for shard in finished_shards(join(root, RAW)):
        _match_rows(root, shard, wanted, matches)
    found = {value for kind, value in matches.used if kind == "sha256"}
    if images := set(request.images) - found:  # those of the bytes as they are stored
        _match_tars(root, RAW, TakedownRequest(), matches, images=images)
    _match_duplicates(root, matches, duplicates)
    _collect_rows(root, matches)
    return matches


def _columns(root: str, shard: int) -> pa.Table:
    return read_table(raw_parquet(root, shard), ["key", "status"], optional=OPTIONAL)


def _by_column(request: TakedownRequest) -> dict[str, Collection[str]]:
    return {"key": request.keys, "uid": request.keys, "url": request.urls, "sha256": request.images}


def _match_rows(root: str, shard: int, wanted: dict[str, pa.Array], matches: Matches) -> None:
    table = _columns(root, shard)
    keys = table.column("key")
    blank = _is_blank(table)
    for name, values in wanted.items():
        if name not in table.column_names:
            continue
        for row in np.flatnonzero(_is_among(table.column(name), values)).tolist():
            value, key = table.column(name)[row].as_py(), keys[row].as_py()
            matches.used.add(("key" if name == "uid" else name, value))
            if blank[row]:
                matches.gone.add(key)
            else:
                matches.reasons.setdefault(key, REASONS[name])


def _is_blank(table: pa.Table) -> np.ndarray:
    """Where a row was taken down before, bool (n,)."""
    if "error_message" not in table.column_names:
        return np.zeros(len(table), bool)
    return _is_among(table.column("error_message"), text_array([TAKEN_DOWN]))


def text_array(values: Collection[str]) -> pa.Array:
    """The values as Arrow has them."""
    return pa.array(list(values), pa.string())


def _is_among(column: pa.ChunkedArray, values: pa.Array) -> np.ndarray:
    """Where a column has one of the values, bool (n,)."""
    found: np.ndarray = pc.is_in(column.cast(pa.string()), values).to_numpy()
    return found


def _match_tars(root: str, folder: str, request: TakedownRequest, matches: Matches, images: Collection[str]) -> None:
    """Samples of a folder's tars by their json members, and by the sha256 of the image as it is stored."""
    for shard in finished_shards(join(root, folder)):
        for sample in read_shard(tar_path(join(root, folder), shard)):
            meta = sample.meta if request.urls or request.images or request.keys else {}
            named = [
                ("key", sample.key, sample.key in request.keys),
                ("key", meta.get("uid"), meta.get("uid") in request.keys),
                ("url", meta.get("url"), meta.get("url") in request.urls),
                ("sha256", meta.get("sha256"), meta.get("sha256") in images),
            ]
            if images and (stored := sha256_bytes(sample.image)) in images:
                named.append(("sha256", stored, True))
            for kind, value, is_named in named:
                if is_named:
                    matches.used.add((kind, str(value)))
                    matches.reasons.setdefault(sample.key, REASONS[kind])


def _match_duplicates(root: str, matches: Matches, duplicates: bool) -> None:
    """Duplicates by dedup/ of what goes: taken with it, or named."""
    groups = defaultdict[str, list[str]](list)  # the key that stayed to its duplicates
    for shard in finished_shards(join(root, DEDUP)):
        for row in read_table(dedup_parquet(root, shard), ["key", "kept"]).to_pylist():
            if row["kept"]:
                groups[row["kept"]].append(row["key"])
    for kept, others in groups.items():
        group = [kept, *others]
        going = [key for key in group if key in matches.reasons]
        for key in group if going else []:
            if key in matches.reasons:
                continue
            if duplicates:
                matches.reasons[key] = f"a duplicate of {going[0]}"
            else:
                matches.near_duplicates[key] = going[0]


def _collect_rows(root: str, matches: Matches) -> None:
    """All rows of the keys that go, and who shares link or image with them."""
    shards = finished_shards(join(root, RAW))
    keys = text_array(matches.reasons)
    for shard in shards:
        table = _columns(root, shard)
        for row in np.flatnonzero(_is_among(table.column("key"), keys) & ~_is_blank(table)).tolist():
            raw_row = _raw_row(shard, row, table.slice(row, 1).to_pylist()[0])
            matches.rows[shard].append(raw_row)
            matches.last_shard[raw_row.key] = shard
    urls = {row.url: row.key for row in matches.last_rows() if row.url}
    images = {row.sha256: row.key for row in matches.last_rows() if row.sha256}
    of_column = [(name, owners, text_array(owners)) for name, owners in (("url", urls), ("sha256", images)) if owners]
    for shard in shards:
        table = _columns(root, shard)
        for name, owners, values in of_column:
            if name not in table.column_names:
                continue
            for row in np.flatnonzero(_is_among(table.column(name), values)).tolist():
                key = table.column("key")[row].as_py()
                if key not in matches.reasons:
                    value = table.column(name)[row].as_py()
                    matches.shared.add(value)
                    matches.same_image.setdefault(key, owners[value])


def _raw_row(shard: int, number: int, row: dict[str, Any]) -> RawRow:
    return RawRow(
        shard=shard,
        number=number,
        key=row["key"],
        status=row["status"],
        error_message=row.get("error_message"),
        url=row.get("url"),
        caption=row.get("caption"),
        sha256=row.get("sha256"),
        uid=None if row.get("uid") is None else str(row["uid"]),
    )
