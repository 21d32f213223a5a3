#!/usr/bin/env python3
"""The tables of docs/recipes: hours and gigabytes of each paper's commands, on one 24 GB GPU and on eight nodes.

    python tests/bench/recipes.py [NAME ...]    such as siclip; `python docs/tables.py` writes them into the pages
    python tests/bench/recipes.py --flops       counts what `JOBS` holds, in a minute: real architectures, empty weights

The arithmetic is that of `pipeline/plan`. Hours of a GPU come from jobs that were measured on a card (`rates.json`, and
`tests/gpu/figures.jsonl` for steps of SiCLIP and CatLIP); another job is taken to keep up the share of the ceiling that
a measured one of its kind does. Where a batch does not fit 24 GB it is computed in chunks, which takes each forward
pass twice.
"""

import argparse
import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, NamedTuple

import plan

from pipeline.plan.costs import ASSUMED_SHARE, STUDENTS
from pipeline.plan.estimate import Choices, Corpus, Gpu, Hardware, StageCost, stage_costs
from pipeline.plan.rates import RATES, MeasuredRates, read_rates

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "tests" / "gpu" / "figures.jsonl"
UNIT = "step of ViT-B-16"  # a measured job, in whose samples the time of the others is told to the plan
CARD, KIND, GUESS = "†", "‡", "§"  # how a rate is known: measured, as a job of its kind, assumed
NODES = 8
GPUS_PER_NODE = 8
SIDE = 224  # pixels a side of the images whose batch is the nominal one

CC3M = plan.CORPORA[0]
CC12M = plan.CORPORA[1]
DATACOMP = plan.CORPORA[2]
BOTH = Corpus("CC3M + CC12M", CC3M.rows + CC12M.rows, CC3M.samples + CC12M.samples, 10_000)
LAION = Corpus("LAION-400M", 400_000_000, 400_000_000, 10_000)  # as TinyCLIP counts it; by now links are dead
IMAGENET = Corpus("ImageNet-1k", 1_281_167, 1_281_167, 1_000)


@dataclass(frozen=True)
class Job:
    """What a GPU does with a sample.

    Attributes:
        forward: 1e9 operations of the forward pass of what is trained, multiply and add are two; 0 where nothing is.
        frozen: The same of what is not trained: a teacher, an encoder.
        like: The measured job whose share of the ceiling it is taken to keep up; empty: `ASSUMED_SHARE`.
        figure: Its own rate in `tests/gpu/figures.jsonl`, where it was measured.
    """

    forward: float = 0.0
    frozen: float = 0.0
    like: str = ""
    figure: str = ""

    @property
    def operations(self) -> float:
        """1e9 operations of a sample; a backward pass has two for each of the forward pass."""
        return 3 * self.forward + self.frozen

    @property
    def mark(self) -> str:
        """How its rate is known."""
        if self.figure:
            return CARD
        return KIND if self.like else GUESS


# `--flops` counts them; the operations of measured jobs are in pipeline/plan/costs.py and tests/gpu
JOBS = {
    "image of ViT-B/32": Job(frozen=8.82, like="image, ViT-L/14"),
    "image of ViT-B/16": Job(frozen=35.13, like="image, ViT-L/14"),
    "text of ViT-B": Job(frozen=5.96, like="text, ViT-L/14"),
    "image of RegNetY-16GF": Job(frozen=31.82),
    "step of SiCLIP-S0": Job(figure="train: SiCLIP-S0, batch 1,536 bf16"),
    "step of TinyCLIP-ViT-61M/32": Job(forward=10.64, like="step of ViT-M-32"),
    "step of TinyCLIP-ViT-40M/32": Job(forward=6.97, like="step of ViT-M-32"),
    "step of ViT-T/16": Job(forward=5.89, like="step of ViT-M-32"),
    "step of CatLIP B/16": Job(figure="train: CatLIP B/16, batch 512 bf16"),
    "probe of ViT-B/16": Job(frozen=35.13, like="image, ViT-L/14"),
    "fine-tuning of ViT-B/16": Job(forward=35.13, like="step of ViT-B-16"),
    "step of TinyMIM-B": Job(forward=32.92, frozen=88.53, like="step of ViT-B-16"),
    "step of Mini-DeiT-S": Job(forward=9.30, like="step of ViT-B-16"),
    "step of Mini-Swin-T, teacher Swin-B": Job(forward=9.19, frozen=30.86, like="step of ViT-B-16"),
}


class Machine(NamedTuple):
    """What the commands of a page run on: nodes, GPUs of all nodes together, 16 cores beside each."""

    name: str
    hardware: Hardware
    nodes: int
    gpus: int


