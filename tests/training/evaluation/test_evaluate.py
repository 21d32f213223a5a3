"""Evaluation where the right answers are known."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_data import draw, tiny_coca
from small_training import tiny_clip, tiny_config, train_short, write_packed

from shards_spec.files import DataError, UserError
from shards_spec.models import load_model
from shards_spec.sample import Sample
from shards_spec.tar import write_shard
from shards_spec.unused_options import refuse_unused
from training.config import ModelConfig
from training.data.labelled_images import find_split
from training.evaluation.clip_benchmark import check_root
from training.evaluation.config import EvalConfig
from training.evaluation.stage import distinct_names, evaluate, print_result
from training.evaluation.zero_shot import Encoder, measure, recalls, retrieval, zeroshot
from training.export import ExportConfig, export
from training.runs.student import load_student, new_student
from training.trainer import train

COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train_short(tmp_path_factory.mktemp("run"))


def write_eval(root: Path, shards, kind="classification"):
    """A CLIP_benchmark root; ``shards`` are lists of (image bytes, extension, label or captions)."""
    member = "cls" if kind == "classification" else "txt"
    for shard, samples in enumerate(shards):
        write_shard(
            str(root / "test" / f"{shard}.tar"),
            [
                Sample(f"s{shard}{i:04d}", {extension: image, member: str(answer).encode()})
                for i, (image, extension, answer) in enumerate(samples)
            ],
        )
    (root / "test" / "nshards.txt").write_text(f"{len(shards)}\n")
    if kind == "retrieval":
        (root / "dataset_type.txt").write_text("retrieval\n")
    else:
        (root / "classnames.txt").write_text("\n".join(COLOURS) + "\n")
        (root / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n{c}\n")
    return str(root)


def plain(colour, extension="png"):
    file = io.BytesIO()
    Image.new("RGB", (40, 32), COLOURS[colour]).save(file, {"jpg": "JPEG"}.get(extension, extension.upper()))
    return file.getvalue()


class Seer(torch.nn.Module):
    """A model that sees an image's mean colour and reads colour words: the right answer, known beforehand."""

    def encode_image(self, images):
        return F.one_hot(images.mean(dim=(2, 3)).argmax(dim=1), 3).float()

    def encode_text(self, tokens):
        return tokens.float()


@pytest.fixture
def seer(tmp_path):
    loaded = load_model(tiny_clip(tmp_path / "any"), random_weights=True)
    model = Seer()
    model.visual = torch.nn.Module()
    model.visual.preprocess_cfg = open_clip.get_model_preprocess_cfg(loaded.model)

    def tokenizer(texts):
        return torch.tensor([[int(colour in text) for colour in COLOURS] for text in texts])

    return Encoder(dataclasses.replace(loaded, model=model, tokenizer=tokenizer), batch_size=2, device="cpu")


def test_zeroshot_of_a_model_that_knows(seer, tmp_path):
    right = [(plain("red"), "png", 0), (plain("green", "jpg"), "jpg", 1), (plain("blue", "webp"), "webp", 2)]
    wrong = [(plain("red"), "png", 1), (plain("green"), "png", 1)]
    metrics, count = zeroshot(seer, write_eval(tmp_path / "eval", [right, wrong]))
    assert count == 5
    assert metrics["acc1"] == pytest.approx(4 / 5)
    assert metrics["acc5"] == 1.0
    assert metrics["mean_per_class_recall"] == pytest.approx((1 + 2 / 3 + 1) / 3)


def test_recall_is_over_the_classes_that_occur(seer, tmp_path):
    samples = [(plain("red"), "png", 0), (plain("green"), "png", 2)]
    metrics, _ = zeroshot(seer, write_eval(tmp_path / "eval", [samples]))
    assert metrics["mean_per_class_recall"] == pytest.approx(0.5)


