"""Hours, bytes and operations of every stage, from what a sample costs and what the machines are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipeline.plan.costs import CLAIM, FILE_OPERATIONS, FLOP, STUDENTS, WIDTH, Costs
from pipeline.plan.rates import MeasuredRates

MEASURED_COSTS = Costs()
Basis = Literal["measured", "assumed", "partly measured"]


@dataclass(frozen=True)
class Corpus:
    """A list, and the tasks it would be given: of ingest's array, of pack's, of those with a GPU each."""

    name: str
    rows: int
    samples: int
    shard_size: int
    ingest_tasks: int = 1
    pack_tasks: int = 1
    gpu_tasks: int = 1

    @property
    def shards(self) -> int:
        """Shards of ``shard_size`` rows."""
        return -(-self.rows // self.shard_size)


@dataclass(frozen=True)
class Choices:
    """What is made of each image, and how often training sees it."""

    views: int = 10
    captions: int = 5
    int8: bool = False  # the cache; else float16
    epochs: int = 1
    width: int = WIDTH  # numbers of a teacher's vector

    def cached_bytes(self, costs: Costs) -> float:
        """Bytes of a cache row: vectors of all views, synthetic captions and the original one, key and identities."""
        vector = self.width + 4 if self.int8 else 2 * self.width  # int8 has one float32 scale
        return (self.views + self.captions + 1) * vector + costs.row_more


@dataclass(frozen=True)
class Gpu:
    """A card, in operations per second.

    Attributes:
        peak: Of a large bf16 product; a job whose share was measured keeps up that share of it.
        sustained: What is assumed of a job whose share was not measured.
        measured: Rates on some card, which need not be this one.
    """

    peak: float
    sustained: float
    measured: MeasuredRates | None = None

    def share(self, job: str) -> float | None:
        """The measured part of its ceiling that a job keeps up; None where it is assumed."""
        return self.measured.share(job) if self.measured else None

    def seconds(self, jobs: Mapping[str, float]) -> float:
        """Seconds of so many samples of each job, one job after the other."""
        total = 0.0
        for job, samples in jobs.items():
            share = self.share(job)
            total += samples * FLOP[job] * 1e9 / (self.sustained if share is None else share * self.peak)
        return total

    def basis(self, jobs: Mapping[str, float]) -> Basis:
        """What the seconds of these jobs rest on."""
        known = [self.share(job) is not None for job in jobs]
        if known and all(known):
            return "measured"
        return "partly measured" if any(known) else "assumed"


@dataclass(frozen=True)
class Hardware:
    """A GPU per task, the cores of a task, and the network in 1e9 bits per second."""

    gpu: Gpu
    cores: int = 16
    gbit: float = 10.0


@dataclass(frozen=True)
class StageCost:
    """Of a whole corpus: core-hours, samples by job of a GPU, bytes, and the tasks and cores it is given."""

    name: str
    core_hours: float
    read: float
    written: float
    tasks: int
    cores: int
    jobs: Mapping[str, float] = field(default_factory=dict)
    sum_hours: float = 0.0
    """of the core-hours those of one process after the tasks, which sums up what they made"""

    @property
    def peta_hours(self) -> float:
        """Hours of a GPU that keeps up 1e15 operations per second."""
        return sum(samples * FLOP[job] for job, samples in self.jobs.items()) / 1e6 / 3600

    def hours(self, hardware: Hardware) -> tuple[float, str]:
        """Of the clock, and what sets them: the slowest of cores, GPU and network."""
        limits = {
            "cores": (self.core_hours - self.sum_hours) / self.cores / self.tasks + self.sum_hours,
            "GPU": hardware.gpu.seconds(self.jobs) / 3600 / self.tasks,
            "network": self.read / (hardware.gbit / 8 * 1e9) / 3600 if self.name == "ingest" else 0.0,
        }
        slowest = max(limits, key=lambda limit: limits[limit])
        return limits[slowest], slowest

    def file_operations(self, shards: int) -> int:
        """On the shared file system, claims of an array included; 0 where they were not counted."""
        each = FILE_OPERATIONS.get(self.name, 0)
        return (each + CLAIM if each and self.tasks > 1 else each) * shards


def gpu_jobs(choices: Choices) -> dict[str, dict[str, float]]:
    """By stage, the samples of each job that one image of a corpus needs; training once."""
    return {
        "caption": {
            "image, CoCa ViT-L/14": 1.0,
            "five captions of 30 tokens, CoCa ViT-L/14": choices.captions / 5,
        },
        "cache": {"image, ViT-L/14": float(choices.views), "text, ViT-L/14": choices.captions + 1.0},
        **{f"train {name}": {f"step of {name}": 1.0} for name in STUDENTS},
    }


def core_ms(choices: Choices, c: Costs = MEASURED_COSTS) -> dict[str, float]:
    """By stage with a GPU, milliseconds of one core that one image needs beside it; training once."""
    return {
        "caption": c.caption_ms,
        "cache": c.view_ms * choices.views,
        **{f"train {name}": c.train_ms for name in STUDENTS},
    }


def stage_costs(corpus: Corpus, choices: Choices, cores: int, c: Costs = MEASURED_COSTS) -> list[StageCost]:
    """All stages of a corpus whose samples cost ``c``, in their order; a training per student."""
    n = corpus.samples
    raw = n * (c.image + c.raw_more)
    final = n * (c.image + c.final_more)
    caption = n * c.caption_bytes * choices.captions / 5
    cached = n * choices.cached_bytes(c)
    hours = n / 3.6e6  # of one core, per millisecond of a sample
    listing = 2 * corpus.rows / c.rows_per_s / 3600 * corpus.ingest_tasks  # its own shards, then what others left
    each_jobs = gpu_jobs(choices)
    each_ms = core_ms(choices, c)
    row = n * (2 * choices.width * 2 + c.row_more)  # of one view and one text

    def on_gpus(name: str, read: float, written: float, times: int = 1) -> StageCost:
        jobs = {job: times * n * samples for job, samples in each_jobs[name].items()}
        return StageCost(name, times * hours * each_ms[name], times * read, written, corpus.gpu_tasks, cores, jobs)

    def on_cores(name: str, each: float, sum_ms: float, read: float, written: float) -> StageCost:
        tasks = corpus.pack_tasks
        return StageCost(name, hours * each, read, written, tasks, cores, sum_hours=hours * sum_ms)

    return [
        StageCost("ingest", hours * c.ingest_ms + listing, n * c.downloaded, raw, corpus.ingest_tasks, cores),
        on_cores("dedup", c.dedup_ms, c.dedup_sum_ms, n * 190, n * 32),
        on_gpus("caption", raw, caption),
        on_cores("pack", c.pack_ms, 0.0, raw + caption, final),
        on_cores("vocab", c.vocab_ms, c.vocab_sum_ms, n * 320, 1e6),
        on_gpus("cache", final, cached),
        on_cores("check", c.check_ms, c.check_sum_ms, raw + caption + final + cached, 0),
        *(on_gpus(f"train {name}", final + row, 0, choices.epochs) for name in STUDENTS),
    ]