class Row(NamedTuple):
    """A command, what it costs, the marks of its GPU's hours, its jobs that the plan does not know, and its steps."""

    name: str
    cost: StageCost
    marks: str = ""
    jobs: tuple[str, ...] = ()
    steps: float = 0.0


class Setting(NamedTuple):
    """Two columns of a table: what the rows are of, and on which machine."""

    title: str
    machine: Machine
    rows: list[Row]


@dataclass(frozen=True)
class Work:
    """A command that keeps GPUs busy: a cache or a training.

    Attributes:
        name: Of the row.
        jobs: Samples of each job, per image and epoch.
        epochs: Passes over the corpus.
        gpus: At most, where the batch is too small for more.
        fits: Whether the batch fits one 24 GB GPU; else it is computed in chunks there.
        row_bytes: What is written per image, where that is not the plan's cache.
        batch: Samples of a step, where the page says how many steps an hour has.
    """

    name: str
    jobs: dict[str, float]
    epochs: float = 1.0
    gpus: int | None = None
    fits: bool = True
    row_bytes: float | None = None
    batch: float | None = None


def one_gpu(measured: MeasuredRates) -> Machine:
    """README's machine: a 24 GB GPU by its data sheet."""
    return Machine("one GPU", plan.one_machine(measured), 1, 1)


def eight_nodes(measured: MeasuredRates) -> Machine:
    """Nodes with eight cards each of the kind that was measured."""
    gpu = Gpu(measured.ceiling, ASSUMED_SHARE * measured.ceiling, measured)
    return Machine(f"{NODES} nodes", Hardware(gpu, cores=16, gbit=10.0), NODES, NODES * GPUS_PER_NODE)


def figure_rate(name: str) -> float:
    """Samples per second of a figure, the last one of its name. Raises KeyError for one that was not measured."""
    figures = [json.loads(line) for line in FIGURES.read_text().splitlines()]
    return {figure["name"]: figure["value"] for figure in figures}[name]


def units(job: Job, measured: MeasuredRates, fits: bool) -> float:
    """Samples of `UNIT` that take a GPU as long as one of a job; in chunks each forward pass runs twice."""
    if job.figure:
        return (1.0 if fits else 4 / 3) * measured.rates[UNIT] / figure_rate(job.figure)
    share = measured.share(job.like) if job.like else ASSUMED_SHARE
    assert share is not None, job.like
    operations = job.operations + (0.0 if fits else job.forward + job.frozen)
    return operations * 1e9 / (share * measured.ceiling) * measured.rates[UNIT]


def stages_of(corpus: Corpus, machine: Machine, choices: Choices) -> dict[str, StageCost]:
    """The plan's stages, as arrays: ingest has a task per node, the others one per GPU."""
    spread = replace(corpus, ingest_tasks=machine.nodes, pack_tasks=machine.gpus, gpu_tasks=machine.gpus)
    return {stage.name: stage for stage in stage_costs(spread, choices, machine.hardware.cores)}


def known(corpus: Corpus, machine: Machine, choices: Choices, *names: str) -> list[Row]:
    """Rows of stages that the plan knows."""
    stages = stages_of(corpus, machine, choices)
    return [Row(name, stages[name], plan.MARKS[machine.hardware.gpu.basis(stages[name].jobs)]) for name in names]


def from_folders(machine: Machine) -> list[Row]:
    """Rows of ImageNet's folders becoming final shards: nothing is downloaded, nothing captioned."""
    ingest, pack = known(IMAGENET, machine, Choices(captions=0), "ingest", "pack")
    name = "ingest --format classes"
    return [Row(name, replace(ingest.cost, name=name)), pack]


def working(corpus: Corpus, machine: Machine, work: Work, measured: MeasuredRates, base: StageCost) -> Row:
    """The row of a command whose jobs the plan does not know; what cores do and bytes are those of ``base``."""
    fits = work.fits or machine.gpus > 1
    each = sum(count * units(JOBS[job], measured, fits) for job, count in work.jobs.items())
    written = base.written if work.row_bytes is None else corpus.samples * work.row_bytes
    cost = replace(
        base,
        name=work.name,
        core_hours=work.epochs * base.core_hours,
        read=work.epochs * base.read,
        written=written,
        tasks=min(machine.gpus, work.gpus or machine.gpus),
        jobs={UNIT: corpus.samples * work.epochs * each},
    )
    marks = {JOBS[job].mark for job in work.jobs}
    known_by = "".join(mark for mark in (CARD, KIND, GUESS) if mark in marks)
    steps = corpus.samples * work.epochs / work.batch if work.batch else 0.0
    return Row(work.name, cost, known_by, tuple(work.jobs), steps)