def test_acc5_counts_the_five_best(seer, tmp_path, monkeypatch):
    root = write_eval(tmp_path / "eval", [[(plain("red"), "png", 6)]])
    Path(root, "classnames.txt").write_text("".join(f"class {i}\n" for i in range(8)))
    angles = torch.linspace(0, 1.4, 8)
    order = torch.tensor([0, 3, 4, 1, 6, 2, 7, 5])  # class 6 is fifth
    features = torch.zeros(8, 2)
    features[order] = torch.stack([angles.cos(), angles.sin()], dim=1)
    monkeypatch.setattr(seer, "texts", lambda texts: features[[int(texts[0].split()[-1].rstrip("."))] * len(texts)])
    monkeypatch.setattr(seer, "_encode", lambda encode, pixels: torch.tensor([[1.0, 0.0]] * len(pixels)))
    assert zeroshot(seer, root)[0]["acc5"] == 1.0
    Path(root, "test", "0.tar").unlink()
    write_eval(tmp_path / "more", [[(plain("red"), "png", 2)]])
    shutil.copy(tmp_path / "more" / "test" / "0.tar", Path(root, "test", "0.tar"))
    assert zeroshot(seer, root)[0]["acc5"] == 0.0


def test_classes_are_renormalised_means_of_their_prompts(tmp_path):
    """Against the formula written out, on a random student."""
    loaded = new_student(ModelConfig(tiny_clip(tmp_path / "model")), 0)
    encoder = Encoder(loaded, batch_size=3, device="cpu")
    samples = [(draw(str(i))[0], "jpg", i % 3) for i in range(7)]
    metrics, _ = zeroshot(encoder, write_eval(tmp_path / "eval", [samples]))
    with torch.no_grad():
        rows = []
        for name in COLOURS:
            prompts = F.normalize(loaded.model.encode_text(loaded.tokenizer([f"a photo of {name}.", name])), dim=-1)
            rows.append(F.normalize(prompts.mean(0), dim=0))
        transform = open_clip.image_transform(32, is_train=False, mean=loaded.mean, std=loaded.std)
        images = torch.stack([transform(Image.open(io.BytesIO(data)).convert("RGB")) for data, _, _ in samples])
        guesses = (F.normalize(loaded.model.encode_image(images), dim=-1) @ torch.stack(rows).T).argmax(1)
    right = guesses == torch.tensor([answer for _, _, answer in samples])
    assert metrics["acc1"] == pytest.approx(right.float().mean().item())


def test_retrieval_of_a_model_that_knows(seer, tmp_path):
    samples = [
        (plain("red"), "png", "something red\nred again"),
        (plain("green"), "png", "green"),
        (plain("blue"), "png", "nothing\nblue\n"),
    ]
    metrics, count = retrieval(seer, write_eval(tmp_path / "eval", [samples], "retrieval"))
    assert count == 3
    assert metrics["text_retrieval_recall@1"] == 1.0
    assert metrics["image_retrieval_recall@1"] == pytest.approx(4 / 5)  # "nothing" matches no image
    assert metrics["image_retrieval_recall@5"] == 1.0


