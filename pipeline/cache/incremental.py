"""What a shard's teacher cache lacks: rows are compared by key and by the content that they were made from."""

from dataclasses import dataclass

import numpy as np

from shards_spec.content_id import content_id
from shards_spec.embeddings import EmbeddingFile, Vectors, empty_vectors, id_column
from shards_spec.files import DataError
from shards_spec.sample import Sample
from shards_spec.tar import TarIndex, open_tar, read_sample


class ShardIndex:
    """A final shard: keys, captions and content ids of all samples in memory; the images stay in the file.

    ``ids`` maps ``id_image``, ``id_text_0`` … to uint64 (n,), 0 where a sample has no such caption. Raises DataError
    naming the file when it is broken or missing. ``tar`` is the file where it was read already.
    """

    def __init__(self, path: str, tar: TarIndex | None = None) -> None:
        tar = tar or open_tar(path)
        self._buffer, self._index = tar.buffer, list(tar)
        self.path = path
        self.keys = [key for key, _ in self._index]
        self.captions = list[list[str]]()
        image_ids = list[int]()
        try:
            for row in range(len(self.keys)):
                sample = self.sample(row)
                self.captions.append(sample.captions)
                image_ids.append(content_id(sample.image))
        except DataError as error:
            raise DataError(f"{path}: {error}; pack again") from error
        self.ids = {"id_image": np.array(image_ids, np.uint64)}
        most_captions = max(map(len, self.captions), default=1)
        for number in range(most_captions):
            self.ids[f"id_text_{number}"] = self._caption_ids(number)

    def _caption_ids(self, number: int) -> np.ndarray:
        """Content ids (n,) of every sample's caption of that number, 0 where it has fewer."""
        ids = np.zeros(len(self.captions), np.uint64)
        for row, captions in enumerate(self.captions):
            if number < len(captions):
                ids[row] = content_id(captions[number].encode())
        return ids

    def sample(self, row: int) -> Sample:
        """The sample with copies of its members' bytes."""
        return read_sample(self._buffer, *self._index[row])

    def column_names(self, views: int, *, texts: bool, soft_labels: bool) -> list[str]:
        """Names of all columns that a cache of ``views`` views should have.

        Those of captions only with ``texts``; with ``soft_labels`` views have these in place of vectors.
        """
        kind = "soft" if soft_labels else "image"
        names = [f"{kind}_{view}" for view in range(views)]
        if texts:
            names += [f"text_{number}" for number in range(len(self.ids) - 1)]
        return names


@dataclass(frozen=True)
class ColumnUpdate:
    """One column to be written: which rows have to be embedded, and which vectors are copied.

    ``new_rows`` have to be embedded. ``reused_rows`` get the vectors of the rows ``source_rows`` of the file
    ``source``, which is None when there is nothing to copy from.
    """

    name: str
    new_rows: np.ndarray
    reused_rows: np.ndarray
    source_rows: np.ndarray
    source: EmbeddingFile | None

    @property
    def kind(self) -> str:
        """``image``, ``soft`` or ``text``."""
        return self.name.partition("_")[0]

    @property
    def number(self) -> int:
        """Of the view or caption."""
        return int(self.name.partition("_")[2])

    def merge(self, count: int, new: Vectors) -> Vectors:
        """The column of ``count`` rows: copied vectors bit by bit, ``new`` ones in ``new_rows``."""
        dim = new.values.shape[1] if len(new.values) or self.source is None else self.source.dim
        vectors = empty_vectors(count, dim, new.values.dtype)
        if self.source is not None and len(self.reused_rows):
            vectors.put(self.reused_rows, self.source.vectors(self.name).take(self.source_rows))
        if len(self.new_rows):
            vectors.put(self.new_rows, new)
        return vectors


def plan_column_update(name: str, shard: ShardIndex, file: EmbeddingFile | None) -> ColumnUpdate | None:
    """What it takes to bring a column up to date; None when ``file`` has it as it should be.

    A vector is reused when the file has a row of the same key, made from the same content.
    """
    ids = shard.ids[id_column(name)]
    stored_ids = file.ids(name) if file else None
    if file is None or stored_ids is None:
        nothing = np.empty(0, np.int64)
        return ColumnUpdate(name, np.flatnonzero(ids), nothing, nothing, None)
    if file.keys == shard.keys and np.array_equal(stored_ids, ids):
        return None
    row_of_key = {key: row for row, key in enumerate(file.keys)}
    source_rows = np.array([row_of_key.get(key, -1) for key in shard.keys], np.int64)
    is_reused = (source_rows >= 0) & (ids != 0)  # the shard or the file may have no rows
    is_reused[is_reused] = stored_ids[source_rows[is_reused]] == ids[is_reused]
    is_new = ~is_reused & (ids != 0)
    return ColumnUpdate(name, np.flatnonzero(is_new), np.flatnonzero(is_reused), source_rows[is_reused], file)
