"""Linear probe, nearest neighbours, CLIP-KD's retrieval; what is measured once is not again; tables over many sets."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_data import draw, tiny_coca
from small_training import train_short, write_retrieval

from shards_spec import imagenet
from shards_spec.files import DataError, UserError
from training.data.labelled_images import open_images
from training.evaluation import protocols
from training.evaluation.clip_benchmark import read_classes
from training.evaluation.config import EvalConfig
from training.evaluation.datacomp import TASKS as DATACOMP
from training.evaluation.datacomp import find_task
from training.evaluation.feature_cache import FeatureCache, data_hash
from training.evaluation.linear_probe import fit, linear_probe, sweep
from training.evaluation.nearest_neighbours import neighbour_scores
from training.evaluation.stage import evaluate
from training.evaluation.summary import MeasuredModel, datacomp_average, robustness, summarise
from training.evaluation.zero_shot import CaptionedFeatures, Encoder, class_metrics, first_caption_recalls
from training.models.classifier import new_classifier

pytestmark = pytest.mark.usefixtures("one_thread")


def gaussian(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train_short(tmp_path_factory.mktemp("run"))


@pytest.fixture
def labelled(tmp_path):
    """Class folders train/ and test/ of three classes of drawings."""
    for split, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(("apple", "bear", "cat")):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.jpg").write_bytes(draw(f"{split} {label} {number}", 24)[0])
    return str(tmp_path / "set")


# linear probe


@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_fit_is_the_minimum_of_scikit_learns_objective(c):
    """The objective is strictly convex, so that where its gradient vanishes is its one minimum."""
    features, labels = 3 * gaussian(0, 60, 5).double(), torch.arange(60) % 3
    probe = fit(features, labels, 3, c)
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    loss = weight.square().sum() / 2 + c * F.cross_entropy(features @ weight.T + bias, labels, reduction="sum")
    loss.backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 2e-5 * c * len(labels)
    other = fit(features, labels, 3, c, start=fit(features, labels, 3, 50 * c))
    assert torch.allclose(other.weight, probe.weight, atol=1e-3)


def test_sweep_is_the_papers_binary_search():
    tried = []

    def accuracy(c):
        tried.append(c)
        return -abs(torch.log10(torch.tensor(c)).item() - 1.375)

    assert sweep(accuracy) == pytest.approx(10**1.375)
    assert tried[:7] == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])
    assert len(tried) == 7 + 2 * 4
    assert sweep(lambda c: 0.5) == pytest.approx(1)


def test_probe_finds_the_strength_and_fits_all_images():
    """A third of the labels are wrong: a weak penalty learns them by heart."""
    centres = 3 * F.one_hot(torch.arange(4), 20).float()
    labels = torch.arange(120) % 4
    features = centres[labels] + gaussian(1, 120, 20)
    labels[::3] = (labels[::3] + 1) % 4
    probe = linear_probe(features, labels, 4, "cpu")
    new_labels = torch.arange(1000) % 4
    new = centres[new_labels] + gaussian(2, 1000, 20)
    found = class_metrics(probe.scores(new), new_labels)["acc1"]
    weak = class_metrics(fit(features, labels, 4, 1e6).scores(new), new_labels)["acc1"]
    assert found > weak + 0.03
    assert torch.equal(probe.weight, linear_probe(features, labels, 4, "cpu").weight)
    whole = fit(features, labels, 4, probe.c)
    assert torch.allclose(probe.weight, whole.weight, atol=1e-3)


def test_probe_of_one_image_per_class():
    probe = linear_probe(torch.eye(3), torch.arange(3), 3, "cpu")
    assert probe.scores(torch.eye(3)).argmax(1).tolist() == [0, 1, 2]


# nearest neighbours, retrieval


def test_votes_of_neighbours_against_the_formula(monkeypatch):
    bank, queries, labels = gaussian(0, 30, 4), gaussian(1, 9, 4), torch.arange(30) % 5
    monkeypatch.setattr("training.evaluation.nearest_neighbours.CHUNK", 4)
    scores = neighbour_scores(bank, labels, queries, 5, neighbours=7)
    for query, row in zip(queries, scores, strict=True):
        votes = [0.0] * 5
        cosines = [F.cosine_similarity(query, one, dim=0).item() for one in bank]
        for cosine, label in sorted(zip(cosines, labels.tolist(), strict=True), reverse=True)[:7]:
            votes[label] += math.exp(cosine / 0.07)
        assert row.tolist() == pytest.approx(votes, rel=1e-4)
    assert neighbour_scores(bank[:3], labels[:3], queries, 5, neighbours=7).count_nonzero(dim=1).tolist() == [3] * 9


def test_first_captions_are_ranked_as_clip_kd_ranks_them():
    images = F.normalize(gaussian(0, 40, 8), dim=-1)
    owner = torch.arange(40).repeat_interleave(torch.arange(40) % 3 + 1)
    texts = F.normalize(images[owner] + 0.9 * gaussian(1, len(owner), 8), dim=-1)
    first = torch.stack([texts[(owner == image).nonzero()[0, 0]] for image in range(40)])
    expected = {}
    for way, logits in (("text", images @ first.T), ("image", first @ images.T)):
        ranking = torch.argsort(logits, descending=True)
        ranks = torch.where(ranking == torch.arange(40).view(-1, 1))[1]
        for k in (1, 5, 10):
            expected[f"{way}_retrieval_recall@{k}"] = (ranks < k).double().mean().item()
    assert first_caption_recalls(CaptionedFeatures(images, texts, owner)) == pytest.approx(expected)


def test_zero_shot_metrics_equal_clip_benchmarks():
    """Its accuracy and scikit-learn's balanced accuracy, written out, on random logits."""
    scores, labels = gaussian(0, 300, 12), torch.randint(0, 11, (300,), generator=torch.Generator().manual_seed(1))
    scores[torch.arange(300), labels] += 1
    best = scores.topk(5, 1, True, True)[1].t()
    correct = best.eq(labels.view(1, -1).expand_as(best))
    recalls = [(scores.argmax(1)[labels == label] == label).double().mean().item() for label in labels.unique()]
    assert class_metrics(scores, labels) == pytest.approx(
        {
            "acc1": correct[:1].float().sum().item() / 300,
            "acc5": correct.float().sum().item() / 300,
            "mean_per_class_recall": sum(recalls) / len(recalls),
        },
        abs=1e-6,
    )


