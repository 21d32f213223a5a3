"""The cache stage: what is new is made and nothing else, rows do not depend on batches, the loss is the teacher's."""

import dataclasses
import json
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from small_data import timm_checkpoint, tiny_coca, tree, vouch, write_raw

from pipeline.cache import stage as cache_stage
from pipeline.cache.config import CacheConfig
from pipeline.cache.cut import cut_teacher_shard
from pipeline.cache.stage import cache
from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.core import runner as stage
from pipeline.core.runner import ShardsFailed
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.embeddings import EmbeddingFile, encode_vectors, id_column, write_vectors
from shards_spec.files import DataError, UserError, join, json_bytes, names, read_json
from shards_spec.images import decode_rgb
from shards_spec.manifest import read_done
from shards_spec.models import LoadedModel, load_model, load_teacher
from shards_spec.sample import Sample
from shards_spec.tar import read_shard, write_shard
from shards_spec.teacher_shard import TeacherShard
from shards_spec.views import ViewSpec, apply_view, draw_view, unpack_view
from training.data.teacher_cache import TeacherCache
from training.losses.distillation import affinity_loss

SHARDS = 2
JITTERED = ViewSpec(ops=2, op_set="timm-inc", op_prob=0.5, jitter=(0.4, 0.4, 0.2, 0.1))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_coca(tmp_path_factory.mktemp("models") / "coca")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> str:
    """raw/ and shards/, original captions only."""
    root = str(tmp_path_factory.mktemp("data") / "ds")
    write_raw(root, SHARDS)
    pack(PackConfig(root, captioner=("none",), workers=1))
    return root


@pytest.fixture
def root(packed, tmp_path) -> str:
    return shutil.copytree(packed, tmp_path / "ds").as_posix()


def run(root: str, model: str, **changes) -> stage.Summary:
    return cache(CacheConfig(root, model, **{"name": "tea", "views": 2, "spec": JITTERED, "device": "cpu", **changes}))


def made_now(summary: stage.Summary) -> tuple[int, int]:
    """Vectors of images and of texts that a run embedded."""
    measured = summary.measurements
    return int(measured.get("new_image_vectors", 0)), int(measured.get("new_text_vectors", 0))


def change(root: str, edit, shard: int = 0) -> None:
    """Write a final shard again with ``edit(samples)``, and the record that vouches for it."""
    path = f"shards/{shard:05d}.tar"
    samples = [edit(sample) for sample in read_shard(join(root, path))]
    write_shard(join(root, path), [sample for sample in samples if sample])
    vouch(root, "shards", shard, path)


def captioned(sample: Sample, *texts: str) -> Sample:
    meta = {**sample.meta, **{f"syn_{i}": text for i, text in enumerate(texts)}}
    return Sample(sample.key, {**sample.members, "json": json_bytes(meta)})


def columns(root: str, shard: int = 0, name: str = "tea") -> dict[str, np.ndarray]:
    cached = TeacherShard(root, name, shard)
    found = sorted(set().union(*(file.names for file in cached.files)))
    return {column: cached.file(column).vectors(column).as_floats() for column in found}


def assert_as_if_made_at_once(root: str, model: str, tmp_path: Path, **changes) -> None:
    """The cache holds, bit for bit, what one run on the dataset as it is now makes."""
    other = shutil.copytree(root, tmp_path / "other").as_posix()
    run(other, model, overwrite=True, **changes)
    for shard in range(SHARDS):
        one, two = columns(root, shard), columns(other, shard)
        for column in two:
            assert np.array_equal(one[column], two[column], equal_nan=True), column
    assert [p for p in check(CheckConfig(root)) if "teacher/" in p] == []
    shutil.rmtree(other)


def test_more_views_are_added_and_nothing_else_is_made(root, model, tmp_path):
    assert made_now(run(root, model)) == (20, 10)
    before = tree(root)
    assert made_now(run(root, model, views=5)) == (30, 0)
    after = tree(root)
    assert set(after) - set(before) == {f"teacher/tea/0000{i}-1.parquet" for i in range(SHARDS)}
    assert all(after[path] == before[path] for path in before if path.endswith(".parquet"))
    assert EmbeddingFile(join(root, "teacher/tea/00000-1.parquet")).names == ["image_2", "image_3", "image_4"]
    assert run(root, model, views=5).made == 0
    assert_as_if_made_at_once(root, model, tmp_path, views=5)
    with pytest.raises(UserError, match=r"--views: 5 before, 2 now"):
        run(root, model)
    assert read_json(join(root, "dataset.json"))["stages"]["cache/tea"]["facts"] == {
        "image vectors": 50,
        "text vectors": 10,
    }


