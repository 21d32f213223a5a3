"""Predicted peak memory against counts by other means: the allocator's, and shapes worked out by hand."""

import pytest
import torch
import torch.nn.functional as F
from allocation_meter import held_after
from small_training import TINY_RESNET, TINY_VIT, tiny_clip
from torch import nn

from training.config import ModelConfig
from training.engine.memory_estimate import predict_memory, saved_bytes
from training.recipes.clip import ClipTask
from training.runs.student import new_student
from training.task import Task

pytestmark = pytest.mark.usefixtures("one_thread")


def batch(count, size=32, context=16):
    return {
        "images": torch.randn(count, 3, size, size),
        "tokens": torch.randint(1, 300, (count, context)),
        "keys": [str(index) for index in range(count)],
        "skipped": [],
    }


class Perceptron(Task):
    """Shapes that can be counted by hand."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(10, 20, bias=False), nn.ReLU(), nn.Linear(20, 5, bias=False)))

    def forward(self, batch):
        return {"image": self.student(batch["images"])}

    def losses(self, features, step):
        own = features["image"][self.row_share.rows(len(features["image"]))]
        return {"pairs": (own @ features["image"].T).square().sum()}


def test_a_perceptron_by_hand():
    memory = predict_memory(Perceptron(), {"images": torch.randn(4, 10), "keys": list("abcd")}, batch_size=64)
    assert memory.weights == memory.gradients == 4 * (10 * 20 + 20 * 5)
    assert memory.optimizer == 2 * memory.weights
    assert memory.average == 0
    assert memory.batch == 4 * 64 * 10
    assert memory.activations == pytest.approx(4 * 64 * 20, abs=8)  # ReLU's output, saved twice, once stored
    assert memory.losses == pytest.approx(4 * (64 * 5 + 64 * 64), abs=64)  # features, and all pairs
    assert memory.total == pytest.approx(4 * (4 * 300 + 640 + 1280 + 320 + 4096), abs=80)


def test_processes_chunks_and_an_average():
    task, few = Perceptron(), {"images": torch.randn(4, 10), "keys": list("abcd")}
    memory = predict_memory(task, few, batch_size=64, ranks=2, chunk_size=8, average=True)
    assert memory.average == memory.weights
    assert memory.batch == 4 * 32 * 10
    assert (memory.activations, memory.losses) == (pytest.approx(4 * (64 * 5 + 32 * 64), abs=64), 0)  # of the losses
    memory = predict_memory(task, few, batch_size=64, ranks=2, chunk_size=30)
    assert memory.activations == pytest.approx(4 * (64 * 5 + 32 * 64), abs=64)
    assert predict_memory(task, few, batch_size=64, ranks=2).activations == pytest.approx(4 * 32 * 20, abs=8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("vision", "tolerance"), [(TINY_VIT, 0.01), (TINY_RESNET, 0.01)], ids=["vit", "resnet"])
def test_activations_are_what_the_allocator_holds(vision, tolerance, precision, tmp_path):
    model = tiny_clip(tmp_path / "model", vision=vision)
    task = ClipTask(new_student(ModelConfig(model), 0).model).train()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    stream = torch.get_rng_state()
    few = batch(4)
    torch.set_rng_state(stream)
    memory = predict_memory(task, few, batch_size=48, precision=precision)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    many = batch(48)

    def forward():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            return task(many)

    forward()
    assert memory.activations == pytest.approx(held_after(forward), rel=tolerance)
    features = {name: value.detach().requires_grad_() for name, value in task(many).items()}
    held = held_after(lambda: task.losses(features, 0))
    assert memory.losses == pytest.approx(held, rel=0.3)  # 6 of (48, 48), and what is not saved but still there
    assert memory.weights == sum(tensor.nbytes for tensor in [*task.parameters(), *task.buffers()])
    assert memory.gradients == 4 * sum(parameter.numel() for parameter in task.parameters())


def test_what_is_saved_counts_once_and_frozen_layers_nothing():
    weight = torch.randn(7, 7, requires_grad=True)
    known = {weight.untyped_storage().data_ptr()}
    rows = torch.randn(3, 7)
    for function, count in (
        (lambda: rows @ weight, 21),
        (lambda: (rows @ weight).relu() @ weight.T, 21 + 21),
        (lambda: F.relu(rows @ weight.detach()), 0),
    ):
        saved, outcome = saved_bytes(lambda function=function: {"out": function()}, known)
        assert saved == 4 * count
        assert torch.equal(outcome["out"], function())
        assert not outcome["out"].requires_grad
