"""How a stage writes the files of one shard: the old done-record goes first, the runner writes the new one last."""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from shards_spec.files import join
from shards_spec.layout import parquet_path, tar_path
from shards_spec.manifest import forget
from shards_spec.parquet import write_table
from shards_spec.sample import Sample
from shards_spec.tar import write_shard


class ShardWriter:
    """Writes a shard's files into ``root/folder``, each atomically.

    Making one deletes the shard's done-record: a stale record would validate the wrong files if the process were
    killed between two of them. ``outputs`` maps paths below ROOT to sha256, as the new done-record needs them.
    """

    def __init__(self, root: str, folder: str, shard: int) -> None:
        self.outputs = dict[str, str]()
        self._root, self._folder = root, folder
        self._shard = shard
        forget(join(root, folder), shard)

    def write_tar(self, samples: Iterable[Sample]) -> None:
        """Write the shard's tar from samples in order."""
        path = tar_path(self._folder, self._shard)
        _, self.outputs[path] = write_shard(join(self._root, path), samples)

    def write_parquet(self, table: pa.Table, **options: Any) -> None:
        """Write the shard's Parquet file. ``options`` are those of `pyarrow.parquet.write_table`."""
        path = parquet_path(self._folder, self._shard)
        self.outputs[path] = write_table(join(self._root, path), table, **options)
