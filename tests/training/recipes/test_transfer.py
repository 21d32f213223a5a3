"""Transfer Init, class maps, and images of classes."""

from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from small_catlip import TINY, need_wordnet, write_bench, write_folders
from torch import nn

import clipmill
from pipeline.labels.classes_stage import ClassesConfig, NearestSynset, classes, map_class, map_classes
from pipeline.labels.vocab_stage import imagenet_classes
from pipeline.labels.wordnet import load_hypernyms
from shards_spec.class_map import ClassMap, ClassRow, read_class_map
from shards_spec.files import DataError, UserError
from shards_spec.vocab import Vocabulary
from training.data.eval_crop import plain_crop
from training.data.labelled_images import open_images
from training.data.labelled_rows import LabelledImageRows, subset
from training.data.order import BatchPlan
from training.models.classifier import new_classifier
from training.recipes.transfer import load_class_map, transfer_head

pytestmark = pytest.mark.integration

WALL, BALL, DOG, TERRIER = "n04546855", "n02778669", "n02084071", "n02092468"


def words(*rows, **header):
    return Vocabulary(tuple((wnid, lemma, 1, 1) for wnid, lemma in rows), {"wordnet": "3.0", **header})


@pytest.fixture(scope="module")
def net():
    return need_wordnet()


@pytest.fixture(scope="module")
def ceiling(net):
    """All synsets that the released rule can reach, by offset."""
    single = [lemma for lemma in net.first_sense if "_" not in lemma]
    reached = {wnid for lemma in single if (wnid := net.synset(lemma)) == net.first_sense[lemma] and wnid}
    return words(*((wnid, net.heads[wnid]) for wnid in sorted(reached)))


def similarity(one, other, hypernyms):
    """Path similarity by walking up from both, without `NearestSynset`."""

    def above(wnid):
        steps, queue = {wnid: 0}, deque([wnid])
        while queue:
            node = queue.popleft()
            for up in hypernyms[node]:
                if up not in steps:
                    steps[up] = steps[node] + 1
                    queue.append(up)
        return steps

    ours, theirs = above(one), above(other)
    return 1 / (1 + min(ours[node] + theirs[node] for node in ours.keys() & theirs.keys()))


def test_path_similarity(net):  # fact 14
    hypernyms, first = load_hypernyms(), net.first_sense
    pairs = {("dog", "cat"): 0.2, ("golden_retriever", "retriever"): 0.5, ("great_white_shark", "shark"): 1 / 3}
    for (one, other), expected in pairs.items():
        assert similarity(first[one], first[other], hypernyms) == pytest.approx(expected)
        found = NearestSynset({first[other]: 0}, hypernyms).find(first[one])
        assert found == (first[other], pytest.approx(expected))


def test_imagenet_is_covered_as_published(ceiling, net):  # fact 14 and section 6.2
    assert len(ceiling) == 37_982
    names = sorted(imagenet_classes())
    assert len(names) == 1000
    found = map_classes(names, ceiling, 0.2)
    assert found.cases == {"exact": 394, "mean": 0, "nearest": 606, "none": 0}
    counts = [sum(row.similarity >= 1 / steps - 1e-9 for row in found.rows) for steps in range(1, 6)]
    assert counts == [394, 775, 971, 997, 1000]
    rows = Counter(row.lemmas[0] for row in found.rows)
    assert len({row.wnids for row in found.rows}) == 713
    assert sum(number for number in Counter(row.wnids for row in found.rows).values() if number > 1) == 403
    assert [rows[name] for name in ("terrier", "dog", "vegetable", "snake")] == [18, 14, 11, 10]
    stricter = map_classes(names, ceiling, 0.5)
    assert (stricter.cases["none"], len(stricter.unmapped)) == (225, 225)


def test_ties_of_imagenet(ceiling, net):  # section 6.2
    nearest, near = NearestSynset(ceiling.index, load_hypernyms()), {}
    for wnid in ceiling.index:  # all of the vocabulary that are as near to a synset above them as any
        for node, steps in nearest.ancestors(wnid).items():
            if steps == nearest.closest_below[node][0]:
                near.setdefault(node, set()).add(wnid)
    tied = 0
    for wnid in imagenet_classes():
        steps = {
            node: up + nearest.closest_below[node][0] for node, up in nearest.ancestors(wnid).items() if node in near
        }
        best = set().union(*(near[node] for node, total in steps.items() if total == min(steps.values())))
        tied += len(best) > 1
    assert tied == 201


