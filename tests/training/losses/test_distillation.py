"""Losses by their numbers, and the schedule as a table. Numbers: worked by hand, TinyCLIP's formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shards_spec.files import UserError
from training.config import OptimConfig
from training.engine.optim import build_optimizer, learning_rate, param_groups
from training.losses.contrastive import clip_loss
from training.losses.distillation import (
    affinity_loss,
    ensemble_affinity_loss,
    ensemble_relation_loss,
    feature_loss,
    relation_loss,
)
from training.losses.similarity import Similarity

EYE = torch.eye(2)


# TinyCLIP's fact 1
@pytest.mark.parametrize(
    ("student", "teacher", "loss"),
    [
        (math.log(3), math.log(3), 0.562335),
        (1.0, 1.0, 0.582203),
        (math.log(9), math.log(3), 0.654667),
        (0.0, 1.0, math.log(2)),
        (50.0, 50.0, 0.0),
    ],
)
def test_affinity_of_identity_features(student, teacher, loss):
    assert affinity_loss(EYE, EYE, EYE, EYE, student_scale=student, teacher_scale=teacher).item() == pytest.approx(
        loss, abs=1e-6
    )


# TinyCLIP's fact 2
def test_affinity_has_two_directions():
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    scale = math.log(3)
    assert affinity_loss(EYE, texts, EYE, EYE, student_scale=scale, teacher_scale=scale).item() == pytest.approx(
        0.765068, abs=1e-6
    )
    # rows alone and columns alone: 0.693147 and 0.836988
    assert (math.log(2) + 0.836988) / 2 == pytest.approx(0.765068, abs=1e-6)


def features(*seeds, n=6, d=5):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [F.normalize(torch.randn(n, d, generator=own, dtype=torch.float64), dim=-1) for own in generators]


# TinyCLIP's fact 3
def test_affinity_gradient_is_the_difference_of_softmaxes():
    student_image, student_text, image, text = features(0, 1, 2, 3)
    scale = torch.tensor(7.0, requires_grad=True, dtype=torch.float64)
    affinity_loss(student_image, student_text, image, text, student_scale=scale, teacher_scale=5.0).backward()
    similarity, target = student_image @ student_text.T, 5 * image @ text.T
    rows = (7 * similarity).softmax(1) - target.softmax(1)
    columns = (7 * similarity).softmax(0) - target.softmax(0)
    expected = ((rows + columns) / 2 / 6 * similarity).sum()
    assert scale.grad.item() == pytest.approx(expected.item(), abs=1e-12)


def loss_and_gradient(loss, image, text):
    """A loss of the student's features and its gradients at them."""
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    value = loss(image, text)
    return value.item(), torch.cat(torch.autograd.grad(value, [image, text]))


@pytest.mark.parametrize(
    ("ensemble", "single"), [(ensemble_affinity_loss, affinity_loss), (ensemble_relation_loss, relation_loss)]
)
def test_averaged_distributions_have_the_gradient_of_averaged_losses(ensemble, single):
    """The cross-entropy is the same, too; the divergence differs by the teachers' own (Jensen-Shannon)."""
    image, text = features(0, 1)
    taught = [(*features(2, 3), 7.0), (*features(4, 5, d=9), 3.0)]  # scales and widths of their own
    teachers = [Similarity(*teacher) for teacher in taught]

    def of_mean(image, text):
        return ensemble(Similarity(image, text, 5.0), teachers)

    def mean_of(image, text):
        return sum(single(image, text, *pair, student_scale=5.0, teacher_scale=scale) for *pair, scale in taught) / 2

    (loss, gradient), (other, expected) = (loss_and_gradient(each, image, text) for each in (of_mean, mean_of))
    assert torch.allclose(gradient, expected, atol=1e-12)
    targets = [torch.stack([own.logits().softmax(1), own.logits().T.softmax(1)]) for own in teachers]
    mean = sum(targets) / 2
    divergence = sum((target * (target / mean).log()).sum(-1).mean() for target in targets).item() / 2
    assert other - loss == pytest.approx(divergence if single is relation_loss else 0.0, abs=1e-12)
    assert divergence > 0.1
    log_student = [(5.0 * image @ text.T).log_softmax(1), (5.0 * text @ image.T).log_softmax(1)]
    cross = -(mean * torch.stack(log_student)).sum(-1).mean()
    written_out = cross if single is affinity_loss else cross + (mean * mean.log()).sum(-1).mean()
    assert loss == pytest.approx(written_out.item(), abs=1e-12)