def test_a_shard_without_samples_has_a_cache_without_rows_and_back(root, model, tmp_path):
    run(root, model)
    samples = list(read_shard(join(root, "shards/00000.tar")))
    change(root, lambda sample: None)
    done = cut_teacher_shard(root, "tea", 0, str(tmp_path / "cut"))
    assert done is not None
    assert done.counts == {"success": 0}
    assert made_now(run(root, model)) == (0, 0)
    write_shard(join(root, "shards/00000.tar"), samples)
    vouch(root, "shards", 0, "shards/00000.tar")
    assert made_now(run(root, model)) == (10, 5)


def test_captions_are_added_and_images_are_not_embedded_again(root, model, tmp_path):
    run(root, model)
    before = tree(root)
    change(root, lambda sample: captioned(sample, "a red ball", f"a box {sample.key}"))
    assert made_now(run(root, model)) == (0, 10)
    assert tree(root)["teacher/tea/00000.parquet"] == before["teacher/tea/00000.parquet"]
    assert EmbeddingFile(join(root, "teacher/tea/00000-1.parquet")).names == ["text_1", "text_2"]
    assert_as_if_made_at_once(root, model, tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_one_edited_caption_re_embeds_one_row(root, model, tmp_path, dtype):
    run(root, model, dtype=dtype)
    second = read_done(join(root, "shards"), 0) and list(read_shard(join(root, "shards/00000.tar")))[1].key
    change(root, lambda s: Sample(s.key, {**s.members, "txt": b"an edited caption"}) if s.key == second else s)
    (problem,) = [p for p in check(CheckConfig(root)) if "teacher/" in p]
    assert f"teacher/tea/00000.parquet: made from another shards/00000.tar: key {second} has another caption" in problem
    assert made_now(run(root, model, dtype=dtype)) == (0, 1)
    assert EmbeddingFile(join(root, "teacher/tea/00000-1.parquet")).names == ["text_0"]
    assert_as_if_made_at_once(root, model, tmp_path, dtype=dtype)


def test_another_image_re_embeds_its_views_and_removed_samples_nothing(root, model, tmp_path):
    run(root, model)
    keys = [sample.key for sample in read_shard(join(root, "shards/00000.tar"))]
    first = next(read_shard(join(root, "shards/00000.tar")))

    def edit(sample: Sample) -> Sample | None:
        if sample.key == keys[3]:
            return Sample(sample.key, {**sample.members, "jpg": first.image})
        return None if sample.key == keys[1] else sample

    change(root, edit)
    assert made_now(run(root, model)) == (2, 0)
    assert [name for name in names(join(root, "teacher/tea")) if name.startswith("00000")] == [
        "00000.parquet",
        "00000_stats.json",
    ]
    assert_as_if_made_at_once(root, model, tmp_path)


def test_captions_that_went_leave_nulls(root, model, tmp_path):
    change(root, lambda sample: captioned(sample, "one", "two"))
    run(root, model)

    def without_second(sample: Sample) -> Sample:
        if sample.key.endswith("0"):
            return captioned(sample, "one", "two")
        meta = {name: value for name, value in sample.meta.items() if name != "syn_1"}
        return Sample(sample.key, {**sample.members, "json": json_bytes(meta)})

    change(root, without_second)
    assert made_now(run(root, model)) == (0, 0)
    table = pq.read_table(join(root, "teacher/tea/00000-1.parquet"))
    assert table.column("text_2").is_null().to_pylist() == [False, True, True, True, True]
    assert_as_if_made_at_once(root, model, tmp_path)


def test_other_labels_embed_nothing(root, model):
    run(root, model)
    change(root, lambda s: Sample(s.key, {**s.members, "json": json_bytes({**s.meta, "synsets": [["n00000001"]]})}))
    before = tree(root)
    cached = TeacherCache(root, "tea", SHARDS)
    keys = TeacherShard(root, "tea", 0).files[0].keys
    with pytest.raises(DataError, match=r"00000\.parquet: made from another .*shards/00000\.tar than the one there"):
        cached.features(0, 0, keys)
    summary = run(root, model)
    assert (summary.made, made_now(summary)) == (1, (0, 0))
    after = tree(root)
    assert {p for p in after if after[p] != before.get(p)} == {"teacher/tea/00000_stats.json"}
    assert len(TeacherCache(root, "tea", SHARDS).features(0, 0, keys).keys) == 5


def test_a_kill_while_views_are_added_costs_one_shard(root, model, monkeypatch, tmp_path):
    run(root, model)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stage, "_publish", die)
        with pytest.raises(KeyboardInterrupt):
            run(root, model, views=4)
    assert "00000-1.parquet" in names(join(root, "teacher/tea"))
    assert check(CheckConfig(root)) == [], "what was there before still proves right"
    assert made_now(run(root, model, views=4)) == (20, 0)
    assert_as_if_made_at_once(root, model, tmp_path, views=4)


