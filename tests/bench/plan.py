#!/usr/bin/env python3
"""The tables of docs/scale.md: what CC3M, CC12M and DataComp-1B cost, from what a sample and a shard cost.

    python tests/bench/plan.py [--sustained 0.2] [--gbit 10] [--cores 16] [--views 10] [--captions 5] [--flops]
    python tests/bench/plan.py --one-gpu        the table of README.md: one 24 GB GPU, 1 TB of disk

`Costs` holds what `costs.py` measured, `FLOP` what `--flops` counts (two minutes: the real architectures, empty
weights, and CoCa's decoding on the CPU), `CORPORA` what is known of the lists. Two assumptions: --sustained,
the 1e15 operations per second that a GPU keeps up over a whole stage, and --gbit, the site's network. The rest is
arithmetic.
"""

import argparse
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Costs:
    """Of a sample: milliseconds of one core and bytes, as `costs.py` prints them, on 2 vCPU of an AMD EPYC (Zen 4)."""

    ingest_ms: float = 6.8
    dedup_ms: float = 0.0046  # with memory for all; see docs/scale.md
    caption_ms: float = 2.8  # decode and resize; what the GPU does is in FLOP
    pack_ms: float = 0.35
    vocab_ms: float = 0.0315
    view_ms: float = 1.04  # decoding included, which ten views share
    train_ms: float = 2.2
    check_ms: float = 0.33  # from the page cache
    rows_per_s: float = 518_000  # of a list of links, that are read to be left to others
    downloaded: float = 125_000  # assumed: the photos of the benches
    image: float = 29_900  # img2dataset's documentation: 1 M images at 256 px are 29.9 GB
    raw_more: float = 3_800  # tar headers, txt, json, padding, the Parquet row
    final_more: float = 4_600
    caption_bytes: float = 185  # of five captions
    row_more: float = 90  # of a cache row beside its vectors: key and identities


@dataclass(frozen=True)
class Files:
    """Of a shard, as `costs.py` counts them by strace: opened, looked up, flushed, renamed or removed."""

    ingest: tuple[int, ...] = (5, 3, 3, 7)
    dedup: tuple[int, ...] = (7, 2, 2, 5)
    caption: tuple[int, ...] = (6, 5, 2, 5)
    pack: tuple[int, ...] = (14, 4, 3, 8)
    vocab: tuple[int, ...] = (2, 0, 0, 0)
    cache: tuple[int, ...] = (7, 6, 2, 5)
    check: tuple[int, ...] = (39, 18, 0, 0)


CLAIM = 5  # more per shard where an array makes it: linked, looked up, moved aside, opened, removed
FLOP = {  # 1e9 operations of a sample; multiply and add are two
    "image, ViT-L/14": 162.03,
    "text, ViT-L/14": 13.30,
    "image, CoCa ViT-L/14": 170.86,
    "five captions of 30 tokens, CoCa ViT-L/14": 80.05,
    "step of ViT-M-32": 3 * (3.99 + 5.96),
    "step of MobileCLIP-S0": 3 * (4.79 + 2.64),
    "step of ViT-B-16": 3 * (35.13 + 5.96),
}
WIDTH = 768  # of the teacher, float16
ONE_GPU = {  # README's table; every figure but the peak is assumed
    "peak": 165.2e12,  # operations per second of an RTX 4090: dense bf16 products, float32 sums (NVIDIA's data sheet)
    "share": 0.2,  # of the peak, over a whole stage
    "gbit": 1.0,
    "views": 8,
    "epochs": 6,  # the affinity recipe's default
}
STUDENTS = ("ViT-M-32", "MobileCLIP-S0", "ViT-B-16")


