"""Labels of the reader, and batches of several sizes."""

import math
from collections import Counter
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from small_catlip import TINY, need_wordnet

from pipeline.labels.labeler import load_labeler
from pipeline.labels.vocab_stage import VocabConfig, vocab
from shards_spec.files import UserError
from shards_spec.tar import read_shard
from shards_spec.vocab import Vocabulary
from training.config import DataConfig, LabelConfig, SideConfig, ViewConfig
from training.data.batches import load_batches
from training.data.order import BatchPlan, batch_positions
from training.data.samples import SampleLabels, find_vocabulary, open_samples
from training.losses.multilabel import PAD
from training.models.classifier import new_classifier

SIDES = tuple(range(128, 321, 16))
LOCAL = {  # batch of 1024 at 224
    128: 3136,
    144: 2477,
    160: 2007,
    176: 1658,
    192: 1393,
    208: 1187,
    224: 1024,
    240: 892,
    256: 784,
    272: 694,
    288: 619,
    304: 555,
    320: 501,
}
FINE = {128: 1568, 160: 1003, 192: 696, 224: 512, 256: 392, 288: 309, 320: 250}


@pytest.fixture(scope="module")
def root(labelled_root):
    return labelled_root


@pytest.fixture(scope="module")
def student():
    return new_classifier(TINY, 5)


def samples_of(root, student, sides=None, original_only=True, **changes):
    data = DataConfig(data=root, **{"batch_size": 4, "workers": 0, "streams": 1, **changes})
    labels = SampleLabels(find_vocabulary(data, LabelConfig()), original_only)
    return open_samples(data, ViewConfig(), student, 0, labels=labels, sides=sides)


def test_sizes_of_batches():  # fact 11
    assert tuple(dict.fromkeys(16 * math.floor(side / 16 + 0.5) for side in np.linspace(128, 320, 25))) == SIDES
    assert {side: BatchPlan(1024, SIDES).of_side(side) for side in SIDES} == LOCAL
    assert {side: BatchPlan(512, tuple(FINE)).of_side(side) for side in FINE} == FINE
    large = BatchPlan(65_536, SIDES, parts=64)
    assert {side: large.of_side(side) / 64 for side in SIDES} == LOCAL
    assert large.mean / 65_536 == pytest.approx(1.27, abs=0.005)
    assert BatchPlan(1024, tuple(range(160, 321, 32))).mean / 1024 == pytest.approx(1.03, abs=0.01)


def test_no_sides_is_one_size():
    plan = BatchPlan(12)
    assert [plan.size(step) for step in range(3)] == [12] * 3
    assert plan.mean == 12
    assert [*plan.positions(5, 60, 3, 1, 2)] == [*batch_positions(60, 3, 12, 1, 2)]


def test_sides_are_drawn_evenly_and_by_the_step_alone():
    plan = BatchPlan(1024, SIDES, seed=3)
    drawn = [plan.side(step) for step in range(2600)]
    assert drawn == [BatchPlan(1024, SIDES, seed=3).side(step) for step in range(2600)]
    assert drawn != [BatchPlan(1024, SIDES, seed=4).side(step) for step in range(2600)]
    counts, sigma = Counter(drawn), (2600 / 13 * 12 / 13) ** 0.5
    assert all(abs(counts[side] - 200) < 4 * sigma for side in SIDES), counts


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_every_batch_equally_and_resume(ranks):
    plan, seen = BatchPlan(64, (32, 48, 64), 48, parts=4, seed=1), 0
    shares = [[*plan.positions(0, 0, 20, rank, ranks)] for rank in range(ranks)]
    for step, own in enumerate(zip(*shares, strict=True)):
        assert len({len(share) for share in own}) == 1
        assert sorted(chain.from_iterable(own)) == [*range(seen, seen + plan.size(step))]
        assert [*plan.positions(step, seen, 20 - step, 0, ranks)] == shares[0][step:]
        seen += plan.size(step)
    sides = plan.sides_from(7)
    assert [next(sides) for _ in range(5)] == [plan.side(step) for step in range(7, 12)]


def test_processes_must_divide_the_parts():
    with pytest.raises(UserError, match="--batch-parts 4: must be a multiple of the 3 processes"):
        next(BatchPlan(64, (32,), 32, parts=4).positions(0, 0, 1, 0, 3))
    with pytest.raises(UserError, match="--sides"):
        SideConfig(sides=(0,))


def test_labels_are_those_of_the_original_caption(root, student):
    samples = samples_of(root, student)
    vocabulary, source = samples.labels.vocabulary, {}
    for shard in range(3):
        source |= {sample.key: sample for sample in read_shard(f"{root}/shards/{shard:05d}.tar")}
    for batch in load_batches(samples, batch_positions(0, 4, 4)):
        assert "tokens" not in batch
        assert batch["labels"].dtype == torch.int64
        for key, row in zip(batch["keys"], batch["labels"].tolist(), strict=True):
            own = [label for label in row if label != PAD]
            names = {vocabulary.rows[label][1] for label in own}
            assert own == vocabulary.labels(source[key].meta["synsets"][0])
            assert "wall" in names
            assert names <= {"red", "green", "blue", "yellow", "ball", "box", "cross", "wall", *names}


