#!/usr/bin/env python3
"""The tables of docs/scale.md: what CC3M, CC12M and DataComp-1B cost, from what a sample and a shard cost.

    python tests/bench/plan.py [--rates FILE] [--peak 0.8] [--sustained 0.2] [--gbit 10] [--cores 16] [--views 10]
    python tests/bench/plan.py --one-gpu        one 24 GB GPU, 1 TB of disk; README has it in short
    python tests/bench/plan.py --flops          counts what pipeline/plan/costs.py has as FLOP, in two minutes: the
                                                real architectures, empty weights, and CoCa's decoding on the CPU

The arithmetic is that of `pipeline/plan`; `CORPORA` is what is known of the lists. A job whose rate was measured on a
GPU (`pipeline/plan/rates.json`, as `tests/gpu/run.sh` writes it) keeps up its share of the ceiling on every card. Other
assumptions: --sustained, the 1e15 operations per second that a GPU keeps up in jobs without a measured rate, and
--gbit, the site's network. `python docs/tables.py` writes the tables into the pages.
"""

import argparse
import sys
import textwrap
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from pipeline.plan.costs import ASSUMED_SHARE, FLOP, STUDENTS
from pipeline.plan.estimate import Basis, Choices, Corpus, Gpu, Hardware, StageCost, core_ms, gpu_jobs, stage_costs
from pipeline.plan.rates import RATES, MeasuredRates, read_rates
from shards_spec.files import UserError

SUSTAINED = 0.2e15  # of a GPU in a cluster, assumed
PEAK = 165.2e12  # operations per second of an RTX 4090: dense bf16 products, float32 sums (NVIDIA's data sheet)
ALONE = Choices(views=8, int8=True, epochs=6)  # README's commands; six epochs are the TinyCLIP recipe's default
MARKS: dict[Basis, str] = {"measured": "†", "partly measured": "‡", "assumed": ""}
CORPORA = (
    Corpus("CC3M", 3_318_333, 2_905_954, 1_000, gpu_tasks=4),  # the list of 2018; samples: open_clip's count
    Corpus("CC12M", 12_423_374, 10_968_539, 10_000, 2, 1, 16),  # the list of 2021; samples: open_clip's count
    Corpus("DataComp-1B", 1_400_000_000, 1_280_000_000, 20_000, 8, 16, 256),  # arXiv 2304.14108; arXiv 2311.17049
)


def number(value: float) -> str:
    """Three digits at most below 1,000, whole above."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(value: float) -> str:
    """Bytes, decimal units."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= unit:
            return f"{number(value / unit)} {name}"
    return "–"


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def hours_of(stage: StageCost, hardware: Hardware) -> tuple[float, str, str]:
    """Hours of the clock, what sets them, and the mark of what they rest on."""
    hours, limit = stage.hours(hardware)
    return hours, limit, MARKS[hardware.gpu.basis(stage.jobs)] if limit == "GPU" else ""


def basis_note(gpu: Gpu, ceiling: str, assumed: str) -> str:
    """What GPU figures rest on; ``ceiling`` and ``assumed`` say whose, and what it is where nothing was measured."""
    if gpu.measured is None or not gpu.measured.rates:
        return textwrap.fill(f"GPU figures assume {assumed}. No rate has been measured on a GPU yet.", 120)
    note = f"†: by the job's share of the ceiling on {gpu.measured.card} ({gpu.measured.date}), here of {ceiling}."
    if set(gpu.measured.rates) < set(FLOP):
        note += f" ‡: some of the stage's jobs by that. Unmarked GPU figures assume {assumed}."
    return textwrap.fill(note, 120)


def jobs_table(measured: MeasuredRates | None) -> str:
    """The jobs of a GPU: operations, and rates where they were measured."""
    rows = [["a sample of", "10⁹ operations", "samples/s measured", "share of the ceiling"]]
    for job, giga in FLOP.items():
        share = measured.share(job) if measured else None
        cells = ["not yet", ""]
        if measured and share is not None:
            cells = [number(measured.rates[job]), f"{share:.3f}"]
        rows.append([job, f"{giga:.2f}", *cells])
    if measured is None:
        return markdown(rows)
    where = f"{measured.card}, {measured.date}, torch {measured.torch}"
    return f"{markdown(rows)}\n\nMeasured on {where}. Its ceiling: {measured.ceiling / 1e12:.0f} TFLOP/s."


