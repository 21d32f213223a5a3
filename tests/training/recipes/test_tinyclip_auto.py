"""The tinyclip recipe with learned masks: two phases in one run, resumed anywhere, in stages, on several processes."""

import dataclasses
import json
import sys
from itertools import pairwise
from pathlib import Path

import open_clip
import pytest
import torch
from small_dist import fork
from small_pruned import OFF
from small_tinyclip import config_of, write_tinyclip_root
from small_training import assert_same_run, read_metrics, steady_metrics, write_retrieval

import clipmill
from shards_spec.files import UserError
from shards_spec.models import load_model
from training.configs import default_config
from training.engine.checkpointing import Checkpointing
from training.export import ExportConfig, export, largest_difference
from training.models.tinyclip_masks import TowerMasks
from training.models.tinyclip_pruning import masks_of, materialise
from training.models.tinyclip_table import model_table, parameters_left
from training.recipes import tinyclip
from training.recipes.tinyclip import TinyclipTask
from training.runs.checkpoint_files import load_checkpoint
from training.runs.run_folder import RunFolder
from training.runs.student import load_run
from training.trainer import predict, stages_of, train

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

CUT = 4  # the prune step of `config_of`
EVERY = {"steps": 7, "ema_decay": 0.6, "checkpoint_steps": 1, "keep_checkpoints": 99}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_tinyclip_root(tmp_path_factory.mktemp("data"))


def masked(root, out, **fields):
    return config_of(root, out, "auto", **{**EVERY, **fields})


def checkpoint(out, step):
    return load_checkpoint(Path(out, "checkpoints", f"step_{step:06d}.pt"))


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """An undisturbed run with a checkpoint after each step."""
    torch.set_num_threads(1)
    return train("tinyclip", masked(root, tmp_path_factory.mktemp("runs") / "whole"))


def test_the_student_starts_as_the_teacher(root):
    student, samples, task = tinyclip.prepare(masked(root, "unused"))
    teacher = load_model(f"local-dir:{root}/models/teacher").model
    own = student.model.state_dict()
    assert torch.equal(own["visual.proj"], teacher.visual.proj)
    assert torch.equal(own["text.text_projection"], teacher.text_projection)
    for masks in masks_of(student.model):
        assert [units.unique().tolist() for units in masks.parameters()] == [[10.0]] * 3
    assert own["logit_scale"].exp().item() == pytest.approx(50)
    assert samples.student is student
    assert task.student is student.model


def test_metrics_of_both_phases(whole):
    lines = steady_metrics(whole)
    assert [set(line["losses"]) for line in lines] == [{"affinity", "sparsity"}] * CUT + [{"affinity"}] * 3
    first, last = lines[0], lines[-1]
    assert [line["sparsity_target"] for line in lines[: CUT - 1]] == [0, 0.25, 0.5]
    assert [line["lambda"] > 10 for line in lines[: CUT - 1]] == [False, True, True]
    assert not {"sparsity_target", "lambda", "beta"} & set(last)
    cut, _ = load_run(whole)
    assert last["parameters"] == sum(parameter.numel() for parameter in cut.model.parameters())
    assert last["sparsity"] == model_table(cut.model)["sparsity"] > 0
    assert first["parameters"] > last["parameters"] > 0
    assert all("logit_scale" in line for line in lines)


def test_what_masks_would_leave_is_what_is_left(root):
    student, _, task = tinyclip.prepare(masked(root, "unused"))
    torch.manual_seed(0)
    with torch.no_grad():
        for masks in masks_of(student.model):
            for units in masks.parameters():
                units.copy_(4 * torch.randn(len(units)))
        student.model.text.masks.heads.fill_(-9)
        student.model.visual.masks.neurons.fill_(-9)
    before = task.metrics(0)["parameters"]
    materialise(student.model, student.config)
    assert before == parameters_left(student.model) == sum(own.numel() for own in student.model.parameters())