def test_files_of_a_killed_overwrite_go(root, model, tmp_path):
    run(root, model)
    run(root, model, views=3)
    Path(root, "teacher/tea/00000_stats.json").unlink()
    run(root, model, views=3)
    assert "00000-1.parquet" not in names(join(root, "teacher/tea"))
    assert_as_if_made_at_once(root, model, tmp_path, views=3)


def test_shards_of_any_batch_size_and_many_devices_are_the_same(root, model):
    run(root, model, batch_size=1)
    one = {path: digest for path, digest in tree(root).items() if "teacher/" in path}
    shutil.rmtree(join(root, "teacher"))
    run(root, model, batch_size=64, processes=1)
    assert {path: digest for path, digest in tree(root).items() if "teacher/" in path} == one


@pytest.fixture
def two_at_once(monkeypatch):
    """As a GPU's shards are made: one is embedded while another is read or written."""
    options = cache_stage.RunOptions
    monkeypatch.setattr(cache_stage, "RunOptions", lambda **given: options(**{**given, "threads": 2}))


def test_shards_that_are_made_at_once_are_the_same(root, model, two_at_once, monkeypatch):
    made = run(root, model)
    assert (made.made, made_now(made)) == (SHARDS, (20, 10))
    assert 0 < made.measurements["waited_s"] < made.measurements["embedding_s"]
    at_once = {path: digest for path, digest in tree(root).items() if "teacher/" in path}
    shutil.rmtree(join(root, "teacher"))
    monkeypatch.undo()
    run(root, model)
    assert {path: digest for path, digest in tree(root).items() if "teacher/" in path} == at_once


def test_a_broken_shard_beside_another_is_named(root, model, two_at_once):
    change(root, lambda s: Sample(s.key, {**s.members, "jpg": b"<html>"}) if s.key.endswith("2") else s)
    with pytest.raises(ShardsFailed, match=r"00000: .*shards/00000\.tar: key 000000002 does not decode"):
        run(root, model)
    assert "00001.parquet" in names(join(root, "teacher/tea"))


@pytest.mark.slow  # two processes that load torch
def test_several_devices_share_the_shards(root, model):
    assert run(root, model, device="cpu,cpu", threads=1).made == SHARDS
    assert [p for p in check(CheckConfig(root)) if "teacher/" in p] == []


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    return timm_checkpoint(tmp_path_factory.mktemp("timm"))


