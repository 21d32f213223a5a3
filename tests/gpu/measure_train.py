"""Training steps by the trainer's own updater on a batch that is held: rates, memory, and where a step waits.

Per model samples per second with their share of the card's ceiling, the peak, and how often Python waits for the device
in a step; the kernels that take most of it; then the flags that may make it faster. Reading is left out
(measure_reader.py has it).
"""

import copy
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import catlip as catlip_bench
import numpy as np
import torch
from figures import Options, ceiling, figure, options, run_parts, seconds_of, synchronize
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.plan.costs import FLOP
from shards_spec.models import LoadedModel
from training.config import EnsembleConfig, ModelConfig, RunConfig
from training.configs import default_config
from training.configs.tinyclip import TinyclipConfig
from training.data.batches import load_batches
from training.data.order import BatchPlan, Order
from training.engine.batch_fit import fitted, profiles
from training.engine.distributed import Ranks
from training.engine.updater import Updater
from training.losses import similarity
from training.losses.distillation import ensemble_affinity_loss
from training.losses.similarity import RowShare, Similarity
from training.models.teacher import CACHED_FIELDS, FrozenTeacher, TeacherEnsemble
from training.recipes import clip, siclip, tinyclip
from training.recipes.clip_kd import ClipKd
from training.runs.student import load_student

CARD = 24e9  # bytes of the card that SiCLIP is to fit
TEACHER = 768  # numbers of a cached feature: ViT-L/14's
TOTAL = 10**6  # steps of the run that these would be the first of
SHOWN_PLACES = 6


class DrawnRows:
    """Rows without a dataset: noise, a caption, and a teacher's features where ``width`` is above 0."""

    def __init__(self, student: LoadedModel, batch_size: int, width: int) -> None:
        self.student = student
        self.plan = BatchPlan(batch_size)
        self.order = Order([TOTAL], 0)
        self.width = width

    def __getitem__(self, index: tuple[int, int | None]) -> dict[str, Any]:
        position, side = index[0], self.student.image_size
        drawn = np.random.default_rng(position)
        text = f"a photo of thing number {position} on a beach beside some large rocks"
        item = {
            "key": f"{position:09d}",
            "position": position,
            "epoch": 0,
            "images": torch.frombuffer(bytearray(drawn.bytes(3 * side * side)), dtype=torch.uint8).view(3, side, side),
            "tokens": self.student.tokenizer([text])[0],
            "blank": False,
        }
        if self.width:
            item |= {name: torch.from_numpy(drawn.normal(size=self.width)).float() for name in CACHED_FIELDS}
        return item


@dataclass
class Job:
    """What is trained: ``operations`` are those of a sample's step, ``rate`` is its key among plan's jobs."""

    name: str
    config: Any
    student: LoadedModel
    task: Any
    rows: DrawnRows
    operations: float = 0.0
    rate: str = ""
    batches: dict[bool, dict[str, Any]] = field(default_factory=dict)

    def batch(self, device: str, as_bytes: bool) -> dict[str, Any]:
        """The batch on the device, made once."""
        if as_bytes not in self.batches:
            positions = [range(self.rows.plan.batch_size)]
            self.batches[as_bytes] = next(load_batches(self.rows, positions, device=device, as_bytes=as_bytes))
        return self.batches[as_bytes]

    def with_run(self, **flags: Any) -> RunConfig:
        """The run's config with other flags."""
        return replace(self.config.run, **flags)


@dataclass(frozen=True)
class Size:
    """The numbers of a job: the student and the pairs of a step."""

    model: str
    batch_size: int


def pairs_job(name: str, recipe: str, size: Size, build: Callable[[Any, LoadedModel], Any], width: int = 0) -> Job:
    """A recipe's job with its own numbers but for the student and the batch."""
    config = default_config(recipe)
    config = replace(
        config,
        data=replace(config.data, batch_size=size.batch_size),
        student=ModelConfig(size.model),
        run=replace(config.run, precision="bf16"),
    )
    student = load_student(config.student, 0)
    rows = DrawnRows(student, size.batch_size, width)
    rate = f"step of {name}"
    job = Job(name, config, student, build(config, student), rows)
    return replace(job, operations=1e9 * FLOP[rate], rate=rate) if rate in FLOP else job