# what is kept


def test_a_result_is_measured_once_and_features_serve_other_tasks(run, labelled, tmp_path, monkeypatch):
    pairs = write_retrieval(tmp_path / "pairs")
    config = EvalConfig(run, (labelled, pairs))
    first = evaluate(config)
    assert json.loads(Path(run, "eval", "set_zeroshot.json").read_text()) == first[0]

    def no_forward(*args):
        raise AssertionError("a forward pass of images")

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "images", no_forward)
        patch.setattr(Encoder, "texts", no_forward)
        assert evaluate(config) == first
        (other,) = evaluate(EvalConfig(run, (pairs,), task="retrieval-first-caption"))
    assert (other["task"], other["samples"]) == ("zeroshot_retrieval_first_caption", 8)
    assert other["metrics"] == first[1]["metrics"]  # each image has one caption
    monkeypatch.setattr(Encoder, "images", no_forward)
    with pytest.raises(AssertionError, match="forward pass"):
        evaluate(EvalConfig(run, (pairs,), features=False, overwrite=True))
    monkeypatch.undo()
    Path(labelled, "test", "cat", "2.jpg").unlink()
    assert evaluate(config)[0]["samples"] == 8


def test_kept_features_are_those_of_one_model_and_one_set(tmp_path):
    def kept(model, data, number):
        cache = FeatureCache(str(tmp_path), model)
        return cache.tensors("x", lambda: data, lambda: {"images": torch.tensor([number])})["images"].item()

    assert kept("a", "d", 1) == 1
    assert kept("a", "d", 2) == 1
    assert [kept("b", "d", 3), kept("b", "e", 4), kept("b", "e", 5)] == [3, 4, 4]
    (tmp_path / "features" / "x.safetensors").write_bytes(b"\xff" * 20)
    assert kept("b", "e", 6) == 6
    file = tmp_path / "features" / "x.safetensors"
    for number, damaged in enumerate((file.read_bytes()[:-2], (2).to_bytes(8, "little") + b"[]"), 7):
        file.write_bytes(damaged)
        assert [kept("b", "e", number), kept("b", "e", 9)] == [number, number]


def test_a_set_is_known_by_its_files(labelled):
    before = data_hash(labelled, "test"), data_hash(labelled, "train")
    Path(labelled, "test", "bear", "0.jpg").write_bytes(b"x")
    assert data_hash(labelled, "test") != before[0]
    assert data_hash(labelled, "train") == before[1]
    Path(labelled, "classnames.txt").write_text("a\nb\nc\n")
    assert data_hash(labelled, "train") != before[1]


# whole commands