def test_labels_of_all_captions_and_none():
    vocabulary = Vocabulary((("n1", "a", 3, 1), ("n2", "b", 2, 1), ("n3", "c", 1, 1)), {})
    sample = next(iter([_sample([["n2", "n9", "n2"], ["n3"], ["n1"]])]))
    assert SampleLabels(vocabulary).class_indices(sample) == [1]
    assert SampleLabels(vocabulary, original_only=False).class_indices(sample) == [0, 1, 2]
    assert SampleLabels(vocabulary).class_indices(_sample([[], ["n3"]])) == []


def _sample(synsets):
    from shards_spec.files import json_bytes
    from shards_spec.sample import Sample

    return Sample("k", {"jpg": b"", "txt": b"x", "json": json_bytes({"synsets": synsets})})


def test_the_figure_of_the_paper_becomes_its_target():  # fact 2
    need_wordnet()
    first = [("n05928118", "image"), ("n13333833", "stock"), ("n04960277", "black")]
    others = [f"n{number:08d}" for number in range(90_000_001, 90_000_007)]
    rows = [*first, *((wnid, "other") for wnid in others), ("n07947958", "free")]
    vocabulary = Vocabulary(tuple((wnid, lemma, 1, 1) for wnid, lemma in rows), {})
    wnids = load_labeler().synsets("An image of black dog.")
    assert wnids == ["n05928118", "n04960277", "n02084071"]
    assert SampleLabels(vocabulary).class_indices(_sample([wnids])) == [0, 2]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_of_several_sizes_and_workers_change_nothing(root, student):
    samples = samples_of(root, student, SideConfig((16, 32, 48), 32, 2), batch_size=8)
    plan = samples.plan

    def batches(workers):
        return load_batches(samples, plan.positions(0, 0, 6), workers=workers, sides=plan.sides_from(0))

    seen = set()
    for step, (one, other) in enumerate(zip(batches(0), batches(2), strict=True)):
        side = plan.side(step)
        seen.add(side)
        assert one["images"].shape == (plan.size(step), 3, side, side)
        for name in ("images", "labels", "positions"):
            assert torch.equal(one[name], other[name])
    assert len(seen) > 1


def test_pieces_of_different_widths_are_joined(root, student, monkeypatch):
    samples = samples_of(root, student, batch_size=12)
    whole = next(load_batches(samples, batch_positions(0, 1, 12)))["labels"]
    monkeypatch.setattr("training.data.batches.PIECE_SIZE", 1)
    assert torch.equal(next(load_batches(samples, batch_positions(0, 1, 12)))["labels"], whole)


def test_what_is_refused(root, student, tmp_path):
    with pytest.raises(
        UserError, match=r"vocab/none\.tsv is not there: `clipmill vocab .* makes it; --vocabulary may be all"
    ):
        find_vocabulary(DataConfig(data=root), LabelConfig(vocabulary="none"))
    with pytest.raises(UserError, match="--folder shards"):
        find_vocabulary(DataConfig(data=root, folder="raw"), LabelConfig())
    vocabulary = find_vocabulary(DataConfig(data=root), LabelConfig())
    other = replace(vocabulary, header={**vocabulary.header, "rule": "catlip-released+synonyms"})
    other.write(f"{root}/vocab/other.tsv")
    with pytest.raises(UserError, match="is of the label rule catlip-released\\+synonyms"):
        find_vocabulary(DataConfig(data=root), LabelConfig(vocabulary="other"))


def test_a_vocabulary_is_counted_on_the_captions_that_labels_come_from(root):
    """CatLIP counts original captions, and --frequency-bias is a lie with counts of others."""
    find_vocabulary(DataConfig(data=root), LabelConfig())  # both defaults are the original caption
    with pytest.raises(
        UserError,
        match=r"all\.tsv was counted on original captions, .* --label-captions all: .*vocab --source all`, or give "
        "--label-captions original",
    ):
        find_vocabulary(DataConfig(data=root), LabelConfig(label_captions="all"))
    every = vocab(VocabConfig(root, min_count=0, source="all", name="every"))
    replace(every, header={**every.header, "source": "synthetic"}).write(f"{root}/vocab/synthetic.tsv")
    for source, name in (("all", "every"), ("synthetic", "synthetic")):
        with pytest.raises(UserError, match=rf"counted on {source} captions, .* `clipmill vocab --source original`"):
            find_vocabulary(DataConfig(data=root), LabelConfig(vocabulary=name))
    with pytest.raises(UserError, match="no synthetic caption has a synset; count others with --source"):
        vocab(VocabConfig(root, min_count=0, source="synthetic", name="none"))
    taken = find_vocabulary(DataConfig(data=root), LabelConfig(vocabulary="every", label_captions="all"))
    assert taken.header["source"] == "all"
    imported = replace(taken, header={**taken.header, "source": "catlip"})  # counted on DataComp's original captions
    imported.write(f"{root}/vocab/imported.tsv")
    assert find_vocabulary(DataConfig(data=root), LabelConfig(vocabulary="imported"))