def test_a_timm_teacher_is_image_only(root, backbone, model):
    run(root, "timm:test_vit", pretrained=backbone, name="vit")
    run(root, model)
    assert [p for p in check(CheckConfig(root)) if "teacher/" in p] == []
    found = columns(root, name="vit")
    assert sorted(found) == ["image_0", "image_1"]
    meta = EmbeddingFile(join(root, "teacher/vit/00000.parquet")).meta
    assert (meta["library"], meta["logit_scale"], meta["tokenizer_sha256"]) == ("timm", None, None)
    assert meta["views_sha256"] == EmbeddingFile(join(root, "teacher/tea/00000.parquet")).meta["views_sha256"]
    loaded = load_teacher("timm:test_vit", backbone)
    sample = next(read_shard(join(root, "shards/00000.tar")))
    view = apply_view(decode_rgb(sample.image), JITTERED, draw_view(JITTERED, sample.key, 1), loaded.image_size)
    mean, std = (torch.tensor(own).view(3, 1, 1) for own in (loaded.mean, loaded.std))
    with torch.no_grad():
        expected = loaded.model((torch.from_numpy(np.array(view)).permute(2, 0, 1) / 255 - mean)[None] / std)[0]
    assert np.abs(found["image_1"][0] - torch.nn.functional.normalize(expected, dim=0).numpy()).max() < 1e-3
    with pytest.raises(UserError, match="'vit' is an image-only teacher's cache"):
        TeacherCache(root, "vit", SHARDS)
    with pytest.raises(UserError, match=r"--teacher is needed: teacher caches in .* are: tea, vit"):
        TeacherCache(root, "", SHARDS)