@pytest.mark.parametrize("task", ["linear-probe", "knn"])
def test_what_learns_from_the_train_split(run, labelled, task):
    (result,) = evaluate(EvalConfig(run, (labelled,), task=task, neighbours=5))
    assert (result["samples"], result["train_samples"], result["classes"]) == (9, 18, 3)
    assert result["task"] == {"linear-probe": "linear_probe", "knn": "knn_classification"}[task]
    assert result["neighbours"] == 5 if task == "knn" else 1e-6 <= result["C"] <= 1e6
    assert 0 <= result["metrics"]["acc1"] <= result["metrics"]["acc5"] == 1
    assert Path(run, "eval", f"set_{task}.json").exists()


def test_all_images_vote_where_there_are_fewer_than_asked_for(run, labelled, caplog):
    (result,) = evaluate(EvalConfig(run, (labelled,), task="knn", neighbours=1000))
    assert result["neighbours"] == 18
    assert "--neighbours 1000, there are 18 training images: all vote" in caplog.text


def test_a_classifiers_features_are_probed_and_its_texts_are_not_asked_for(labelled):
    classifier = new_classifier("timm:test_vit", 3, pretrained=None, seed=0)
    protocol = EvalConfig("any", (labelled,), task="knn")
    measurement = protocols.measure_task(protocol, classifier, protocols.EvalSet(labelled, "set"), "knn", "cpu")
    assert measurement.samples == 9
    assert protocols.chosen_task(EvalConfig("any", ("x",)), classifier, labelled) == "classification"
    with pytest.raises(UserError, match="--task zeroshot needs texts"):
        protocols.chosen_task(EvalConfig("any", ("x",), task="zeroshot"), classifier, labelled)
    classifier.model.trunk.reset_classifier(1)  # as TinyMIM leaves it
    with pytest.raises(UserError, match=r"without classes, .* --task knn or --task linear-probe measures its features"):
        protocols.chosen_task(EvalConfig("any", ("x",)), classifier, labelled)


def test_images_that_do_not_decode_are_left_out_of_a_classifiers_measurement_and_counted(labelled):
    """Even where they are the whole of a batch, as every other protocol has it."""
    classifier = new_classifier("timm:test_vit", 3, pretrained=None, seed=0)
    classifier.model.names = ["apple", "bear", "cat"]
    config = EvalConfig("any", (labelled,), batch_size=3)

    def measured(task):
        return protocols.measure_task(config, classifier, protocols.EvalSet(labelled, "set"), task, "cpu")

    whole = measured("classification")
    assert (whole.samples, whole.skipped) == (9, 0)
    for number in range(3):
        Path(labelled, "test", "apple", f"{number}.jpg").write_bytes(b"no image")
    for task in ("classification", "knn"):
        some = measured(task)
        assert (some.samples, some.skipped) == (6, 3), task
        assert 6 * some.metrics["acc1"] == pytest.approx(round(6 * some.metrics["acc1"])), task
    for path in Path(labelled, "test").glob("*/*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of 9 images decodes, first .*apple.0.jpg; download the set again"):
        measured("classification")


def test_many_models_and_many_sets(run, labelled, tmp_path, capsys):
    model = tiny_coca(tmp_path / "other").removeprefix("local-dir:")
    pairs = write_retrieval(tmp_path / "flickr30k")
    out = tmp_path / "out"
    results = evaluate(EvalConfig((run, model), (labelled, pairs), output=str(out)))
    assert len(results) == 4
    assert {path.name for path in out.iterdir()} == {Path(run).name, "other", "summary.json"}
    assert (out / "other" / "set_zeroshot.json").exists()
    summary = json.loads((out / "summary.json").read_text())
    assert [entry["model"] for entry in summary["models"]] == [Path(run).name, "other"]
    assert [one["metric"] for one in summary["models"][0]["sets"]] == ["acc1", "mean_recall@1"]
    assert summary["models"][0]["datacomp"]["values"].keys() == {"Flickr"}
    assert "DataComp" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "fields", "said"),
    [
        (lambda root: (root / "train").rename(root / "x"), {"task": "knn"}, "--task knn learns from a split train"),
        (lambda root: (root / "train" / "cat").rename(root / "train" / "cow"), {"task": "knn"}, "cat, cow"),
        (lambda root: None, {"task": "knn", "neighbours": 0}, "--neighbours 0"),
        (lambda root: None, {"task": "retrieval"}, "has labelled images and no captions to retrieve: use --task"),
        (lambda root: None, {"pretrained": "x", "model": ("ViT-B-32", "RN50")}, "say NAME:TAG for each"),
        (lambda root: None, {"pretrained": "x", "model": ("ViT-B-32:openai",)}, "say NAME:TAG for each"),
    ],
)
def test_bad_options_and_sets_are_named(run, labelled, spoil, fields, said):
    spoil(Path(labelled))
    with pytest.raises(UserError, match=said):
        evaluate(EvalConfig(**{"model": run, "data": (labelled,), **fields}))