def corpus_table(corpus: Corpus, choices: Choices, hardware: Hardware) -> str:
    """All stages of a corpus."""
    shards = corpus.shards
    rows = [["", "core-h", "PFLOP/s-h", "GPU-h", "read", "written", "tasks x cores", "hours", "file operations"]]
    for stage in stage_costs(corpus, choices, hardware.cores):
        wall, slowest, mark = hours_of(stage, hardware)
        gpu_hours = hardware.gpu.seconds(stage.jobs) / 3600
        cells = [
            stage.name,
            number(stage.core_hours),
            number(stage.peta_hours),
            number(gpu_hours) + (MARKS[hardware.gpu.basis(stage.jobs)] if stage.jobs else ""),
            size(stage.read),
            size(stage.written),
            f"{stage.tasks} x {stage.cores}",
            f"{number(wall)}{mark} {slowest}",
            number(stage.file_operations(shards)),
        ]
        rows.append([cell if cell != "0" else "" for cell in cells])
    head = (
        f"**{corpus.name}**: {corpus.rows:,} rows, {corpus.samples:,} samples, {shards:,} shards of "
        f"{corpus.shard_size:,} rows, {12 * shards:,} files"
    )
    return f"{head}\n\n{markdown(rows)}"


def cores_table(choices: Choices, hardware: Hardware) -> str:
    """How many cores a GPU needs beside it, so that it never waits."""
    rows = [["", "samples/s of a GPU", "cores that feed it"]]
    milliseconds = core_ms(choices)
    for stage, jobs in gpu_jobs(choices).items():
        rate = 1 / hardware.gpu.seconds(jobs)
        mark = MARKS[hardware.gpu.basis(jobs)]
        rows.append([stage, number(rate) + mark, number(milliseconds[stage] / 1e3 * rate) + mark])
    return markdown(rows)


def cluster(options: argparse.Namespace, measured: MeasuredRates | None) -> Hardware:
    """The machines of docs/scale.md; without --peak the GPU is the one that was measured."""
    sustained = options.sustained * 1e15
    own = measured.ceiling if measured else sustained
    return Hardware(Gpu(options.peak * 1e15 if options.peak else own, sustained, measured), options.cores, options.gbit)


def corpora_tables(choices: Choices, hardware: Hardware) -> str:
    """All corpora, and what their GPU figures rest on."""
    gpu = hardware.gpu
    tables = [corpus_table(corpus, choices, hardware) for corpus in CORPORA]
    note = basis_note(gpu, f"{gpu.peak / 1e12:.0f} TFLOP/s", f"{gpu.sustained / 1e12:g} TFLOP/s")
    return "\n\n".join([*tables, note])


@dataclass(frozen=True)
class Alone:
    """A stage on README's one machine: hours, what sets them, what they rest on, bytes that stay on disk."""

    hours: float
    limit: str
    mark: str
    stays: float


def one_machine(measured: MeasuredRates | None) -> Hardware:
    """README's machine: a 24 GB GPU by its data sheet, 16 cores and 1 Gbit/s."""
    return Hardware(Gpu(PEAK, PEAK * ASSUMED_SHARE, measured), cores=16, gbit=1.0)


def alone_note(hardware: Hardware) -> str:
    """What the GPU figures of README's machine rest on."""
    ceiling = f"the {PEAK / 1e12:g} TFLOP/s of an RTX 4090's data sheet"
    return basis_note(hardware.gpu, ceiling, f"{ASSUMED_SHARE:g} of {ceiling}")


def alone_costs(corpus: Corpus, hardware: Hardware) -> dict[str, Alone]:
    """The stages of a corpus on one machine."""
    one = replace(corpus, ingest_tasks=1, pack_tasks=1, gpu_tasks=1)
    stages = stage_costs(one, ALONE, hardware.cores)
    return {stage.name: Alone(*hours_of(stage, hardware), stage.written) for stage in stages}


def one_gpu_table(measured: MeasuredRates | None) -> str:
    """CC3M and CC12M on one machine."""
    hardware = one_machine(measured)
    corpora = {corpus.name: alone_costs(corpus, hardware) for corpus in CORPORA[:2]}
    rows = [["", *chain.from_iterable((f"{name}: hours", "GB") for name in corpora)]]
    for stage in corpora["CC3M"]:
        cells = [stage]
        for costs in corpora.values():
            cost = costs[stage]
            cells += [f"{number(cost.hours)}{cost.mark} ({cost.limit})", number(cost.stays / 1e9)]
        rows.append(cells)
    totals = [
        f"{name} in all {number(sum(cost.stays for cost in costs.values()) / 1e9)} GB"
        for name, costs in corpora.items()
    ]
    return f"{markdown(rows)}\n\n{', '.join(totals)}.\n\n{alone_note(hardware)}"


def rounded(value: float, little: str) -> str:
    """For README: one decimal below 10, ``little`` below 0.05."""
    if value >= 10:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 0.05 else little