def siclip_job(where: Options) -> Job:
    """SiCLIP as its recipe has it, with random weights."""
    size = Size("SiCLIP-tiny", 4) if where.dry else Size("SiCLIP-S0", 1536)
    base = size.model.replace("SiCLIP", "MobileCLIP")

    def build(config: Any, student: LoadedModel) -> Any:
        return siclip.build_task(replace(config, base=base, base_weights="random"), student, None)

    return pairs_job("SiCLIP-S0", "siclip", size, build)


def fit_siclip(job: Job, where: Options) -> None:
    """Count SiCLIP's operations, and choose its chunks as --fit 24 does."""
    job.operations = siclip_operations(job)
    run = job.with_run(fit=CARD / 1e9)
    task = job.task.to(where.device).train()
    memory = fitted(run, profiles(replace(job.config, run=run), job.rows, task, where.device), 1, where.device)
    figure("train: SiCLIP-S0, memory predicted", memory.total / 1e9, "GB", **{"chunk size": str(memory.chunk_size)})
    job.config = replace(job.config, run=replace(run, chunk_size=memory.chunk_size))


def siclip_operations(job: Job) -> float:
    """Of a sample's step: all of the forward pass, and twice what of it belongs to the student alone."""
    task, batch = copy.deepcopy(job.task).to("meta"), on_meta(job, 2)
    base = task.base.model
    forward = count(lambda: task(task.draw(batch)))
    teacher = count(lambda: (base.encode_image(batch["images"]), base.encode_text(batch["tokens"])))
    return (forward + 2 * (forward - teacher)) / 2


def on_meta(job: Job, number: int) -> dict[str, Any]:
    """A batch without numbers."""
    batch = next(load_batches(job.rows, [range(number)]))
    return {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in batch.items()}


@torch.no_grad()
def count(work: Callable[[], object]) -> float:
    """Operations of a call, multiply and add are two."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def affinity_job(where: Options) -> Job:
    """Affinity mimicking from a cache."""

    def build(config: TinyclipConfig, student: LoadedModel) -> Any:
        teacher = TeacherEnsemble([FrozenTeacher("drawn", width=TEACHER, logit_scale=50.0)], EnsembleConfig())
        clip_kd = ClipKd(config.clip_kd, student.config["embed_dim"], teacher, compares=False)
        return tinyclip.TinyclipTask(student.model, {"affinity": 1.0}, config.fixed_logit_scale, clip_kd)

    size = Size("MobileCLIP-tiny", 4) if where.dry else Size("ViT-M-32", 1024)
    return pairs_job("ViT-M-32", "tinyclip", size, build, TEACHER)


def clip_job(name: str, where: Options) -> Job:
    """The contrastive loss alone, everything trained."""
    size = Size("MobileCLIP-tiny", 4) if where.dry else Size(name, 256 if name == "MobileCLIP-S0" else 512)
    return pairs_job(name, "clip", size, lambda config, student: clip.ClipTask(student.model))


def prepare_step(job: Job, where: Options, run: RunConfig) -> tuple[Updater, Callable[[], None]]:
    """The updater of a run of the job, and a call that takes its next step."""
    task = job.task.to(where.device).train()
    config = replace(job.config, run=run)
    updater = Updater(task, config, TOTAL, ranks=Ranks(), device=where.device, normalise=job.student.normalise)
    batch = dict(job.batch(where.device, run.chunk_size is not None))
    if run.channels_last:  # as the trainer lays them out
        batch["images"] = batch["images"].contiguous(memory_format=torch.channels_last)
    steps = iter(range(TOTAL))

    def step() -> None:
        update = updater.update(batch, next(steps), [len(batch["keys"])])
        assert not update.skipped, f"{job.name}: loss or gradient is not finite"

    return updater, step


def step_seconds(step: Callable[[], None], where: Options) -> float:
    """Median seconds per step of three turns of three steps, after a turn that does not count."""
    steps = 1 if where.dry else 3

    def turn() -> None:
        for _ in range(steps):
            step()

    return seconds_of(turn, where.device, repeat=1 if where.dry else 3, warm_up=0 if where.dry else 1) / steps


def waits_of(step: Callable[[], None], device: str) -> Counter[str]:
    """Where Python waits for the device in a step, and how often."""
    if not device.startswith("cuda"):
        step()
        return Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(one.filename).name}:{one.lineno}" for one in caught if "synchroniz" in str(one.message))


def measure_kernels(job: Job, where: Options) -> None:
    """Report which kernels take most of a step; the log has them by their full names."""
    _, step = prepare_step(job, where, job.config.run)
    step()
    kind, attribute = (
        ("CUDA", "self_device_time_total") if where.device.startswith("cuda") else ("CPU", "self_cpu_time_total")
    )
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as profiled:
        step()
        synchronize(where.device)
    averages = profiled.key_averages()
    taken = Counter[str]()
    for event in averages:
        taken[short_name(event.key)] += getattr(event, attribute)
    whole = sum(taken.values())
    shares = {name: time_taken / whole for name, time_taken in taken.most_common(SHOWN_PLACES)}
    figure(f"train: {job.name}, kernels of a step", whole / 1e3, "ms", **shares)
    table = averages.table(sort_by=f"self_{kind.lower()}_time_total", row_limit=25, max_name_column_width=90)
    print(f"{job.name}, one step\n{table}", flush=True)


def short_name(kernel: str) -> str:
    """A kernel's name without its namespaces and templates."""
    return kernel.removeprefix("void ").replace("(anonymous namespace)", "").split("<")[0].split("(")[0].split("::")[-1]


