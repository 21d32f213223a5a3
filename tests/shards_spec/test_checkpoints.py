"""Weights of others: what is read, what is refused and in what words, and that nothing of theirs runs."""

import argparse
import json
import os
import pickle
import shutil
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_training import BPE, tiny_clip

from shards_spec.checkpoints import TRUST, describe_mismatch, load_checkpoint, read_checkpoint, strip_wrappers
from shards_spec.files import DataError, UserError
from shards_spec.models import Trust, load_model, load_teacher, remote_code
from training.models.classifier import new_classifier

MOST = 700  # characters of a message: a few lines
COCA = str(Path(__file__).parents[2] / "demo/models/coca")
WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2)}


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture
def trap(tmp_path):
    """What a pickle makes when it runs; the test fails at its end if it did."""
    path = tmp_path / "it_ran"
    yield Touch(str(path))
    assert not path.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "extra",
    [
        {"epoch": 3, "name": "run"},
        {"args": argparse.Namespace(lr=1e-3, model="ViT-B-32", more=[1, None])},
        {
            "best": np.float64(0.5),
            "loss": np.float32(1),
            "step": np.int64(7),
            "ok": np.bool_(True),
            "d": np.dtype("f2"),
        },
    ],
    ids=["plain", "namespace", "numpy"],
)
def test_what_training_loops_keep_beside_weights_is_read(tmp_path, zipped, extra):
    path = str(tmp_path / "epoch_3.pt")
    torch.save({"state_dict": WEIGHTS, **extra}, path, _use_new_zipfile_serialization=zipped)
    found = load_checkpoint(path)
    assert list(found) == list(WEIGHTS)
    assert all(torch.equal(found[name], value) for name, value in WEIGHTS.items())


def test_scalars_of_numpy_1_are_read(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"state_dict": WEIGHTS, "best": np.float64(0.25)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert b"cnumpy._core.multiarray\n" in data
    path.write_bytes(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert read_checkpoint(str(path))["best"] == 0.25


def test_safetensors_are_known_by_content(tmp_path):
    save_file(WEIGHTS, tmp_path / "weights.bin")
    assert set(load_checkpoint(str(tmp_path / "weights.bin"))) == set(WEIGHTS)
    torch.save(WEIGHTS, tmp_path / "weights.safetensors")
    assert set(load_checkpoint(str(tmp_path / "weights.safetensors"))) == set(WEIGHTS)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", ["code", "array", "defaultdict", "module"])
def test_anything_else_needs_trust_and_does_not_run(tmp_path, trap, zipped, kind):
    objects = {"code": trap, "array": np.ones(3), "defaultdict": defaultdict(int), "module": torch.nn.Linear(2, 2)}
    path = str(tmp_path / "x.pt")
    torch.save({"state_dict": WEIGHTS, "extra": objects[kind]}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as found:
        load_checkpoint(path)
    assert TRUST in str(found.value)
    assert path in str(found.value)
    assert len(str(found.value)) < MOST
    if kind != "code":
        assert set(load_checkpoint(path, trust=True)) == set(WEIGHTS)


def test_trust_runs_what_the_file_says(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"state_dict": WEIGHTS, "extra": Touch(str(tmp_path / "ran"))}, path)
    load_checkpoint(str(path), trust=True)
    assert (tmp_path / "ran").exists()


def test_a_torchscript_archive_is_a_program(tmp_path):
    path = str(tmp_path / "ViT-B-32.pt")  # OpenAI's are such
    torch.jit.save(torch.jit.trace(torch.nn.Linear(3, 2), torch.zeros(1, 3)), path)
    with pytest.raises(UserError, match=r"is a TorchScript archive, a program; .*--trust-checkpoint"):
        load_checkpoint(path)
    assert set(load_checkpoint(path, trust=True)) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>" + b"x" * 50_000, "web page"),
        (b"", "0 bytes"),
        (b"Entry not found", "neither safetensors nor a format of torch's"),
        (b'{"error": "x"}', "not a readable checkpoint"),
        (b"\x1f\x8b" + b"0" * 50, "packed with gzip"),
        (b"PK\x03\x04" + b"0" * 50, "cut short or damaged"),
        (os.urandom(5000), "not a readable checkpoint"),
        (pickle.dumps({"a": 1}), "not a readable checkpoint"),
    ],
    ids=["pointer", "page", "empty", "text", "json", "gzip", "zip", "noise", "pickle"],
)
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_files_that_are_none_are_named(tmp_path, data, said, name):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=said) as found:
        load_checkpoint(str(path))
    assert str(path) in str(found.value)
    assert len(str(found.value)) < MOST