@dataclass(frozen=True)
class Corpus:
    """A list, and the tasks it would be given: of ingest's array, of pack's, of those with a GPU each."""

    name: str
    rows: int
    samples: int
    shard_size: int
    ingest_tasks: int
    pack_tasks: int
    gpu_tasks: int

    @property
    def shards(self) -> int:
        """Shards of ``shard_size`` rows."""
        return -(-self.rows // self.shard_size)


CORPORA = (
    Corpus("CC3M", 3_318_333, 2_905_954, 1_000, 1, 1, 4),  # the list of 2018; samples: open_clip's count
    Corpus("CC12M", 12_423_374, 10_968_539, 10_000, 2, 1, 16),  # the list of 2021; samples: open_clip's count
    Corpus("DataComp-1B", 1_400_000_000, 1_280_000_000, 20_000, 8, 16, 256),  # arXiv 2304.14108; arXiv 2311.17049
)


@dataclass(frozen=True)
class Stage:
    """Of a whole corpus: core-hours, 1e15 operations, bytes in and out, tasks and the cores of each."""

    name: str
    core_hours: float
    peta: float
    read: float
    written: float
    tasks: int
    cores: int

    def hours(self, options: argparse.Namespace) -> tuple[float, str]:
        """Of the clock, and what sets them."""
        limits = {
            "cores": self.core_hours / self.cores / self.tasks,
            "GPU": self.peta / options.sustained / 3600 / self.tasks,
            "network": self.read / (options.gbit / 8 * 1e9) / 3600 if self.name == "ingest" else 0.0,
        }
        slowest = max(limits, key=lambda limit: limits[limit])
        return limits[slowest], slowest


def gpu_work(options: argparse.Namespace) -> tuple[float, float]:
    """1e9 operations of a sample: captions, teacher."""
    captions = FLOP["five captions of 30 tokens, CoCa ViT-L/14"] * options.captions / 5
    texts = (options.captions + 1) * FLOP["text, ViT-L/14"]
    return FLOP["image, CoCa ViT-L/14"] + captions, options.views * FLOP["image, ViT-L/14"] + texts


def stages(corpus: Corpus, options: argparse.Namespace) -> list[Stage]:
    """All stages of a corpus, one epoch of training."""
    c = Costs()
    n = corpus.samples
    cores = options.cores
    raw, final = n * (c.image + c.raw_more), n * (c.image + c.final_more)
    caption = n * c.caption_bytes * options.captions / 5
    cached = n * ((options.views + options.captions + 1) * WIDTH * 2 + c.row_more)
    hours, (coca, teacher) = n / 3.6e6, (n * giga / 1e6 for giga in gpu_work(options))
    listing = 2 * corpus.rows / c.rows_per_s / 3600 * corpus.ingest_tasks  # its own shards, then what others left
    ours, gpus = (corpus.ingest_tasks, cores), (corpus.gpu_tasks, cores)
    row = n * (2 * WIDTH * 2 + c.row_more)  # of one view and one text
    return [
        Stage("ingest", hours * c.ingest_ms + listing, 0, n * c.downloaded, raw, *ours),
        Stage("dedup", hours * c.dedup_ms, 0, n * 190, n * 32, 1, 1),
        Stage("caption", hours * c.caption_ms, coca, raw, caption, *gpus),
        Stage("pack", hours * c.pack_ms, 0, raw + caption, final, corpus.pack_tasks, cores),
        Stage("vocab", hours * c.vocab_ms, 0, 2 * n * 320, 1e6, 1, 1),
        Stage("cache", hours * c.view_ms * options.views, teacher, final, cached, *gpus),
        Stage("check", hours * c.check_ms, 0, 2 * raw + 4 * final + 2 * cached, 0, 1, 1),
        *(
            Stage(f"train {name}", hours * c.train_ms, n / 1e6 * FLOP[f"step of {name}"], final + row, 0, *gpus)
            for name in STUDENTS
        ),
    ]


def number(value: float) -> str:
    """Three digits at most below 1,000, whole above."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(value: float) -> str:
    """Bytes, decimal units."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= unit:
            return f"{number(value / unit)} {name}"
    return "–"


def table(corpus: Corpus, options: argparse.Namespace) -> None:
    """Print a corpus."""
    shards = corpus.shards
    print(
        f"\n**{corpus.name}**: {corpus.rows:,} rows, {corpus.samples:,} samples, {shards:,} shards of "
        f"{corpus.shard_size:,} rows, {12 * shards:,} files\n"
    )
    print("| | core-h | PFLOP/s-h | GPU-h | read | written | tasks x cores | hours | file operations |")
    print("|---" * 9 + "|")
    for stage in stages(corpus, options):
        wall, slowest = stage.hours(options)
        operations = sum(getattr(Files(), stage.name, (0,))) * shards
        if operations and stage.tasks > 1:
            operations += CLAIM * shards
        cells = [
            stage.name,
            number(stage.core_hours),
            number(stage.peta / 3600),
            number(stage.peta / 3600 / options.sustained),
            size(stage.read),
            size(stage.written),
            f"{stage.tasks} x {stage.cores}",
            f"{number(wall)} {slowest}",
            number(operations),
        ]
        print("| " + " | ".join(cell if cell != "0" else "" for cell in cells) + " |")


def cores_per_gpu(options: argparse.Namespace) -> None:
    """How many cores a GPU needs beside it, so that it never waits."""
    c, rate = Costs(), options.sustained * 1e15
    coca, teacher = gpu_work(options)
    cases = {"caption": (c.caption_ms, coca), "cache": (c.view_ms * options.views, teacher)}
    cases |= {f"train {name}": (c.train_ms, FLOP[f"step of {name}"]) for name in STUDENTS}
    print("\n| | samples/s of a GPU | cores that feed it |\n|---|---|---|")
    for name, (milliseconds, giga) in cases.items():
        print(f"| {name} | {number(rate / giga / 1e9)} | {number(milliseconds / 1e3 * rate / giga / 1e9)} |")


def one_gpu_stages(corpus: Corpus, options: argparse.Namespace) -> dict[str, tuple[float, str, float]]:
    """Per stage of one machine: hours, what sets them, bytes that stay on disk (the cache as int8)."""
    rate = ONE_GPU["peak"] * ONE_GPU["share"]
    epochs = ONE_GPU["epochs"]
    n = corpus.samples
    machine = {"sustained": rate / 1e15, "gbit": ONE_GPU["gbit"], "views": int(ONE_GPU["views"])}
    options = argparse.Namespace(**{**vars(options), **machine})
    alone = replace(corpus, ingest_tasks=1, pack_tasks=1, gpu_tasks=1)
    table = dict[str, tuple[float, str, float]]()
    for stage in stages(alone, options):
        hours, limit = stage.hours(options)
        if stage.name == "cache":
            vector = WIDTH + 4  # one float32 scale
            table["cache"] = (hours, limit, n * ((options.views + options.captions + 1) * vector + Costs().row_more))
        elif stage.name.startswith("train"):
            table[stage.name] = (epochs * hours, limit, 0.0)
        else:
            table[stage.name] = (hours, limit, stage.written)
    return table


def one_gpu(options: argparse.Namespace) -> None:
    """Print README's table: CC3M and CC12M on one machine."""
    corpora = {corpus.name: one_gpu_stages(corpus, options) for corpus in CORPORA[:2]}
    print("| | " + " | ".join(f"{name}: hours | GB" for name in corpora) + " |\n" + "|---" * 5 + "|")
    for stage in next(iter(corpora.values())):
        rows = [table[stage] for table in corpora.values()]
        cells = [f"{number(hours)} ({limit}) | {number(stays / 1e9)}" for hours, limit, stays in rows]
        print(f"| {stage} | " + " | ".join(cells) + " |")
    for name, table in corpora.items():
        print(f"{name} in all: {number(sum(stays for *_, stays in table.values()) / 1e9)} GB")


def count_flops() -> None:
    """Count what `FLOP` holds.

    A step is three times its forward pass: torch's formula for the backward of grouped convolutions counts too much,
    and for ViTs it gives just that.
    """
    import open_clip
    import torch
    from caption import build, count, random_images
    from torch.utils.flop_counter import FlopCounterMode

    from pipeline.caption.coca import Coca
    from pipeline.caption.decoding import Decoding
    from pipeline.caption.sampling import generate
    from shards_spec.models import import_extensions

    import_extensions()
    torch.backends.mha.set_fastpath_enabled(False)
    for name in ("ViT-L-14", *STUDENTS):
        model = open_clip.create_model(name, device="meta").eval()
        size = open_clip.get_model_preprocess_cfg(model)["size"]
        pixels = torch.empty(1, 3, *(size if isinstance(size, tuple) else (size, size)), device="meta")
        for what, work in (
            ("image", lambda m=model, p=pixels: m.encode_image(p)),
            ("text", lambda m=model: m.encode_text(torch.zeros(1, 77, dtype=torch.long, device="meta"))),
        ):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                work()
            print(f"{what}, {name}: {counter.get_total_flops() / 1e9:.2f}")
    model = build("coca_ViT-L-14", "cpu", "fp32")
    coca, image = Coca(model, open_clip.tokenizer.SimpleTokenizer()), random_images(model, 1)
    decoding = Decoding("top_k", top_k=50, min_tokens=28, max_tokens=29)
    print(f"image, CoCa ViT-L/14: {count(lambda: coca.encode_images(image)):.2f}")
    seen, names = coca.encode_images(image), [f"0/{caption}" for caption in range(5)]
    written = count(lambda: generate(coca, seen, [0] * 5, names, decoding))
    print(f"five captions of 30 tokens, CoCa ViT-L/14: {written:.2f}")


def main() -> None:
    """Print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sustained", type=float, default=0.2, help="1e15 operations per second of a GPU: assumed")
    parser.add_argument("--gbit", type=float, default=10, help="1e9 bits per second of the site's network: assumed")
    parser.add_argument("--cores", type=int, default=16, help="of a task")
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--captions", type=int, default=5)
    parser.add_argument("--flops", action="store_true", help="count operations instead")
    parser.add_argument("--one-gpu", action="store_true", help="the table of README.md instead")
    options = parser.parse_args()
    if options.flops:
        return count_flops()
    if options.one_gpu:
        return one_gpu(options)
    for corpus in CORPORA:
        table(corpus, options)
    cores_per_gpu(options)
    return None


if __name__ == "__main__":
    main()
