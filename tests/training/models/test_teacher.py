"""A frozen teacher, live or cached: the same interface, nothing of it trained or saved; taps and early exit."""

import pytest
import torch
from small_training import TINY_VIT, tiny_clip, write_packed, write_teacher
from torch import nn

from shards_spec.files import UserError
from shards_spec.models import load_model
from training.data.teacher_cache import TeacherCache
from training.models.taps import run_with_taps
from training.models.teacher import FrozenTeacher
from training.task import Task

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCKS = "visual.transformer.resblocks"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    name = tiny_clip(tmp_path_factory.mktemp("teacher") / "model", vision={**TINY_VIT, "layers": 3})
    return load_model(name, random_weights=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("cache"))
    write_teacher(root, write_packed(root, [3]))
    return TeacherCache(root, "planted", 1)


def batch_of(count=2):
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"images": images, "tokens": torch.arange(16).repeat(count, 1)}


def test_a_live_teacher_is_its_model_without_gradients(loaded):
    teacher, batch = FrozenTeacher.live("tiny", loaded), batch_of()
    features = teacher.features(batch)
    assert torch.equal(features["teacher_image"], loaded.model.encode_image(batch["images"]))
    assert torch.equal(features["teacher_text"], loaded.model.encode_text(batch["tokens"]))
    assert not any(value.requires_grad for value in features.values())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.model.training
    assert (teacher.width, teacher.item_fields) == (16, ())
    assert teacher.logit_scale == pytest.approx(1 / 0.07)


def test_a_teacher_of_images_alone_is_read_by_its_taps():
    vit = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    teacher = FrozenTeacher("vit", width=2, model=vit)
    tapped = teacher.intermediate(lambda model: model(torch.ones(1, 4)), ["0"], until="0")
    assert tapped.taps["0"][0].shape == (1, 3)
    assert (teacher.logit_scale, teacher.item_fields) == (1.0, ())


def test_a_part_of_the_forward_pass_may_be_shared(loaded):
    teacher = FrozenTeacher.live("tiny", loaded)
    features = teacher.features({}, lambda model: (model.logit_scale + 1, model.logit_scale + 2))
    assert features["teacher_text"] - features["teacher_image"] == pytest.approx(1.0)


def test_a_cached_teacher_is_in_the_batch(cache):
    teacher = FrozenTeacher.cached(cache)
    assert (teacher.name, teacher.width, teacher.logit_scale) == ("planted", 16, 20.0)
    assert teacher.item_fields == ("teacher_image", "teacher_text")
    batch = {"teacher_image": torch.ones(2, 16), "teacher_text": torch.zeros(2, 16), "images": torch.ones(1)}
    features = teacher.features(batch)
    assert list(features) == ["teacher_image", "teacher_text"]
    assert features["teacher_image"] is batch["teacher_image"]
    with pytest.raises(UserError, match="teacher cache planted has final features only; this recipe needs a live tea"):
        teacher.intermediate(lambda model: model.encode_image(batch["images"]), [BLOCKS])


def test_a_task_moves_its_teacher_and_neither_trains_nor_saves_it(loaded, cache):
    class Taught(Task):
        def __init__(self):
            super().__init__(nn.Linear(2, 2))
            self.teacher = FrozenTeacher.live("tiny", loaded)
            self.base, self.cached = self.teacher, FrozenTeacher.cached(cache)

    task = Taught()
    assert set(task.state_dict()) == {"student.weight", "student.bias"}
    assert len(list(task.parameters())) == 2
    assert [len(group.params) for group in task.param_groups(0.1)] == [1, 1]
    task.train()
    assert not task.teacher.model.training
    task.double()
    assert next(task.teacher.model.parameters()).dtype == torch.float64
    task.float()


def test_taps_return_what_modules_returned(loaded):
    teacher, batch = FrozenTeacher.live("tiny", loaded), batch_of()
    names = [f"{BLOCKS}.{number}" for number in range(3)]
    tapped = teacher.intermediate(lambda model: model.encode_image(batch["images"]), names)
    assert torch.equal(tapped.output, loaded.model.encode_image(batch["images"]))
    assert [len(tapped.taps[name]) for name in names] == [1, 1, 1]
    hidden = tapped.taps[names[0]][0]
    assert torch.equal(loaded.model.visual.transformer.resblocks[1](hidden), tapped.taps[names[1]][0])
    with pytest.raises(ValueError, match="no submodule 'blocks' to tap"):
        teacher.intermediate(lambda model: model.encode_image(batch["images"]), ["blocks"])
    assert not any(module._forward_hooks for module in loaded.model.modules()), "hooks are taken off"


def test_an_early_exit_computes_nothing_behind_it(loaded):
    teacher, batch = FrozenTeacher.live("tiny", loaded), batch_of()
    calls = []
    handles = [
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
        for number, block in enumerate(loaded.model.visual.transformer.resblocks)
    ]
    until = f"{BLOCKS}.1"
    tapped = teacher.intermediate(lambda model: model.encode_image(batch["images"]), [until], until)
    assert calls == [0, 1]
    assert tapped.output is None
    for handle in handles:
        handle.remove()
    whole = teacher.intermediate(lambda model: model.encode_image(batch["images"]), [until])
    assert torch.equal(tapped.taps[until][0], whole.taps[until][0])


def test_taps_of_a_student_have_gradients_and_shared_modules_several():
    shared = nn.Linear(3, 3)
    student = nn.Sequential(shared, nn.ReLU(), shared)
    tapped = run_with_taps(student, lambda model: model(torch.ones(1, 3)), ["0", "2"])
    assert [len(outputs) for outputs in tapped.taps.values()] == [2, 2]
    assert torch.equal(tapped.taps["0"][1], tapped.output)
    tapped.taps["0"][0].sum().backward()
    assert shared.weight.grad is not None
