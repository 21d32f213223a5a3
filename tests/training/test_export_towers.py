"""ONNX of image towers without a text tower: with classes, with a vocabulary, with tied weights, without a head."""

import dataclasses
import json
import shutil

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from small_catlip import TINY, write_folders
from small_training import tiny_config, write_packed

from pipeline.report.results import read_evaluations
from shards_spec.files import DataError, UserError
from shards_spec.models import EvalCrop
from shards_spec.vocab import Vocabulary
from training.data.eval_crop import eval_pixels
from training.data.labelled_images import open_images
from training.evaluation.classification import plain_rows
from training.evaluation.config import EvalConfig
from training.evaluation.features import load_embedding_model
from training.evaluation.stage import evaluate
from training.evaluation.zero_shot import preprocessing
from training.export import ExportConfig, export, to_onnx, to_timm
from training.export.comparison import Encoders, compare, encoders_of
from training.export.onnx_int8 import quantize
from training.export.onnx_model import load_onnx
from training.export.probe import Probe, noise, read_probe
from training.models.classifier import load_timm_classifier, new_classifier
from training.trainer import train

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]
CROP = EvalCrop(0.9, "bicubic", "squash")
SMALL = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32}


def small_vit(classes: int):
    student = new_classifier("timm:vit_tiny_patch16_224", classes, options=SMALL)
    return dataclasses.replace(student, image_size=SMALL["img_size"])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("images"), train=8, test=4)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "probe"
    train("probe", tiny_config("probe", images, str(out), model="timm:test_vit", sides=(), steps=2, batch_size=4))
    return str(out)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("exports") / "probe"
    export(ExportConfig(run, str(path), format="onnx"))
    return path


def test_a_classifier_is_measured_as_its_run_is(run, folder, images, tmp_path):
    """Its own classes, and what its features give neighbours."""
    for task in ("auto", "knn"):
        config = EvalConfig((run, str(folder)), (images,), task=task, output=str(tmp_path), device="cpu")
        student, exported = evaluate(config)
        assert exported["metrics"] == student["metrics"], task
    assert {path.name for path in folder.iterdir()} == {
        "image.onnx",
        "onnx_config.json",
        "classifier.json",
        "README.md",
    }


def test_it_says_what_it_gives(folder):
    described = json.loads((folder / "onnx_config.json").read_text())
    assert described["classes"] == ["blue", "red"]
    assert described["image"].items() >= {"output": "logits", "features": "features"}.items()
    graph = onnx.load(folder / "image.onnx").graph
    assert [output.name for output in graph.output] == ["logits", "features"]
    assert [output.type.tensor_type.shape.dim[0].dim_param for output in graph.output] == ["batch", "batch"]
    card = (folder / "README.md").read_text()
    assert "An image classifier, made by `clipmill export` from step 2 of the run probe." in card
    assert "pipeline_tag: image-classification" in card


def test_its_cost_has_images_only(folder, tmp_path):
    (result,) = evaluate(EvalConfig(str(folder), cost=True, cost_images=2, output=str(tmp_path), device="cpu"))
    assert json.loads((tmp_path / "cost_onnx.json").read_text()) == result
    assert result["weights_bytes"] == (folder / "image.onnx").stat().st_size
    [speed] = result["speed"]
    assert set(speed["images_per_s"]) == {"1", "64"}
    assert "texts_per_s" not in speed


