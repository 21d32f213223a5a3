"""The contract of recipes, used to its limits: own rates, gradient ascent, a student that changes its shape."""

from pathlib import Path

import pytest
import torch
import toy_recipe
from small_dist import fork
from small_training import TINY_VIT, steady_metrics, tiny_clip, tiny_config, write_clip_root
from toy_recipe import REBUILD_AT, ToyTask

from shards_spec.files import UserError
from training.config import OptimConfig
from training.data.batches import Skipped
from training.data.samples import Samples
from training.engine.optim import learning_rate
from training.runs.checkpoint_files import load_checkpoint
from training.runs.run_folder import RunFolder
from training.runs.student import load_run
from training.task import check_item_fields
from training.trainer import train

SMALLER = REBUILD_AT + 1  # steps that were taken when the student is smaller
FIELDS = {"steps": 8, "warmup": 2, "ema_decay": 0.6, "weight_decay": 0.1, "clip_norm": 1.0}
EVERY = {**FIELDS, "checkpoint_steps": 1, "keep_checkpoints": 99}
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread", "toy")]


@pytest.fixture(scope="module")
def toy():
    """The toy recipe is known while the module's tests run."""
    toy_recipe.register()
    yield
    toy_recipe.unregister()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A packed dataset with a student models/toy whose image tower has two layers."""
    folder = tmp_path_factory.mktemp("data")
    write_clip_root(folder)
    tiny_clip(folder / "models" / "toy", vision={**TINY_VIT, "layers": 2})
    return str(folder)


def toy_config(root, out, **fields):
    return tiny_config("toy", root, str(out), **{"model": f"local-dir:{root}/models/toy", **fields})


def checkpoint(out, step):
    return load_checkpoint(Path(out, "checkpoints", f"step_{step:06d}.pt"))


def assert_equal(one, other):
    """Nested states are equal to the last bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            if name not in ("seconds", "out"):
                assert_equal(one[name], other[name])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_equal(mine, theirs)
    else:
        assert one == other


@pytest.fixture(scope="module")
def whole(root, toy, tmp_path_factory):
    """An undisturbed run with a checkpoint after each step."""
    torch.set_num_threads(1)
    return train("toy", toy_config(root, tmp_path_factory.mktemp("runs") / "whole", **EVERY))


def test_a_student_loses_a_layer_in_mid_run(whole):
    """Training goes on: the same names of losses but the constraint's, finite, and the student that is left learns."""
    run = steady_metrics(whole)
    assert [line["step"] for line in run] == list(range(1, 9))
    assert [set(line["losses"]) for line in run] == [{"contrastive", "constraint"}] * SMALLER + [{"contrastive"}] * 4
    before, after = checkpoint(whole, SMALLER - 1)["task"], checkpoint(whole, SMALLER)["task"]
    assert "multiplier" in before
    assert "multiplier" not in after
    tower = "student.visual.transformer.resblocks"
    assert f"{tower}.1.ln_1.weight" in before
    assert not [name for name in after if name.startswith(f"{tower}.1.")]
    assert len(after[f"{tower}.0.mlp.c_fc.weight"]) == len(before[f"{tower}.0.mlp.c_fc.weight"]) / 2
    last = checkpoint(whole, 8)["task"]
    assert not torch.equal(last[f"{tower}.0.mlp.c_fc.weight"], after[f"{tower}.0.mlp.c_fc.weight"])
    assert not torch.equal(last[f"{tower}.0.attn.in_proj_weight"], after[f"{tower}.0.attn.in_proj_weight"])


def optimizer_steps(out, step):
    """Steps that the optimizer has taken of each trained parameter, by its name; 0 where it has no state."""
    state = checkpoint(out, step)
    names = [name for name in state["task"] if name.startswith("student.") and name != "student.attn_mask"]
    if "multiplier" in state["task"]:
        names = ["multiplier", *names]  # a module's own parameters come first
    trained = sum(len(group["params"]) for group in state["optimizer"]["param_groups"])
    assert len(names) == trained
    taken = state["optimizer"]["state"]
    return {name: int(taken[place]["step"]) if place in taken else 0 for place, name in enumerate(names)}


def test_the_optimizers_state_stays_where_shapes_fit(whole):
    assert set(optimizer_steps(whole, SMALLER - 1).values()) == {SMALLER - 1}
    narrowed = {
        f"student.visual.transformer.resblocks.0.mlp.{name}" for name in ("c_fc.weight", "c_fc.bias", "c_proj.weight")
    }
    for step in (SMALLER, SMALLER + 1, 8):
        for name, taken in optimizer_steps(whole, step).items():
            assert taken == (step - SMALLER if name in narrowed else step), name


def test_an_average_stays_where_shapes_fit(whole):
    """The layer that is left has another name; its average follows its own weights and not those of the former one."""
    prefix = "visual.transformer.resblocks"
    name, before = f"{prefix}.0.attn.in_proj_weight", f"{prefix}.1.attn.in_proj_weight"
    average = checkpoint(whole, SMALLER - 1)["ema"][before].double()
    for step in range(SMALLER, 9):
        state = checkpoint(whole, step)
        average = 0.6 * average + 0.4 * state["task"][f"student.{name}"].double()
        torch.testing.assert_close(state["ema"][name].double(), average, rtol=1e-5, atol=1e-6)
    smaller, narrowed = checkpoint(whole, SMALLER), f"{prefix}.0.mlp.c_fc.weight"
    assert torch.equal(smaller["ema"][narrowed], smaller["task"][f"student.{narrowed}"])