def readme_table(measured: MeasuredRates | None) -> str:
    """The table of one GPU in short: the stages, one training, and their sums."""
    hardware = one_machine(measured)
    corpora = {corpus.name: alone_costs(corpus, hardware) for corpus in CORPORA[:2]}
    student = f"train {STUDENTS[0]}"
    names = {stage: f"`{stage}`" for stage in corpora["CC3M"] if not stage.startswith("train")}
    names[student] = f"`train tinyclip`, {ALONE.epochs} epochs"
    rows = [["command", *chain.from_iterable((f"{name}: hours", "GB") for name in corpora), "set by"]]
    for stage, name in names.items():
        cells = [name]
        for costs in corpora.values():
            cost = costs[stage]
            cells += [rounded(cost.hours, "<0.1") + cost.mark, rounded(cost.stays / 1e9, "–")]
        limits = dict.fromkeys(costs[stage].limit for costs in corpora.values())
        rows.append([*cells, " / ".join(limits).replace("network", f"network, {hardware.gbit:g} Gbit/s")])
    total = ["together"]
    for costs in corpora.values():
        chosen = [costs[stage] for stage in names]
        total += [
            rounded(sum(cost.hours for cost in chosen), ""),
            rounded(sum(cost.stays for cost in chosen) / 1e9, ""),
        ]
    return f"{markdown([*rows, [*total, '']])}\n\n{alone_note(hardware)}"


def blocks(options: argparse.Namespace) -> dict[str, str]:
    """All tables by the names that the pages give them (`docs/tables.py`).

    Raises UserError when the file of rates is not right, or was named and is not there.
    """
    measured = read_rates(Path(options.rates or RATES)) if options.rates or RATES.exists() else None
    choices = Choices(views=options.views, captions=options.captions)
    hardware = cluster(options, measured)
    return {
        "jobs of a GPU": jobs_table(measured),
        "corpora": corpora_tables(choices, hardware),
        "cores beside a GPU": cores_table(choices, hardware),
        "one GPU": one_gpu_table(measured),
        "one GPU, in short": readme_table(measured),
    }


def count_flops() -> None:
    """Count what `FLOP` holds.

    A step is three times its forward pass: torch's formula for the backward of grouped convolutions counts too much,
    and for ViTs it gives just that.
    """
    import open_clip
    import torch
    from caption import build, count, random_images

    from pipeline.caption.coca import Coca
    from pipeline.caption.decoding import Decoding
    from pipeline.caption.sampling import generate
    from shards_spec.models import import_extensions
    from training.evaluation.cost import count_macs

    import_extensions()
    torch.backends.mha.set_fastpath_enabled(False)
    for name in ("ViT-L-14", *STUDENTS):
        model = open_clip.create_model(name, device="meta").eval()
        size = open_clip.get_model_preprocess_cfg(model)["size"]
        pixels = torch.empty(1, 3, *(size if isinstance(size, tuple) else (size, size)), device="meta")
        tokens = torch.zeros(1, 77, dtype=torch.long, device="meta")
        for what, run, inputs in (("image", model.encode_image, pixels), ("text", model.encode_text, tokens)):
            print(f"{what}, {name}: {2 * count_macs(run, inputs) / 1e9:.2f}")
    model = build("coca_ViT-L-14", "cpu", "fp32")
    coca, image = Coca(model, open_clip.tokenizer.SimpleTokenizer()), random_images(model, 1)
    decoding = Decoding("top_k", top_k=50, min_tokens=28, max_tokens=29)
    print(f"image, CoCa ViT-L/14: {count(lambda: coca.encode_images(image)):.2f}")
    seen, names = coca.encode_images(image), [f"0/{caption}" for caption in range(5)]
    written = count(lambda: generate(coca, seen, [0] * 5, names, decoding))
    print(f"five captions of 30 tokens, CoCa ViT-L/14: {written:.2f}")


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", help="file of measured rates; by default pipeline/plan/rates.json")
    parser.add_argument(
        "--peak", type=float, help="1e15 operations per second of your GPU, by default the measured one"
    )
    parser.add_argument("--sustained", type=float, default=SUSTAINED / 1e15, help="the same, for jobs without a rate")
    parser.add_argument("--gbit", type=float, default=10, help="1e9 bits per second of the site's network: assumed")
    parser.add_argument("--cores", type=int, default=16, help="of a task")
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--captions", type=int, default=5)
    parser.add_argument("--flops", action="store_true", help="count operations instead")
    parser.add_argument("--one-gpu", action="store_true", help="one GPU instead")
    return parser


def main() -> None:
    """Print."""
    options = parser().parse_args()
    if options.flops:
        return count_flops()
    try:
        tables = blocks(options)
    except UserError as error:
        sys.exit(str(error))
    names = ["one GPU"] if options.one_gpu else ["jobs of a GPU", "corpora", "cores beside a GPU"]
    print("\n\n".join(tables[name] for name in names))
    return None


if __name__ == "__main__":
    main()
