"""The files of a final shard: the tar, whose images are copied, and the table of captions and synsets."""

import contextlib
import gc
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from pipeline.core.runner import ShardResult, ShardTask
from pipeline.core.taken_down import TAKEN_DOWN_SAMPLES
from pipeline.labels.labeler import LabelRule, load_labeler
from pipeline.pack.caption_cleaning import strict_json
from pipeline.pack.selection import RESERVED_FIELD, SampleSelector, SelectedSample, SelectionConfig
from shards_spec.class_names import label_of
from shards_spec.files import json_bytes, remove
from shards_spec.layout import SHARDS, raw_tar, sizes_json
from shards_spec.sample import Sample
from shards_spec.shard_writer import ShardWriter
from shards_spec.tar import read_shard

NOT_FINITE = "json members with NaN or Infinity of the source, null instead"  # a counter on disk
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("synthetic", pa.list_(pa.string())),
        pa.field("synsets", pa.list_(pa.list_(pa.string()))),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
    ]
)


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Pause the search for reference cycles: none are made, and scanning all labels takes an eighth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def write_final_shard(
    root: str, task: ShardTask, *, selection: SelectionConfig, wordnet: str, rule: LabelRule, classes: int | None = None
) -> ShardResult:
    """Write the tar and the Parquet file of a final shard from the task's payload, a tuple of `ShardRange`s in order.

    Image bytes are copied untouched; every sample that is dropped is counted. ``classes`` is the number of classes of
    labelled images. Raises DataError when captions or dedup's list do not belong to the raw shards, and for an image
    without one of the classes.
    """
    synsets_of = load_labeler(wordnet, rule).synsets
    counts = Counter[str]()
    counters = Counter[str]()
    schema = SCHEMA if classes is None else SCHEMA.append(pa.field("cls", pa.int32(), nullable=False))
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}

    def final_samples() -> Iterator[Sample]:
        for shard_range in task.payload:
            selector = SampleSelector(root, shard_range, selection)
            samples = read_shard(raw_tar(root, shard_range.shard), shard_range.offset)
            number = None if shard_range.keys is None else len(shard_range.keys)
            for sample in islice(samples, number):
                selected = selector.select(sample)
                if isinstance(selected, str):
                    counts[selected] += 1
                    continue
                counts["success"] += 1
                synsets = [synsets_of(text) for text in (selected.original, *selected.synthetic)]
                for name, value in _row(sample.key, selected, synsets).items():
                    columns[name].append(value)
                members = final_members(sample, selected, synsets)
                if classes is not None:
                    label = label_of(raw_tar(root, shard_range.shard), sample, classes)
                    columns["cls"].append(label)
                    members["cls"] = str(label).encode()
                counters.update(selected.notes)
                yield Sample(sample.key, members)
            selector.finish()
            if shard_range.taken_down:
                counters[TAKEN_DOWN_SAMPLES] += shard_range.taken_down

    files = ShardWriter(root, SHARDS, task.shard)
    remove(sizes_json(root))  # it says that all shards belong together
    with _without_garbage_collection():
        files.write_tar(final_samples())
    files.write_parquet(pa.table(columns, schema))
    return ShardResult(dict(counts), files.outputs, counters=dict(sorted(counters.items())))


def _row(key: str, selected: SelectedSample, synsets: list[list[str]]) -> dict[str, Any]:
    """A sample's row of the table (`SCHEMA`)."""
    return {
        "key": key,
        "caption": selected.caption,
        "synthetic": selected.synthetic,
        "synsets": synsets,
        "width": _pixels(selected.meta.get("width")),
        "height": _pixels(selected.meta.get("height")),
    }


def _pixels(value: Any) -> int | None:
    """A side as the json member has it; None for what is no such number (in shards made by others)."""
    return value if isinstance(value, int) and 0 <= value < 1 << 31 else None


def final_members(sample: Sample, selected: SelectedSample, synsets: list[list[str]]) -> dict[str, bytes]:
    """The image as it is, the original caption cleaned, and json with the captions as plain strings and the synsets.

    Adds to the notes of ``selected`` what the json member could not keep.
    """
    texts = {f"syn_{i}": text for i, text in enumerate(selected.synthetic)}
    ours = {"caption": selected.caption, **texts, "synsets": synsets}
    theirs = {name: value for name, value in selected.meta.items() if not RESERVED_FIELD.fullmatch(name)}
    try:
        meta = json_bytes({**theirs, **ours}, indent=None, strict=True)
    except ValueError as error:
        if not isinstance(error, UnicodeEncodeError):
            selected.notes.append(NOT_FINITE)
        meta = json_bytes({**strict_json(theirs), **ours}, indent=None, strict=True)
    return {sample.image_extension: sample.image, "txt": selected.caption.encode(), "json": meta}