def test_groups_have_their_own_rates_and_a_multiplier_rises(whole):
    config = OptimConfig(lr=1e-3, warmup=2)
    for step in (1, 2, SMALLER - 1):
        groups = checkpoint(whole, step)["optimizer"]["param_groups"]
        scheduled = learning_rate(step - 1, config, 8)
        assert {group["lr"] for group in groups[1:]} == {scheduled, 0.5 * scheduled}
        assert (groups[0]["lr"], groups[0]["maximize"], groups[0]["weight_decay"]) == (0.02, True, 0.0)
        assert [group["maximize"] for group in groups[1:]] == [False] * (len(groups) - 1)
        assert {tuple(group["betas"]) for group in groups[1:]} == {(0.9, 0.98)}
    values = [checkpoint(whole, step)["task"]["multiplier"].item() for step in range(1, SMALLER)]
    assert values[0] == pytest.approx(1.02)  # AdamW's first step, upwards
    assert values == sorted(values)
    assert values[-1] == pytest.approx(1.06, abs=0.02)


@pytest.mark.parametrize("step", [SMALLER - 1, SMALLER, SMALLER + 1])
def test_resumed_around_the_change_it_is_the_same_run(step, root, whole, tmp_path):
    """From right before it, right at it and right after it, with its losses, weights, optimizer and average."""
    out = train("toy", toy_config(root, tmp_path / "run", **EVERY))
    for later in range(step + 1, 9):
        Path(out, "checkpoints", f"step_{later:06d}.pt").unlink()
    train("toy", toy_config(root, out, **EVERY))
    assert steady_metrics(out) == steady_metrics(whole)
    for later in range(step + 1, 9):
        assert_equal(
            {name: value for name, value in checkpoint(out, later).items() if name != "config"},
            {name: value for name, value in checkpoint(whole, later).items() if name != "config"},
        )


def test_the_change_is_saved_at_once_and_the_folder_describes_it(root, tmp_path):
    out = train("toy", toy_config(root, tmp_path / "run", **FIELDS))
    assert sorted(path.name for path in Path(out, "checkpoints").glob("*.pt")) == ["step_000004.pt", "step_000008.pt"]
    Path(out, "checkpoints", "step_000008.pt").unlink()
    student, step = load_run(out, raw=True)
    assert step == SMALLER
    assert len(student.model.visual.transformer.resblocks) == 1
    weights = load_checkpoint(RunFolder(out).newest())["task"]
    for name, value in student.model.state_dict().items():
        assert torch.equal(weights[f"student.{name}"], value)


def two(rank, root, out, fields):
    """A run in one of two processes."""
    return train("toy", toy_config(root, out, **fields))


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_two_processes_change_together(chunk_size, root, whole, tmp_path):
    """DDP is made anew: the losses are those of one process, also from a resume on."""
    out = str(tmp_path / "run")
    fields = {**EVERY, "chunk_size": chunk_size}
    fork(2, two, root, out, fields)
    for line, expected in zip(steady_metrics(out), steady_metrics(whole), strict=True):
        assert line["losses"] == pytest.approx(expected["losses"], rel=1e-3)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
    first = steady_metrics(out)
    for later in range(SMALLER + 1, 9):
        Path(out, "checkpoints", f"step_{later:06d}.pt").unlink()
    fork(2, two, root, out, fields)
    assert steady_metrics(out) == first


def test_samples_must_carry_what_the_task_reads(root, tmp_path, monkeypatch):
    build = ToyTask.__init__
    monkeypatch.setattr(
        ToyTask, "__init__", lambda self, student, config: build(self, student, config, ("images", "depth"))
    )
    with pytest.raises(UserError, match="the samples have no depth, which this recipe needs: give it other --data"):
        train("toy", toy_config(root, tmp_path / "run", **FIELDS))
    assert not (tmp_path / "run").exists()


def test_declared_fields_are_enough():
    task = ToyTask(torch.nn.Linear(1, 1), {})
    check_item_fields(task, {"images": 1, "tokens": 2, "keys": []})


def test_a_second_copy_of_an_image_is_a_field_like_the_first(root, tmp_path, monkeypatch):
    """Batched, normalised and cut into chunks alike: a task that reads the copy learns the same of it."""
    render, encode = Samples._render, ToyTask.forward

    def with_copy(self, row):
        found = render(self, row)
        return found if isinstance(found, Skipped) else {**found, "plain": found["images"].clone()}

    def of_the_copy(self, batch):
        assert torch.equal(batch["plain"], batch["images"])
        assert batch["plain"].dtype == torch.float32
        return encode(self, {**batch, "images": batch["plain"]})

    usual = train("toy", toy_config(root, tmp_path / "usual", **{**FIELDS, "chunk_size": 2, "steps": 2}))
    monkeypatch.setattr(Samples, "_render", with_copy)
    monkeypatch.setattr(ToyTask, "forward", of_the_copy)
    for chunk_size in (None, 2):
        fields = {**FIELDS, "chunk_size": chunk_size, "steps": 2}
        out = train("toy", toy_config(root, tmp_path / f"copy-{chunk_size}", **fields))
        for line, expected in zip(steady_metrics(out), steady_metrics(usual), strict=True):
            assert line["losses"] == pytest.approx(expected["losses"], rel=1e-5)
