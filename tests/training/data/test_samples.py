"""The reader: samples, captions, views, the teacher's rows, and what it refuses."""

import logging
import os
from collections import Counter
from dataclasses import replace
from itertools import chain, product

import numpy as np
import pytest
import torch
from small_data import write_raw
from small_training import SPEC, teacher_meta, teacher_rows, tiny_clip, write_packed, write_teacher

from shards_spec.embeddings import read_embeddings, write_embeddings
from shards_spec.files import DataError, UserError
from shards_spec.images import decode_rgb
from shards_spec.models import LoadedModel, load_model
from shards_spec.tar import read_shard, write_shard
from shards_spec.views import apply_view, draw_view
from training.config import DataConfig, TeacherCacheConfig, ViewConfig
from training.data.batches import Skipped, load_batches
from training.data.order import batch_positions
from training.data.samples import draw_caption, open_samples
from training.data.shard_reader import ShardReader
from training.data.teacher_cache import TeacherCache


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return load_model(tiny_clip(tmp_path_factory.mktemp("student") / "model"), random_weights=True)


@pytest.fixture
def root(tmp_path):
    keys = write_packed(str(tmp_path), [6, 5, 4])
    write_teacher(str(tmp_path), keys)
    return str(tmp_path)


def config(root, **changes):
    return DataConfig(data=root, **{"batch_size": 4, "workers": 0, "streams": 1, "window": 2, **changes})


def by_key(root):
    shards = (read_shard(f"{root}/shards/{shard:05d}.tar") for shard in range(3))
    return {sample.key: sample for sample in chain.from_iterable(shards)}


def test_items_are_what_the_shard_holds(root, student):
    samples = open_samples(config(root), ViewConfig(scale=(0.5, 1.0)), student, seed=9)
    spec, source = ViewConfig(scale=(0.5, 1.0)).spec(9), by_key(root)
    for position in (0, 7, 20, 44):
        item = samples[position]
        sample, epoch = source[item["key"]], position // 15
        view = apply_view(decode_rgb(sample.image), spec, draw_view(spec, sample.key, epoch), 32)
        assert torch.equal(item["images"], torch.from_numpy(np.array(view)).permute(2, 0, 1))
        assert item["images"].shape == (3, 32, 32)
        assert item["images"].dtype == torch.uint8
        assert item["position"] == position
        captions = sample.captions
        assert len(captions) == 3
        caption = captions[draw_caption(9, sample.key, epoch, 3)]
        assert torch.equal(item["tokens"], student.tokenizer([caption])[0])
        assert item["epoch"] == epoch


def test_rows_of_a_piece_are_those_asked_for_one_by_one(tmp_path, student):
    """An error takes its own place in a piece and changes no other row: a broken image, and one without features."""
    keys = write_packed(str(tmp_path), [6, 5, 4], broken=("000000002",))
    write_teacher(str(tmp_path), keys)
    rewrite(str(tmp_path), lambda k, c, m: (k, {**c, "image_1": without_row(c["image_1"], 4)}, m))
    samples = open_samples(config(str(tmp_path)), TeacherCacheConfig(), student, seed=0)
    positions = [*range(30), (3, 48)]
    rows = samples.__getitems__(positions)
    for position, row in zip(positions, rows, strict=True):
        alone = samples[position]
        if not isinstance(row, dict):
            assert str(row) == str(alone)
            continue
        assert {name for name, value in row.items() if not same(value, alone[name])} == set()
        assert row["images"].shape == (3, *([48, 48] if position == (3, 48) else [32, 32]))
    assert sum(isinstance(row, Skipped) for row in rows) == 2
    assert sum(isinstance(row, DataError) for row in rows) == 1


def without_row(values, index):
    return np.where((np.arange(len(values)) == index)[:, None], np.nan, values)


def same(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_pixels_are_normalised():
    pixels = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 2, 2)
    loaded = LoadedModel(None, None, {}, 2, (0.5, 0.5, 0.5), (0.25, 0.5, 1.0))
    assert torch.allclose(loaded.normalise(pixels)[1, :, 0, 0], torch.tensor([2.0, -1.0, -0.3]))


