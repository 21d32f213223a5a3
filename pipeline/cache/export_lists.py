"""The convenient form of a teacher cache: ordinary lists of float32, for pandas and DuckDB."""

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core.runner import RunOptions, ShardResult, ShardTask, Stage, Summary, run_stage, upstream_shards
from shards_spec.files import UserError, join, names
from shards_spec.layout import STAGES, TEACHER, teacher_folder
from shards_spec.manifest import read_done
from shards_spec.shard_writer import ShardWriter
from shards_spec.soft_labels import format_of
from shards_spec.teacher_shard import TeacherShard
from shards_spec.views import RecordedSpec, draw_view, parse_view_spec


def export_lists(root: str, name: str, overwrite: bool) -> Summary:
    """Write ``teacher/NAME/lists/NNNNN.parquet``: key, ``image_0`` … ``text_0`` … as lists, ``view_0`` … packed.

    Of soft labels the fields of a view's record are columns: ``soft_0_classes``, ``soft_0_probabilities`` and
    ``soft_0_rest``, or ``soft_0_logits``.

    Raises UserError when there is no such cache, ShardsFailed.
    """
    caches = names(join(root, TEACHER))
    if name not in caches:
        raise UserError(f"no {TEACHER}/{name} in {root}, there are: {', '.join(caches) or 'none'}; say --name")
    folder = teacher_folder(name)
    shards = upstream_shards(root, folder, f"cache/{name}")
    stage = Stage(f"cache-lists/{name}", STAGES["cache-lists"].folder(name), {"teacher": name})

    def inputs(shard: int) -> dict[str, str]:
        done = read_done(join(root, folder), shard)
        return done.outputs if done else {}

    tasks = (ShardTask(shard, inputs(shard)) for shard in shards)
    work = partial(_export_shard, stage=stage, name=name)
    return run_stage(root, stage, tasks, work, RunOptions(total=len(shards), overwrite=overwrite))


def _export_shard(root: str, task: ShardTask, *, stage: Stage, name: str) -> ShardResult:
    cached = TeacherShard(root, name, task.shard)
    spec = parse_view_spec(cached.path, cached.config["views"])
    keys = cached.files[-1].keys
    table: dict[str, Any] = {"key": pa.array(keys, pa.string())}
    for view in range(cached.config["num_views"]):
        if isinstance(spec, RecordedSpec):
            recorded = cached.file(f"view_{view}").vectors(f"view_{view}")
            packed = [values.tobytes() for values in recorded.values]
            table[f"view_{view}"] = pa.array(packed, pa.binary(), mask=~recorded.present)
        else:
            table[f"view_{view}"] = pa.array([draw_view(spec, key, view).pack() for key in keys], pa.binary())
    soft = format_of(cached.path, cached.config)
    for column in _columns(cached):
        vectors = cached.file(column).vectors(column)
        if soft is None:
            table[column] = _lists(vectors.as_floats().astype(np.float32), vectors.present)
        else:
            table |= _record_columns(column, soft.decode(vectors.values))
    files = ShardWriter(root, stage.folder, task.shard)
    files.write_parquet(pa.table(table))
    return ShardResult({"success": len(keys)}, files.outputs)


def _columns(cached: TeacherShard) -> list[str]:
    """Names of the vectors' columns in all files: images by view, then texts by caption."""
    columns = {name for name in set[str]().union(*(file.names for file in cached.files)) if name[:5] != "view_"}

    def order(name: str) -> tuple[str, int]:
        kind, _, number = name.partition("_")
        return kind, int(number)

    return sorted(columns, key=order)


def _record_columns(column: str, records: np.ndarray) -> dict[str, Any]:
    """The fields of soft labels (n,): lists of uint16 and float32, and a float32 for the rest."""
    columns = dict[str, Any]()
    for name in records.dtype.names or ():
        values = records[name]
        values = values.astype(np.float32) if values.dtype == np.float16 else values
        columns[f"{column}_{name}"] = pa.array(list(values) if values.ndim > 1 else values)
    return columns


def _lists(values: np.ndarray, present: np.ndarray) -> Any:
    """list<float32> of (n, D), null where not ``present``."""
    ends = np.concatenate([[0], np.cumsum(present)]).astype(np.int32) * np.int32(values.shape[1])
    flat = pa.array(values[present].ravel(), pa.float32())
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat, mask=pa.array(~present))
