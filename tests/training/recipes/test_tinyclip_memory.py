"""The memory that is predicted for both phases of a run with masks, against what the allocator holds in its steps."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from allocation_meter import held_after
from small_tinyclip import config_of, write_tinyclip_root

import clipmill
from training.data.batches import first_batch
from training.engine.memory_estimate import predict_memory
from training.runs.student import load_run
from training.trainer import predict, prepare, train

pytestmark = pytest.mark.usefixtures("one_thread")
PHASES = ["before the student changes its shape", "afterwards"]
BATCH = 48  # three times what is looked at


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_tinyclip_root(tmp_path_factory.mktemp("data"))


def batch_of(rows, task):
    """BATCH samples, those that there are several times."""
    few = first_batch(rows, 16)
    count = len(few["keys"])
    keys = (few["keys"] * BATCH)[:BATCH]
    repeated = {
        name: value.repeat(BATCH // count + 1, *[1] * (value.ndim - 1))[:BATCH]
        for name, value in few.items()
        if isinstance(value, torch.Tensor)
    }
    return task.draw({**few, **repeated, "keys": keys})


@pytest.mark.parametrize(
    "fields",
    [{}, {"precision": "bf16"}, {"teacher_from": "live"}],
    ids=["fp32", "bf16", "live teacher"],
)
def test_both_phases_are_what_the_allocator_holds(fields, root, tmp_path):
    config = config_of(root, tmp_path / "run", "auto", sparsity=0.75, batch_size=BATCH, steps=9, **fields)
    predicted = predict("tinyclip", config)
    assert list(predicted) == PHASES
    _, rows, task = prepare("tinyclip", config)
    task.train()
    measured = []
    for phase, memory in predicted.items():
        if phase == "afterwards":
            assert task.take_final_shape()
        batch = batch_of(rows, task)

        def forward(batch=batch):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.run.precision == "bf16"):
                return task(batch)

        forward()
        measured.append(held_after(forward))
        assert memory.activations == pytest.approx(measured[-1], rel=0.01)
        trained = sum(parameter.nbytes for parameter in task.parameters() if parameter.requires_grad)
        assert (memory.gradients, memory.optimizer) == (trained, 2 * trained)
        own = sum(tensor.nbytes for tensor in [*task.parameters(), *task.buffers()])
        of_teacher = sum(sum(tensor.nbytes for tensor in teacher.tensors()) for teacher in task.teachers)
        assert memory.weights == own + of_teacher
        assert memory.total >= own + 3 * trained + measured[-1] * 0.99
        assert (of_teacher > 10**6) == ("teacher_from" in fields)
    assert measured[1] < 0.6 * measured[0]


def test_what_a_step_with_masks_keeps_is_what_is_predicted(root, tmp_path):
    """Gradients and the optimizer's state, those of masks and multipliers among them."""
    config = config_of(root, tmp_path / "run", "auto", sparsity=0.75, batch_size=BATCH, steps=9)
    _, rows, task = prepare("tinyclip", config)
    task.train()
    batch = batch_of(rows, task)
    memory = predict_memory(task, first_batch(rows, 16), batch_size=BATCH)
    optimizer = torch.optim.AdamW([parameter for parameter in task.parameters() if parameter.requires_grad])

    def step():
        sum(task.losses(task(batch), 0).values()).backward()
        optimizer.step()
        return [parameter.grad for parameter in task.parameters()]

    kept = held_after(step)
    assert kept == pytest.approx(memory.gradients + memory.optimizer, rel=0.02)


def printed(capsys, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["clipmill", "train", "tinyclip", *words, "--predict-memory"])
    with pytest.raises(SystemExit) as done:
        clipmill.main()
    assert not done.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "stages", [["--sparsity", "0.5", "--prune-step", "3"], ["--stages", "1,0.5,0.25", "--stage-prune-steps", "3,3"]]
)
def test_the_command_says_both(stages, root, monkeypatch, capsys, tmp_path):
    teacher = ["--teacher", "planted", "--teacher-weights", f"local-dir:{root}/models/teacher"]
    masks = ["--inherit", "auto", *stages, "--steps", "9"]
    words = ["--data", root, *teacher, "--batch-size", "8", "--precision", "fp32", "--out", str(tmp_path / "run")]
    text = printed(capsys, monkeypatch, *words, *masks)
    found = re.findall(r"(?m)^(.*): peak memory of a process: about ([\d.,]+) MiB", text)
    assert [phase for phase, _ in found] == PHASES
    before, after = (float(number.replace(",", "")) for _, number in found)
    assert 0 < after < before
    alone = printed(capsys, monkeypatch, *words, "--inherit", "manual", "--model", f"local-dir:{root}/models/half")
    assert alone.startswith("peak memory of a process: about ")
    assert not (tmp_path / "run").exists()


def test_the_foreseen_shape_takes_about_what_the_learned_one_does(root, tmp_path):
    """Which share of dimensions, heads and neurons goes is learned: the prediction takes the same share of each."""
    learned = config_of(root, tmp_path / "run", "auto", sparsity=0.5, batch_size=8, steps=17, prune_step=16)
    table = json.loads(Path(train("tinyclip", learned), "student.json").read_text())
    assert 0.3 < table["sparsity"] < 0.95
    config = config_of(root, tmp_path / "unused", "auto", sparsity=table["sparsity"], batch_size=8, steps=9)
    foreseen = predict("tinyclip", config)["afterwards"]
    _, rows, task = prepare("tinyclip", config)
    student, _ = load_run(learned.run.out)
    task.reshape_like({f"student.{name}": value for name, value in student.model.state_dict().items()})
    actual = predict_memory(task, first_batch(rows, 16), batch_size=8)
    assert foreseen.total == pytest.approx(actual.total, rel=0.15)
    assert foreseen.weights == pytest.approx(actual.weights, rel=0.25)