def test_what_needs_texts_or_other_options_is_refused(folder, images, tmp_path):
    with pytest.raises(UserError, match=r"has no text tower, and a search compares"):
        load_embedding_model(str(folder))
    with pytest.raises(UserError, match=r"--precision bf16 would not be used: .* is an ONNX export"):
        evaluate(EvalConfig((str(folder),), (images,), precision="bf16"))
    with pytest.raises(UserError, match=r"--task zeroshot needs texts"):
        evaluate(EvalConfig((str(folder),), (images,), task="zeroshot"))
    with pytest.raises(UserError, match=r"--raw would not be used: timm:local-dir:x is no RUN"):
        export(ExportConfig("timm:local-dir:x", str(tmp_path / "to"), raw=True, format="onnx"))
    with pytest.raises(UserError, match=r"local-dir:nowhere"):
        export(ExportConfig("timm:local-dir:nowhere", str(tmp_path / "to"), format="onnx"))
    (tmp_path / "moved").mkdir()
    for name in ("classifier.json", "onnx_config.json"):
        (tmp_path / "moved" / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match=r"image.onnx is not there; export again"):
        load_onnx(str(tmp_path / "moved"))
    (tmp_path / "moved" / "image.onnx").write_bytes((folder / "image.onnx").read_bytes())
    described = json.loads((folder / "classifier.json").read_text())
    for changes, message in (
        ({"classes": 3}, r"image.onnx has logits of width 2, the files beside it say 3: it is of another export"),
        ({"image_size": 64}, r"image.onnx has pixels of width \d+, the files beside it say 64"),
        ({"model": None}, r"classifier.json is damaged: model is no string; export again"),
    ):
        (tmp_path / "moved" / "classifier.json").write_text(json.dumps(described | changes))
        with pytest.raises(DataError, match=message):
            load_onnx(str(tmp_path / "moved"))


def test_a_student_without_labels_gives_features_alone(tmp_path):
    """As TinyMIM leaves it: its head was never trained."""
    student = small_vit(1)
    to_onnx.write(tmp_path, student, ExportConfig("run", str(tmp_path), format="onnx"))
    exported = load_onnx(str(tmp_path))
    same = compare(encoders_of(student), encoders_of(exported), noise(student))
    assert same.difference < 1e-5
    assert same.image_cosine > 0.9999
    assert same.agreement is None
    assert json.loads((tmp_path / "onnx_config.json").read_text())["classes"] is None
    assert not exported.model.has_classes
    assert exported.model(noise(student).pixels).shape == (8, 32)
    path = tmp_path / "onnx_config.json"
    described = json.loads(path.read_text())
    for name in ("logits", "answers"):
        path.write_text(json.dumps(described | {"image": described["image"] | {"output": name}}))
        with pytest.raises(DataError, match=rf"image.onnx has no {name} \(but features\), it is of another export"):
            load_onnx(str(tmp_path))
    path.write_text(json.dumps(described))
    assert ".encode_image(loaded" in to_onnx.usage(student)


def test_a_folder_of_timms_with_a_vocabulary(images, tmp_path):
    """CatLIP's classes are synsets, which lie in its folders, and images are prepared as its config says."""
    rows = tuple((f"n{number:08d}", f"thing_{number}", 1, 1) for number in range(5))
    vocabulary = Vocabulary(rows, {"source": "original"})
    student = new_classifier(TINY, 5, vocabulary=vocabulary, options={"embed_dim": 64, "num_heads": 2, "depth": 2})
    student = dataclasses.replace(student, image_size=48, crop=CROP)  # positions are interpolated
    config = ExportConfig("run", str(tmp_path / "timm"), format="timm")
    to_timm.write(tmp_path / "timm", student, config)
    name = f"timm:local-dir:{tmp_path / 'timm'}"
    export(ExportConfig(name, str(tmp_path / "onnx"), format="onnx"))
    exported = load_onnx(str(tmp_path / "onnx"))
    assert exported.model.class_names == [wnid for wnid, *_ in rows]
    assert exported.model.vocabulary.sha256 == vocabulary.sha256
    same = compare(encoders_of(student), encoders_of(exported), noise(student))
    assert (same.agreement, same.accuracy) == (1, None)
    assert same.difference < 1e-5
    assert (
        json.loads((tmp_path / "onnx" / "onnx_config.json").read_text())["image"]["preprocess"].items()
        >= {
            "size": 48,
            **CROP._asdict(),
        }.items()
    )
    plain = dataclasses.replace(exported, crop=None)
    timms = timm.data.create_transform(
        **timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'timm'}"))
    )
    for image in (Image.effect_noise((70, 50), 80).convert("RGB"), Image.effect_noise((50, 90), 80).convert("RGB")):
        pixels = eval_pixels(image, exported, 48)
        torch.testing.assert_close(exported.normalise(pixels.unsqueeze(0))[0], timms(image))
        assert not torch.equal(pixels, eval_pixels(image, plain, 48))
    rows, plain_crops = (plain_rows(open_images(images, train=False), loaded) for loaded in (exported, plain))
    assert rows.student.crop == CROP
    assert not torch.equal(rows[0]["images"], plain_crops[0]["images"])
    assert preprocessing(exported) != preprocessing(plain)
    assert "from the timm model timm." in (tmp_path / "onnx" / "README.md").read_text()


