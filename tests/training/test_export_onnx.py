"""ONNX: what onnxruntime computes from an export, wherever it is moved to."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from small_training import train_short, write_retrieval

from pipeline.report.results import read_evaluations
from shards_spec.files import DataError, UserError
from shards_spec.models import load_model
from training.evaluation.config import EvalConfig
from training.evaluation.stage import evaluate
from training.export import ExportConfig, export, to_onnx
from training.export.comparison import compare, encoders_of
from training.export.onnx_int8 import quantize
from training.export.onnx_model import load_onnx, onnxruntime
from training.export.probe import noise, read_probe
from training.export.to_onnx import export_graph
from training.models.classifier import new_classifier
from training.models.text_tower import TextTower
from training.models.tinyclip_pruned import PrunedTextTower
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


@pytest.mark.parametrize(("kind", "cosine"), [("dynamic", 0.99), ("static", 0.98)])
def test_eight_bits_are_smaller_and_close(folder, run, tmp_path, kind, cosine):
    student, _ = load_run(run)
    shutil.copytree(folder, tmp_path / "int8")
    probe = read_probe(str(Path(run).parent), student, 8, "calibrate")
    quantize(tmp_path / "int8" / "image.onnx", kind, "pixels", probe.pixels)
    quantize(tmp_path / "int8" / "text.onnx", kind, "tokens", student.tokenizer(probe.texts))
    close = compare(encoders_of(student), encoders_of(load_onnx(str(tmp_path / "int8"))), probe)
    assert close.difference > 1e-4
    assert min(close.image_cosine, close.text_cosine) > cosine
    weights = onnx.load(tmp_path / "int8" / "text.onnx").graph.initializer
    assert max(np.prod(weight.dims) for weight in weights if weight.data_type == onnx.TensorProto.INT8) >= 32 * 128
    assert (tmp_path / "int8" / "text.onnx").stat().st_size < 0.5 * (folder / "text.onnx").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"int8": "dynamic"}, {"int8": "static", "calibrate": "ROOT"}, {"dtype": "fp16"}])
def test_smaller_numbers_by_the_command(run, tmp_path, capsys, options):
    root = str(Path(run).parent)
    given = {name: root if value == "ROOT" else value for name, value in options.items()}
    export(ExportConfig(run, str(tmp_path), format="onnx", check=root, opset=19, **given))
    printed = capsys.readouterr().out
    assert "own text is best" in printed
    assert "same best text for" in printed
    described = json.loads((tmp_path / "onnx_config.json").read_text())
    assert (described["dtype"], described["opset"]) == ("int8 " + options["int8"] if "int8" in options else "fp16", 19)


def test_text_towers_with_other_poolings_and_blocks(tmp_path):
    tower = TextTower(8, context_length=8, vocab_size=50, width=16, heads=2, layers=2, kernel_size=3, share=2).eval()
    sizes = {"width": 16, "heads": [1, 0], "neurons": [8, 0], "head_width": 8, "norm_eps": 1e-5, "act_kwargs": None}
    shared = {"original": {}, "masks": False, "context_length": 8, "vocab_size": 50, "no_causal_mask": False}
    irregular = PrunedTextTower(8, **sizes, **shared, pool_type="eos", eos_id=49).eval()
    tokens = torch.randint(0, 49, (4, 8))
    tokens[torch.arange(4), torch.arange(4) + 2] = 49
    for name, module in (("mobileclip", tower), ("tinyclip", irregular)):
        path = tmp_path / f"{name}.onnx"
        export_graph(module, tokens[:3], "tokens", path)
        session = onnxruntime().InferenceSession(str(path))
        with torch.no_grad():
            for count in (1, 4):
                found = session.run(None, {"tokens": tokens[:count].numpy()})[0]
                np.testing.assert_allclose(found, module(tokens[:count]).numpy(), rtol=0, atol=1e-5)


def test_what_is_missing_or_damaged_is_named(folder, run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"onnx_config\.json is not there"):
        load_onnx(str(tmp_path))
    with pytest.raises(UserError, match=r"--opset 7: must be 18 to \d+"):
        export(ExportConfig(run, str(tmp_path / "to"), format="onnx", opset=7))
    newest = onnx.defs.onnx_opset_version()
    with pytest.raises(UserError, match=rf"--opset {newest}: onnxruntime .* does not read it .*; give a lower --opset"):
        export(ExportConfig(run, str(tmp_path / "to"), format="onnx", opset=newest))
    assert not (tmp_path / "to").exists()
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "text.onnx").write_bytes(b"no graph")
    with pytest.raises(DataError, match=r"text.onnx cannot be read by onnxruntime"):
        load_onnx(str(tmp_path / "copy"))
    (tmp_path / "copy" / "text.onnx").unlink()
    with pytest.raises(UserError, match=r"text.onnx is not there; export again"):
        load_onnx(str(tmp_path / "copy"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"a package is missing .*clipmill\[onnx\]"):
        export(ExportConfig(run, str(tmp_path / "to"), format="onnx"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime is needed .*clipmill\[onnx\]"):
        load_onnx(str(folder))
    assert not (tmp_path / "to").exists()


def test_a_folder_of_parts_of_others_is_told(folder, tmp_path):
    """Each file that is missing, damaged, or of another export is named when the folder is loaded."""

    def said(name, content):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        if content is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(content)
        with pytest.raises((DataError, UserError)) as raised:
            load_onnx(str(copy))
        shutil.rmtree(copy)
        assert str(raised.value).endswith("; export again, or copy the whole folder")
        assert f"{copy}" in str(raised.value)
        return str(raised.value)

    described = json.loads((folder / "onnx_config.json").read_text())
    assert "onnx_config.json is damaged: dtype is no string" in said("onnx_config.json", b"{}")
    assert "onnx_config.json is damaged: dtype is no string" in said("onnx_config.json", b"[]")
    assert "not a readable JSON file" in said("onnx_config.json", b"{")
    assert "image.file is no string" in said("onnx_config.json", json.dumps(described | {"image": {}}).encode())
    assert "text.file is no string" in said("onnx_config.json", json.dumps(described | {"text": 1}).encode())
    assert "logit_scale is no number" in said("onnx_config.json", json.dumps(described | {"logit_scale": ""}).encode())
    narrow = json.dumps(described | {"embed_dim": 4}).encode()
    assert "image.onnx has features of width 16, the files beside it say 4" in said("onnx_config.json", narrow)
    no_texts = json.dumps({key: value for key, value in described.items() if key != "text"}).encode()
    assert "classifier.json is not there" in said("onnx_config.json", no_texts)
    assert "open_clip_config.json is not there" in said("open_clip_config.json", None)
    assert "model_cfg is no object" in said("open_clip_config.json", b"{}")
    no_size = json.dumps({"model_cfg": {}, "preprocess_cfg": {}}).encode()
    assert "preprocess_cfg.size is no number" in said("open_clip_config.json", no_size)
    assert "bpe.txt.gz is not there" in said("bpe.txt.gz", None)
    assert "its tokenizer cannot be read" in said("bpe.txt.gz", (folder / "bpe.txt.gz").read_bytes()[:100])
    assert "image.onnx has no pixels (but tokens)" in said("image.onnx", (folder / "text.onnx").read_bytes())


def test_it_is_evaluated_as_the_run_is(folder, run, tmp_path):
    data = (write_retrieval(tmp_path / "eval"),)
    found = [evaluate(EvalConfig((str(model),), data, output=str(tmp_path)))[0]["metrics"] for model in (run, folder)]
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mini_deit_test", "mini_swin_test"])
def test_tied_blocks_have_their_weights_once(tmp_path, name):
    tower = new_classifier(f"timm:{name}", 8).model.trunk
    images = torch.randn(3, 3, 32, 32)
    export_graph(tower, images, "pixels", tmp_path / "tower.onnx")
    found = onnxruntime().InferenceSession(str(tmp_path / "tower.onnx")).run(None, {"pixels": images[:1].numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, tower(images[:1]).numpy(), rtol=0, atol=1e-5)
    stored = sum(np.prod(weight.dims) for weight in onnx.load(tmp_path / "tower.onnx").graph.initializer)
    assert stored < 1.1 * sum(parameter.numel() for parameter in tower.parameters())


def test_the_cost_of_an_export_stands_beside_the_runs(run, folder, capsys):
    out = Path(run, "eval")
    (result,) = evaluate(EvalConfig(str(folder), cost=True, cost_images=2, output=str(out), device="cpu"))
    assert json.loads((out / "cost_onnx.json").read_text()) == result
    assert (result["task"], result["precision"], result["runtime"]) == ("cost_onnx", "fp32", "onnxruntime")
    files = [Path(folder, name) for name in ("image.onnx", "text.onnx")]
    assert result["weights_bytes"] == sum(file.stat().st_size for file in files)
    [speed] = result["speed"]
    assert (speed["device"], speed["threads"], speed["peak_mib"]) == ("cpu", torch.get_num_threads(), {})
    assert set(speed["images_per_s"]) == set(speed["texts_per_s"]) == {"1", "64"}
    assert min(speed["images_per_s"].values()) > 0
    assert "2 images in a row, cpu" in capsys.readouterr().out
    read = read_evaluations(str(out), [])
    assert (read.onnx_cost, read.unread) == (result, 0)