def test_checkpoints_that_do_not_fit_are_refused(root, tmp_path, backbone):
    other = torch.load(backbone)
    del other["norm.weight"]
    torch.save(other | {"extra": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"1 weight missing \['norm.weight'\], 1 left over \['extra'\]"):
        run(root, "timm:test_vit", pretrained=str(tmp_path / "other.pt"))
    with pytest.raises(UserError, match="no model 'timm:no_such_model' in timm"):
        run(root, "timm:no_such_model", pretrained=backbone)
    with pytest.raises(UserError, match=r"no\.pt is not there"):
        run(root, "timm:test_vit", pretrained=str(tmp_path / "no.pt"))


def test_views_of_another_pillow_are_refused_before_any_work(root, model, monkeypatch):
    run(root, model)
    import PIL

    monkeypatch.setattr(PIL, "__version__", "99.0")
    made_with = read_done(join(root, "teacher/tea"), 0).config["views"]["pillow"]
    with pytest.raises(DataError, match=rf"rendered by Pillow {made_with} .*here is Pillow 99\.0.*install pillow=="):
        run(root, model, views=3)


@pytest.mark.parametrize("changes", [{"spec": ViewSpec(ops=1)}, {"dtype": "int8"}, {"model": "other"}])
def test_another_teacher_spec_or_dtype_is_refused_by_name(root, model, tmp_path, changes):
    run(root, model)
    if changes.get("model"):
        changes = {"model": tiny_coca(tmp_path / "coca", seed=9)}
    named = {"spec": "--ops", "dtype": "--dtype", "model": "weights_sha256"}[next(iter(changes))]
    with pytest.raises(UserError, match=rf"was made with another config .*{named}: .* before, .* now"):
        run(root, changes.pop("model", model), **changes)


def test_shuffled_rows_and_swapped_shards_are_refused(root, model):
    run(root, model)
    keys = [TeacherShard(root, "tea", shard).files[0].keys for shard in range(SHARDS)]
    path = join(root, "teacher/tea/00000.parquet")
    file = EmbeddingFile(path)
    order = np.array([0, 2, 1, 3, 4])
    moved = {name: file.vectors(name).take(order) for name in file.names}
    ids = {name: file._small[name][order] for name in ("id_image", "id_text_0")}
    shutil.copy(path, f"{path}.kept")
    write_vectors(path, [file.keys[row] for row in order], moved, ids, file.meta)
    with pytest.raises(DataError, match=rf"00000\.parquet: row 1 is key {keys[0][2]}, the shard has {keys[0][1]}"):
        TeacherCache(root, "tea", SHARDS).features(0, 0, keys[0])
    shutil.move(f"{path}.kept", path)
    for one, other in (("00000", "x"), ("00001", "00000"), ("x", "00001")):
        for end in (".parquet", "_stats.json"):
            shutil.move(join(root, "teacher/tea", one + end), join(root, "teacher/tea", other + end))
    with pytest.raises(DataError, match=r"00000\.parquet: made from another .*shards/00000\.tar"):
        TeacherCache(root, "tea", SHARDS).features(0, 0, keys[0])
    assert {p[len(root) + 1 :].split(":")[0] for p in check(CheckConfig(root)) if "teacher/" in p} == {
        "teacher/tea/00000_stats.json",
        "teacher/tea/00001_stats.json",
    }


def test_caches_of_an_earlier_layout_are_refused(root, model):
    run(root, model)
    path = join(root, "teacher/tea/00000.parquet")
    table = pq.read_table(path)
    meta = json.loads(table.schema.metadata[b"clipmill"])
    del meta["layout"]
    pq.write_table(table.replace_schema_metadata({"clipmill": json.dumps(meta)}), path)
    with pytest.raises(DataError, match=r"00000\.parquet: its layout is 1, this clipmill reads 2; .*--overwrite"):
        TeacherCache(root, "tea", SHARDS)


def test_export_lists_is_read_by_pandas(root, model):
    change(root, lambda s: captioned(s, "one") if s.key.endswith("0") else s)
    run(root, model, dtype="int8")
    summary = run(root, model, export_lists=True)
    assert summary.counts == {"success": 10}
    assert run(root, model, export_lists=True).made == 0
    frame = pd.read_parquet(join(root, "teacher/tea/lists/00000.parquet"))
    assert list(frame.columns) == ["key", "view_0", "view_1", "image_0", "image_1", "text_0", "text_1"]
    assert np.array_equal(np.stack(frame["image_1"]), columns(root)["image_1"])
    assert frame["text_1"].isna().tolist() == [False, True, True, True, True]
    assert unpack_view(frame["view_1"][2]) == draw_view(JITTERED, frame["key"][2], 1)
    problems = check(CheckConfig(root))
    assert [p for p in problems if "teacher/" in p] == []
    assert [p for p in problems if "unknown stage" in p] == []
    with pytest.raises(UserError, match=r"no teacher/nope in .*, there are: tea; say --name"):
        run(root, model, name="nope", export_lists=True)


def test_a_image_that_does_not_decode_names_file_and_key(root, model):
    change(root, lambda s: Sample(s.key, {**s.members, "jpg": b"<html>"}) if s.key.endswith("2") else s)
    for processes in (0, 1):
        with pytest.raises(ShardsFailed, match=r"00000: .*shards/00000\.tar: key 000000002 does not decode"):
            run(root, model, processes=processes)


def test_the_log_says_how_long_the_device_waited(root, model):
    run(root, model)
    line = json.loads(Path(root, "logs", "cache-tea.jsonl").read_text().splitlines()[-1])
    assert 0 <= line["waited_s"] <= line["embedding_s"]
    assert (line["new_image_vectors"], line["new_text_vectors"]) == (20, 10)


def test_bad_options_are_named():
    for changes, named in (({"views": 0}, "--views 0"), ({"processes": -1}, "--processes -1")):
        with pytest.raises(UserError, match=named):
            CacheConfig("x", **changes)


def features_of(root: str, loaded: LoadedModel, view: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The live teacher's features of one view and of the original captions, all samples in one batch."""
    samples = list(chain.from_iterable(read_shard(join(root, f"shards/{shard:05d}.tar")) for shard in range(SHARDS)))
    mean, std = (torch.tensor(own).view(3, 1, 1) for own in (loaded.mean, loaded.std))
    pixels = [
        np.array(apply_view(decode_rgb(s.image), JITTERED, draw_view(JITTERED, s.key, view), loaded.image_size))
        for s in samples
    ]
    images = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        return (
            loaded.model.encode_image(images, normalize=True),
            loaded.model.encode_text(loaded.tokenizer([s.caption for s in samples]), normalize=True),
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3), ("int8", 2e-2)])
def test_the_loss_from_the_cache_is_the_live_teachers(root, model, dtype, tolerance):
    """Value and gradient of the affinity loss at the teacher's own scale, and at 100."""
    run(root, model, dtype=dtype)
    teacher, loaded = TeacherCache(root, "tea", SHARDS), load_model(model)
    rows = [
        teacher.features(shard, 1, [s.key for s in read_shard(join(root, f"shards/{shard:05d}.tar"))])
        for shard in range(SHARDS)
    ]

    def cached(name: str) -> torch.Tensor:
        vectors = list[np.ndarray]()
        for own in rows:
            vectors += [own.row(name, row) for row in range(len(own.keys))]
        return torch.from_numpy(np.stack(vectors))

    image, text = cached("image_1"), cached("text_0")
    live = features_of(root, loaded, 1)
    rng = torch.Generator().manual_seed(0)
    for scale in (teacher.logit_scale, 100.0):
        results = []
        for image_features, text_features in (live, (image, text)):
            student = [torch.nn.functional.normalize(torch.randn(10, 16, generator=rng), dim=-1) for _ in range(2)]
            rng.manual_seed(0)
            student[0].requires_grad_()
            loss = affinity_loss(*student, image_features, text_features, student_scale=50.0, teacher_scale=scale)
            loss.backward()
            results.append((loss.detach(), student[0].grad))
        assert abs(results[0][0] - results[1][0]) <= tolerance * max(1, abs(results[0][0]))
        assert (results[0][1] - results[1][1]).abs().max() <= 10 * tolerance


