"""Masks in the one loop: trained, applied in mid-run, resumed, in several processes; folders of such students."""

import dataclasses
import json
from pathlib import Path

import masked_recipe
import open_clip
import pytest
import torch
from masked_recipe import CUT_AFTER
from safetensors.torch import save_file
from small_dist import fork
from small_pruned import OFF
from small_training import TINY_VIT, steady_metrics, tiny_clip, tiny_config, write_clip_root

from shards_spec.models import load_model
from training.config import ModelConfig
from training.export import ExportConfig, export, largest_difference
from training.models.tinyclip_convert import from_open_clip
from training.models.tinyclip_pruning import attach_masks, masks_of, materialise
from training.models.tinyclip_table import model_table
from training.runs.checkpoint_files import load_checkpoint
from training.runs.model_folder import write_open_clip_config
from training.runs.student import load_run, new_student
from training.trainer import train

SMALLER = CUT_AFTER + 1  # steps that were taken when the student is cut
EVERY = {"steps": 7, "warmup": 2, "ema_decay": 0.6, "weight_decay": 0.1, "clip_norm": 5.0}
EVERY |= {"checkpoint_steps": 1, "keep_checkpoints": 99}
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread", "recipe")]


@pytest.fixture(scope="module")
def recipe():
    """The recipe is known while the module's tests run."""
    masked_recipe.register()
    yield
    masked_recipe.unregister()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_clip_root(folder)
    tiny_clip(folder / "models" / "two", vision={**TINY_VIT, "layers": 2})
    return str(folder)


def config(root, out, **fields):
    return tiny_config("masked", root, str(out), **{**EVERY, "model": f"local-dir:{root}/models/two", **fields})


def checkpoint(out, step):
    return load_checkpoint(Path(out, "checkpoints", f"step_{step:06d}.pt"))


@pytest.fixture(scope="module")
def whole(root, recipe, tmp_path_factory):
    """An undisturbed run with a checkpoint after each step."""
    torch.set_num_threads(1)
    return train("masked", config(root, tmp_path_factory.mktemp("runs") / "whole"))


def test_masks_are_trained_and_then_applied(whole):
    lines = steady_metrics(whole)
    assert [set(line["losses"]) for line in lines] == [{"contrastive", "sparsity"}] * SMALLER + [{"contrastive"}] * 3
    before, after = checkpoint(whole, SMALLER - 1), checkpoint(whole, SMALLER)
    units = before["task"]["student.visual.masks.dims"]
    assert len(units.unique()) > 1
    assert -4.6052 < units.min() < units.max() < 4.6052
    assert before["task"]["constraint.linear"] > 10
    assert not [name for name in after["task"] if "masks" in name or "constraint" in name]
    width = len(after["task"]["student.visual.class_embedding"])
    assert width < len(before["task"]["student.visual.class_embedding"])
    assert len(before["optimizer"]["param_groups"]) == 4
    assert [group["lr"] for group in before["optimizer"]["param_groups"][2:]] == [masked_recipe.RATE] * 2
    assert len(after["optimizer"]["param_groups"]) == 2
    moved = [state["step"].item() for state in after["optimizer"]["state"].values()]
    assert moved == [SMALLER]  # the logit scale's; all else begins anew
    assert set(after["ema"]) == {name.removeprefix("student.") for name in after["task"]}
    assert torch.equal(after["ema"]["visual.proj"], after["task"]["student.visual.proj"])


def test_the_folder_describes_the_student_of_before_and_of_after(root, whole, tmp_path):
    student, step = load_run(whole, raw=True)
    assert step == 7
    assert student.config["vision_cfg"]["masks"] is False
    assert student.config["vision_cfg"]["original"] == {"width": 32, "heads": 2, "neurons": 128}
    assert 0 < model_table(student.model)["sparsity"] < 1
    early = train("masked", config(root, tmp_path / "early", steps=2))
    masked, step = load_run(early)
    assert step == 2
    assert len(masks_of(masked.model)) == 2
    export(ExportConfig(early, str(tmp_path / "to")))
    assert largest_difference(masked, load_model(f"local-dir:{tmp_path / 'to'}")) == 0