@pytest.mark.parametrize("shards", [[15], [6, 5, 4]])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_workers_change_nothing(tmp_path, student, shards):
    write_teacher(str(tmp_path), write_packed(str(tmp_path), shards))
    samples = open_samples(config(str(tmp_path)), TeacherCacheConfig(), student, seed=0)
    alone, shared = (list(load_batches(samples, batch_positions(4, 6, 4), workers=workers)) for workers in (0, 3))
    for one, other in zip(alone, shared, strict=True):
        assert one["keys"] == other["keys"]
        for name in ("images", "tokens", "teacher_image", "teacher_text"):
            assert torch.equal(one[name], other[name])


def test_every_key_once_per_epoch_over_batches_and_ranks(root, student):
    samples = open_samples(config(root), ViewConfig(), student, seed=0)
    seen = Counter[str]()
    for rank in range(3):
        for batch in load_batches(samples, batch_positions(0, 5, 6, rank, 3)):
            seen.update(batch["keys"])
    assert seen == Counter(dict.fromkeys(by_key(root), 2))


def test_reader_keeps_few_shards_open(tmp_path, student):
    write_packed(str(tmp_path), [2] * 50, synthetic=0)
    samples = open_samples(config(str(tmp_path), streams=2, window=1), ViewConfig(), student, seed=0)
    before, most = len(os.listdir("/proc/self/fd")), 0
    for batch in load_batches(samples, batch_positions(0, 25, 4)):
        assert len(batch["keys"]) == 4
        most = max(most, len(samples.reader.open_shards.values))
        assert len(os.listdir("/proc/self/fd")) <= before + 5
    assert most == 4, "in each stream the open window and the one before"


def test_captions_are_drawn_evenly_and_again():
    counts = Counter(draw_caption(0, f"{key:09d}", epoch, 6) for key, epoch in product(range(2000), range(3)))
    expected, sigma = 1000, (6000 * 1 / 6 * 5 / 6) ** 0.5
    assert all(abs(counts[i] - expected) < 4 * sigma for i in range(6)), counts
    assert [draw_caption(1, "k", e, 6) for e in range(9)] == [draw_caption(1, "k", e, 6) for e in range(9)]
    assert [draw_caption(1, "k", e, 6) for e in range(9)] != [draw_caption(2, "k", e, 6) for e in range(9)]


def test_an_empty_caption_is_never_drawn(root, student):
    path = f"{root}/shards/00001.tar"
    samples = [replace(s, members={**s.members, "txt": b" "}) for s in read_shard(path)]
    write_shard(path, samples)
    tokenized = {tuple(student.tokenizer([text])[0].tolist()) for text in (" ", "")}
    items = open_samples(config(root), ViewConfig(scale=(0.5, 1.0)), student, seed=9)
    emptied, drawn = {s.key for s in samples}, [items[position] for position in range(90)]
    texts = {tuple(item["tokens"].tolist()) for item in drawn if item["key"] in emptied}
    assert len(texts) > len(samples)
    assert not texts & tokenized


def test_original_captions_only(root, student):
    samples = open_samples(config(root, captions="original"), TeacherCacheConfig(("planted",)), student, seed=0)
    source = by_key(root)
    for position in range(15):
        item = samples[position]
        assert torch.equal(item["tokens"], student.tokenizer([source[item["key"]].caption])[0])
        assert np.allclose(item["teacher_text"], teacher_rows([item["key"]], "text_0")[0], atol=1e-3)


def test_the_cache_gives_its_view_and_its_caption(root, student):
    samples = open_samples(config(root), TeacherCacheConfig(), student, seed=5)
    source = by_key(root)
    for position in (0, 16, 31, 46):
        item, epoch = samples[position], position // 15
        key, view = item["key"], epoch % 2
        caption = draw_caption(5, key, epoch, 3)
        assert np.allclose(item["teacher_image"], teacher_rows([key], f"image_{view}")[0], atol=1e-3)
        assert np.allclose(item["teacher_text"], teacher_rows([key], f"text_{caption}")[0], atol=1e-3)
        assert item["teacher_image"].dtype == torch.float32
        rendered = apply_view(decode_rgb(source[key].image), SPEC, draw_view(SPEC, key, view), 32)
        assert torch.equal(item["images"], torch.from_numpy(np.array(rendered)).permute(2, 0, 1))


def test_a_dataset_behind_a_url_gives_the_same(root, student, tmp_path):
    import fsspec

    url = f"memory://{root}"
    fsspec.filesystem("memory").put(root, root, recursive=True)
    here, there = (
        open_samples(config(place, scratch=f"{tmp_path}/near"), TeacherCacheConfig(), student, seed=0)
        for place in (root, url)
    )
    for position in range(0, 45, 4):
        one, other = here[position], there[position]
        assert one["key"] == other["key"]
        assert all(
            torch.equal(one[name], other[name]) for name in ("images", "tokens", "teacher_image", "teacher_text")
        )