def test_bytes_per_sample_and_per_training_sample(tmp_path):
    """ViT-L/14's 768 numbers, 10 views and 6 captions; a step needs one view and one caption."""
    rng = np.random.default_rng(0)
    count = 1000
    root = str(tmp_path)
    keys = [f"{row:09d}" for row in range(count)]
    _, digest = write_shard(join(root, "shards/00000.tar"), [Sample(key, {"txt": b"a"}) for key in keys])
    names = [*(f"image_{i}" for i in range(10)), *(f"text_{i}" for i in range(6))]
    vectors = {name: encode_vectors(rng.normal(size=(count, 768)), "float16") for name in names}
    ids = {id_column(name): np.arange(1, count + 1, dtype=np.uint64) for name in names}
    meta = dict.fromkeys(("model", "pretrained", "weights_sha256", "logit_scale"))
    meta |= {"views": JITTERED.as_json(), "views_sha256": JITTERED.sha256, "num_views": 10}
    path = "teacher/tea/00000.parquet"
    write_vectors(join(root, path), keys, vectors, ids, meta)
    tar = {"shards/00000.tar": digest}
    stage.Done("pack", 0, {}, {"success": count}, {}, tar).write(join(root, "shards"))
    stage.Done("cache/tea", 0, meta, {"success": count}, tar, {path: ""}).write(join(root, "teacher/tea"))
    cache = TeacherCache(root, "tea", 1)
    before = io_read()
    rows = cache.features(0, 3, keys)
    for row in range(count):
        for name in (f"text_{row % 6}", "image_3"):
            assert np.array_equal(rows.row(name, row), vectors[name].values[row])
    stored, read = Path(root, path).stat().st_size / count, (io_read() - before) / count
    print(f"{stored:.0f} bytes stored, {read:.0f} read per sample, 3072 needed")
    assert stored < 16 * 768 * 2 + 120
    assert read <= 1.2 * 3072


def io_read() -> int:
    """Bytes this process has asked the system to read."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_a_column_that_is_asked_for_twice_counts_from_its_last_file(tmp_path):
    first, second = (encode_vectors(np.full((2, 4), value, np.float32), "float32") for value in (1.0, 2.0))
    for number, column in ((0, first), (1, second)):
        path = str(tmp_path / f"teacher/t/00000{'-1' if number else ''}.parquet")
        write_vectors(path, ["a", "b"], {"text_0": column}, {"id_text_0": np.array([1, 2], np.uint64)}, {})
    outputs = {f"teacher/t/00000{end}.parquet": "" for end in ("", "-1")}
    stage.Done("cache/t", 0, {}, {"success": 2}, {}, outputs).write(str(tmp_path / "teacher/t"))
    assert TeacherShard(str(tmp_path), "t", 0).file("text_0").vectors("text_0").values[0, 0] == 2
    with pytest.raises(DataError, match=r"00000\.parquet: no column image_0, it has \['text_0'\]"):
        TeacherShard(str(tmp_path), "t", 0).file("image_0")


def test_the_configs_of_both_floors_draw_alike():
    from training.config import ViewConfig

    ours = {field.name for field in dataclasses.fields(ViewSpec)} - {"seed", "rendering"}
    assert ours == {field.name for field in dataclasses.fields(ViewConfig)}
    drawn = ViewConfig(**{name: getattr(JITTERED, name) for name in ours}).spec(4)
    assert drawn == dataclasses.replace(JITTERED, seed=4)
