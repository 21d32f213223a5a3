"""ONNX: what onnxruntime computes from an export, wherever it is moved to."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from small_training import train_short

from shards_spec.models import load_model
from training.export import ExportConfig, export, to_onnx
from training.export.comparison import compare, encoders_of
from training.export.onnx_model import load_onnx
from training.export.probe import noise
from training.runs.student import load_run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train_short(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("exports")
    export(ExportConfig(run, str(path / "first"), format="onnx"))
    return shutil.move(path / "first", path / "moved")


def test_both_towers_compute_the_same_for_any_batch(run, folder):
    student, _ = load_run(run)
    loaded = load_onnx(str(folder))
    assert (loaded.mean, loaded.std, loaded.image_size) == (student.mean, student.std, student.image_size)
    for count in (1, 5):
        pixels = torch.randn(count, 3, 32, 32)
        tokens = student.tokenizer(["a red ball"] * count)
        with torch.no_grad():
            image = student.model.encode_image(pixels, normalize=True)
            text = student.model.encode_text(tokens, normalize=True)
        torch.testing.assert_close(loaded.model.encode_image(pixels), image, rtol=0, atol=1e-5)
        torch.testing.assert_close(loaded.model.encode_text(tokens), text, rtol=0, atol=1e-5)


def test_images_and_texts_go_in_as_they_are(folder):
    model = load_onnx(str(folder)).model
    images = model.embed_images([Image.new("L", (50, 40), 128), Image.new("RGB", (32, 32), "red")])
    texts = model.embed_texts(["a red ball", "two cats"])
    for features in (images, texts):
        assert features.shape == (2, 16)
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)


def test_nothing_names_the_machine(run, folder):
    here = str(folder.parent)
    for path in folder.iterdir():
        assert here.encode() not in path.read_bytes(), path.name
        assert b"site-packages" not in path.read_bytes(), path.name
    described = json.loads((folder / "onnx_config.json").read_text())
    graph = onnx.load(folder / described["image"]["file"])
    assert graph.opset_import[0].version == described["opset"]
    assert graph.graph.input[0].name == described["image"]["input"]
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert (folder / "README.md").read_text().startswith("---\nlicense: unknown\nlibrary_name: onnx\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileCLIP-tiny", "SiCLIP-tiny"])
def test_towers_of_mobileclip_have_their_weights_once(name, tmp_path):
    student = load_model(name, random_weights=True)
    to_onnx.write(tmp_path, student, ExportConfig("run", str(tmp_path), format="onnx"))
    same = compare(encoders_of(student), encoders_of(load_onnx(str(tmp_path))), noise(student))
    assert same.difference < 1e-4
    assert min(same.image_cosine, same.text_cosine) > 0.9999
    for file, tower in (("image.onnx", student.model.visual), ("text.onnx", student.model.text)):
        stored = sum(np.prod(weight.dims) for weight in onnx.load(tmp_path / file).graph.initializer)
        assert stored < 1.02 * sum(parameter.numel() for parameter in tower.parameters())