@pytest.fixture(scope="module")
def timm_folders(tmp_path_factory):
    """Folders of timm's: with a vocabulary of five synsets, and without labels."""
    folder = tmp_path_factory.mktemp("timm")
    rows = tuple((f"n{number:08d}", f"thing_{number}", 1, 1) for number in range(5))
    options = {"embed_dim": 64, "num_heads": 2, "depth": 2}
    catlip = new_classifier(TINY, 5, vocabulary=Vocabulary(rows, {"source": "original"}), options=options)
    for name, student in (("catlip", catlip), ("mim", small_vit(1))):
        to_timm.write(folder / name, student, ExportConfig("run", str(folder / name), format="timm"))
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_overwrite_leaves_nothing_of_the_former_model(timm_folders, tmp_path):
    """Its classes would be taken for those of the new one."""
    to = shutil.copytree(timm_folders / "catlip", tmp_path / "to")
    (to / "README.md").write_text("of CatLIP")
    former = contents(to)
    config = ExportConfig(f"timm:local-dir:{timm_folders / 'mim'}", str(to), format="timm")
    for kind in ("timm", "onnx"):
        with pytest.raises(UserError, match=r"is vocabulary"):
            export(dataclasses.replace(config, format=kind))
    assert contents(to) == former
    export(dataclasses.replace(config, overwrite=True))
    assert set(contents(to)) == {"config.json", "model.safetensors", "classifier.json", "README.md"}
    assert "of CatLIP" not in (to / "README.md").read_text()


def test_a_vocabulary_of_another_model_is_refused(timm_folders, tmp_path):
    folder = shutil.copytree(timm_folders / "mim", tmp_path / "mim")
    shutil.copy(timm_folders / "catlip" / "vocabulary.tsv", folder)
    with pytest.raises(UserError, match=r"vocabulary.tsv has 5 synsets, and the model beside it 1 class: .*delete it"):
        load_timm_classifier(f"timm:local-dir:{folder}")


def test_the_models_own_folder_and_a_run_are_never_written_to(timm_folders, run, tmp_path):
    source = timm_folders / "mim"
    (tmp_path / "link").symlink_to(source)
    former = contents(source)
    for to in (source, tmp_path / "link"):
        with pytest.raises(UserError, match=r"is the folder of the model itself"):
            export(ExportConfig(f"timm:local-dir:{source}", str(to), format="onnx", overwrite=True))
    with pytest.raises(UserError, match=r"is the folder of the model itself"):
        export(ExportConfig(run, run, overwrite=True))
    assert contents(source) == former
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_text('{"recipe": "clip"}')
    (tmp_path / "stages" / "stage-1").mkdir(parents=True)
    for to in (unfinished, tmp_path / "stages"):
        with pytest.raises(UserError, match=r"is a RUN; name a folder of its own"):
            export(ExportConfig(f"timm:local-dir:{source}", str(to), overwrite=True))
    assert set(contents(unfinished)) == {"config.json"}


@pytest.mark.parametrize("size", [(1, 160, 160), (3, 64, 32)])
def test_images_that_are_not_square_or_not_rgb_are_refused(size, tmp_path):
    """Before torch translates anything."""
    trunk = timm.create_model("test_vit", num_classes=2, in_chans=size[0])
    trunk.pretrained_cfg = trunk.pretrained_cfg | {"input_size": size}
    timm.models.save_for_hf(trunk, tmp_path / "model", model_args={"in_chans": size[0]}, safe_serialization=True)
    reason = r"its input is {} x {} x {}".format(*size)
    with pytest.raises(UserError, match=rf"does not take square RGB images \({reason}\)"):
        export(ExportConfig(f"timm:local-dir:{tmp_path / 'model'}", str(tmp_path / "to"), format="onnx"))
    assert not (tmp_path / "to").exists()


