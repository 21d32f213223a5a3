"""What a shard's teacher cache lacks: rows are told by key and by what they were made from."""

from dataclasses import dataclass

import numpy as np

from shards_spec.content_id import content_id
from shards_spec.embeddings import Dtype, EmbeddingFile, Vectors, empty_vectors, encode_vectors, id_column
from shards_spec.files import DataError, read_buffer
from shards_spec.sample import Sample
from shards_spec.tar import index_shard, read_sample


class OpenShard:
    """A final shard in place: keys, captions and identities of all samples in memory, images where they lie.

    ``ids``: ``id_image``, ``id_text_0`` … to uint64 (n,), 0 where a sample has no such caption. Raises DataError naming
    the file when it is broken or gone.
    """

    def __init__(self, path: str) -> None:
        try:
            with read_buffer(path) as self._buffer:
                self._index = list(index_shard(self._buffer, path))
        except FileNotFoundError as error:
            raise DataError(f"{path}: is not there; make the shard again") from error
        self.path, self.keys = path, [key for key, _ in self._index]
        self.captions, images = list[list[str]](), list[int]()
        try:
            for row in range(len(self.keys)):
                sample = self.sample(row)
                self.captions.append(sample.captions)
                images.append(content_id(sample.image))
        except DataError as error:
            raise DataError(f"{path}: {error}; pack again") from error
        self.ids = {"id_image": np.array(images, np.uint64)}
        for caption in range(max(map(len, self.captions), default=1)):
            self.ids[f"id_text_{caption}"] = np.array(
                [content_id(own[caption].encode()) if caption < len(own) else 0 for own in self.captions], np.uint64
            )

    def sample(self, row: int) -> Sample:
        """The sample with copies of its members' bytes."""
        return read_sample(self._buffer, *self._index[row])

    def columns(self, views: int, texts: bool) -> list[str]:
        """Names of all that a cache of ``views`` views should hold."""
        captions = len(self.ids) - 1 if texts else 0
        return [*(f"image_{view}" for view in range(views)), *(f"text_{caption}" for caption in range(captions))]


@dataclass(frozen=True)
class Column:
    """One column to be written: ``rows`` have to be embedded, ``kept`` come from rows ``there`` of ``old``."""

    name: str
    rows: np.ndarray
    kept: np.ndarray
    there: np.ndarray
    old: EmbeddingFile | None

    @property
    def kind(self) -> str:
        """``image`` or ``text``."""
        return self.name.partition("_")[0]

    @property
    def number(self) -> int:
        """Of the view or caption."""
        return int(self.name.partition("_")[2])

    def filled(self, count: int, features: np.ndarray, dtype: Dtype) -> Vectors:
        """The column of ``count`` rows: old vectors bit by bit, ``features`` (float32) in ``rows``."""
        dim = features.shape[1] if len(features) or self.old is None else self.old.dim
        vectors = empty_vectors(count, dim, dtype)
        if self.old is not None and len(self.kept):
            vectors.put(self.kept, self.old.vectors(self.name).take(self.there))
        if len(self.rows):
            vectors.put(self.rows, encode_vectors(features, dtype))
        return vectors


def stale_column(name: str, shard: OpenShard, file: EmbeddingFile | None) -> Column | None:
    """What it takes to bring a column up to date; None when ``file`` has it as it should be."""
    wanted, nothing = shard.ids[id_column(name)], np.empty(0, np.int64)
    known = file.ids(name) if file else None
    if file is None or known is None:
        return Column(name, np.flatnonzero(wanted), nothing, nothing, None)
    if file.keys == shard.keys and np.array_equal(known, wanted):
        return None
    place = {key: row for row, key in enumerate(file.keys)}
    there = np.array([place.get(key, -1) for key in shard.keys])
    same = (there >= 0) & (known[there] == wanted) & (wanted != 0)
    return Column(name, np.flatnonzero(~same & (wanted != 0)), np.flatnonzero(same), there[same], file)
