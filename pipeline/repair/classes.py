"""``classnames.txt`` of labelled images, restored from the source or from what the rows say of their classes."""

from typing import Any

from pipeline.ingest.labelled_sources import source_classes
from pipeline.repair.recorded import Recorded
from shards_spec.class_names import CLASS_LIST, class_list_hash, read_class_names, write_class_names
from shards_spec.files import DataError, UserError, exists, join
from shards_spec.layout import RAW, class_names_txt, raw_parquet
from shards_spec.manifest import finished_shards
from shards_spec.parquet import read_table


def restore_class_names(recorded: Recorded, sources: tuple[str, ...], *, dry_run: bool) -> str | None:
    """What is wrong with the list and what was done, None when it is as the records say.

    A list counts when its hash is the recorded one.
    """
    path = class_names_txt(recorded.root)
    digest = (recorded.config("ingest") or {}).get(CLASS_LIST)
    if digest is None:
        return None
    problem = "is not there"
    if exists(path):
        try:
            if class_list_hash(read_class_names(path)) == digest:
                return None
            problem = "not the classes that the shards were labelled by"
        except (UserError, DataError) as error:
            problem = str(error).removeprefix(f"{path}").lstrip(": ").partition("; ")[0]
    for names in _candidates(recorded, sources):
        if class_list_hash(names) == digest:
            if not dry_run:
                write_class_names(path, names)
            return f"{problem}; written again"
    return f"{problem}; refused: no source and no rows tell all classes; put the list back"


def _candidates(recorded: Recorded, sources: tuple[str, ...]) -> list[list[str]]:
    """Lists of classes by the source, and by the captions and folders of the rows."""
    found = list[list[str]]()
    for source in sources:
        try:
            found.append(source_classes(source))
        except (UserError, DataError, OSError):
            continue
    by_column: dict[str, dict[int, str]] = {"class_folder": {}, "caption": {}}
    for shard in finished_shards(join(recorded.root, RAW)):
        try:
            rows: list[dict[str, Any]] = read_table(raw_parquet(recorded.root, shard)).to_pylist()
        except (UserError, DataError):
            continue
        for column, names in by_column.items():
            names |= {row["cls"]: row[column] for row in rows if row.get(column) and row.get("cls") is not None}
    for names in by_column.values():
        if names and sorted(names) == list(range(len(names))):
            in_order = [names[label] for label in sorted(names)]
            found += [in_order, [name.replace(" ", "_") for name in in_order]]
    return found