def test_large_logits_are_compared_by_their_size():
    """Rounding grows with them; a difference of another kind does not pass."""
    student = small_vit(3)
    pixels = noise(student).pixels
    for scale, expected in ((1e4, 1e-6), (0.5, 5e-7)):
        logits = torch.nn.functional.normalize(torch.randn(len(pixels), 3)) * scale
        logits[0] = torch.tensor([scale, 0, 0])
        ours, theirs = ((lambda images, found=found: found[: len(images)]) for found in (logits, logits * (1 + 1e-6)))
        found = compare(Encoders(ours, None, True), Encoders(theirs, None, True), Probe(pixels, []))
        assert found.difference == pytest.approx(expected, rel=0.2)


def test_tied_weights_are_stored_once(tmp_path):
    """Of MiniViT, in eight bits too."""
    student = new_classifier("timm:mini_deit_test", 6, options={"depth": 2, "groups": 1})
    tied = sum(parameter.numel() for parameter in student.model.parameters())
    to_onnx.write(tmp_path, student, ExportConfig("run", str(tmp_path), format="onnx"))
    path = tmp_path / "image.onnx"
    for cosine in (0.9999, 0.98):
        stored = sum(np.prod(weight.dims) for weight in onnx.load(path).graph.initializer)
        assert stored < 1.1 * tied
        same = compare(encoders_of(student), encoders_of(load_onnx(str(tmp_path))), noise(student))
        assert same.image_cosine > cosine
        quantize(path, "dynamic", "pixels", noise(student).pixels)
    assert same.difference > 1e-5


def test_pairs_calibrate_and_check_images_alone(tmp_path):
    """A caption is no class."""
    write_packed(str(tmp_path), [4])
    probe = read_probe(str(tmp_path), small_vit(2), 3, "calibrate")
    assert probe.pixels.shape == (3, 3, 32, 32)
    assert probe.targets is None


def test_other_classes_are_no_truth(images):
    for names, truth in ((["blue", "red"], [0, 1]), (["red", "blue"], None)):
        student = small_vit(2)
        student.model.names = names
        targets = read_probe(images, student, 2, "check").targets
        assert (targets if targets is None else sorted(set(targets.tolist()))) == truth


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["catlip", "tinymim", "minivit", "finetune"])
def test_a_run_of_every_recipe_in_eight_bits(recipe, images, labelled_root, clip_root, tmp_path):
    """What the recipe trained, its vocabulary and its speed beside the run's own."""
    fields = {
        "catlip": {"data": labelled_root, "model": TINY, "sides": (32,), "base_side": 32},
        "tinymim": {
            "data": clip_root,
            "model": "timm:test_vit",
            "teacher": "timm:test_vit",
            "teacher_weights": "random",
        },
        "minivit": {"model": "timm:mini_swin_test", "teacher": "none", "label_weight": 1.0, "warmup_lr": None},
        "finetune": {"model": f"local-dir:{clip_root}/models/clip", "sides": (32,), "base_side": 32},
    }[recipe]
    if recipe == "finetune":
        fields["model"] = train("clip", tiny_config("clip", clip_root, str(tmp_path / "clip"), steps=1))
    run = train(recipe, tiny_config(recipe, images, str(tmp_path / "run"), **{"steps": 2, "warmup": 0, **fields}))
    to = tmp_path / "onnx"
    export(ExportConfig(run, str(to), format="onnx", int8="dynamic"))
    for model, output in ((run, None), (str(to), f"{run}/eval")):
        evaluate(EvalConfig((model,), cost=True, cost_images=2, output=output, device="cpu"))
    read = read_evaluations(f"{run}/eval", [])
    assert read.onnx_cost["precision"] == "int8 dynamic"
    assert set(read.onnx_cost["speed"][0]["images_per_s"]) == set(read.cost["speed"][0]["images_per_s"]) == {"1", "64"}
    assert (to / "vocabulary.tsv").exists() == (recipe == "catlip")
    if recipe in ("minivit", "finetune"):
        (result,) = evaluate(EvalConfig((str(to),), (images,), output=str(tmp_path)))
        assert result["samples"] == 8
