"""A selection in the order: which samples an epoch has, how often, and with which captions."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from small_training import teacher_rows, tiny_clip, write_packed, write_teacher

from shards_spec.files import DataError, UserError
from shards_spec.layout import select_folder, select_parquet
from shards_spec.manifest import Done, read_done
from shards_spec.models import load_model
from shards_spec.selection import COPIES, ShardSelection, write_selection
from training.config import DataConfig, TeacherCacheConfig, ViewConfig
from training.data.batches import load_batches
from training.data.order import batch_positions
from training.data.samples import draw_caption, open_samples

COPIES_OF = [[1, 0, 3, 0, 1, 0], [0, 0, 0, 0, 0], [2, 1, 0, 1]]  # per shard; one shard is not used


def write_copies(root: str, keys: list[list[str]], captions: dict[str, list[int]]) -> None:
    """ROOT/select/some as `select` leaves it."""
    for shard, (own, copies) in enumerate(zip(keys, COPIES_OF, strict=True)):
        reasons = [None if count else "not wanted" for count in copies]
        shown = [captions.get(key) for key in own]
        outputs = write_selection(root, "some", shard, ShardSelection(own, np.array(copies, np.uint8), reasons, shown))
        tar = f"shards/{shard:05d}.tar"
        inputs = {tar: read_done(f"{root}/shards", shard).outputs[tar]}
        counts = {"success": sum(map(bool, copies)), "not wanted": copies.count(0)}
        done = Done("select/some", shard, {}, counts, inputs, outputs, counters={COPIES: sum(copies)})
        done.write(f"{root}/{select_folder('some')}")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return load_model(tiny_clip(tmp_path_factory.mktemp("student") / "model"), random_weights=True)


@pytest.fixture
def keys(tmp_path):
    keys = write_packed(str(tmp_path), [6, 5, 4])
    write_teacher(str(tmp_path), keys)
    write_copies(str(tmp_path), keys, {keys[0][2]: [1, 2], keys[2][0]: [0]})
    return keys


def config(root, **changes):
    return DataConfig(data=str(root), **{"batch_size": 4, "workers": 0, "streams": 2, "select": "some", **changes})


def test_an_epoch_has_each_selected_sample_as_often_as_it_counts(keys, student, tmp_path):
    samples = open_samples(config(tmp_path), ViewConfig(), student, seed=5)
    assert samples.order.total == 9
    expected = Counter(
        {
            key: count
            for own, copies in zip(keys, COPIES_OF, strict=True)
            for key, count in zip(own, copies, strict=True)
        }
    )
    for epoch in range(2):
        assert Counter(samples[epoch * 9 + place]["key"] for place in range(9)) == +expected


def test_copies_take_turns_through_views_and_captions_that_are_allowed(keys, student, tmp_path):
    samples = open_samples(config(tmp_path), TeacherCacheConfig("planted"), student, seed=5)
    assert samples.cache.num_views == 2
    turns = []
    for position in range(18):
        item = samples[position]
        if item["key"] != keys[0][2]:
            continue
        found = [
            (view, text)
            for view in range(2)
            for text in range(3)
            if np.allclose(item["teacher_image"], teacher_rows([item["key"]], f"image_{view}")[0], atol=1e-2)
            and np.allclose(item["teacher_text"], teacher_rows([item["key"]], f"text_{text}")[0], atol=1e-2)
        ]
        turns += found
    expected = [(turn % 2, 1 + draw_caption(5, keys[0][2], turn, 2)) for turn in range(6)]
    assert sorted(turns) == sorted(expected)


def test_one_caption_alone(keys, student, tmp_path):
    samples = open_samples(config(tmp_path), TeacherCacheConfig("planted"), student, seed=1)
    items = [samples[position] for position in range(27)]
    texts = [item["teacher_text"] for item in items if item["key"] == keys[2][0]]
    assert len(texts) == 6
    for text in texts:
        assert np.allclose(text, teacher_rows([keys[2][0]], "text_0")[0], atol=1e-2)


def test_what_is_refused(keys, student, tmp_path):
    with pytest.raises(UserError, match=r"no such selection .* there are: some"):
        open_samples(config(tmp_path, select="other"), ViewConfig(), student, seed=0)
    with pytest.raises(UserError, match="use --folder shards"):
        open_samples(replace(config(tmp_path), folder="raw"), ViewConfig(), student, seed=0)
    only = config(tmp_path, shards=2)
    assert open_samples(only, ViewConfig(), student, seed=0).order.total == 5
    done = read_done(str(tmp_path / "select/some"), 0)
    replace(done, inputs={"shards/00000.tar": "0" * 64}).write(str(tmp_path / "select/some"))
    with pytest.raises(DataError, match="made from another"):
        open_samples(config(tmp_path), ViewConfig(), student, seed=0)


def test_another_samples_selection_is_seen(keys, student, tmp_path):
    wrong = [list(reversed(keys[0])), keys[1], keys[2]]
    write_copies(str(tmp_path), wrong, {})
    samples = open_samples(config(tmp_path), ViewConfig(), student, seed=0)
    answers = [samples[position] for position in range(9)]
    errors = [answer for answer in answers if isinstance(answer, DataError)]
    assert len(errors) == 5
    assert select_parquet(str(tmp_path), "some", 0) in str(errors[0])


def read(root, student, start, number, world_size=1):
    """The samples of some batches, by position, as so many processes read them."""
    found = {}
    for rank in range(world_size):
        samples = open_samples(config(root), TeacherCacheConfig("planted"), student, seed=3)
        for batch in load_batches(samples, batch_positions(start, number, 4, rank, world_size), workers=0):
            for row, position in enumerate(batch["positions"].tolist()):
                tensors = [batch[name][row] for name in ("images", "tokens", "teacher_image", "teacher_text")]
                found[position] = (batch["keys"][row], *(tensor.numpy().tobytes() for tensor in tensors))
    return found


def test_going_on_with_another_world_size_is_the_same_bit_for_bit(keys, student, tmp_path):
    whole = read(tmp_path, student, 0, 8)
    assert sorted(whole) == list(range(32))
    assert (
        read(tmp_path, student, 0, 3) | read(tmp_path, student, 12, 2, 2) | read(tmp_path, student, 20, 3, 4) == whole
    )
