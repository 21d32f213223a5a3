"""A teacher cache whose final shard lost samples, brought up to date without its teacher: every vector is copied."""

from pipeline.cache.incremental import ShardIndex, plan_column_update
from pipeline.cache.stage import free_path
from shards_spec.embeddings import Vectors, empty_vectors, id_column, write_vectors
from shards_spec.files import join
from shards_spec.layout import SHARDS, final_tar, tar_path, teacher_folder
from shards_spec.manifest import Done, file_hash, read_done
from shards_spec.soft_labels import format_of
from shards_spec.teacher_shard import TeacherShard


def cut_teacher_shard(root: str, name: str, shard: int, target: str) -> Done | None:
    """Write the rows of the samples that are left below ``target``; the done-record that they are to have.

    None, and nothing is written, when something has to be embedded. Raises DataError for a broken shard or cache.
    """
    folder = teacher_folder(name)
    done = read_done(join(root, folder), shard)
    if done is None:
        return None
    cached = TeacherShard(root, name, shard)
    if "imported" in cached.config:  # may lack rows, and has views beside them: `cache --from` writes it again
        return None
    index = ShardIndex(final_tar(root, shard))
    has_texts = cached.find("text_0") is not None
    soft = format_of(cached.path, cached.config) is not None
    columns = dict[str, Vectors]()
    current = set[str]()
    for column in index.column_names(cached.config["num_views"], texts=has_texts, soft_labels=soft):
        file = cached.find(column)
        update = plan_column_update(column, index, file)
        if file is None or (update is not None and len(update.new_rows)):
            return None
        if update is None:
            current.add(file.path)
        else:
            columns[column] = update.merge(len(index.keys), empty_vectors(0, file.dim, file.dtype))
    outputs = {path: digest for path, digest in done.outputs.items() if join(root, path) in current}
    tar = tar_path(SHARDS, shard)
    shard_hash = file_hash(root, SHARDS, shard, tar)
    if columns:
        path = free_path(folder, shard, outputs)
        ids = {id_column(column): index.ids[id_column(column)] for column in columns}
        meta = {**cached.files[-1].meta, "shard_sha256": shard_hash}
        outputs[path] = write_vectors(join(target, path), index.keys, columns, ids, meta)
    per_sample = {"soft labels": cached.config["num_views"], "image vectors": cached.config["num_views"]}
    counters = {what: len(index.keys) * per_sample[what] for what in done.counters if what in per_sample}
    if "text vectors" in done.counters:
        counters["text vectors"] = sum(map(len, index.captions)) if has_texts else 0
    return Done(
        stage=done.stage,
        shard=shard,
        config=done.config,
        counts={"success": len(index.keys)},
        inputs={tar: shard_hash},
        outputs=outputs,
        counters=counters,
    )