def test_raw_shards_serve_too(tmp_path, student):
    write_raw(str(tmp_path), shards=2, per_shard=6)
    samples = open_samples(config(str(tmp_path), folder="raw"), ViewConfig(), student, seed=0)
    assert samples.order.total == 10
    batches = load_batches(samples, batch_positions(0, 5, 2))
    keys = list(chain.from_iterable(batch["keys"] for batch in batches))
    assert len(set(keys)) == 10
    with pytest.raises(UserError, match="belongs to packed shards"):
        open_samples(config(str(tmp_path), folder="raw"), TeacherCacheConfig(), student, seed=0)
    with pytest.raises(UserError, match="--folder raw, the default of coca: a selection belongs to packed shards"):
        open_samples(config(str(tmp_path), folder="raw", select="good"), ViewConfig(), student, seed=0)


def test_a_image_that_does_not_decode_is_skipped_and_named(tmp_path, student, caplog):
    write_packed(str(tmp_path), [6], broken=("000000002",))
    samples = open_samples(config(str(tmp_path)), ViewConfig(), student, seed=0)
    with caplog.at_level(logging.WARNING):
        batches = list(load_batches(samples, batch_positions(0, 2, 6), workers=1))
    assert [len(batch["keys"]) for batch in batches] == [5, 5]
    assert [len(batch["skipped"]) for batch in batches] == [1, 1]
    assert "shards/00000.tar: key 000000002: does not decode" in caplog.text
    write_packed(str(tmp_path), [6])
    whole = list(load_batches(samples, batch_positions(0, 2, 6)))
    assert [[k for k in b["keys"] if k != "000000002"] for b in whole] == [b["keys"] for b in batches]


def test_a_batch_of_nothing_but_broken_images_stops(tmp_path, student):
    write_packed(str(tmp_path), [1], broken=("000000000",))
    samples = open_samples(config(str(tmp_path)), ViewConfig(), student, seed=0)
    with pytest.raises(DataError, match=r"none of 2 samples of a batch can be used, first .*key 000000000"):
        list(load_batches(samples, batch_positions(0, 1, 2)))


def rewrite(root, change, shard=0):
    """Write a shard's cache file again with ``change(keys, columns, meta)`` applied."""
    path = f"{root}/teacher/planted/{shard:05d}.parquet"
    names = ["image_0", "image_1", "text_0", "text_1", "text_2"]
    keys, columns, _ = read_embeddings(path, names)
    meta = teacher_meta(root, shard, 2, 3)
    columns = {name: values.astype(np.float32) for name, values in columns.items()}
    keys, columns, meta = change(keys, columns, meta)
    write_embeddings(path, keys, columns, meta)


