"""What runs say of a few images, against what `clipmill eval` measures."""

import pkgutil

import pytest
import torch
from small_data import draw
from small_training import train_short, write_retrieval

from clipmill import COMMANDS, _call
from pipeline.core.command_line import parse
from shards_spec.files import DataError
from shards_spec.sample import Sample
from shards_spec.tar import write_shard
from training.evaluation.guesses import guess_images
from training.evaluation.zero_shot import Encoder, retrieval
from training.runs.student import load_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train_short(tmp_path_factory.mktemp("run"))


def write_classes(root, labels, broken=()):
    samples = []
    for index, label in enumerate(labels):
        image = draw(str(index))[0]
        data = image[:100] if index in broken else image
        samples.append(Sample(f"k{index}", {"jpg": data, "cls": str(label).encode()}))
    write_shard(str(root / "test" / "0.tar"), samples)
    (root / "test" / "nshards.txt").write_text("1\n")
    (root / "classnames.txt").write_text("".join(f"thing {n}\n" for n in range(7)))
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}\n")
    return str(root)


def test_best_classes_with_their_probabilities(run, tmp_path):
    root = write_classes(tmp_path / "toys", [0, 3, 6, 2], broken=(2,))
    guesses = guess_images({"a": run, "b": run}, root, count=9, device="cpu")
    assert (guesses.dataset, [one.key for one in guesses.images]) == ("toys", ["k0", "k1", "k2", "k3"])
    assert [one.truth for one in guesses.images] == [("thing 0",), ("thing 3",), ("thing 6",), ("thing 2",)]
    assert guesses.images[2].guesses == {}  # it does not decode
    loaded, _ = load_run(run)
    encoder = Encoder(loaded, 8, "cpu")
    texts = torch.nn.functional.normalize(encoder.texts([f"a photo of a thing {n}." for n in range(7)]), dim=-1)
    _, features = next(encoder.images([("", Sample("k1", {"jpg": draw("1")[0]}))]))
    logits = loaded.model.logit_scale.exp() * torch.nn.functional.normalize(features, dim=-1) @ texts.T
    expected = logits.softmax(-1)[0].topk(5)
    best = guesses.images[1].guesses["a"]
    assert [guess.score for guess in best] == pytest.approx(expected.values.tolist(), rel=1e-5)
    assert [guess.text for guess in best] == [f"thing {n}" for n in expected.indices]
    assert [guess.is_right for guess in best] == [n == 3 for n in expected.indices]
    assert best == guesses.images[1].guesses["b"]


def test_best_captions_agree_with_recall(run, tmp_path):
    root = write_retrieval(tmp_path / "set")
    guesses = guess_images({"a": run}, root, count=8, device="cpu")
    first_is_right = [one.guesses["a"][0].is_right for one in guesses.images]
    loaded, _ = load_run(run)
    assert sum(first_is_right) / 8 == retrieval(Encoder(loaded, 8, "cpu"), root)[0]["text_retrieval_recall@1"]
    assert "among the 8 captions of 8 images" in guesses.score


def test_runs_that_cannot_be_asked_are_silent(run, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text('{"recipe": "clip"}')
    guesses = guess_images({"new": str(tmp_path / "new"), "old": run}, write_retrieval(tmp_path / "s"), count=1)
    assert "has no checkpoint yet" in guesses.silent["new"]
    assert set(guesses.images[0].guesses) == {"old"}
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="has no image"):
        guess_images({"old": run}, write_classes(tmp_path / "none", []), count=2)


def test_command_asks_the_runs(run, tmp_path, capsys):
    page = tmp_path / "page.html"
    words = [run, "--data", write_classes(tmp_path / "toys", [0, 3]), "--output", str(page), "--device", "cpu"]
    command = COMMANDS["compare"]
    config = parse("compare", pkgutil.resolve_name(command.config), words)
    assert _call("compare", pkgutil.resolve_name(command.function), config) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert "What they say of images of toys" in page.read_text()