def test_recalls_equal_clip_benchmarks(monkeypatch):
    """CLIP_benchmark's own formulation (scores, positive pairs, recall_at_k), on random features."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.randint(0, 40, (120,), generator=generator).sort().values
    owner = torch.cat([owner, torch.arange(40)])
    images = F.normalize(torch.randn(40, 8, generator=generator), dim=-1)
    texts = F.normalize(images[owner] + 0.7 * torch.randn(160, 8, generator=generator), dim=-1)
    positive = torch.zeros(160, 40, dtype=torch.bool)
    positive[torch.arange(160), owner] = True

    def recall_at_k(scores, positive, k):
        best = F.one_hot(scores.topk(k, dim=1).indices, positive.shape[1])
        return (positive[:, None].float() * best.float()).sum(dim=(1, 2)) / positive.sum(dim=1)

    scores = texts @ images.T
    expected = {}
    for k in (1, 5, 10):
        expected[f"image_retrieval_recall@{k}"] = (recall_at_k(scores, positive, k) > 0).float().mean().item()
        expected[f"text_retrieval_recall@{k}"] = (recall_at_k(scores.T, positive.T, k) > 0).float().mean().item()
    monkeypatch.setattr("training.evaluation.zero_shot.CHUNK", 32)
    assert recalls(images, texts, owner) == pytest.approx(expected)
    assert 0 < expected["text_retrieval_recall@1"] < 1


def test_blank_lines_of_captions_are_captions(seer, tmp_path):
    """As in CLIP_benchmark, whose rule is str.splitlines: every line, the blank ones too."""
    samples = [
        (plain("red"), "png", "red\n\nred again\n"),
        (plain("green"), "png", "green"),
        (plain("blue"), "png", "\n"),
    ]
    asked, texts = list[str](), seer.texts
    seer.texts = lambda captions: asked.extend(captions) or texts(captions)
    metrics, count = retrieval(seer, write_eval(tmp_path / "eval", [samples], "retrieval"))
    assert asked == ["red", "", "red again", "green", ""]
    assert count == 3
    assert metrics["image_retrieval_recall@10"] == 1.0


def test_a_broken_image_is_left_out_and_counted(seer, tmp_path):
    samples = [(plain("red"), "png", 0), (plain("green")[:40], "png", 0), (plain("blue"), "png", 2)]
    metrics, count = zeroshot(seer, write_eval(tmp_path / "eval", [samples]))
    assert (count, seer.skipped, metrics["acc1"]) == (2, 1, 1.0)


def test_a_run_is_measured_and_its_result_kept(run, tmp_path, capsys):
    root = write_eval(tmp_path / "colours", [[(plain("red"), "png", 0), (plain("green"), "png", 1)]])
    (result,) = evaluate(EvalConfig(run, (root,)))
    assert json.loads(Path(run, "eval", "colours_zeroshot.json").read_text()) == result
    assert (result["dataset"], result["task"], result["language"]) == ("colours", "zeroshot_classification", "en")
    assert (result["recipe"], result["step"], result["samples"], result["pretrained"]) == ("clip", 2, 2, run)
    assert set(result["metrics"]) == {"acc1", "acc5", "mean_per_class_recall"}
    assert "acc1" in capsys.readouterr().out
    pairs = write_eval(
        tmp_path / "pairs", [[(plain("red"), "png", "red"), (plain("blue"), "png", "blue")]], "retrieval"
    )
    assert evaluate(EvalConfig(run, (pairs,), precision="bf16"))[0]["task"] == "zeroshot_retrieval"
    assert Path(run, "eval", "pairs_retrieval.json").exists()


def test_two_roots_of_one_name_are_two_results(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples = [(plain(colour), "png", n) for n, colour in enumerate(COLOURS)]
    roots = [write_eval(Path(name), [samples[: n + 1]]) for n, name in enumerate(("a/x", "b/x", "y"))]
    roots[1] += "/"
    results = evaluate(EvalConfig(run, tuple(roots), output="results"))
    written = {f"{x}_zeroshot.json" for x in ("a-x", "b-x", "y")}
    assert {path.name for path in Path("results").iterdir()} == {*written, "summary.json", "features"}
    assert [(result["dataset"], result["samples"]) for result in results] == [("a-x", 1), ("b-x", 2), ("y", 3)]
    assert [json.loads(Path(f"results/{result['dataset']}_zeroshot.json").read_text()) for result in results] == results


@pytest.mark.parametrize(
    ("roots", "names"),
    [
        (["/d/x"], ["x"]),
        (["/d/x/", "/d/x"], ["x", "x"]),
        (["/d/a/x/test", "/d/b/x/test", "/d/test"], ["a-x-test", "b-x-test", "d-test"]),
        (["/d/x", "s3://d/x"], ["d-x", "s3-d-x"]),
        (["/p/a/x", "/q/a/x", "/r/p-a-x"], ["p-a-x", "q-a-x", "r-p-a-x"]),
    ],
)
def test_names_of_datasets(roots, names):
    assert distinct_names(roots, "data") == names


def test_any_model_is_measured(tmp_path):
    model = tiny_coca(tmp_path / "model")
    root = write_eval(tmp_path / "colours", [[(plain("red"), "png", 0)]])
    output = tmp_path / "results"
    assert evaluate(EvalConfig(model, (root,), output=str(output)))[0]["model"] == model
    assert json.loads((output / "colours_zeroshot.json").read_text())["samples"] == 1
    assert evaluate(EvalConfig(model.removeprefix("local-dir:"), (root,)))[0]["model"] == model


def test_paths_of_results_are_printed_whole(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    output = tmp_path / ("a_long_name_" * 12)
    root = write_eval(tmp_path / "colours", [[(plain("red"), "png", 0)]])
    evaluate(EvalConfig(run, (root,), output=str(output)))
    assert str(output / "colours_zeroshot.json") in capsys.readouterr().out.splitlines()


def test_the_name_of_a_data_set_is_neither_markup_nor_a_terminals_command(tmp_path, capsys):
    result = {"dataset": "[/red]\x1b[2J", "task": "zeroshot", "samples": 1, "skipped": 0, "metrics": {"acc1": 1.0}}
    print_result(result, f"{tmp_path}/\x1b[2J.json")
    out = capsys.readouterr().out
    assert "[/red]\\x1b[2J" in out
    assert "\x1b" not in out


def write_folders(root: Path, split="test"):
    """Class folders of colours with a wrong image among them; names sort as blue, green, red."""
    for colour, shown in (("red", "red"), ("green", "green"), ("blue", "blue"), ("blue", "red")):
        folder = root / split / colour / "deeper"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{shown}.png").write_bytes(plain(shown))
    (root / split / ".ipynb_checkpoints").mkdir()
    (root / split / "red" / "notes.txt").write_text("x")
    return str(root)


@pytest.mark.parametrize("split", ["test", "val"])
def test_class_folders_are_measured_as_shards_are(seer, tmp_path, split):
    root = write_folders(tmp_path / "folders", split)
    check_root(root)
    found, metrics, count = measure(seer, root)
    assert (found, count, metrics["acc1"]) == ("zeroshot", 4, 3 / 4)
    assert metrics["mean_per_class_recall"] == pytest.approx((1 + 1 + 1 / 2) / 3)


def test_class_folders_take_names_and_prompts_of_files(seer, tmp_path):
    root = write_folders(tmp_path / "folders")
    Path(root, "classnames.txt").write_text("red\ngreen\nblue\n")  # of blue/, green/, red/
    assert zeroshot(seer, root)[0]["acc1"] == pytest.approx(2 / 4)
    Path(root, "zeroshot_classification_templates.txt").write_text("{}\n")
    with pytest.raises(UserError, match=r"has no \{c\}"):
        zeroshot(seer, root)
    Path(root, "classnames.txt").write_text("red\ngreen\n")
    with pytest.raises(UserError, match=r"classnames.txt has 2 lines, .*/test 3 class folders; give a line per folder"):
        check_root(root)


def test_class_folders_measure_a_run_while_it_trains(tmp_path):
    root, folders = tmp_path / "data", write_folders(tmp_path / "folders")
    write_packed(str(root), [8])
    tiny_clip(root / "models" / "clip")
    out = train("clip", tiny_config("clip", str(root), str(tmp_path / "out"), steps=2, eval_data=folders))
    assert (Path(out) / "checkpoints" / "best.pt").exists()
    assert evaluate(EvalConfig(out, (folders,), best=True))[0]["samples"] == 4


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pretrained": "x.pt"}, "--pretrained 'x.pt' would not be used"),
        ({"raw": True}, "--raw would not be used"),
        ({"best": True}, "--best would not be used"),
    ],
)
def test_options_that_would_not_be_used_are_refused(tmp_path, fields, said):
    model = tiny_coca(tmp_path / "model").removeprefix("local-dir:")
    with pytest.raises(UserError, match=said):
        evaluate(EvalConfig(model, (str(tmp_path),), **fields))


@pytest.mark.parametrize(
    ("fields", "given", "said"),
    [
        ({"neighbours": 5}, "neighbours", "--neighbours 5 would not be used without --task knn"),
        ({"cost_images": 5}, "cost_images", "--cost-images 5 would not be used without --cost"),
        ({"data": (), "cost": True, "batch_size": 5}, "batch_size", "--batch-size 5 would not be used without --data"),
    ],
)
def test_options_of_what_is_not_measured_are_refused(fields, given, said):
    refuse_unused(EvalConfig("m", ("x",), task="knn"), {"neighbours", "batch_size"})
    with pytest.raises(UserError, match=said):
        refuse_unused(EvalConfig(**{"model": "m", "data": ("x",), **fields}), {given})


def test_a_run_takes_no_weights_of_others(run, tmp_path):
    with pytest.raises(UserError, match=r"--pretrained 'x\.pt' would not be used"):
        evaluate(EvalConfig(run, (str(tmp_path),), pretrained="x.pt"))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda r: (r / "classnames.txt").unlink(), UserError, "classnames.txt is not there: it holds one class name"),
        (lambda r: (r / "zeroshot_classification_templates.txt").unlink(), UserError, "templates.txt is not there"),
        (
            lambda r: (r / "zeroshot_classification_templates.txt").write_text("photo\n"),
            UserError,
            "'photo' has no {c}",
        ),
        (lambda r: (r / "test" / "nshards.txt").unlink(), UserError, "test/nshards.txt is not there"),
        (lambda r: (r / "test" / "nshards.txt").write_text("x"), UserError, "says 'x': it must be a number"),
        (lambda r: (r / "test" / "nshards.txt").write_text("3"), UserError, "test/1.tar is not there, though"),
        (
            lambda r: (r / "classnames.txt").write_text("red\n"),
            DataError,
            "0.tar: key s00001 has class '1', not a number",
        ),
        (lambda r: (r / "dataset_type.txt").write_text("video"), UserError, "dataset_type.txt says 'video'"),
        (
            lambda r: (r / "dataset_type.txt").write_text("retrieval"),
            DataError,
            "key s00000 has no caption (member txt)",
        ),
    ],
)
def test_what_is_missing_is_named(spoil, error, message, run, tmp_path):
    root = write_eval(tmp_path / "eval", [[(plain("red"), "png", 0), (plain("green"), "png", 1)]])
    spoil(Path(root))
    with pytest.raises(error) as raised:
        evaluate(EvalConfig(run, (root,)))
    assert message in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_folders_that_are_no_model(tmp_path):
    (tmp_path / "test" / "red").mkdir(parents=True)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_text('{"recipe": "clip"}')
    with pytest.raises(UserError, match="begun: the run has no checkpoint yet"):
        evaluate(EvalConfig(str(begun), ("x",)))
    with pytest.raises(UserError, match="neither a RUN folder"):
        evaluate(EvalConfig(str(tmp_path), (str(tmp_path),)))
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    for name in (str(tmp_path / "timm"), f"timm:local-dir:{tmp_path}/timm"):
        with pytest.raises(UserError, match=r"clipmill export timm:local-dir:/.*timm --to FOLDER --format onnx"):
            evaluate(EvalConfig(name, ("x",)))
    with pytest.raises(UserError, match=r"no RUN folder of `clipmill train`; it is .* timm:local-dir:/.*timm"):
        export(ExportConfig(str(tmp_path / "timm"), str(tmp_path / "to")))
    with pytest.raises(UserError, match=r"no RUN folder of `clipmill train`; it is .* timm:local-dir:/.*timm"):
        load_student(ModelConfig(str(tmp_path / "timm")), 0)
    with pytest.raises(UserError, match="no-such-model"):
        evaluate(EvalConfig("no-such-model", (str(tmp_path),)))
    with pytest.raises(UserError, match=r"no RUN folder of `clipmill train`"):
        export(ExportConfig(str(tmp_path), str(tmp_path / "to")))


def test_class_folders_one_level_off_are_told_with_the_way_out(tmp_path):
    for folder in ("set/cat", "set/dog", "imagenet/val/n01440764"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    said = {}
    for name in ("set", "nosuch", "file"):
        with pytest.raises(UserError) as error:
            find_split(str(tmp_path / name))
        said[name] = str(error.value)
    assert said["set"].endswith(f"move them below {tmp_path}/set/test")
    assert said["nosuch"] == f"{tmp_path}/nosuch is not there; check the path"
    assert said["file"] == f"{tmp_path}/file is a file, not a folder; check the path"
    with pytest.raises(UserError, match="give the folder above"):
        find_split(str(tmp_path / "imagenet" / "val"))
    assert find_split(str(tmp_path / "imagenet")) == "val"
