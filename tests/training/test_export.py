"""An exported student comes back the same, wherever it is moved to."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from small_training import tiny_clip, tiny_config, train_short, write_packed

from shards_spec.files import UserError
from shards_spec.models import load_model
from training.config import ModelConfig
from training.export import ExportConfig, export, largest_difference
from training.export.comparison import Comparison
from training.runs.model_folder import write_model, write_open_clip_config
from training.runs.student import load_run, new_student
from training.trainer import train

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train_short(tmp_path_factory.mktemp("run"))


def test_export_comes_back_the_same(run, tmp_path, monkeypatch):
    folder = tmp_path / "exported"
    export(ExportConfig(run, str(folder)))
    student, _ = load_run(run)
    loaded = load_model(f"local-dir:{folder}")
    assert largest_difference(student, loaded) == 0
    assert (loaded.mean, loaded.std, loaded.image_size) == ((0.5,) * 3, (0.25,) * 3, 32)
    assert {path.name for path in folder.iterdir()} == {
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "bpe.txt.gz",
        "README.md",
    }
    moved = shutil.move(folder, tmp_path / "elsewhere")
    assert str(tmp_path) not in (moved / "open_clip_config.json").read_text()
    monkeypatch.chdir("/")  # open_clip alone finds weights, and tokenizer by name of its file
    plain_model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{moved}")
    tokens = open_clip.get_tokenizer(f"local-dir:{moved}", bpe_path=str(moved / "bpe.txt.gz"))(["a red ball"])
    with torch.no_grad():
        assert torch.equal(plain_model.eval().encode_text(tokens), student.model.encode_text(tokens))
    assert np.allclose(preprocess.transforms[-1].mean, 0.5)
    assert largest_difference(student, load_model(f"local-dir:{moved}")) == 0


def describe_text(folder, change):
    """Change what a model's description says of its text tower."""
    path = folder / "open_clip_config.json"
    said = json.loads(path.read_text())
    said["model_cfg"]["text_cfg"] = change(said["model_cfg"]["text_cfg"])
    path.write_text(json.dumps(said))


def test_a_tokenizer_of_transformers_travels_with_run_and_export(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from small_data import write_roberta

    source = tmp_path / "source"
    name = tiny_clip(source)
    text = write_roberta(source, width=32, layers=1, heads=2, wide=64)
    named = {name: text[name] for name in ("vocab_size", "hf_tokenizer_name")}
    describe_text(source, lambda plain: {**plain, **named, "tokenizer_kwargs": {}})
    root = tmp_path / "data"
    write_packed(str(root), [8])
    (root / "models").mkdir()
    out = train("clip", tiny_config("clip", str(root), str(tmp_path / "out"), steps=1, model=name))
    texts = ["a red ball", "two cats"]
    wanted = load_model(name, random_weights=True).tokenizer(texts)
    shutil.move(source, tmp_path / "gone")
    monkeypatch.chdir("/")
    assert torch.equal(load_run(out)[0].tokenizer(texts), wanted)
    export(ExportConfig(out, str(tmp_path / "to")))
    moved = shutil.move(tmp_path / "to", tmp_path / "moved")
    assert str(tmp_path) not in (moved / "open_clip_config.json").read_text()
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{moved}")(texts), wanted)


def test_a_text_tower_of_transformers_travels_with_run_and_export(tmp_path, monkeypatch):
    """The folder that described it is gone, and so is the one that it was written to."""
    pytest.importorskip("transformers")
    from small_data import write_roberta

    source = tmp_path / "source"
    name = tiny_clip(source)
    text = write_roberta(source, width=32, layers=1, heads=2, wide=64)
    describe_text(source, lambda _: {**text, "context_length": 16})
    write_packed(str(tmp_path / "data"), [8])
    (tmp_path / "data" / "models").mkdir()
    config = tiny_config("clip", str(tmp_path / "data"), str(tmp_path / "out"), steps=1, model=name)
    run = shutil.move(train("clip", config), tmp_path / "run")
    shutil.rmtree(source)
    monkeypatch.chdir("/")
    student, _ = load_run(str(run))
    export(ExportConfig(str(run), str(tmp_path / "to")))
    moved = shutil.copytree(tmp_path / "to", tmp_path / "moved")
    shutil.rmtree(tmp_path / "to")
    assert str(tmp_path) not in (moved / "open_clip_config.json").read_text()
    loaded = load_model(f"local-dir:{moved}")
    assert largest_difference(student, loaded) == 0
    again = tmp_path / "again"
    write_open_clip_config(str(again), loaded, f"local-dir:{moved}")  # as a run that starts from it
    assert (again / "text_tower/config.json").read_bytes() == (moved / "text_tower/config.json").read_bytes()
    card = (moved / "README.md").read_text()
    usage = card.partition("```python\n")[2].partition("```")[0].replace("FOLDER", str(moved))
    spoken: dict = {}
    exec(usage, spoken)  # open_clip alone, as the card says
    tokens = spoken["tokenizer"](["a red ball"])
    with torch.no_grad():
        assert torch.equal(spoken["model"].eval().encode_text(tokens), student.model.encode_text(tokens))


def test_a_run_lives_without_its_source(run, tmp_path):
    shutil.copytree(run, tmp_path / "moved")
    assert largest_difference(load_run(str(tmp_path / "moved"))[0], load_run(run)[0]) == 0
    shutil.move(str(Path(run).parent / "models"), tmp_path / "models")
    try:
        export(ExportConfig(str(tmp_path / "moved"), str(tmp_path / "to")))
    finally:
        shutil.move(tmp_path / "models", str(Path(run).parent / "models"))


def test_an_export_that_computes_something_else_is_an_error(run, tmp_path, monkeypatch):
    monkeypatch.setattr("training.export.stage.compare", lambda *_: Comparison(1e-3, 1.0, 1.0, 1.0, None))
    with pytest.raises(UserError, match=r"differ by 0\.001"):
        export(ExportConfig(run, str(tmp_path / "to")))
    assert not (tmp_path / "to" / "open_clip_config.json").exists()  # it loads as nothing
    monkeypatch.undo()
    export(ExportConfig(run, str(tmp_path / "to")))
    assert largest_difference(load_run(run)[0], load_model(f"local-dir:{tmp_path / 'to'}")) == 0


def test_compare_sees_another_model(run, tmp_path):
    other = new_student(ModelConfig(tiny_clip(tmp_path / "model")), 5)
    other.model.eval()
    assert largest_difference(load_run(run)[0], other) > 1e-2


def test_an_export_replaces_no_other_model(tmp_path):
    write_model(str(tmp_path / "to"), "open_clip_model.safetensors", b"one", False)
    write_model(str(tmp_path / "to"), "open_clip_model.safetensors", b"one", False)  # again, after a kill
    for folder, name in (("to", "open_clip_model.safetensors"), ("to", "model.safetensors")):
        with pytest.raises(UserError, match=r"another model \(open_clip_model.safetensors\).*--overwrite"):
            write_model(str(tmp_path / folder), name, b"two", False)
    assert (tmp_path / "to" / "open_clip_model.safetensors").read_bytes() == b"one"
    write_model(str(tmp_path / "to"), "open_clip_model.safetensors", b"two", True)
    assert (tmp_path / "to" / "open_clip_model.safetensors").read_bytes() == b"two"
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="is a RUN"):
        write_model(str(tmp_path / "run"), "model.safetensors", b"x", True)