def test_nearest_is_the_best_of_all(ceiling, net):
    hypernyms, some = load_hypernyms(), [wnid for wnid, _, _, _ in ceiling.rows[::37]]
    nearest = NearestSynset({wnid: rank for rank, wnid in enumerate(some)}, hypernyms)
    for wnid in sorted(imagenet_classes())[::250]:
        scores = [similarity(wnid, other, hypernyms) for other in some]
        ties = [other for other, score in zip(some, scores, strict=True) if score == max(scores)]
        above = [other for other in ties if other in nearest.ancestors(wnid)]
        assert nearest.find(wnid) == ((above or ties)[0], pytest.approx(max(scores)))


def test_each_case_by_name(ceiling, net):
    nearest = NearestSynset(ceiling.index, load_hypernyms())

    def of(name):
        row = map_class(name, net, nearest, ceiling.index, 0.2)
        return row.case, row.lemmas

    assert of("n02084071") == of("n2084071") == of("dog") == of("Dogs") == ("exact", ("dog",))
    assert of("restaurant kitchen") == of("/r/restaurant_kitchen") == ("mean", ("restaurant", "kitchen"))
    assert of("archaeological excavation") == of("archaeological_excavation") == ("none", ())
    assert of("ice cream") == ("mean", ("ice", "cream"))
    assert of("a/airfield") == ("exact", ("airfield",))
    assert of("n02099601") == ("nearest", ("retriever",))
    assert of("bike") == of("n99999999") == of("qwertz") == ("none", ())
    few = words((DOG, "dog"))
    alone = NearestSynset(few.index, load_hypernyms())
    assert map_class("golden retriever", net, alone, few.index, 0.2).case == "nearest"
    assert map_class("golden retriever", net, alone, few.index, 0.5).case == "none"


def test_class_map_file(tmp_path, net):
    vocabulary = words((DOG, "dog"), (WALL, "wall"))
    vocabulary.write(str(tmp_path / "all.tsv"))
    for name in ("dog", "wall dog", "qwertz"):
        (tmp_path / "images" / name).mkdir(parents=True)
    out = str(tmp_path / "classes.tsv")
    found = classes(ClassesConfig(str(tmp_path / "images"), str(tmp_path / "all.tsv"), out))
    assert read_class_map(out) == found
    assert (found.unmapped, found.cases["mean"]) == (["qwertz"], 1)
    assert load_class_map(out, ["qwertz", "dog"], vocabulary).rows[1].wnids == (DOG,)
    with pytest.raises(UserError, match=f"maps to vocabulary {vocabulary.sha256[:12]}"):
        load_class_map(out, ["dog"], words((DOG, "dog")))
    with pytest.raises(UserError, match="no row for 1 class, first 'cat'"):
        load_class_map(out, ["cat", "dog"], vocabulary)
    with open(out, "a") as file:
        file.write("cat\texact\t\t\t\n")
    with pytest.raises(UserError, match="line 6 is broken"):
        read_class_map(out)
    for name, said in (("all.tsv", "not a clipmill class map"), ("absent.tsv", "is not there"), (".", "is a folder")):
        with pytest.raises(UserError, match=said):
            read_class_map(str(tmp_path / name))
    lines = Path(out).read_bytes().splitlines()[:-1]
    Path(out).write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\r\n")  # as an editor on Windows leaves it
    assert len(read_class_map(out).rows) == len(lines) - 2
    Path(out).write_bytes(b"\n".join([*lines, b"cat\tnearest\tnear\tn1\tx"]))
    with pytest.raises(UserError, match=f"line {len(lines) + 1} is broken"):
        read_class_map(out)
    with pytest.raises(UserError, match="--alpha 0"):
        ClassesConfig("x", "y", "z", alpha=0)


def test_the_command(tmp_path, net, monkeypatch, capsys):
    words((DOG, "dog")).write(str(tmp_path / "all.tsv"))
    (tmp_path / "names.txt").write_text("dog\n\nqwertz\n")
    argv = ["clipmill", "classes", str(tmp_path / "names.txt"), "--vocabulary", str(tmp_path / "all.tsv")]
    monkeypatch.setattr("sys.argv", [*argv, "--out", str(tmp_path / "map.tsv")])
    with pytest.raises(SystemExit) as end:
        clipmill.main()
    assert end.value.code == 0
    assert "classes: 2 classes: 1 exact, 1 none; no synset for qwertz" in capsys.readouterr().out