# tables


def result(dataset, value, task="zeroshot_classification", **more):
    return {"dataset": dataset, "task": task, "metrics": {"acc1": value, "mean_per_class_recall": value / 2}, **more}


def test_robustness_over_the_sets_that_are_there():
    of_classes = {"imagenet-a": 0.9, "imagenet-r": 0.8}
    results = [
        result("imagenet", 0.7, acc1_on_classes_of=of_classes),
        result("wds_imagenet-r_test", 0.6),
        result("ImageNetV2", 0.5),
        result("imagenetv2", 0.1, task="knn_classification"),
    ]
    table = robustness(results)
    assert table["variants"] == {"imagenetv2": 0.5, "imagenet-r": 0.6}
    assert table["average"] == pytest.approx(0.55)
    assert table["gap"] == pytest.approx(0.15)
    assert table["gaps_on_same_classes"] == pytest.approx({"imagenetv2": 0.2, "imagenet-r": 0.2})
    assert robustness(results[:1]) is None
    assert robustness(results[1:]) is None


def test_datacomps_average_is_over_what_is_there_and_says_so():
    assert len(DATACOMP) == 38
    assert len({task.name for task in DATACOMP}) == 38
    results = [
        result("wds_vtab-caltech101_test", 0.8),
        result("cifar10", 0.6),
        result("wilds_iwildcam", 0.3),
        result("my set", 0.9),
        result("cifar100", 0.9, task="linear_probe"),
        result("cifar100", 0.9, classes=20),
        {
            "dataset": "flickr30k",
            "task": "zeroshot_retrieval",
            "metrics": {"image_retrieval_recall@1": 0.2, "text_retrieval_recall@1": 0.4},
        },
    ]
    average = datacomp_average(results)
    assert average["values"] == pytest.approx({"Caltech-101": 0.4, "CIFAR-10": 0.6, "Flickr": 0.3})
    assert average["average"] == pytest.approx(1.3 / 3)
    assert (average["tasks"], average["of"], average["unmeasured"]) == (3, 38, ["iWildCam"])
    assert len(average["missing"]) == 35
    assert datacomp_average(results[3:6]) is None
    summary = summarise([MeasuredModel("m", [*results, {"task": "cost"}])])
    assert [one["value"] for one in summary["models"][0]["sets"]] == pytest.approx([0.4, 0.6, 0.3, 0.9, 0.9, 0.9, 0.3])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("wds_imagenet-a_test", "imagenet-a"),
        ("imagenet_v2", "imagenetv2"),
        ("ImageNet", "imagenet1k"),
        ("vtab-dtd", "vtab/dtd"),
        ("wds_mscoco_captions_test", "retrieval/mscoco_2014_5k_test_image_text_retrieval"),
        ("test", None),
        ("coco", None),
    ],
)
def test_sets_are_known_by_their_folders_names(name, key):
    task = find_task(name)
    assert (task and task.key) == key
    assert find_task("imagenet", 1000).name == "ImageNet 1k"
    assert find_task("imagenet", 100) is None


def test_imagenet_is_also_measured_on_the_classes_of_its_variants():
    labels = torch.arange(1000)
    scores = F.one_hot(labels, 1000).float()
    of_a = torch.tensor(imagenet.labels_of_variant("a"))
    outside = next(label for label in range(1000) if label not in of_a)
    scores[of_a[:50], outside] = 2  # wrong among all classes, right among those of -A
    scores[of_a[50:60], of_a[0]] = 2
    found = protocols._on_classes_of_variants("imagenet", scores, labels)["acc1_on_classes_of"]
    assert found["imagenet-a"] == pytest.approx(190 / 200)
    assert class_metrics(scores, labels)["acc1"] == pytest.approx(0.94)
    assert protocols._on_classes_of_variants("cifar10", scores, labels) == {}


def test_imagenets_class_folders_are_named_without_a_conversion(tmp_path):
    for wnid in ("n02123045", "n01440764"):
        (tmp_path / "val" / wnid).mkdir(parents=True)
        (tmp_path / "val" / wnid / "x.jpg").write_bytes(draw("x", 24)[0])
    names, prompts = read_classes(str(tmp_path), open_images(str(tmp_path), train=False))
    assert names == ["tench", "tabby cat"]
    assert len(prompts) == 80
    (tmp_path / "val" / "n02123045").rename(tmp_path / "val" / "n99999999")
    with pytest.raises(UserError, match=r"n99999999\) named by a WNID that is none of .*classnames.txt"):
        read_classes(str(tmp_path), open_images(str(tmp_path), train=False))