@contextmanager
def card_of(size: float | None, device: str) -> Any:
    """Within, the allocator gives ``size`` bytes at most, as a smaller card would."""
    if size is None or not device.startswith("cuda"):
        yield
        return
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(device).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def measure(job: Job, where: Options, *, card: float | None = None) -> None:
    """Report a job as its recipe trains it."""
    on_cuda = where.device.startswith("cuda")
    with card_of(card, where.device):
        updater, step = prepare_step(job, where, job.config.run)
        step()
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = step_seconds(step, where)
    size = job.rows.plan.batch_size
    rate = size / seconds
    facts: dict[str, float | str] = {"batch": size, "ms a step": 1e3 * seconds}
    if on_cuda:
        facts["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        facts["reserved GB"] = torch.cuda.max_memory_reserved() / 1e9
    if job.operations:
        facts["share"] = rate * job.operations / ceiling(where.device)
    name = f"train: {job.name}, batch {size:,} bf16"
    figure(name, rate, "samples/s", rate=job.rate, **facts)
    if card is not None:
        figure(f"{name}, steps", 1 / seconds, "steps/s", **{"chunk size": str(updater.gradients.chunk_size)})
        if on_cuda:
            peak = torch.cuda.max_memory_allocated()
            figure(f"{name}, peak", peak / 1e9, "GB", goal="below 24", allowed=card / 1e9)
    places = waits_of(step, where.device)
    shown = ", ".join(f"{place} x {number}" for place, number in places.most_common(SHOWN_PLACES))
    figure(f"train: {job.name}, waits for the device in a step", sum(places.values()), "waits", where=shown or "none")


def measure_variant(job: Job, where: Options, label: str, run: RunConfig) -> None:
    """Report a job with other flags, the first step's seconds beside it."""
    _, step = prepare_step(job, where, run)
    start = time.perf_counter()
    step()
    synchronize(where.device)
    first = time.perf_counter() - start
    rate = job.rows.plan.batch_size / step_seconds(step, where)
    facts = {"share": rate * job.operations / ceiling(where.device)} if job.operations else {}
    figure(f"train: {job.name}, {label}", rate, "samples/s", **facts, **{"first step s": first})


def measure_siclip(where: Options) -> None:
    """Report SiCLIP, whose goal is a card of 24 GB."""
    job = siclip_job(where)
    fit_siclip(job, where)
    measure(job, where, card=CARD)
    measure_kernels(job, where)
    measure_variant(job, where, "channels_last", job.with_run(channels_last=True))


def measure_affinity(where: Options) -> None:
    """Report the TinyCLIP recipe's student."""
    job = affinity_job(where)
    measure(job, where)
    if not where.dry:
        measure_kernels(job, where)


def measure_mobileclip(where: Options) -> None:
    """Report MobileCLIP-S0, everything trained."""
    job = clip_job("MobileCLIP-S0", where)
    measure(job, where)
    if not where.dry:
        measure_kernels(job, where)


def measure_vit(where: Options) -> None:
    """Report ViT-B-16; a dry run has seen the same with another model."""
    if not where.dry:
        measure(clip_job("ViT-B-16", where), where)


def measure_catlip(where: Options) -> None:
    """Report CatLIP's step against CLIP's, by tests/bench/catlip.py."""
    tiny = [
        "--model",
        "catlip_vit_tiny",
        "--size",
        "48",
        "--text-width",
        "64",
        "--text-layers",
        "1",
        "--classes",
        "100",
    ]
    full = ["--batch-size", "512", "--steps", "4", "--rounds", "2"]
    sizes = [*tiny, "--labels", "3", "--batch-size", "4", "--steps", "1", "--rounds", "1"] if where.dry else full
    chosen = catlip_bench.parse([*sizes, "--device", where.device, "--precision", "bf16"])
    tasks = {"CatLIP": catlip_bench.catlip_task(chosen), "CLIP": catlip_bench.clip_task(chosen)}
    rounds = catlip_bench.measure_rounds(tasks, chosen)
    whole = {name: min(sum(parts) for parts in taken) for name, taken in rounds.items()}
    for name, seconds in whole.items():
        rate = chosen.batch_size / seconds
        share = rate * catlip_bench.operations(tasks[name], chosen) / ceiling(where.device)
        figure(f"train: {name} B/16, batch {chosen.batch_size} bf16", rate, "samples/s", share=share)
    parts = catlip_bench.measure_parts(chosen)
    of_clip, of_catlip = parts["text tower"] / whole["CLIP"], parts["labels and loss"] / whole["CatLIP"]
    shares = {"text tower of CLIP's": of_clip, "labels and loss of CatLIP's": of_catlip}
    shares["RangeAugment of CatLIP's"] = parts["RangeAugment"] / whole["CatLIP"]
    figure("train: CLIP's step over CatLIP's", whole["CLIP"] / whole["CatLIP"], "x", goal="paper: 2.7", **shares)


def measure_losses(where: Options) -> None:
    """Report the affinity loss of large batches, with the matrices of all pairs whole or in blocks of rows.

    The last one is the share of one of eight processes.
    """
    cases = ((8192, 8192, 1), (16384, 8192, 1), (16384, 16384, 1), (32768, 8192, 1), (32768, 8192, 8))
    for pairs, largest, processes in ((64, 64, 1), (64, 16, 1), (64, 16, 8)) if where.dry else cases:
        share = RowShare(size=processes)
        student = [torch.randn(pairs, 512, device=where.device, requires_grad=True) for _ in range(2)]
        teacher = [torch.randn(pairs, TEACHER, device=where.device) for _ in range(2)]
        sides = Similarity(student[0], student[1], 50.0), Similarity(teacher[0], teacher[1], 50.0)

        def step(sides: tuple[Similarity, Similarity] = sides, share: RowShare = share) -> None:
            ensemble_affinity_loss(sides[0], sides[1:], share=share).backward()

        if where.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        similarity.MAX_WHOLE = largest
        seconds = seconds_of(step, where.device, repeat=3)
        peak = torch.cuda.max_memory_allocated() / 1e9 if where.device.startswith("cuda") else 0.0
        own = share.rows(pairs)
        how = "whole" if similarity.is_whole(own.stop - own.start, pairs) else "in blocks"
        if processes > 1:
            how = f"{how}, one of {processes} processes"
        figure(f"train: affinity loss of {pairs:,} pairs, {how}", 1e3 * seconds, "ms", **{"peak GB": peak})


def main() -> int:
    """Measure and report, the most important first."""
    where = options(__doc__)
    parts = (
        measure_siclip,
        measure_affinity,
        measure_mobileclip,
        measure_vit,
        measure_catlip,
        measure_losses,
    )
    return run_parts(*(partial(part, where) for part in parts))


if __name__ == "__main__":
    sys.exit(main())
