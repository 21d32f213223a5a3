#!/usr/bin/env python3
"""SiCLIP against MobileCLIP-S0 on a CPU: images per second of the image encoders, and a training step.

    python tests/bench/inference.py [--batches 1 8] [--repeat 40] [--threads 1] [--train-batch 8]

Both image encoders are in inference form (timm's `reparameterize_model`), take the same pixels in turn, and the median
counts. The paper (arXiv 2411.14789, table 3, Xeon Silver 4314) has 39.5 against 38.2 images/s. The training steps are
SiCLIP with its backbone frozen, whose part before the attention blocks runs once, fused and without a graph, and feeds
the live teacher, too; and MobileCLIP-S0 with everything trainable and no teacher. Weights are random.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import open_clip
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from training.config import OptimConfig
from training.engine.optim import build_optimizer
from training.losses.contrastive import clip_loss
from training.models.inheritance import freeze, inherit_siclip
from training.models.mobileclip import forward_shared, forward_tail

PAPER = 39.5 / 38.2


def in_turn(teacher: Callable[[], object], student: Callable[[], object], repeat: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of teacher/student over the rounds, which run them one after the other.

    The order alternates; two rounds warm up. The ratio within a round, and on one thread the time of the CPU instead of
    the clock's, stand a machine that has other things to do.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    rounds = []
    for turn in range(repeat + 2):
        seconds = [0.0, 0.0]
        for which in (0, 1) if turn % 2 else (1, 0):
            start = clock()
            (teacher, student)[which]()
            seconds[which] = clock() - start
        rounds.append(seconds)
    teachers, students = zip(*rounds[2:], strict=True)
    ratio = statistics.median(one / other for one, other in rounds[2:])
    return statistics.median(teachers), statistics.median(students), ratio


def moved(model: nn.Module) -> nn.Module:
    """The model with BatchNorm statistics and layer scales as a trained one has them, not 0, 1 and 1e-5."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(std=0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif "layer_scale" in name:
            tensor.uniform_(0.05, 0.2)
    return model.eval()


@dataclass(frozen=True)
class ImageTimes:
    """Seconds per batch of the image encoders, the median of their ratios, and seconds of the attention blocks."""

    teacher: float
    student: float
    ratio: float
    teacher_blocks: float
    student_blocks: float


def image_times(teacher: nn.Module, student: nn.Module, batch: int, repeat: int) -> ImageTimes:
    """Measure the image encoders on batches of ``batch`` images."""
    pixels, hidden = torch.rand(batch, 3, 256, 256), torch.randn(batch, 512, 8, 8)
    towers = [reparameterize_model(model.visual) for model in (teacher, student)]
    blocks = [tower.trunk.stages[-1].blocks for tower in towers]
    with torch.inference_mode():
        slow, fast, ratio = in_turn(lambda: towers[0](pixels), lambda: towers[1](pixels), repeat)
        before, after, _ = in_turn(lambda: blocks[0](hidden), lambda: blocks[1](hidden), repeat)
    return ImageTimes(slow, fast, ratio, before, after)


def student_step(teacher: nn.Module, student: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """A step of frozen SiCLIP with a contrastive and a feature loss; the live teacher shares the prefixes."""
    state, frozen = inherit_siclip(student.state_dict(), teacher.state_dict())
    student.load_state_dict(state)
    freeze(student, frozen)
    prefix = reparameterize_model(teacher)
    optimizer = build_optimizer(student.train(), OptimConfig())

    def step(pixels: Tensor, tokens: Tensor) -> None:
        with torch.no_grad():
            seen, read = forward_shared(prefix, pixels), prefix.text.forward_shared(tokens)
            targets = forward_tail(prefix, seen), prefix.text.forward_tail(read, tokens)
        found = forward_tail(student, seen), student.text.forward_tail(read, tokens)
        (image, text), (image_target, text_target) = (
            [nn.functional.normalize(features, dim=-1) for features in pair] for pair in (found, targets)
        )
        loss = clip_loss(image, text, student.logit_scale.exp())
        loss = loss + nn.functional.mse_loss(image, image_target) + nn.functional.mse_loss(text, text_target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def plain_step(model: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """A step of MobileCLIP-S0 with all weights trainable and the contrastive loss."""
    optimizer = build_optimizer(model.train(), OptimConfig())

    def step(pixels: Tensor, tokens: Tensor) -> None:
        image, text = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
        optimizer.zero_grad()
        clip_loss(image, text, model.logit_scale.exp()).backward()
        optimizer.step()

    return step


def step_times(teacher: nn.Module, student: nn.Module, pairs: int) -> tuple[float, float, float]:
    """Seconds per training step of MobileCLIP-S0 and of SiCLIP-S0, and the median of their ratios."""
    pixels = torch.rand(pairs, 3, 256, 256)
    tokens = torch.randint(1, 49407, (pairs, 77))
    plain, frozen = plain_step(copy.deepcopy(teacher)), student_step(teacher, student)
    return in_turn(lambda: plain(pixels, tokens), lambda: frozen(pixels, tokens), 5)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeat", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train-batch", type=int, default=8, help="pairs per training step; 0 leaves training out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    teacher, student = (moved(open_clip.create_model(name)) for name in ("MobileCLIP-S0", "SiCLIP-S0"))
    for batch in options.batches:
        took = image_times(teacher, student, batch, max(5, options.repeat // batch))
        print(
            f"batch {batch}: MobileCLIP-S0 {batch / took.teacher:.2f}, SiCLIP-S0 {batch / took.student:.2f} images/s, "
            f"ratio {took.ratio:.3f} (paper {PAPER:.3f}); of this, attention blocks "
            f"{1000 * took.teacher_blocks / batch:.2f} against {1000 * took.student_blocks / batch:.2f} ms/image"
        )
    if options.train_batch:
        slow, fast, ratio = step_times(teacher, student, options.train_batch)
        print(
            f"training step of {options.train_batch} pairs: MobileCLIP-S0, all trainable, {slow:.2f} s; SiCLIP-S0, "
            f"frozen backbone and live teacher, {fast:.2f} s: {ratio:.1f} x"
        )


if __name__ == "__main__":
    main()