@pytest.mark.parametrize("held", [[1], {}, torch.ones(3), {"x": 1}, {3: torch.ones(1)}], ids=str)
def test_files_without_weights_are_named(tmp_path, held):
    torch.save(held, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt holds no weights by name but"):
        load_checkpoint(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weights_that_are_no_numbers_are_named(tmp_path, dtype):
    fine = {"a": torch.ones(2), "mask": torch.full((2,), -torch.inf), "steps": torch.tensor(3)}
    torch.save(fine, tmp_path / "fine.pt")
    assert load_checkpoint(str(tmp_path / "fine.pt")).keys() == fine.keys()
    torch.save(fine | {"b": torch.tensor([1, torch.nan], dtype=dtype)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt: b holds values that are no numbers"):
        load_checkpoint(str(tmp_path / "x.pt"))


def test_a_runs_own_checkpoint_is_named(tmp_path):
    torch.save({"task": {"student.a": torch.ones(1)}, "progress": {"step": 3}}, tmp_path / "step_000003.pt")
    with pytest.raises(UserError, match="is a checkpoint of a RUN; name the RUN folder"):
        load_checkpoint(str(tmp_path / "step_000003.pt"))


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_every_cut_and_flip_is_read_or_named(tmp_path, kind):
    path = tmp_path / "x.pt"
    if kind == "safetensors":
        save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=kind == "zip")
    whole, said, cut = path.read_bytes(), list[str](), 0
    for at in range(0, len(whole), max(1, len(whole) // 150)):
        flipped = bytearray(whole)
        flipped[at] ^= 0xFF
        for data in (bytes(flipped), whole[:at]):
            path.write_bytes(data)
            try:
                load_checkpoint(str(path))
            except UserError as error:
                said.append(str(error))
                cut += data == whole[:at]
    assert cut >= 150
    assert all(str(path) in text and len(text) < MOST for text in said)


def test_folders_pipes_and_absent_files_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("pipe", "no regular file"), (".", "is a folder"), ("absent.pt", "is not there")):
        with pytest.raises(UserError, match=said):
            load_checkpoint(str(tmp_path / name))


def test_a_broken_checkpoint_of_a_run_is_the_datasets_fault(tmp_path):
    (tmp_path / "step_000001.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match="the fix"):
        read_checkpoint(str(tmp_path / "step_000001.pt"), given=False, fix="the fix")


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("module.visual.proj", "visual.proj"),
        ("_orig_mod.visual.proj", "visual.proj"),
        ("module._orig_mod.visual.proj", "visual.proj"),
        ("_orig_mod.module.visual.proj", "visual.proj"),
        ("visual._orig_mod.proj", "visual.proj"),
        ("visual.module.proj", "visual.proj"),
        ("text.blocks.0._orig_mod.attn.module.weight", "text.blocks.0.attn.weight"),
        ("my_module.module_list.0", "my_module.module_list.0"),
        ("module", "module"),
    ],
)
def test_names_of_wrappers_go(name, bare):
    assert strip_wrappers(name) == bare


def test_a_models_own_module_stays():
    own = ["blocks.0.module.weight"]
    assert strip_wrappers("module.blocks.0.module.weight", own) == "blocks.0.module.weight"
    assert strip_wrappers("_orig_mod.blocks.0.module.weight", own) == "blocks.0.module.weight"


def test_a_name_twice_is_refused(tmp_path):
    torch.save({"a": torch.ones(1), "module.a": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="twice, with and without module"):
        load_checkpoint(str(tmp_path / "x.pt"))


def test_a_state_dict_of_another_model_is_told_in_a_line():
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(2000)))
    other = {f"visual.a_long_name.{n}.weight": torch.ones(1) for n in range(2000)} | {"0.weight": torch.ones(2, 2)}
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(other)
    assert len(str(error.value)) > 40_000
    text = describe_mismatch(error.value)
    assert len(text) < MOST
    assert text.startswith(
        "3999 weights missing (0.bias, 1.weight, 1.bias, ...); 2000 weights left over (visual.a_long"
    )
    assert text.endswith("1 of another shape (0.weight is [2, 2], the model's [3, 3])")


# --- models --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path):
    """(name, weights) of a tiny CLIP without a file of weights."""
    name = tiny_clip(tmp_path / "clip")
    return name, load_model(name, random_weights=True).model.state_dict()


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("ending", ["pt", "bin", "safetensors"])
def test_open_clip_models_take_wrapped_checkpoints(tmp_path, clip, wrapper, ending):
    name, weights = clip
    path = (
        tmp_path / "clip" / {"pt": "model.pth", "bin": "open_clip_pytorch_model.bin"}.get(ending, "model.safetensors")
    )
    renamed = {f"{wrapper}{key}": value + 0.5 for key, value in weights.items()}
    if ending == "safetensors":
        save_file(renamed, path)
    else:
        torch.save({"epoch": 1, "state_dict": renamed, "args": argparse.Namespace(x=np.float32(1))}, path)
    loaded = load_model(name).model.state_dict()
    assert all(torch.equal(loaded[key], value + 0.5) for key, value in weights.items())


def test_a_model_that_does_not_fit_is_told_in_few_lines(tmp_path, clip):
    save_file({f"other.{key}": value.clone() for key, value in clip[1].items()}, tmp_path / "clip/model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors does not fit local-dir:.*weights missing") as found:
        load_model(clip[0])
    assert len(str(found.value)) < MOST


def places(tmp_path, trap):
    """(what, call) for every place that takes weights of others."""
    evil = tmp_path / "evil.pt"
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": trap}, evil)
    for number, ending in enumerate(["open_clip_pytorch_model.bin", "model.pth", "open_clip_model.safetensors"]):
        name = tiny_clip(tmp_path / f"m{number}")
        shutil.copy(evil, Path(name.removeprefix("local-dir:")) / ending)
        yield ending, lambda name=name: load_model(name)
    yield "--pretrained", lambda: load_model("ViT-S-32-alt", str(evil))
    yield "--pretrained of timm", lambda: load_teacher("timm:vit_tiny_patch16_224", str(evil))
    yield "--pretrained of a classifier", lambda: new_classifier("timm:resnet18", 3, pretrained=str(evil))
    for ending in ("npz", "npy"):
        array = tmp_path / f"evil.{ending}"
        if ending == "npz":
            np.savez(array, a=np.array([trap], dtype=object), allow_pickle=True)
        else:
            np.save(array, np.array([trap], dtype=object), allow_pickle=True)
        yield ending, lambda array=array: load_model("ViT-B-16-SigLIP", str(array))
        yield f"{ending} of timm", lambda array=array: load_teacher("timm:vit_tiny_patch16_224", str(array))
    for ending in ("pytorch_model.bin", "model.pth"):
        folder = tmp_path / f"timm_{ending}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": {}}))
        shutil.copy(evil, folder / ending)
        yield f"timm:local-dir {ending}", lambda folder=folder: load_teacher(f"timm:local-dir:{folder}")
        yield "timm:local-dir", lambda folder=folder: new_classifier(f"timm:local-dir:{folder}", 3, pretrained="timm")