# TinyCLIP's fact 3
def test_affinity_at_the_teacher_is_its_entropy_with_no_gradient():
    image, text = features(0, 1)
    student = image.clone().requires_grad_()
    loss = affinity_loss(student, text, image, text, student_scale=20.0, teacher_scale=20.0)
    logits = 20 * image @ text.T
    entropy = sum(-(p * p.log()).sum(1).mean() for p in (logits.softmax(1), logits.T.softmax(1))) / 2
    assert loss.item() == pytest.approx(entropy.item(), abs=1e-12)
    loss.backward()
    assert student.grad.abs().max() < 1e-12


def test_no_gradient_reaches_the_teacher():
    student_image, student_text, image, text = (tensor.requires_grad_() for tensor in features(0, 1, 2, 3))
    (
        affinity_loss(student_image, student_text, image, text) + feature_loss(student_image, student_text, image, text)
    ).backward()
    assert image.grad is None
    assert text.grad is None
    assert student_image.grad.abs().sum() > 0


def test_clip_loss_equals_open_clips():
    from open_clip.loss import ClipLoss

    image, text = features(0, 1)
    assert torch.allclose(clip_loss(image, text, 13.0), ClipLoss()(image, text, torch.tensor(13.0)))
    assert clip_loss(EYE, EYE, math.log(3)).item() == pytest.approx(-math.log(3 / 4), abs=1e-6)


def test_losses_are_float32_under_autocast():
    image, text = (tensor.float() for tensor in features(0, 1))
    plain = (
        affinity_loss(image, text, text, image),
        clip_loss(image, text, 50.0),
        feature_loss(image, text, text, image),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = (
            affinity_loss(image, text, text, image),
            clip_loss(image, text, 50.0),
            feature_loss(image, text, text, image),
        )
    assert plain == cast


def test_feature_loss_is_two_minus_two_cosines():
    image, text, other_image, other_text = features(0, 1, 2, 3)
    cosines = ((image * other_image).sum(1).mean() + (text * other_text).sum(1).mean()) / 2
    assert feature_loss(3 * image, text, other_image, 0.1 * other_text).item() == pytest.approx(
        2 - 2 * cosines.item(), abs=1e-6
    )
    assert feature_loss(EYE, EYE, EYE, EYE.flip(0)).item() == pytest.approx(1.0)


HALF_COSINE = [1.0, 0.9619398, 0.8535534, 0.6913417, 0.5, 0.3086583, 0.1464466, 0.0380602]
SCHEDULES = {
    "cosine": HALF_COSINE,
    "linear": [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
    "constant": [1.0] * 8,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("final", [0.0, 0.25])
def test_learning_rate_tables(schedule, final):
    config = OptimConfig(lr=1.0, warmup=4, schedule=schedule, final_lr=final)
    end = 0.0 if schedule == "constant" else final
    expected = [0.25, 0.5, 0.75, 1.0, *(end + (1 - end) * left for left in SCHEDULES[schedule])]
    assert [learning_rate(step, config, 12) for step in range(12)] == pytest.approx(expected, abs=1e-6)
    assert learning_rate(12, config, 12) == pytest.approx(1.0 if schedule == "constant" else final)


def test_learning_rate_without_a_warm_up_and_with_nothing_after_it():
    assert learning_rate(0, OptimConfig(lr=2.0, warmup=0), 10) == 2.0
    assert learning_rate(5, OptimConfig(lr=1.0, warmup=5), 5) == 1.0


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 3)
        self.ln_1 = nn.LayerNorm(3)
        self.bn_weird = nn.Parameter(torch.ones(2, 2))
        self.logit_scale = nn.Parameter(torch.ones([]))
        self.positional_embedding = nn.Parameter(torch.ones(4, 3))
        self.class_embedding = nn.Parameter(torch.ones(3))
        self.layer_scale = nn.Parameter(torch.ones(3, 1, 1))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_decay_is_for_matrices_with_no_exempt_name():
    toy = Toy()
    names = {id(parameter): name for name, parameter in toy.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group.params} for group in param_groups(toy, 0.2))
    assert decayed == {"fc.weight", "positional_embedding"}
    assert plain == {"fc.bias", "ln_1.weight", "ln_1.bias", "bn_weird", "logit_scale", "class_embedding", "layer_scale"}


def test_optimizer_takes_the_config():
    optimizer = build_optimizer(Toy(), OptimConfig(lr=0.5, weight_decay=0.3, beta1=0.1, beta2=0.2, eps=0.01))
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all((g["lr"], g["betas"], g["eps"]) == (0.5, (0.1, 0.2), 0.01) for g in (decayed, plain))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("weight_decay", -1.0),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", 0.0),
        ("warmup", -1),
        ("clip_norm", 0.0),
    ],
)
def test_fields_are_checked(field, value):
    with pytest.raises(UserError, match=rf"--{field.replace('_', '-')} {value}: must be"):
        OptimConfig(**{field: value})