def test_rows_of_the_pretrained_head():
    vocabulary = words((DOG, "dog"), (WALL, "wall"), (BALL, "ball"))
    torch.manual_seed(0)
    pretrained, head = nn.Linear(8, 3), nn.Linear(8, 4)
    nn.init.zeros_(head.bias)
    before = head.weight.detach().clone()
    rows = (
        ClassRow("ball", "exact", (BALL,)),
        ClassRow("x", "none"),
        ClassRow("dog wall", "mean", (DOG, WALL)),
        ClassRow("terrier", "nearest", (DOG,)),
    )
    transfer_head(head, pretrained, vocabulary, ClassMap(rows, {}))
    old, new = pretrained.weight.detach().double().numpy(), head.weight.detach().double().numpy()
    expected = np.stack([old[2], (old[0] + old[1]) / 2, old[0]])
    assert np.allclose(new[[0, 2, 3]], expected, atol=1e-7)
    assert np.allclose(np.linalg.norm(new[1]), np.linalg.norm(expected, axis=1).mean(), rtol=1e-6)
    assert np.allclose(new[1] / np.linalg.norm(new[1]), before[1] / before[1].norm(), atol=1e-6)
    assert not head.bias.any()
    transfer_head(head, pretrained, vocabulary, ClassMap(rows, {}), copy_bias=True)
    bias = pretrained.bias.detach()
    assert torch.allclose(head.bias, torch.stack([bias[2], torch.tensor(0.0), (bias[0] + bias[1]) / 2, bias[0]]))


@pytest.mark.parametrize("write", [write_folders, write_bench])
def test_folders_and_shards_hold_the_same(tmp_path, write):
    root = write(tmp_path / "images")
    train, test = open_images(root, True), open_images(root, False)
    assert train.classes == test.classes == ["blue", "red"]
    assert Counter(train.labels.tolist()) == {0: 12, 1: 12}
    assert len(test.labels) == 12
    rows = LabelledImageRows(test, new_classifier(TINY, 2), BatchPlan(4), None, np.arange(12))
    for position in (0, 5, 6, 7, 11):
        item = rows[position]
        colour = item["images"].float().amax(dim=(1, 2)) - item["images"].float().mean(dim=(1, 2))
        assert item["targets"] == test.labels[position]
        assert (colour[0] > colour[2]) == (test.classes[item["targets"]] == "red")


def test_what_images_refuse(tmp_path):
    with pytest.raises(UserError, match="--data is needed"):
        open_images("", True)
    with pytest.raises(
        UserError, match=r"test/nshards.txt is not there, nor is a folder of images per class in .*/test or .*/val"
    ):
        open_images(str(tmp_path), False)
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match="It is a ROOT of image-text pairs, which have no classes"):
        open_images(str(tmp_path), False)
    root = write_bench(tmp_path / "bench")
    (tmp_path / "bench" / "classnames.txt").write_text("blue\n")
    with pytest.raises(DataError, match="has class '1', not a number below 1"):
        open_images(root, True)
    (tmp_path / "bench" / "train" / "nshards.txt").write_text("3")
    (tmp_path / "bench" / "classnames.txt").write_text("blue\nred\n")
    with pytest.raises(UserError, match=r"2\.tar is not there"):
        open_images(root, True)


def test_subsets_are_balanced_and_nested():
    labels = np.repeat(np.arange(5), [100, 40, 3, 1, 20])
    kept = {share: subset(labels, share, 7) for share in (0.01, 0.05, 0.25, 1.0)}
    assert np.bincount(labels[kept[0.25]]).tolist() == [25, 10, 1, 1, 5]
    assert np.bincount(labels[kept[0.01]]).tolist() == [1] * 5
    for smaller, larger in ((0.01, 0.05), (0.05, 0.25), (0.25, 1.0)):
        assert {*kept[smaller]} <= {*kept[larger]}
    assert kept[1.0].tolist() == [*range(164)]
    assert kept[0.25].tolist() != subset(labels, 0.25, 8).tolist()


def test_plain_crop_is_232_cut_to_224():
    from PIL import Image

    column = np.repeat(np.arange(232, dtype=np.uint8)[None, :, None], 232, 0).repeat(3, 2)
    shown = np.asarray(plain_crop(Image.fromarray(column), 224))
    assert shown.shape == (224, 224, 3)
    assert shown[0, :, 0].tolist() == [*range(4, 228)]