@pytest.mark.integration
def test_a_planted_pickle_runs_in_no_place_that_takes_weights(tmp_path, trap):
    tried = 0
    for what, call in places(tmp_path, trap):
        with pytest.raises(UserError) as found:
            call()
        assert len(str(found.value)) < MOST, what
        assert not Path(trap.path).exists(), what
        tried += 1
    assert tried == 14


def test_a_planted_pickle_in_a_run_does_not_run(tmp_path, trap):
    from training.runs.checkpoint_files import load_checkpoint
    from training.runs.run_folder import RunFolder
    from training.runs.student import load_run

    run = RunFolder(str(tmp_path / "run"))
    run.save(1, {"task": {}, "progress": {"step": 1}, "x": trap}, keep=1)
    with pytest.raises(DataError):
        load_checkpoint(run.newest())
    name = tiny_clip(tmp_path / "clip")
    shutil.copy(Path(name.removeprefix("local-dir:")) / "open_clip_config.json", run.path)
    shutil.copy(BPE, run.path)
    (run.path / "config.json").write_text(json.dumps({"recipe": "clip", "model": name}))
    with pytest.raises(DataError):
        load_run(str(run.path))


# --- code that comes with a model ------------------------------------------------------------------------------------


@pytest.fixture
def roberta(tmp_path):
    """A folder of an open_clip model with a tokenizer of transformers whose class is a Python file beside it."""
    pytest.importorskip("transformers")
    folder = tmp_path / "custom"
    tiny_clip(folder)
    (folder / "mine.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'it_ran')!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast\nclass Mine(PreTrainedTokenizerFast):\n    pass\n"
    )
    return folder