def training(corpus: Corpus, machine: Machine, work: Work, measured: MeasuredRates) -> Row:
    """The row of a training."""
    one_epoch = stages_of(corpus, machine, Choices())
    return working(corpus, machine, work, measured, one_epoch[f"train {STUDENTS[0]}"])


def cached(corpus: Corpus, machine: Machine, work: Work, measured: MeasuredRates, choices: Choices) -> Row:
    """The row of a teacher cache; ``choices`` say views, captions and the vectors' size."""
    return working(corpus, machine, work, measured, stages_of(corpus, machine, choices)["cache"])


def siclip(measured: MeasuredRates) -> list[Setting]:
    """CC12M with five synthetic captions, 32 epochs of batch 1,536."""
    train = Work("train siclip, 32 epochs", {"step of SiCLIP-S0": 1}, 32, gpus=GPUS_PER_NODE, batch=1536)
    settings = []
    for machine in (one_gpu(measured), eight_nodes(measured)):
        stages = known(CC12M, machine, Choices(captions=5), "ingest", "dedup", "caption", "pack")
        rows = [*stages, training(CC12M, machine, train, measured)]
        settings.append(Setting(f"CC12M, {machine.name}", machine, rows))
    return settings


def tinyclip(measured: MeasuredRates) -> list[Setting]:
    """Two stages by hand: on CC12M as on YFCC-15M (25 epochs of batch 4,096), on LAION-400M as released (6 epochs)."""
    settings = []
    for corpus, machine, epochs, views in (
        (CC12M, one_gpu(measured), 25, 8),
        (CC12M, eight_nodes(measured), 25, 8),
        (LAION, eight_nodes(measured), 6, 6),
    ):
        choices = Choices(views=views, captions=0, width=512)
        teacher = Work("cache", {"image of ViT-B/32": views, "text of ViT-B": 1})
        rows = [*known(corpus, machine, choices, "ingest", "pack"), cached(corpus, machine, teacher, measured, choices)]
        for stage, size in enumerate(("61M", "40M"), 1):
            job = {f"step of TinyCLIP-ViT-{size}/32": 1.0}
            batch = 32_768 if corpus is LAION else 4_096
            work = Work(f"train tinyclip, stage {stage}", job, epochs, fits=False, batch=batch)
            rows.append(training(corpus, machine, work, measured))
        settings.append(Setting(f"{corpus.name}, {machine.name}", machine, rows))
    return settings


def mean_batch(sides: Sequence[int]) -> float:
    """Images of a step over the nominal batch, the mean where a step has one of these sides and as many pixels."""
    return mean((SIDE / side) ** 2 for side in sides)


def catlip(measured: MeasuredRates) -> list[Setting]:
    """CC3M for 25 epochs on one GPU, DataComp-1B for 200,000 steps of 65,536 on eight nodes; then ImageNet.

    Jobs are counted in images of 224 pixels a side.
    """
    seen, tuned = mean_batch(range(128, 321, 16)), mean_batch(range(128, 321, 32))
    settings = []
    for corpus, machine, epochs, batch in (
        (CC3M, one_gpu(measured), 25.0, 2_048 * seen),
        (DATACOMP, eight_nodes(measured), 200_000 * 65_536 * seen / DATACOMP.samples, 65_536 * seen),
    ):
        works = [
            (corpus, Work("train catlip", {"step of CatLIP B/16": 1 / seen}, epochs, fits=False, batch=batch)),
            (IMAGENET, Work("train probe, 30 epochs", {"probe of ViT-B/16": 1 / tuned}, 30, gpus=GPUS_PER_NODE)),
            (
                IMAGENET,
                Work("train finetune, 10 epochs", {"fine-tuning of ViT-B/16": 1 / tuned}, 10, GPUS_PER_NODE, False),
            ),
        ]
        rows = known(corpus, machine, Choices(captions=0), "ingest", "pack", "vocab")
        rows += [training(images, machine, work, measured) for images, work in works]
        settings.append(Setting(f"{corpus.name}, {machine.name}", machine, rows))
    return settings


def tinymim(measured: MeasuredRates) -> list[Setting]:
    """ViT-B from MAE's ViT-L, 300 epochs of batch 4,096, and 100 epochs of fine-tuning."""
    works = [
        Work("train tinymim, 300 epochs", {"step of TinyMIM-B": 1}, 300, fits=False, batch=4_096),
        Work("train finetune, 100 epochs", {"fine-tuning of ViT-B/16": 1}, 100, GPUS_PER_NODE, False),
    ]
    return [on_imagenet(machine, works, measured) for machine in (one_gpu(measured), eight_nodes(measured))]


