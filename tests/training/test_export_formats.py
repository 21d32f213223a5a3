"""The folders of timm and transformers: what these libraries read from them, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from PIL import Image
from small_training import tiny_clip, train_short, write_retrieval

from shards_spec.files import UserError
from shards_spec.models import load_model, weights_sha256
from training.export import ExportConfig, export, to_open_clip, to_timm, to_transformers
from training.export.card import ExportedWeights, result_lines
from training.export.comparison import compare, encoders_of
from training.export.plain_vit import check_plain_text, check_plain_vit
from training.export.probe import noise, read_probe
from training.export.reparameterized import reparameterized
from training.runs.student import load_run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]
TEXTS = ["a red ball", "Two CATS, one's asleep…", "naïve café 😀 12", "", "many words " * 30]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train_short(tmp_path_factory.mktemp("run"))


def random_clip(folder, **changes):
    """A tiny CLIP with other entries in its config; random weights."""
    name = tiny_clip(folder)
    path = folder / "open_clip_config.json"
    described = json.loads(path.read_text())
    for part, entries in changes.items():
        if isinstance(entries, dict):
            described["model_cfg"][part] |= entries
        else:
            described["model_cfg"][part] = entries
    path.write_text(json.dumps(described))
    return load_model(name, random_weights=True)


def moved_export(run, tmp_path, **options):
    export(ExportConfig(run, str(tmp_path / "to"), **options))
    return shutil.move(tmp_path / "to", tmp_path / "moved")


def test_transformers_computes_the_same_from_images_and_texts(run, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    folder = moved_export(run, tmp_path, format="transformers", check=str(Path(run).parent))
    monkeypatch.chdir("/")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    student, _ = load_run(run)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    images = [Image.effect_noise((50, 40), 80).convert("RGB"), Image.new("RGB", (32, 32), "red")]
    inputs = processor(text=TEXTS, images=images, padding=True, truncation=True, return_tensors="pt")
    expected = student.tokenizer(TEXTS)
    for found, wanted in zip(inputs["input_ids"], expected, strict=True):
        length = int((wanted > 0).sum())
        assert found[:length].tolist() == wanted[:length].tolist()
    preprocess = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(student.model)), is_train=False
    )
    pixels = torch.stack([preprocess(image) for image in images])
    assert (inputs["pixel_values"] - pixels).abs().max() < 0.1  # of a range of 4; torchvision resizes in its own way
    inputs["pixel_values"] = pixels
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
        image = student.model.encode_image(pixels, normalize=True)
        text = student.model.encode_text(expected, normalize=True)
    torch.testing.assert_close(logits, student.model.logit_scale.exp() * image @ text.mT, rtol=1e-4, atol=1e-4)
    assert all(str(tmp_path) not in file.read_text() for file in folder.glob("*.json"))


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_activations_and_kinds_of_clip(tmp_path, custom_text, quick_gelu):
    pytest.importorskip("transformers")
    student = random_clip(tmp_path / "model", custom_text=custom_text, quick_gelu=quick_gelu)
    config = ExportConfig(str(tmp_path / "model"), str(tmp_path / "to"), format="transformers")
    to_transformers.write(tmp_path / "to", student, config)
    exported = to_transformers.load(tmp_path / "to", student, config)
    assert compare(encoders_of(student), exported, noise(student)).difference < 1e-5
    timm_config = dataclasses.replace(config, to=str(tmp_path / "timm"), format="timm")
    to_timm.write(tmp_path / "timm", student, timm_config)
    same = compare(encoders_of(student), to_timm.load(tmp_path / "timm", student, timm_config), noise(student))
    assert same.difference < 1e-5
    assert same.text_cosine is None
    said = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert said["architecture"] == f"vit_base_patch16_clip{'_quickgelu' if quick_gelu else ''}_224"
    assert said["model_args"]["depth"] == 1
    assert said["model_args"]["img_size"] == [32, 32]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vision_cfg": {"pool_type": "avg"}}, "pools by avg"),
        ({"vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 2}}, "pools by attention"),
        ({"vision_cfg": {"no_ln_pre": True}}, "no LayerNorm before"),
        ({"vision_cfg": {"ls_init_value": 0.1}}, "layer scales"),
        ({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None}}, "image tower is ModifiedResNet"),
        ({"text_cfg": {"no_causal_mask": True}}, "no causal mask"),
        ({"text_cfg": {"pool_type": "last"}}, "pools by last"),
        ({"init_logit_bias": -10.0}, "logits have a bias"),
    ],
)
def test_what_is_not_plain_is_refused_by_name(tmp_path, changes, reason):
    student = random_clip(tmp_path / "model", **changes)
    check = check_plain_text if "text_cfg" in changes or "init_logit_bias" in changes else check_plain_vit
    with pytest.raises(UserError, match=f"no such model: its .*{reason}.*; use --format"):
        check(student.model, "transformers")


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    pytest.importorskip("transformers")
    student = random_clip(
        tmp_path / "model", text_cfg={"tokenizer_kwargs": {"bpe_path": "bpe.txt.gz", "clean": "canonicalize"}}
    )
    config = ExportConfig("run", str(tmp_path / "to"), format="transformers")
    with pytest.raises(UserError, match="its tokenizer has clean"):
        to_transformers.write(tmp_path / "to", student, config)
    assert not (tmp_path / "to").exists()


def test_timm_reads_the_image_tower(run, tmp_path, monkeypatch):
    folder = moved_export(run, tmp_path, format="timm")
    monkeypatch.chdir("/")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    student, _ = load_run(run)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), student.model.encode_image(pixels), rtol=1e-4, atol=1e-5)
    data = timm.data.resolve_model_data_config(model)
    assert (tuple(data["mean"]), tuple(data["std"])) == (student.mean, student.std)
    assert data["input_size"] == (3, 32, 32)
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    preprocess = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(student.model)), is_train=False
    )
    torch.testing.assert_close(timm.data.create_transform(**data)(image), preprocess(image))


@pytest.mark.parametrize("name", [pytest.param("MobileCLIP-tiny", marks=pytest.mark.slow), "SiCLIP-tiny"])
def test_fused_branches_compute_the_same(tmp_path, name):
    student = load_model(name, random_weights=True)
    spread = torch.Generator().manual_seed(0)
    for key, buffer in student.model.named_buffers():
        if key.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=spread)
    fused = reparameterized(student)
    config = ExportConfig("run", str(tmp_path / "fused"), reparameterize=True)
    to_open_clip.write(tmp_path / "fused", fused, config)
    exported = to_open_clip.load(tmp_path / "fused", fused, config)
    assert compare(encoders_of(student), exported, noise(student)).difference < 1e-5
    assert len(fused.model.state_dict()) < 0.8 * len(student.model.state_dict())
    with pytest.raises(UserError, match="timm reads no fused FastViT"):
        to_timm.write(tmp_path / "timm", fused, config)
    to_timm.write(tmp_path / "timm", student, config)
    same = compare(encoders_of(student), to_timm.load(tmp_path / "timm", student, config), noise(student))
    assert same.difference < 1e-5
    assert to_timm.needed_module(student) == "training.models.siclip"


def test_half_precision_halves_the_file_and_is_close(run, tmp_path):
    for dtype in ("fp32", "fp16"):
        export(ExportConfig(run, str(tmp_path / dtype), dtype=dtype))
    sizes = [(tmp_path / dtype / "open_clip_model.safetensors").stat().st_size for dtype in ("fp32", "fp16")]
    assert sizes[1] < 0.55 * sizes[0]
    one, other = (load_model(f"local-dir:{tmp_path / dtype}") for dtype in ("fp32", "fp16"))
    same = compare(encoders_of(one), encoders_of(other), noise(one))
    assert 0 < same.difference < 2e-3
    with pytest.raises(UserError, match=r"--dtype fp16: w has numbers above 65,504"):
        to_open_clip.as_dtype({"w": torch.tensor([1e5])}, "fp16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"int8": "dynamic"}, "--int8 dynamic would not be used: it belongs to --format onnx"),
        ({"format": "timm", "opset": 20}, "--opset 20 would not be used"),
        ({"format": "onnx", "int8": "static"}, "--int8 static needs --calibrate ROOT"),
        ({"format": "onnx", "calibrate": "x"}, "--calibrate x would not be used: it belongs to --int8 static"),
        ({"format": "onnx", "int8": "dynamic", "dtype": "fp16"}, "--int8 dynamic with --dtype fp16: give one"),
        ({"samples": 0}, "--samples 0: must be 1 or more"),
        ({"to": "s3://bucket/model"}, "give a local folder"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(UserError, match=message):
        ExportConfig(**{"run": "run", "to": "to", **options})


def test_what_a_run_cannot_do_is_said(run, tmp_path):
    with pytest.raises(UserError, match="--reparameterize: the student has no parallel branches"):
        export(ExportConfig(run, str(tmp_path / "to"), reparameterize=True))
    with pytest.raises(UserError, match="is no RUN folder"):
        export(ExportConfig(str(tmp_path), str(tmp_path / "to")))
    with pytest.raises(UserError, match="not there; check the path"):
        export(ExportConfig(run, str(tmp_path / "to"), check=str(tmp_path / "none")))
    assert not (tmp_path / "to").exists()
    export(ExportConfig(run, str(tmp_path / "to"), format="timm"))
    with pytest.raises(UserError, match=r"has another model \(config.json\)"):
        export(ExportConfig(run, str(tmp_path / "to")))
    export(ExportConfig(run, str(tmp_path / "to"), overwrite=True))
    assert not (tmp_path / "to" / "model.safetensors").exists()  # of timm: both would be found


def test_the_card_names_what_the_run_was(run, tmp_path):
    shutil.copytree(run, tmp_path / "red balls")
    (tmp_path / "red balls" / "eval").mkdir()
    for step, value in ((2, 0.25), (1, 0.5)):
        result = {"dataset": f"flowers{step}", "metrics": {"acc1": value}, "step": step}
        (tmp_path / "red balls" / "eval" / f"{step}.json").write_text(json.dumps(result))
    export(ExportConfig(str(tmp_path / "red balls"), str(tmp_path / "to"), license="cc-by-4.0"))
    text = (tmp_path / "to" / "README.md").read_text()
    assert text.startswith("---\nlicense: cc-by-4.0\nlibrary_name: open_clip\n")
    for part in ("step 2 of the run red balls.", "`clipmill train clip`, batch_size 4, steps 2", "samples seen: 8"):
        assert part in text
    assert "- flowers2, acc1: 0.2500" in text
    assert "flowers1" not in text  # of another step
    assert str(tmp_path) not in text
    assert str(Path(run).parent) not in text


def test_the_card_has_the_results_that_eval_wrote_elsewhere(run, tmp_path):
    """Of several models there is a folder each; another run's, and another step's, are not this model's."""
    of_run = {"dataset": "birds", "metrics": {"acc1": 0.75}, "step": 2, "pretrained": run, "recipe": "clip"}
    written = {
        "one/birds.json": of_run,
        "several/a/birds.json": of_run | {"dataset": "fish"},
        "several/b/birds.json": of_run | {"dataset": "trees", "pretrained": str(tmp_path)},
        "several/a/old.json": of_run | {"dataset": "stones", "step": 1},
        "several/summary.json": {"rows": []},
        "others/birds.json": of_run | {"step": 1},
    }
    for name, result in written.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result))
    folders = (str(tmp_path / "one"), str(tmp_path / "several"))
    weights = ExportedWeights(2, "sha")
    lines = result_lines(ExportConfig(run, str(tmp_path / "to"), results=folders), weights)
    assert lines == ["- birds, acc1: 0.7500", "- fish, acc1: 0.7500"]
    with pytest.raises(UserError, match=r"--results .*others: no result of these weights \(step 2 of "):
        export(ExportConfig(run, str(tmp_path / "to"), results=(*folders, str(tmp_path / "others"))))
    assert not (tmp_path / "to").exists()
    export(ExportConfig(run, str(tmp_path / "to"), results=folders))
    assert "- fish, acc1: 0.7500\n" in (tmp_path / "to" / "README.md").read_text()