@pytest.mark.parametrize("step", [SMALLER - 1, SMALLER, SMALLER + 1])
def test_resumed_around_the_cut_it_is_the_same_run(step, root, whole, tmp_path):
    out = train("masked", config(root, tmp_path / "run"))
    for later in range(step + 1, 8):
        Path(out, "checkpoints", f"step_{later:06d}.pt").unlink()
    train("masked", config(root, out))
    assert steady_metrics(out) == steady_metrics(whole)
    for later in range(step + 1, 8):
        mine, theirs = checkpoint(out, later), checkpoint(whole, later)
        for part in ("task", "ema"):
            assert list(mine[part]) == list(theirs[part])
            assert all(torch.equal(mine[part][name], theirs[part][name]) for name in mine[part]), part
        assert torch.equal(mine["rng"][0][0], theirs["rng"][0][0])


@pytest.mark.parametrize("chunk_size", [2, 4])
def test_chunks_have_the_same_sample(chunk_size, root, whole, tmp_path):
    out = train("masked", config(root, tmp_path / "run", chunk_size=chunk_size, steps=3))
    for line, expected in zip(steady_metrics(out), steady_metrics(whole), strict=False):
        assert line["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def rank(rank, root, out, fields):
    """A run in one of two processes; returns the numbers of each step's masks, and the weights at the end."""
    drawn, tasks = [], []
    draw = masked_recipe.MaskedTask.draw

    def noted(self, batch):
        batch = draw(self, batch)
        tasks.append(self)
        drawn.append(batch["mask_numbers"]["visual"].numpy() if "mask_numbers" in batch else None)
        return batch

    masked_recipe.MaskedTask.draw = noted
    train("masked", config(root, out, **fields))
    steps = drawn[-EVERY["steps"] :]  # the main process has drawn for the prediction of memory, too
    weights = {name: value.numpy() for name, value in tasks[-1].state_dict().items()}
    return [numbers for numbers in steps if numbers is not None], weights


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_processes_sample_on_their_own_and_stay_equal(chunk_size, root, tmp_path):
    out = str(tmp_path / "run")
    (one, weights), (other, others) = fork(2, rank, root, out, {"chunk_size": chunk_size})
    assert len(one) == len(other) == SMALLER
    for mine, theirs in zip(one, other, strict=True):
        assert (mine != theirs).mean() > 0.99
    assert list(weights) == list(others)
    assert all((weights[name] == others[name]).all() for name in weights)
    first = steady_metrics(out)
    for later in range(SMALLER + 1, 8):
        Path(out, "checkpoints", f"step_{later:06d}.pt").unlink()
    fork(2, rank, root, out, {"chunk_size": chunk_size})
    assert steady_metrics(out) == first


def test_a_cut_student_is_saved_and_loaded_to_the_bit(root, tmp_path, monkeypatch):
    """By open_clip's local-dir, wherever the folder is moved; also as the start of the next training."""
    student = new_student(ModelConfig(f"local-dir:{root}/models/two"), 0)
    model, model_config = from_open_clip(student.model, student.config)
    attach_masks(model, model_config)
    torch.manual_seed(0)
    for masks in masks_of(model):
        for units in masks.parameters():
            units.data = torch.where(torch.rand(len(units)) < 0.1, OFF, 3 * torch.rand(len(units)) + 1)
    with torch.no_grad():
        model.text.masks.heads[:] = OFF
        model.visual.masks.neurons[:] = OFF
        model.visual.masks.heads[:2] = OFF
    materialise(model.eval(), model_config)
    cut = dataclasses.replace(student, model=model, config=model_config)
    folder = tmp_path / "cut"
    folder.mkdir()
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, str(folder / "open_clip_model.safetensors"))
    write_open_clip_config(str(folder), cut, f"local-dir:{root}/models/two")
    monkeypatch.chdir("/")
    loaded = load_model(f"local-dir:{folder}")
    assert loaded.config == json.loads(json.dumps(model_config))
    assert loaded.config["text_cfg"]["heads"] == [0]
    assert (loaded.image_size, loaded.mean) == (cut.image_size, cut.mean)
    assert largest_difference(cut, loaded) == 0
    assert all(torch.equal(value, loaded.model.state_dict()[name]) for name, value in model.state_dict().items())
    alone = open_clip.create_model(f"local-dir:{folder}")
    assert torch.equal(alone.visual.proj, model.visual.proj)
    monkeypatch.setattr(masked_recipe, "TARGET", 0.95)
    out = train("masked", config(root, tmp_path / "second", steps=5, model=f"local-dir:{folder}"))
    second, _ = load_run(out)
    assert model_table(second.model)["sparsity"] > model_table(model)["sparsity"]
    assert second.config["vision_cfg"]["original"] == {"width": 32, "heads": 2, "neurons": 128}
