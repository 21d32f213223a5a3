"""The peak memory of training against its prediction, per recipe at sizes as users have them, whole and in chunks.

The prediction is made as `clipmill train` makes it, on the device before the first step, and once more as a machine
without a device would. The peak is the allocator's over three steps of the trainer.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from allocation_meter import AllocationMeter
from figures import figure, options, run_parts
from small_training import tiny_config, write_every_root, write_packed, write_teacher

from training.data.batches import TrainingRows
from training.engine.batch_fit import SizedProfile, fitted, profiles
from training.engine.device_memory import CudaMeter, Meter
from training.engine.distributed import Ranks
from training.engine.memory_estimate import Memory
from training.runs.run_folder import RunFolder
from training.task import Prepared, Task
from training.trainer import Trainer, prepare

STEPS = 3  # the second is the first one with the optimizer's state
CLASSES = 24_320  # of CatLIP's vocabulary of CC3M
CARD = 24.0  # GB that SiCLIP is to take at most


@dataclass(frozen=True)
class Job:
    """A recipe at a size, and the chunks it is measured with, None being the whole batch."""

    name: str
    recipe: str
    fields: dict[str, Any]
    chunks: tuple[int | None, ...]
    goal: str = "predicted within 10 %"
    dry: dict[str, Any] = field(default_factory=dict)

    def config(self, root: str, out: Path, dry: bool) -> Any:
        """The recipe's own numbers at this size; at a tiny one when ``dry``."""
        fields = {"precision": "bf16", "steps": STEPS, **self.fields, **(self.dry if dry else {"workers": 8})}
        return tiny_config(self.recipe, root, str(out), **fields)


CATLIP = {"model": "timm:catlip_vit_base_patch16_224", "sides": (224,), "base_side": 224}
TINY_CATLIP = {"model": "timm:catlip_vit_tiny", "sides": (32,), "base_side": 32, "batch_size": 4}
SICLIP = {"model": "SiCLIP-S0", "base": "MobileCLIP-S0", "base_weights": "random"}
JOBS = (
    Job(
        "SiCLIP-S0, batch 1536",
        "siclip",
        {"batch_size": 1536, **SICLIP},
        (None, 384),
        f"< {CARD:.0f} GB, predicted within 10 %",
        {"batch_size": 4, "model": "SiCLIP-tiny", "base": "MobileCLIP-tiny"},
    ),
    Job(
        "affinity ViT-B-32, batch 1024",
        "tinyclip",
        {"batch_size": 1024, "model": "ViT-B-32"},
        (None, 256),
        dry={"batch_size": 8, "model": "local-dir:{root}/models/clip"},
    ),
    Job("CatLIP B/16, batch 256", "catlip", {"batch_size": 256, **CATLIP}, (None, 64), dry=TINY_CATLIP),
)


def write_root(folder: Path, dry: bool) -> str:
    """A dataset with labels and a teacher; in a dry run with tiny models."""
    if dry:
        return write_every_root(folder)
    write_teacher(str(folder), write_packed(str(folder), [64, 64], classes=CLASSES))
    return str(folder)


@contextmanager
def meter_of(device: str) -> Iterator[Meter]:
    """What counts bytes on the device."""
    if device.startswith("cuda"):
        yield CudaMeter(device)
        return
    with AllocationMeter() as meter:
        yield meter


def peak_of_steps(config: Any, prepared: Prepared, device: str, meter: Meter) -> int:
    """The most bytes that the allocator gave in a few steps, all that the process has there included."""
    out = RunFolder(config.run.out)
    trainer = Trainer(config, prepared, out, ranks=Ranks(), device=device)
    batches = trainer.batches()
    gc.collect()
    meter.clear()
    for _ in range(STEPS):
        trainer.step(next(batches))
    assert trainer.progress.nonfinite == 0
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return meter.peak()


def predict_on_cpu(config: Any, rows: TrainingRows, task: Task) -> list[SizedProfile]:
    """What a machine without a device measures."""
    return profiles(config, rows, task, "cpu")


def measure(job: Job, root: str, out: Path, device: str) -> None:
    """Report a job's predictions and peaks."""
    dry = not device.startswith("cuda")
    config = job.config(root, out, dry)
    if "{root}" in config.student.model:
        config = replace(config, student=replace(config.student, model=config.student.model.format(root=root)))
    with meter_of(device) as meter:
        prepared = prepare(job.recipe, config)
        on_cpu = predict_on_cpu(config, prepared.rows, prepared.task)
        task = prepared.task.to(device).train()
        on_device = profiles(config, prepared.rows, task, device, meter=meter)
        for chunk in job.chunks:
            asked = min(chunk, config.data.batch_size // 2) if chunk and dry else chunk
            run = replace(config.run, chunk_size=asked, fit=1e3)
            predicted, elsewhere = (fitted(run, found, 1, device) for found in (on_device, on_cpu))
            peak = peak_of_steps(replace(config, run=run), prepared, device, meter)
            report(job, predicted, elsewhere, peak)


def report(job: Job, predicted: Memory, elsewhere: Memory, peak: int) -> None:
    """Report one peak in GB; ``elsewhere`` is the prediction of a machine without a device."""
    chunks = f", chunks of {predicted.chunk_size}" if predicted.chunk_size else ""
    figure(
        f"memory: {job.name}{chunks}",
        peak / 1e9,
        "GB",
        goal=job.goal,
        predicted=predicted.total / 1e9,
        ratio=predicted.total / peak,
        ratio_without_a_device=elsewhere.total / peak,
    )
    print(f"{job.name}: {predicted}; without a device: {elsewhere}", flush=True)


def main() -> int:
    """Measure and report."""
    where = options(__doc__)
    if where.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # as `train` does
    root = write_root(where.work / "memory", where.dry)
    return run_parts(
        *(
            partial(measure, job, root, where.work / f"memory-run-{number}", where.device)
            for number, job in enumerate(JOBS)
        )
    )


if __name__ == "__main__":
    sys.exit(main())