def on_imagenet(machine: Machine, works: Sequence[Work], measured: MeasuredRates) -> Setting:
    """Trainings on ImageNet's images after its folders became shards."""
    rows = [*from_folders(machine), *(training(IMAGENET, machine, work, measured) for work in works)]
    return Setting(f"ImageNet, {machine.name}", machine, rows)


def minivit(measured: MeasuredRates) -> list[Setting]:
    """Mini-DeiT-S from cached soft labels and Mini-Swin-T from a live Swin-B, 300 epochs of batch 1,024 each."""
    labels = Work("cache --soft-labels", {"image of RegNetY-16GF": 8}, row_bytes=8 * (4 * 100 + 4))
    works = [
        Work("train minivit, Mini-DeiT-S", {"step of Mini-DeiT-S": 1}, 300, GPUS_PER_NODE, False, batch=1_024),
        Work(
            "train minivit, Mini-Swin-T",
            {"step of Mini-Swin-T, teacher Swin-B": 1},
            300,
            GPUS_PER_NODE,
            False,
            batch=1_024,
        ),
    ]
    settings = []
    for machine in (one_gpu(measured), eight_nodes(measured)):
        setting = on_imagenet(machine, works, measured)
        made = cached(IMAGENET, machine, labels, measured, Choices(views=8))
        settings.append(setting._replace(rows=[*setting.rows[:2], made, *setting.rows[2:]]))
    return settings


def clipkd(measured: MeasuredRates) -> list[Setting]:
    """runs/clipkd.sh: four views of a ViT-B/16, a ViT-T/16 alone and distilled, 32 epochs of batch 1,024 each."""
    choices = Choices(views=4, captions=0, width=512)
    teacher = Work("cache", {"image of ViT-B/16": 4, "text of ViT-B": 1})
    works = [
        Work(f"train {recipe}, 32 epochs", {"step of ViT-T/16": 1}, 32, GPUS_PER_NODE, False, batch=1_024)
        for recipe in ("clip", "siclip")
    ]
    settings = []
    for machine in (one_gpu(measured), eight_nodes(measured)):
        rows = [*known(BOTH, machine, choices, "ingest", "pack"), cached(BOTH, machine, teacher, measured, choices)]
        rows += [training(BOTH, machine, work, measured) for work in works]
        settings.append(Setting(f"CC3M + CC12M, {machine.name}", machine, rows))
    return settings


PAGES = {page.__name__: page for page in (siclip, tinyclip, catlip, tinymim, minivit, clipkd)}


def hours_cell(row: Row, machine: Machine) -> tuple[float, str]:
    """Hours of the clock, and the cell: with marks where the GPU sets them, else with what does."""
    hours, limit = row.cost.hours(machine.hardware)
    text = plan.rounded(hours, "<0.1")
    return hours, f"{text}{row.marks}" if limit == "GPU" else f"{text} ({limit})"


def cost_table(settings: Sequence[Setting]) -> str:
    """The table of a page: a line per command, their sums, and the steps that an hour of the trainings has."""
    names = dict.fromkeys(row.name for row in chain.from_iterable(setting.rows for setting in settings))
    lines = {name: [f"`{name}`" if "," not in name else name] for name in names}
    total = ["together"]
    steps = {row.name: [f"steps an hour, {row.name}"] for row in settings[0].rows if row.steps}
    head = [""]
    for setting in settings:
        head += [f"{setting.title}: hours", "GB"]
        by_name = {row.name: row for row in setting.rows}
        spent = 0.0
        for name, cells in lines.items():
            hours, text = hours_cell(by_name[name], setting.machine)
            spent += hours
            cells += [text, plan.rounded(by_name[name].cost.written / 1e9, "–")]
            if name in steps:
                steps[name] += [f"{by_name[name].steps / hours:,.0f}", ""]
        total += [plan.rounded(spent, "<0.1"), plan.rounded(sum(row.cost.written for row in setting.rows) / 1e9, "–")]
    return plan.markdown([head, *lines.values(), total, *steps.values()])


def counted_jobs(jobs: Iterable[str]) -> str:
    """Jobs with the operations of their samples."""
    return ", ".join(f"{job} ({plan.number(JOBS[job].operations)} · 10⁹)" for job in jobs)


