"""The prediction from passes on the device, against whole steps on the CPU, whose meter counts as CUDA's does."""

import pytest
import torch
from allocation_meter import AllocationMeter
from small_training import TINY_RESNET, TINY_VIT, tiny_clip, tiny_config, write_every_root
from torch import nn

from training.data.batches import first_batch
from training.engine import batch_fit
from training.engine.batch_fit import SizedProfile, choose, profiles
from training.engine.device_memory import MemorySpan, Pass, Passes, measure, repeated
from training.engine.distributed import Ranks
from training.engine.updater import Updater
from training.task import Task
from training.trainer import prepare

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]
DEEP_VIT = {**TINY_VIT, "layers": 4, "patch_size": 8, "width": 64}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A dataset for every recipe of pairs, with its tiny models."""
    return write_every_root(tmp_path_factory.mktemp("data"))


def peak_of_steps(config, prepared, batch):
    """The most that two steps hold beside weights and batch; the second has the optimizer's state from the start."""
    run = config.run
    task = prepared.task.train()
    updater = Updater(task, config, 10, ranks=Ranks(), device="cpu")
    size = len(batch["keys"])
    with AllocationMeter() as meter:
        updater.update(batch, 0, [size])
        meter.peak()
        updater.update(batch, 1, [size])
        most = meter.peak()
    assert updater.gradients.chunk_size == run.chunk_size
    return most


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [None, 24])
@pytest.mark.parametrize(
    ("recipe", "vision"),
    [("clip", DEEP_VIT), ("clip", TINY_RESNET), ("tinyclip", None), ("siclip", None)],
    ids=["vit", "resnet", "tinyclip", "siclip"],
)
def test_a_step_takes_what_passes_of_few_samples_predict(recipe, vision, chunk, precision, root, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_fit, "MOST_MEASURED", 16)
    model = {"model": tiny_clip(tmp_path / "model", vision=vision)} if vision else {}
    fields = {"batch_size": 96, "precision": precision, "chunk_size": chunk, "ema_decay": 0.9}
    config = tiny_config(recipe, root, "unused", **fields, **model)
    prepared = prepare(recipe, config)
    with AllocationMeter() as meter:
        [(one, _)] = profiles(config, prepared.rows, prepared.task, meter=meter)
    memory = one.at(96, chunk_size=chunk)
    assert choose([SizedProfile(one, 96)], 1, 1e12, chunk) == one.at(96, chunk_size=chunk, as_bytes=chunk is not None)
    measured = peak_of_steps(config, prepared, first_batch(prepared.rows, 96))
    # the optimizer's state and the average were made within the meter's sight, batch and weights before
    predicted = memory.total - memory.weights - memory.batch - memory.average
    assert predicted == pytest.approx(measured, rel=0.02)


class Perceptron(Task):
    """Shapes that can be counted by hand: 100 in, 400, 10 out."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(100, 400, bias=False), nn.ReLU(), nn.Linear(400, 10, bias=False)))

    def forward(self, batch):
        return {"image": self.student(batch["images"])}

    def losses(self, features, step):
        return {"pairs": (features["image"] @ features["image"].T).square().sum()}


def test_a_perceptron_by_hand():
    """With few samples the gradients are the worst, with many the hidden layer and its gradient."""
    task = Perceptron()
    weights = 4 * (100 * 400 + 400 * 10)
    images = torch.randn(4, 100)
    with AllocationMeter() as meter:
        one = measure(task, {"images": images, "keys": list("abcd")}, 64, meter, most=8)
    assert one.trained == weights
    assert one.features == 40
    assert all(parameter.grad is None for parameter in task.parameters())
    few = one.at(8)
    assert few.gradients == weights
    # the last weight's gradient comes after the hidden layer's, of which ReLU's output is still there
    hidden = 4 * 1000 * 400
    many = one.at(1000)
    assert many.gradients == 4 * 400 * 10
    assert many.activations == pytest.approx(2 * hidden, rel=0.1)
    chunks = one.at(1000, chunk_size=500)
    assert chunks.gradients == weights
    assert chunks.activations == pytest.approx(hidden + 2 * 40 * 1000, rel=0.2)
    assert one.at(1000, ranks=2).gradients == weights


def test_the_worst_span_of_many_samples_is_not_that_of_few():
    few = Pass(2, 20.0, (MemorySpan(100.0, 0), MemorySpan(40.0, 8)))
    more = Pass(4, 40.0, (MemorySpan(110.0, 0), MemorySpan(80.0, 8)))
    passes = Passes(few, more)
    assert passes.worst(2) == MemorySpan(100.0, 0)
    assert passes.worst(10) == MemorySpan(200.0, 8)
    assert passes.held(10) == 100.0
    uneven = Passes(few, Pass(4, 40.0, (MemorySpan(120.0, 3),)))
    assert uneven.worst(6) == MemorySpan(140.0, 3)


def test_fewer_samples_are_measured_where_the_device_has_no_room(root, monkeypatch):
    tried = []

    def measure_some(*words, most, **more):
        tried.append(most)
        if most > 8:
            raise RuntimeError("CUDA error: out of memory")
        return measure(*words, most=most, **more)

    monkeypatch.setattr(batch_fit, "measure", measure_some)
    _, rows, task = prepare("clip", tiny_config("clip", root, "unused", batch_size=48))
    with AllocationMeter() as meter:
        [(one, size)] = profiles(tiny_config("clip", root, "unused", batch_size=48), rows, task, meter=meter)
    assert (tried, one.first.more.samples, size) == ([48, 24, 12, 6], 6, 48)
    monkeypatch.setattr(batch_fit, "MOST_MEASURED", 8)
    monkeypatch.setattr(batch_fit, "measure", lambda *words, **more: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"), AllocationMeter() as meter:
        profiles(tiny_config("clip", root, "unused"), rows, task, meter=meter)


def test_the_losses_are_the_worst_of_a_large_batch(root):
    """Matrices of all pairs, in chunks of one sample: what the towers hold is little beside them."""
    config = tiny_config("tinyclip", root, "unused", batch_size=2048)
    _, rows, task = prepare("tinyclip", config)
    with AllocationMeter() as meter:
        one = measure(task.train(), first_batch(rows, 4), 2048, meter, most=4)
        shared = measure(task, first_batch(rows, 4), 2048, meter, most=4, ranks=8)
    assert shared.losses < one.losses / 5, "a process has an eighth of the rows"
    memory = one.at(2048, chunk_size=1)
    assert 3 * 4 * 2048**2 < memory.losses < 12 * 4 * 2048**2
    assert memory.gradients == 0, "of the towers, whose backward pass comes after that of the losses"


def test_samples_are_repeated_in_their_order():
    batch = {"images": torch.arange(3), "keys": ["a", "b", "c"], "scale": torch.tensor(2.0), "skipped": []}
    more = repeated(batch, 5)
    assert more["images"].tolist() == [0, 1, 2, 0, 1]
    assert more["keys"] == ["a", "b", "c", "a", "b"]
    assert (more["scale"], more["skipped"]) == (torch.tensor(2.0), [])