def describe(folder, tokenizer_kwargs=None, auto_map=None, where="tokenizer_config.json"):
    said = json.loads((folder / "open_clip_config.json").read_text())
    said["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "mine", "tokenizer_kwargs": tokenizer_kwargs or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    (folder / where).write_text(json.dumps({"tokenizer_class": "Mine", **({"auto_map": auto_map} if auto_map else {})}))


MAP = {"AutoTokenizer": [None, "mine.Mine"]}


@pytest.mark.parametrize(
    ("kwargs", "auto_map", "said"),
    [
        ({"trust_remote_code": True}, MAP, "trust_remote_code in open_clip_config.json"),
        ({"trust_remote_code": True}, None, "trust_remote_code in open_clip_config.json"),
        ({"trust_remote_code": 1}, None, "trust_remote_code in open_clip_config.json"),
        ({}, MAP, r"auto_map in .*tokenizer_config.json"),
    ],
)
def test_a_folders_own_python_is_refused_by_name(tmp_path, roberta, kwargs, auto_map, said):
    describe(roberta, kwargs, auto_map)
    with pytest.raises(UserError, match=rf"wants to run Python of its own \({said}.*--trust-remote-code"):
        load_model(f"local-dir:{roberta}", random_weights=True)
    assert not (tmp_path / "it_ran").exists()


def test_a_runs_own_python_is_refused_by_name(tmp_path, roberta):
    from training.runs.student import load_run

    describe(roberta, {"trust_remote_code": True}, MAP)
    (roberta / "config.json").write_text(json.dumps({"recipe": "clip"}))
    (roberta / "checkpoints").mkdir()
    torch.save({"task": {}, "progress": {"step": 1}}, roberta / "checkpoints/step_000001.pt")
    with pytest.raises(UserError, match="wants to run Python of its own"):
        load_run(str(roberta))
    assert not (tmp_path / "it_ran").exists()


def test_trusted_python_runs(tmp_path, roberta, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    describe(roberta, {"trust_remote_code": True}, MAP)
    with pytest.raises(UserError, match="cannot be loaded"):  # there is no tokenizer.json in the folder
        load_model(f"local-dir:{roberta}", random_weights=True, trust=Trust(trust_remote_code=True))
    assert (tmp_path / "it_ran").exists()


def test_code_maps_of_a_folder_count_only_where_transformers_reads_them(tmp_path):
    folder = tmp_path / "plain"
    name = tiny_clip(folder)
    (folder / "config.json").write_text(json.dumps({"auto_map": MAP}))
    load_model(name, random_weights=True)
    assert remote_code(name, {"text_cfg": {"hf_model_name": "x"}}) == f"auto_map in {folder / 'config.json'}"


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["local-dir", "hf-hub"])
def test_weights_that_would_not_be_used_are_refused(where, tmp_path):
    name = "hf-hub:some/where"
    if where == "local-dir":
        name = tiny_clip(tmp_path / "clip")
        (tmp_path / "clip" / "open_clip_model.safetensors").touch()
    with pytest.raises(UserError, match=rf"--pretrained 'F.pt' would not be used: '{name}' brings its own weights"):
        load_model(name, "F.pt")


def test_weights_beside_a_folder_without_any_are_refused_with_the_way_to_them(tmp_path):
    name, run = tiny_clip(tmp_path / "clip"), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"'{name}' has none there; .* `clipmill export {run} --to FOLDER`"):
        load_model(name, str(run), random_weights=True)
    with pytest.raises(UserError, match=r"`clipmill export RUN --to FOLDER`.*a file of weights goes into the folder"):
        load_model(name, "F.pt")
    with pytest.raises(UserError, match="the folder is not there"):
        load_model("local-dir:/some/where", "F.pt", random_weights=True)


@pytest.mark.parametrize(
    ("model", "pretrained", "said"),
    [
        ("VIT-B32", None, "no model 'VIT-B32': did you mean .*ViT-B-32"),
        ("qqqq", None, "no model 'qqqq': none of the .* folders are named local-dir:PATH"),
        (COCA, None, f"the model in that folder is local-dir:{COCA}"),
        ("ViT-B-32", "opeanai", r"is no tag of ViT-B-32 and no file: did you mean openai"),
        ("ViT-B-32", ".", "is no file; name a checkpoint file"),
        ("ViT-S-32-alt", "x", "it has no tags"),
        ("ViT-S-32-alt", None, "it has no weights; say --pretrained"),
        ("local-dir:/no/where", None, "the folder is not there"),
        (
            "timm:vit_tiny_patch16",
            "/no/where.pt",
            "no model 'timm:vit_tiny_patch16' in timm: did you mean vit_tiny_patch16_",
        ),
        ("timm:vit_tiny_patch16_224", "/no/where.pt", "/no/where.pt is not there"),
    ],
)
def test_names_that_are_none_get_near_ones_and_never_all(model, pretrained, said):
    with pytest.raises(UserError, match=said) as found:
        load_teacher(model, pretrained)
    assert len(str(found.value)) < MOST


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"model_cfg": 3}', '{"model_cfg": {"embed_dim": 3}}', '{"a": "\xe9"}']
)
def test_a_broken_description_of_a_model_is_named(tmp_path, text):
    (tmp_path / "open_clip_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"open_clip_config\.json"):
        load_model(f"local-dir:{tmp_path}", random_weights=True)


def test_an_ordered_dict_is_a_state_dict(tmp_path):
    torch.save(OrderedDict(WEIGHTS), tmp_path / "x.pt")
    assert list(load_checkpoint(str(tmp_path / "x.pt"))) == list(WEIGHTS)
