"""The files that `check` looks at: each is read once, whatever is validated by it."""

from typing import IO, Any, cast

import pyarrow as pa

from pipeline.cache.incremental import ShardIndex
from shards_spec.files import DataError, is_url, join, read_buffer, read_bytes, sha256_bytes, sha256_file
from shards_spec.layout import remake_advice, stats_path
from shards_spec.library_errors import REMAKE, json_errors, parse_json
from shards_spec.manifest import Done, done_of
from shards_spec.parquet import open_parquet
from shards_spec.tar import TarIndex, index_tar
from shards_spec.teacher_shard import TeacherShard


class DatasetFiles:
    """Files of ``root`` by their paths, and what was derived from them: hashes, the places of a tar's members, records.

    A local file is hashed piece by piece, which brings it into the system's page cache, and then mapped from there. An
    object of a store is fetched once and held in memory. `forget` drops what is not needed any more.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._data = dict[str, memoryview]()
        self._digests = dict[str, str]()
        self._stats = dict[str, tuple[bytes, Any]]()
        self._tars = dict[str, TarIndex]()
        self._indices = dict[str, ShardIndex]()

    def data(self, path: str) -> memoryview:
        """The bytes of a file. Raises OSError."""
        if path not in self._data:
            with read_buffer(path) as self._data[path]:
                pass  # the bytes stay as long as a view of them
        return self._data[path]

    def sha256(self, path: str) -> str:
        """Hexadecimal sha256 of a file. Raises OSError."""
        if path not in self._digests:
            self._digests[path] = sha256_bytes(self.data(path)) if is_url(path) else sha256_file(path)
        return self._digests[path]

    def open(self, path: str) -> IO[bytes]:
        """A reader of a file's bytes. Raises OSError."""
        return cast(IO[bytes], pa.BufferReader(pa.py_buffer(self.data(path))))

    def rows(self, path: str, columns: list[str], optional: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """These columns of a Parquet file, and the ``optional`` ones that are there, row by row. Raises DataError."""
        with open_parquet(path, opener=self.open) as file:
            present = file.schema_arrow.names
            chosen = [name for name in (*columns, *optional) if name in present]
            # processes are the way to more cores; threads cost a small table more than they give
            rows: list[dict[str, Any]] = file.read(chosen, use_threads=False).to_pylist()
        missing = [name for name in columns if name not in present]
        if rows and missing:  # a file without rows may lack columns
            raise DataError(f"{path}: no column {missing[0]}; {remake_advice(path)}")
        return rows

    def tar(self, path: str) -> TarIndex:
        """The samples of a tar, as far as it is whole. Raises DataError when it is not there."""
        if path not in self._tars:
            try:
                self._tars[path] = index_tar(self.data(path), path)
            except FileNotFoundError as error:
                raise DataError(f"{path}: is not there; {remake_advice(path)}") from error
        return self._tars[path]

    def shard_index(self, path: str) -> ShardIndex:
        """Keys, captions and content ids of a final shard. Raises DataError."""
        if path not in self._indices:
            self._indices[path] = ShardIndex(path, self.tar(path))
        return self._indices[path]

    def teacher_shard(self, name: str, shard: int) -> TeacherShard:
        """What a teacher cache holds of a shard. Raises DataError."""
        return TeacherShard(self.root, name, shard, self.data)

    def stats(self, folder: str, shard: int) -> tuple[bytes, Any]:
        """The stats of a shard of a folder below ROOT: their bytes, and their JSON. Raises DataError, OSError."""
        path = stats_path(join(self.root, folder), shard)
        if path not in self._stats:
            with json_errors(path):
                data = read_bytes(path)
                self._stats[path] = data, parse_json(path, data)
        return self._stats[path]

    def done(self, folder: str, shard: int) -> Done | None:
        """As `manifest.read_done`, of a folder below ROOT. Raises DataError for the record of another shard, too."""
        try:
            _, stats = self.stats(folder, shard)
        except FileNotFoundError:
            return None
        path = stats_path(join(self.root, folder), shard)
        done = done_of(path, stats)
        if done is not None and done.shard != shard:
            raise DataError(f"{path}: says {done.stage} shard {done.shard}; {remake_advice(path, REMAKE)}")
        return done

    def forget(self, folder: str) -> None:
        """Drop the contents of the files of a folder below ROOT; hashes and records stay."""
        start = f"{join(self.root, folder)}/"
        for known in (self._data, self._tars, self._indices):
            for path in [path for path in known if path.startswith(start)]:
                del known[path]