def note(measured: MeasuredRates, settings: Sequence[Setting]) -> str:
    """What the hours of a page rest on."""
    said = []
    rows = list(chain.from_iterable(setting.rows for setting in settings))
    jobs = dict.fromkeys(chain.from_iterable(row.jobs for row in rows))
    if any(CARD in row.marks for row in rows):
        said.append(f"{CARD}: the rate on {measured.card} ({measured.date}).")
    alike = dict.fromkeys(JOBS[job].like for job in jobs if JOBS[job].mark == KIND)
    shares = [f"{counted_jobs(job for job in jobs if JOBS[job].like == like)} as `{like}`" for like in alike]
    if shares:
        kinds = "operations were counted, at the share of the ceiling that a measured job of the kind keeps up"
        said.append(f"{KIND}: {kinds}: {'; '.join(shares)}.")
    if guessed := [job for job in jobs if JOBS[job].mark == GUESS]:
        said.append(f"{GUESS}: {counted_jobs(guessed)} at {ASSUMED_SHARE} of the ceiling, which is assumed.")
    said.append(
        f"One GPU: {plan.PEAK / 1e12:g} TFLOP/s (an RTX 4090's data sheet), 16 cores, 1 Gbit/s; a batch that 24 GB do "
        f"not hold takes each forward pass twice. {NODES} nodes: {GPUS_PER_NODE} GPUs of {measured.ceiling / 1e12:.0f} "
        "TFLOP/s and 128 cores each, 10 Gbit/s together. What GPUs send each other, checkpoints, start-up and queues "
        "are not in it."
    )
    return textwrap.fill(" ".join(said), 120, break_on_hyphens=False)


def page_table(name: str, measured: MeasuredRates) -> str:
    """The table of a page and its note."""
    settings = PAGES[name](measured)
    return f"{cost_table(settings)}\n\n{note(measured, settings)}"


def blocks() -> dict[str, str]:
    """All tables by the names that the pages give them (`docs/tables.py`)."""
    measured = read_rates(RATES)
    return {f"recipe {name}": page_table(name, measured) for name in PAGES}


def count_flops() -> None:
    """Count what `JOBS` holds, forward passes of one sample."""
    import open_clip
    import timm
    import torch

    from shards_spec.models import import_extensions
    from training.evaluation.cost import count_macs
    from training.models.tinymim import TimmTower, read

    import_extensions()
    pixels = torch.empty(1, 3, 224, 224, device="meta")
    tokens = torch.zeros(1, 77, dtype=torch.long, device="meta")

    def say(name: str, *passes: tuple[Callable[["Tensor"], object], "Tensor"]) -> None:
        print(f"{name}: {sum(2 * count_macs(run, inputs) for run, inputs in passes) / 1e9:.2f}")

    sizes = ("TinyCLIP-ViT-61M-32-Text-29M", "TinyCLIP-ViT-40M-32-Text-19M")
    student = json.loads((ROOT / "runs" / "ViT-T-16" / "open_clip_config.json").read_text())["model_cfg"]
    clips = {name: open_clip.create_model(name, device="meta").eval() for name in ("ViT-B-32", "ViT-B-16", *sizes)}
    with torch.device("meta"):
        clips["ViT-T/16"] = open_clip.CLIP(**student).eval()
    for name, model in clips.items():
        say(f"image of {name}", (model.encode_image, pixels))
        say(f"text of {name}", (model.encode_text, tokens))
        say(f"step of {name}, forward", (model.encode_image, pixels), (model.encode_text, tokens))
    for name in (
        "regnety_160",
        "vit_base_patch16_224",
        "mini_deit_small_patch16_224",
        "mini_swin_tiny_patch4_window7_224",
        "swin_base_patch4_window7_224",
    ):
        with torch.device("meta"):
            say(name, (timm.create_model(name).eval(), pixels))
    for name, block in (("vit_base_patch16_224", 12), ("vit_large_patch16_224", 18)):
        with torch.device("meta"):
            tower = TimmTower(timm.create_model(name, num_classes=0).eval())
        until = partial(read, tower, target="relations", block=block)
        say(f"{name} to the projections of block {block}", (until, pixels))


def main() -> None:
    """Print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PAGES)}; without: all")
    parser.add_argument("--flops", action="store_true", help="count operations instead")
    options = parser.parse_args()
    if options.flops:
        return count_flops()
    if wrong := set(options.names) - set(PAGES):
        parser.error(f"no table {', '.join(sorted(wrong))}: there are {', '.join(PAGES)}")
    measured = read_rates(RATES)
    print("\n\n".join(page_table(name, measured) for name in options.names or PAGES))
    return None


if __name__ == "__main__":
    main()