def test_the_card_has_the_scores_of_its_own_weights_wherever_they_were_measured(run, tmp_path, monkeypatch):
    """An average's, not the raw weights' of the same step; of a run that was named by another path since."""
    moved = shutil.copytree(run, tmp_path / "moved")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"ema_decay": 0.5}))
    path = moved / "checkpoints" / "step_000002.pt"
    state = torch.load(path, weights_only=False)
    state["ema"] = {"logit_scale": torch.tensor(1.0)}
    torch.save(state, path)
    Path(f"{path}.sha256").unlink()
    of_step = json.dumps({"step": 2, "eval": {"acc1": 0.9}})
    (moved / "metrics.jsonl").write_text(of_step + "\n")
    measured = {}
    for name, value in (("average", 0.75), ("raw", 0.25)):
        student, step = load_run(str(moved), raw=name == "raw")
        measured[name] = ExportedWeights(step, weights_sha256(student.model))
        result = {"dataset": "birds", "metrics": {"acc1": value}, "step": 2, "pretrained": "elsewhere/run"}
        result["measured_with"] = {"weights_sha256": measured[name].sha256}
        for folder in (moved / "eval", tmp_path / "out" / name):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.json").write_text(json.dumps(result))
    assert measured["average"].sha256 != measured["raw"].sha256
    options = {"results": (str(tmp_path / "out"),)}
    lines = result_lines(ExportConfig(str(moved), "to", **options), measured["average"])
    assert lines == ["- eval_data, acc1: 0.9000", "- birds, acc1: 0.7500"]
    assert result_lines(ExportConfig(str(moved), "to", raw=True, **options), measured["raw"]) == [
        "- birds, acc1: 0.2500"
    ]
    with pytest.raises(UserError, match="no result of these weights"):
        result_lines(ExportConfig(str(moved), "to", results=(str(tmp_path / "out" / "raw"),)), measured["average"])


def test_probes_of_datasets(run, tmp_path):
    student, _ = load_run(run)
    pairs = read_probe(str(Path(run).parent), student, 3, "check")
    assert (len(pairs.pixels), len(pairs.texts), pairs.targets.tolist()) == (3, 3, [0, 1, 2])
    assert len(set(pairs.texts)) == 3
    retrieval = read_probe(write_retrieval(tmp_path / "eval"), student, 64, "check")
    assert len(retrieval.texts) == 8
    for name in ("red", "blue"):
        (tmp_path / "classes" / "test" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 40), name).save(tmp_path / "classes" / "test" / name / f"{number}.png")
    (tmp_path / "classes" / "test" / "blue" / "0.png").write_bytes(b"no image")
    classes = read_probe(str(tmp_path / "classes"), student, 64, "check")
    assert classes.texts == ["a photo of a blue.", "a photo of a red."]
    assert classes.targets.tolist() == [0] * 3 + [1] * 4
    for path in (tmp_path / "classes" / "test").glob("*/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"--calibrate .* none of its images can be used"):
        read_probe(str(tmp_path / "classes"), student, 64, "calibrate")