def read_all(root, student, workers=0, batches=8):
    samples = open_samples(config(root), TeacherCacheConfig(), student, seed=0)
    return list(load_batches(samples, batch_positions(0, batches, 4), workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shuffled_row_is_refused(root, student, workers):
    rewrite(root, lambda k, c, m: ([k[0], k[2], k[1], *k[3:]], c, m))
    with pytest.raises(DataError) as error:
        read_all(root, student, workers)
    assert str(error.value) == (
        f"{root}/teacher/planted/00000.parquet: row 1 is key 000000002, the shard has 000000001 there; "
        "delete it and run `clipmill cache` again with the --name and options it had"
    )


def test_a_row_too_few_is_refused(root, student):
    rewrite(root, lambda k, c, m: (k[:-1], {n: v[:-1] for n, v in c.items()}, m))
    with pytest.raises(DataError, match=r"5 rows, the shard has 6, first odd key 000000005"):
        read_all(root, student)


def test_another_shard_is_refused(root, student):
    samples = list(read_shard(f"{root}/shards/00001.tar"))
    _, digest = write_shard(f"{root}/shards/00001.tar", reversed(samples))
    record = f"{root}/shards/00001_stats.json"
    with open(record) as file:
        text = file.read()
    old = teacher_old_hash(root)
    with open(record, "w") as file:
        file.write(text.replace(old, digest))
    with pytest.raises(
        DataError, match=r"00001\.parquet: made from another .*shards/00001\.tar than the one there; run `clip"
    ):
        read_all(root, student)


def teacher_old_hash(root):
    from shards_spec.embeddings import read_meta

    return read_meta(f"{root}/teacher/planted/00001.parquet")["shard_sha256"]


def test_caches_of_two_shards_swapped_are_refused(tmp_path, student):
    write_teacher(str(tmp_path), write_packed(str(tmp_path), [5, 5]))
    one, other = (tmp_path / f"teacher/planted/{shard:05d}.parquet" for shard in range(2))
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)
    with pytest.raises(DataError, match=r"0000(0|1)\.parquet: row 0 is key 0000(1|0)0000, the shard has 0000(0|1)0000"):
        read_all(str(tmp_path), student)


def test_a_cache_of_other_captions_is_refused(root, student):
    """Packing again with another captioner or WordNet changes json members, hence the shard's hash."""
    write_packed(root, [6, 5, 4], synthetic=3)
    with pytest.raises(DataError, match=r"0000\d\.parquet: made from another .*shards/0000\d\.tar than the one there"):
        read_all(root, student)


def test_a_missing_column_is_refused(root, student):
    rewrite(root, lambda k, c, m: (k, {n: v for n, v in c.items() if n != "image_1"}, m))
    with pytest.raises(DataError, match=r"00000\.parquet: no column image_1"):
        read_all(root, student)


def test_a_missing_image_row_is_refused(root, student):
    def blank(keys, columns, meta):
        columns["image_0"][3] = np.nan
        return keys, columns, meta

    rewrite(root, blank)
    with pytest.raises(DataError, match=r"00000\.parquet: key 000000003 has no image_0"):
        read_all(root, student)


def test_a_missing_caption_row_is_refused_when_it_is_drawn(root, student):
    def blank(keys, columns, meta):
        columns["text_1"][3] = np.nan
        return keys, columns, meta

    rewrite(root, blank)
    with pytest.raises(DataError, match=r"00000\.parquet: key 000000003 has no text_1"):
        read_all(root, student, batches=60)


@pytest.mark.parametrize("field", ["weights_sha256", "logit_scale", "pretrained"])
def test_shards_of_two_teachers_are_refused(root, student, field):
    rewrite(root, lambda k, c, m: (k, c, m | {field: 7}), shard=2)
    with pytest.raises(DataError, match=rf"00002\.parquet: its {field} is 7, .*00000\.parquet has"):
        read_all(root, student)


@pytest.mark.parametrize(("field", "value"), [("pillow", "1.0"), ("rendering", 99)])
def test_views_of_another_renderer_are_refused(root, student, field, value):
    rewrite(root, lambda k, c, m: (k, c, m | {"views": m["views"] | {field: value}}))
    with pytest.raises(DataError, match=r"00000\.parquet: its views were rendered by Pillow .*run `clipmill cache`"):
        read_all(root, student)


def test_an_edited_view_spec_is_refused(root, student):
    rewrite(root, lambda k, c, m: (k, c, m | {"views": m["views"] | {"seed": 4}}))
    with pytest.raises(DataError, match="does not match its hash"):
        read_all(root, student)


def test_caches_that_are_not_there(root, student, tmp_path):
    with pytest.raises(UserError, match=r"--teacher 'other' is not there: teacher caches in .* are: planted"):
        open_samples(config(root), TeacherCacheConfig(("other",)), student, seed=0)
    os.remove(f"{root}/teacher/planted/00002.parquet")
    with pytest.raises(UserError, match=r"00002\.parquet is not there \(1 of 3 shards missing\)"):
        TeacherCache(root, "", 3)


def test_a_dataset_that_is_not_there(tmp_path, student):
    with pytest.raises(UserError, match="--data is needed"):
        open_samples(DataConfig(), ViewConfig(), student, seed=0)
    with pytest.raises(UserError, match="run `clipmill pack"):
        open_samples(config(str(tmp_path)), ViewConfig(), student, seed=0)


def test_a_tar_of_another_size_is_refused(root):
    with pytest.raises(DataError, match=r"00001\.tar: 5 samples, its records say 9"):
        ShardReader(root, "shards", [6, 9, 4]).sample(1, 0)
    os.remove(f"{root}/shards/00001.tar")
    with pytest.raises(DataError, match=r"00001\.tar is not there"):
        ShardReader(root, "shards", [6, 5, 4]).sample(1, 0)