def test_groups_of_the_optimizer(root, whole):
    before, after = checkpoint(whole, CUT - 1), checkpoint(whole, CUT)
    groups = before["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.2, 0, 0, 0]
    assert [group["lr"] for group in groups[2:]] == [1.2, 1.2]
    assert [group["maximize"] for group in groups] == [False, False, False, True]
    assert [tuple(group["betas"]) for group in groups] == [(0.9, 0.98)] * 2 + [(0.9, 0.999)] * 2
    assert [group["eps"] for group in groups] == [1e-6] * 2 + [1e-8] * 2
    assert not [name for name in after["task"] if "masks" in name or "constraint" in name]
    assert not after["optimizer"]["state"]  # made anew; the logit scale is frozen
    for masks in ("student.visual.masks.dims", "student.text.masks.neurons"):
        assert -4.6052 < before["task"][masks].min() <= before["task"][masks].max() < 4.6052
    fresh = default_config("tinyclip").masks
    assert (fresh.mask_lr, fresh.sparsity, fresh.prune_step, fresh.sparsity_ramp) == (0.02, 0.25, 3000, 1000)
    rates = [line["lr"] for line in read_metrics(whole)]
    assert rates[1:] == sorted(rates[1:], reverse=True)  # the same cosine, without a second warm-up


# fact 14
def test_lambda_goes_up_by_the_rate_while_the_target_is_missed(root, tmp_path):
    out = train("tinyclip", masked(root, tmp_path / "run", mask_lr=0.02, sparsity_ramp=0, sparsity=0.9, prune_step=7))
    lines = read_metrics(out)[:6]
    values = [line["lambda"] for line in lines]
    assert values[:3] == pytest.approx([10.02, 10.04, 10.06], abs=1e-4)  # the gradient hardly changes yet
    assert all(0.015 < after - before < 0.0201 for before, after in pairwise(values))
    assert [line["beta"] for line in lines] == pytest.approx(values, abs=1e-2)


def test_the_two_sided_form_also_asks_for_less(root, tmp_path):
    fields = {"sparsity_form": "two-sided", "mask_lr": 0.02, "sparsity_ramp": 0, "sparsity": 0.9, "prune_step": 7}
    lines = read_metrics(train("tinyclip", masked(root, tmp_path / "run", **fields)))[:6]
    assert [line["lambda"] for line in lines[:3]] == pytest.approx([-0.02, -0.04, -0.06], abs=1e-4)


# fact 15
def test_the_table_of_the_run(whole, root, tmp_path):
    table = json.loads(Path(whole, "student.json").read_text())
    cut, _ = load_run(whole)
    own = checkpoint(whole, CUT)["task"]
    assert (table["step"], table["masks"]) == (CUT, False)
    assert table["image"]["width"] == len(own["student.visual.class_embedding"])
    assert table == {"step": CUT, "masks": False, **json.loads(json.dumps(model_table(cut.model)))}
    for layer, heads in enumerate(table["text"]["heads"]):
        packed = own.get(f"student.text.transformer.resblocks.{layer}.attn.in_proj_weight")
        assert 0 if packed is None else len(packed) == 3 * 16 * heads
    early = train("tinyclip", masked(root, tmp_path / "early", steps=4, prune_step=4))
    assert json.loads(Path(early, "student.json").read_text())["step"] == 4


@pytest.mark.parametrize("step", [CUT - 1, CUT, CUT + 1])
def test_resumed_around_the_cut_it_is_the_same_run(step, root, whole, tmp_path):
    config = masked(root, tmp_path / "run")
    out = train("tinyclip", config)
    for later in range(step + 1, 8):
        Path(out, "checkpoints", f"step_{later:06d}.pt").unlink()
    train("tinyclip", config)
    same(out, whole)


def same(out, whole):
    assert_same_run(out, whole)
    for step in (CUT, 7):
        mine, theirs = checkpoint(out, step), checkpoint(whole, step)
        assert all(torch.equal(mine["ema"][name], theirs["ema"][name]) for name in theirs["ema"])
        assert torch.equal(mine["rng"][0][0], theirs["rng"][0][0])
        pairs = zip(mine["optimizer"]["state"].values(), theirs["optimizer"]["state"].values(), strict=True)
        assert all(torch.equal(one["exp_avg"], other["exp_avg"]) for one, other in pairs)
    assert Path(out, "student.json").read_text() == Path(whole, "student.json").read_text()
    assert Path(out, "open_clip_config.json").read_text() == Path(whole, "open_clip_config.json").read_text()


@pytest.mark.parametrize(("owner", "method"), [(Checkpointing, "save"), (RunFolder, "write_table")])
def test_killed_in_the_very_step_of_the_cut(owner, method, root, whole, tmp_path, monkeypatch):
    """Before anything of the step is on disk, and after the folder describes a student that no checkpoint has."""

    def killed(self, *args, **kwargs):
        step = args[0].step if owner is Checkpointing else args[1]
        if step == CUT:
            raise KeyboardInterrupt
        return own(self, *args, **kwargs)

    own = getattr(owner, method)
    config = masked(root, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(owner, method, killed)
        with pytest.raises(KeyboardInterrupt):
            train("tinyclip", config)
    out = str(tmp_path / "run")
    student, step = load_run(out)
    assert (step, len(masks_of(student.model))) == (CUT - 1, 2)
    train("tinyclip", config)
    same(out, whole)


def test_a_best_checkpoint_of_before_the_cut_loads(root, tmp_path):
    evaluation = write_retrieval(tmp_path / "eval")
    out = train("tinyclip", masked(root, tmp_path / "run", eval_data=evaluation, eval_every_steps=2, lr=1e-9))
    path = Path(out, "checkpoints", "best.pt")
    state = load_checkpoint(path)
    student, step = load_run(out, best=True)
    assert bool(masks_of(student.model)) == (step < CUT)
    assert state["progress"]["step"] == step
    measured = [line["eval"] for line in read_metrics(out) if "eval" in line]
    assert len(measured) == 4


def test_export_before_the_cut_is_the_student_cut(root, tmp_path):
    early = train("tinyclip", masked(root, tmp_path / "early", steps=5, prune_step=5))
    Path(early, "checkpoints", "step_000005.pt").unlink()
    before, step = load_run(early)
    assert (step, len(masks_of(before.model))) == (4, 2)
    export(ExportConfig(early, str(tmp_path / "to")))
    there = load_model(f"local-dir:{tmp_path / 'to'}")
    assert not masks_of(there.model)
    assert largest_difference(before, there) < 1e-5


def test_a_cut_student_is_exported_and_loaded_to_the_bit(root, tmp_path, monkeypatch):
    """Layers without heads, layers without neurons; wherever the folder is moved; as the start of another training."""
    make = masked(root, tmp_path / "run", steps=5, mask_lr=0.001)
    own = TinyclipTask.after_step

    def with_empty_layers(self, step):
        if step == CUT - 1:
            torch.manual_seed(0)
            with torch.no_grad():
                for masks in masks_of(self.student):
                    for units in masks.parameters():
                        units.copy_(torch.where(torch.rand(len(units)) < 0.1, OFF, 3 * torch.rand(len(units)) + 1))
                self.student.text.masks.heads.fill_(OFF)
                self.student.visual.masks.neurons[:256] = OFF
                self.student.visual.masks.heads[:4] = OFF
            patched.setattr(TowerMasks, "clamp", lambda masks: None)
        own(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(TinyclipTask, "after_step", with_empty_layers)
        run = train("tinyclip", make)
    folder = tmp_path / "to"
    export(ExportConfig(run, str(folder)))
    student, _ = load_run(run)
    monkeypatch.chdir("/")
    loaded = load_model(f"local-dir:{folder}")
    assert loaded.config["text_cfg"]["heads"] == [0, 0, 0]
    assert loaded.config["vision_cfg"]["neurons"][0] == 0
    assert (loaded.image_size, loaded.mean) == (student.image_size, student.mean)
    assert largest_difference(student, loaded) == 0
    weights = loaded.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in student.model.state_dict().items())
    alone = open_clip.create_model(f"local-dir:{folder}")
    assert torch.equal(alone.visual.proj, student.model.visual.proj)
    again = masked(root, tmp_path / "second", teacher_weights=f"local-dir:{folder}", sparsity=0.95, steps=5)
    second, _ = load_run(train("tinyclip", again))
    assert model_table(second.model)["sparsity"] > model_table(student.model)["sparsity"]
    assert second.config["vision_cfg"]["original"] == {"width": 64, "heads": 4, "neurons": 256}


@pytest.mark.parametrize("fields", [{"chunk_size": 2}, {"checkpoint_activations": True}])
def test_chunks_and_recomputed_blocks_have_the_same_masks(fields, root, whole, tmp_path):
    lines = steady_metrics(train("tinyclip", masked(root, tmp_path / "run", **fields)))
    for line, expected in zip(lines[:3], steady_metrics(whole)[:3], strict=True):
        assert line["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def run_rank(rank, root, out, fields):
    """A run in one of two processes; returns the numbers of each step's masks, and the weights at the end."""
    drawn, tasks = [], []
    draw = TinyclipTask.draw

    def noted(self, batch):
        batch = draw(self, batch)
        tasks.append(self)
        drawn.append(batch["masks"]["visual"].numpy() if "masks" in batch else None)
        return batch

    TinyclipTask.draw = noted
    train("tinyclip", masked(root, out, **fields))
    steps = drawn[-EVERY["steps"] :]  # the main process has drawn for the prediction of memory, too
    return [numbers for numbers in steps if numbers is not None], {
        name: value.numpy() for name, value in tasks[-1].state_dict().items()
    }


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_two_processes_sample_on_their_own_and_stay_equal(chunk_size, root, tmp_path):
    out = str(tmp_path / "run")
    fields = {"chunk_size": chunk_size}
    (one, weights), (other, others) = fork(2, run_rank, root, out, fields)
    assert len(one) == len(other) == CUT
    assert all((mine != theirs).mean() > 0.99 for mine, theirs in zip(one, other, strict=True))
    assert list(weights) == list(others)
    assert all((weights[name] == others[name]).all() for name in weights)
    first = steady_metrics(out)
    for later in range(CUT, 8):
        Path(out, "checkpoints", f"step_{later:06d}.pt").unlink()
    fork(2, run_rank, root, out, fields)
    assert steady_metrics(out) == first


def test_stages_go_on_from_the_former_student(root, tmp_path):
    config = masked(root, tmp_path / "run", stages="1,0.7,0.4", stage_prune_steps="3,4", keep_checkpoints=1)
    first, second = stages_of("tinyclip", config)
    assert [one.masks.sparsity for one in (first, second)] == [0.3, 0.6]
    assert [one.masks.prune_step for one in (first, second)] == [3, 4]
    assert first.inheritance.teacher_weights == second.inheritance.teacher_weights
    out = train("tinyclip", config)
    assert out == second.run.out == str(tmp_path / "run" / "stage-2")
    former, _ = load_run(first.run.out)
    last, _ = load_run(out)
    reached = model_table(former.model)["sparsity"]
    assert 0 < reached < model_table(last.model)["sparsity"]
    assert read_metrics(out)[0]["sparsity_target"] == pytest.approx(reached)
    assert last.config["vision_cfg"]["original"] == {"width": 64, "heads": 4, "neurons": 256}
    start = tinyclip.prepare(second).student.model
    assert torch.equal(start.visual.proj, former.model.visual.proj)
    before = steady_metrics(out)
    assert train("tinyclip", config) == out
    assert steady_metrics(out) == before
    with pytest.raises(UserError, match=rf"--sparsity \S+: .*stage-1 has a sparsity of {reached:.3f} already"):
        tinyclip.prepare(masked(root, "unused", from_run=first.run.out, sparsity=reached / 2))


def run_stages(rank, root, out):
    return train("tinyclip", masked(root, out, stages="0.7,0.4", steps=4, prune_step=3))


def test_stages_of_two_processes(root, tmp_path):
    out = str(tmp_path / "run")
    assert fork(2, run_stages, root, out) == [f"{out}/stage-2"] * 2
    first, second = (load_run(f"{out}/stage-{number}")[0].model for number in (1, 2))
    assert model_table(second)["sparsity"] > model_table(first)["sparsity"]


def test_a_stage_stopped_in_the_middle_is_resumed_there(root, tmp_path, monkeypatch):
    fields = {"stages": "0.7,0.4", "steps": 5, "prune_step": 3}
    whole = train("tinyclip", masked(root, tmp_path / "whole", **fields))
    own = Checkpointing.save

    def killed(self, progress, best=None):
        if "stage-2" in str(self.run.path) and progress.step == 4:
            raise KeyboardInterrupt
        own(self, progress, best)

    config = masked(root, tmp_path / "run", **fields)
    with monkeypatch.context() as patched:
        patched.setattr(Checkpointing, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train("tinyclip", config)
    assert_same_run(train("tinyclip", config), whole)
    assert_same_run(tmp_path / "run" / "stage-1", tmp_path / "whole" / "stage-1")


def test_a_stage_needs_a_student_that_was_cut(root, tmp_path):
    early = train("tinyclip", masked(root, tmp_path / "early", steps=5, prune_step=5))
    Path(early, "checkpoints", "step_000005.pt").unlink()
    with pytest.raises(UserError, match="early still has masks, the next stage begins with a student that was cut"):
        tinyclip.prepare(masked(root, "unused", from_run=early))


def test_memory_of_both_phases_is_predicted(root, tmp_path, monkeypatch, capsys):
    phases = predict("tinyclip", masked(root, tmp_path / "run", sparsity=0.75))
    before, after = phases.values()
    assert list(phases) == ["before the student changes its shape", "afterwards"]
    assert after.weights < 0.7 * before.weights
    assert after.activations < before.activations
    words = ["train", "tinyclip", "--data", root, "--inherit", "auto", "--smoke", "--predict-memory"]
    words += ["--teacher-weights", f"local-dir:{root}/models/teacher", "--teacher", "planted"]
    monkeypatch.setattr(sys, "argv", ["clipmill", *words])
    with pytest.raises(SystemExit) as done:
        clipmill.main()
    assert not done.value.code
    assert "afterwards: peak memory of a process: about " in capsys.readouterr().out


def test_smoke_applies_the_masks(root, tmp_path, monkeypatch, capsys):
    words = ["train", "tinyclip", "--data", root, "--inherit", "auto", "--smoke", "--out", str(tmp_path / "run")]
    words += ["--teacher-weights", f"local-dir:{root}/models/teacher", "--teacher", "planted", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["clipmill", *words])
    with pytest.raises(SystemExit) as done:
        clipmill.main()
    assert not done.value.code
    assert json.loads((tmp_path / "run" / "student.json").read_text())["masks"] is False
    assert dataclasses.asdict(default_config("tinyclip").masks)["prune_step"] == 3000
