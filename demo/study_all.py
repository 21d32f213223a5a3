#!/usr/bin/env python3
"""The page of `make study-all`: tables, what orders as in the papers, advice, and two scatters of accuracy.

    python demo/study_all.py STUDY OUT --teacher RUN --rows scratch manual --seeds 0 1 2

Writes OUT.svg, OUT-latency.svg and OUT.md: where that is not there it begins as docs/methods.md, and what stands
between the lines <!-- study_all.py --> and <!-- end --> is replaced. Numbers are means and ranges over the seeds.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import chain, product
from pathlib import Path

from markupsafe import Markup
from study import HEIGHT, LINE, STYLE, WIDTH, fill_block

from pipeline.report.axes import Axis, linear, logarithmic
from pipeline.report.charts import Plot
from pipeline.report.compare import read_runs
from pipeline.report.compare_charts import latency
from pipeline.report.methods import UNKNOWN, Method, group_methods, method_table, spread
from pipeline.report.run import parameter_counts, results
from training.evaluation.cost import cpu_name

NAMES = {  # and what a row begins with or learns from, besides the dataset
    "scratch": ("CLIP from scratch", ""),
    "synthetic": ("CLIP, with synthetic captions", "captioner"),
    "siclip": ("SiCLIP", "captioner, MobileCLIP"),
    "manual": ("TinyCLIP, manual inheritance", "large CLIP"),
    "auto": ("TinyCLIP, masks (auto)", "large CLIP"),
    "stages": ("TinyCLIP, masks in 2 stages", "large CLIP"),
    "lit": ("distilled, LiT teacher's cache", "LiT teacher"),
    "cached": ("distilled, large CLIP's cache", "large CLIP"),
    "live": ("distilled, large CLIP live", "large CLIP"),
    "two": ("distilled, two teachers' caches", "LiT teacher, large CLIP"),
    "catlip": ("CatLIP", "WordNet"),
    "tinymim": ("TinyMIM", "large CLIP"),
    "untied": ("classifier from scratch", "labels"),
    "tied": ("MiniViT, tied in pairs", "labels"),
    "multiplexed": ("MiniViT, tied and transformed", "labels"),
    "distilled": ("MiniViT, tied, transformed, distilled", "classifier"),
}
METRICS = ("zero-shot", "image→text R@1", "text→image R@1", "linear probe", "fine-tuned")
EVALUATIONS = {  # of a run itself, and of the runs that probe or fine-tune it
    ("kinds", "zeroshot_classification", "acc1"): "zero-shot",
    ("titles", "zeroshot_retrieval", "text_retrieval_recall@1"): "image→text R@1",
    ("titles", "zeroshot_retrieval", "image_retrieval_recall@1"): "text→image R@1",
    ("kinds", "linear_probe", "acc1"): "linear probe",
    ("kinds", "classification", "acc1"): "fine-tuned",
}
TUNED = {"probe": "linear probe", "finetune": "fine-tuned"}
COSTS = {  # heads of `clipmill compare`'s table, as this page has them
    "parameters": "parameters",
    "MACs, image": "MACs, image",
    "MACs, text": "MACs, text",
    "images/s, batch 1, cpu": "images/s one by one",
    "images/s, batch 64, cpu": "in 64s",
    "images/s, batch 1, ONNX int8 dynamic": "ONNX int8 one by one",
    "images/s, batch 64, ONNX int8 dynamic": "in 64s (int8)",
    "training": "training",
}
CLAIMS = (  # better row, worse row, by which metric, who says so
    ("synthetic", "scratch", "zero-shot", "SiCLIP, table 4: synthetic captions help"),
    ("siclip", "synthetic", "zero-shot", "SiCLIP, table 5: the method is ahead of plain training"),
    ("manual", "scratch", "zero-shot", "TinyCLIP: distillation with inheritance is ahead of training from scratch"),
    ("auto", "manual", "zero-shot", "TinyCLIP: masks are ahead of inheritance by hand"),
    ("stages", "auto", "zero-shot", "TinyCLIP: several stages are ahead of one"),
    ("lit", "scratch", "zero-shot", "CLIP-KD: a teacher helps"),
    ("two", "lit", "zero-shot", "MobileCLIP: two teachers are ahead of one"),
    ("two", "cached", "zero-shot", "MobileCLIP: two teachers are ahead of the other one"),
    ("catlip", "scratch", "linear probe", "CatLIP: its features are at least as good as CLIP's in less time"),
    ("catlip", "untied", "fine-tuned", "CatLIP: pre-training is ahead of none"),
    ("tinymim", "untied", "fine-tuned", "TinyMIM: pre-training is ahead of none"),
    ("untied", "tied", "fine-tuned", "MiniViT, ablation: sharing alone costs accuracy"),
    ("multiplexed", "tied", "fine-tuned", "MiniViT, ablation: transformation gives it back"),
    ("distilled", "multiplexed", "fine-tuned", "MiniViT, ablation: distillation adds to it"),
)
AIMS = (  # an aim, the rows that serve it, by which metric
    ("Halve a CLIP that you have", ("manual", "auto", "stages"), "zero-shot"),
    (
        "One GPU and CC12M: a small CLIP",
        ("scratch", "synthetic", "siclip", "lit", "cached", "live", "two"),
        "zero-shot",
    ),
    (
        "Search: texts that find images",
        ("scratch", "synthetic", "siclip", "manual", "auto", "stages", "lit", "cached", "live", "two"),
        "text→image R@1",
    ),
    (
        "Only classification",
        tuple(NAMES),
        "fine-tuned",
    ),
)
PAGE = Path(__file__).parents[1] / "docs/methods.md"
TEACHERS = {"large": "large CLIP", "mobileclip": "MobileCLIP", "classifier": "classifier"}
DOT = 3  # pixels of a dot's radius
MARK_WIDTH, MARK_HEIGHT = 14, 9  # of a dot's number, two digits
MARK_ROWS = (3, -4, 10, -13, 19, -22, 28, -31, 37)  # pixels below a dot where its number may stand, the best first
ROOM = 1.15  # factor of room beside the outermost dots
ZERO_SHOT, FINE_TUNED = "#1f77b4", "#d62728"


@dataclass(frozen=True)
class Row:
    """A method's numbers: by metric a share for each seed."""

    name: str
    method: Method
    values: dict[str, list[float]]

    @property
    def title(self) -> str:
        """As the tables name it."""
        return NAMES[self.name][0]

    def mean(self, metric: str) -> float:
        """The mean over the seeds; NaN where it was not measured."""
        return statistics.mean(self.values[metric]) if self.values.get(metric) else math.nan

    def text(self, metric: str) -> str:
        """Mean and range in per cent."""
        return spread(self.values.get(metric, []))

    @property
    def parameters(self) -> float:
        """Of the first seed's student."""
        return parameter_counts(self.method.runs[0].run).get("total", math.nan)


def read_row(method: Method) -> Row:
    """Return a method's numbers."""
    values: dict[str, list[float]] = {}
    for one in method.runs:
        for key, value in results(one.run).items():
            if key in EVALUATIONS:
                values.setdefault(EVALUATIONS[key], []).append(value)
    for one in method.tuned:
        metric = TUNED[one.run.config["recipe"]]
        values.setdefault(metric, []).append(results(one.run)["kinds", "classification", "acc1"])
    return Row(Path(method.runs[0].path).name.rpartition("-")[0], method, values)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *lines])


def quality_table(rows: list[Row], to_scratch: dict[str, str]) -> str:
    """Return the table of accuracy; ``to_scratch`` has the samples to scratch's accuracy by method."""
    head = ["", "begins with", "seeds", *METRICS, "samples to scratch's end"]
    lines = []
    for row in rows:
        cells = [row.title, NAMES[row.name][1], str(len(row.method.runs)), *map(row.text, METRICS)]
        lines.append([*cells, to_scratch.get(row.method.name, UNKNOWN)])
    return markdown(head, lines)


def teacher_table(study: Path, lit: Path) -> str:
    """Return the table of the models that rows begin with, and the minutes that they were trained for."""
    lines = []
    for folder, name in [
        (lit, "LiT teacher (`make real`)"),
        *((study / "teachers" / n, t) for n, t in TEACHERS.items()),
    ]:
        (one,) = read_runs([str(folder)])
        row = read_row(Method(name, [one], []))
        minutes = one.columns["seconds"][-1] / 60
        lines.append([name, *(row.text(metric) for metric in METRICS), f"{minutes:.0f}"])
    return markdown(["", *METRICS, "minutes"], lines)


def verdict(better: list[float], worse: list[float]) -> str:
    """Say whether a row is ahead of another one, by the ranges of their seeds."""
    if min(len(better), len(worse)) < 2:
        return f"{'ahead' if better > worse else 'not ahead'}, of one seed"
    if min(better) > max(worse):
        return "as in the paper"
    if max(better) < min(worse):
        return "**the other way round**"
    return f"{'ahead' if statistics.mean(better) > statistics.mean(worse) else 'not ahead'} in the mean, ranges overlap"


def claims_table(rows: dict[str, Row]) -> str:
    """Return what papers say of two rows each, and what was measured."""
    lines = []
    for better, worse, metric, who in CLAIMS:
        pair = [rows[name] for name in (better, worse) if name in rows and rows[name].values.get(metric)]
        if len(pair) == 2:
            shown = [f"{row.title}: {row.text(metric)}" for row in pair]
            lines.append([who, metric, *shown, verdict(*(row.values[metric] for row in pair))])
    return markdown(["the paper", "by", "should be ahead", "of", "here"], lines)


def advice(rows: dict[str, Row]) -> str:
    """Return a sentence for each aim, with the row that it rests on and those that are within its range."""
    lines = []
    for aim, names, metric in AIMS:
        found = [rows[name] for name in names if name in rows and rows[name].values.get(metric)]
        if found:
            best = max(found, key=lambda row: row.mean(metric))
            near = [row for row in found if row is not best and max(row.values[metric]) >= min(best.values[metric])]
            also = f"; not told apart from it: {', '.join(row.title for row in near)}" if near else ""
            lines.append(f"- **{aim}**: {best.title}, {metric} {best.text(metric)}{also}.")
    if sized := [row for row in rows.values() if row.parameters > 0]:
        least = min(sized, key=lambda row: row.parameters)
        measured = [f"{metric} {least.text(metric)}" for metric in METRICS if least.values.get(metric)]
        lines.append(f"- **Smallest file**: {least.title}, {least.parameters / 1e3:,.0f} k parameters, {measured[-1]}.")
    return "\n".join(lines) + "\n"


def cached_and_live(rows: dict[str, Row], training: dict[str, str]) -> str:
    """Return what a cache changes: accuracy within the seeds, and time."""
    if not {"cached", "live"} <= set(rows):
        return ""
    cached, live = rows["cached"], rows["live"]
    own, other = cached.values["zero-shot"], live.values["zero-shot"]
    overlap = min(own) <= max(other) and min(other) <= max(own)
    return (
        f"Cached against live teacher: zero-shot {cached.text('zero-shot')} in {training[cached.method.name]} against "
        f"{live.text('zero-shot')} in {training[live.method.name]}; the ranges {'' if overlap else 'do not '}overlap.\n"
    )


def scatter(rows: list[Row], cost: dict[str, float], label: str) -> str:
    """Return an SVG: a numbered dot for each row at its cost and accuracy, a bar from the lowest to the highest seed.

    Rows that have zero-shot accuracy are drawn by that, the others by their fine-tuned one, in another colour.
    """
    dots = []
    for number, row in enumerate(rows, 1):
        metric = "zero-shot" if row.values.get("zero-shot") else "fine-tuned"
        if row.values.get(metric) and math.isfinite(cost[row.name]):
            dots.append((number, row, cost[row.name], [100 * value for value in row.values[metric]], metric))
    highest = max(chain.from_iterable(values for _, _, _, values, _ in dots))
    costs = [at for _, _, at, _, _ in dots]
    plot = Plot(_cost_axis(label, costs), linear("top-1, %", 0, highest * ROOM, 5), (WIDTH, HEIGHT))
    body, legend = "", ""
    places = [(plot.x_at(at), plot.y_at(statistics.mean(values))) for _, _, at, values, _ in dots]
    marks = place_marks(places)
    for place, (number, row, _, values, metric) in enumerate(dots):
        colour = ZERO_SHOT if metric == "zero-shot" else FINE_TUNED
        (x, y), (mark_x, mark_y) = places[place], marks[place]
        body += (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{plot.y_at(min(values)):.1f}" y2="{plot.y_at(max(values)):.1f}" '
            f'style="stroke:{colour}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="{DOT}" style="fill:{colour}"/>'
            f'<text x="{mark_x:.1f}" y="{mark_y:.1f}">{number}</text>'
        )
        legend += (
            f'<text x="40" y="{HEIGHT + 22 + LINE * place}" style="fill:{colour}">{number} {row.title}: {metric}</text>'
        )
    tall = HEIGHT + 30 + LINE * len(dots)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall}" width="{WIDTH}" height="{tall}">{STYLE}'
        f'<rect width="{WIDTH}" height="{tall}" fill="#fff"/><svg width="{WIDTH}" height="{HEIGHT}">'
        f"{plot.draw(Markup(body), f'accuracy against {label}')}</svg>{legend}</svg>\n"
    )


def place_marks(dots: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return where each dot's number begins, beside it and on no other number or dot as far as there is room."""
    taken = [(x - DOT, y + DOT, 2 * DOT, 2 * DOT) for x, y in dots]
    marks = []
    for x, y in dots:
        places = [(x + across, y + down) for down in MARK_ROWS for across in (DOT + 3, -MARK_WIDTH - DOT - 3)]
        mark = next((place for place in places if not _overlaps(*place, taken)), places[0])
        taken.append((*mark, MARK_WIDTH, MARK_HEIGHT))
        marks.append(mark)
    return marks


def _overlaps(x: float, y: float, taken: list[tuple[float, float, float, float]]) -> bool:
    """Whether a number that begins there lies on one of these boxes: left, bottom, width, height."""
    return any(
        x < left + width and left < x + MARK_WIDTH and y - MARK_HEIGHT < bottom and bottom - height < y
        for left, bottom, width, height in taken
    )


def _cost_axis(label: str, costs: list[float]) -> Axis:
    return logarithmic(label, min(costs) / ROOM, max(costs) * ROOM)


def costs_table(rows: list[Row], texts: dict[str, dict[str, str]]) -> str:
    """Return the table of costs; ``texts`` has the cells of `clipmill compare` by method and head."""
    lines = [[row.title, *(texts[row.method.name].get(head, UNKNOWN) for head in COSTS)] for row in rows]
    return markdown(["", *COSTS.values()], lines)


def compared(methods: Sequence[Method], baseline: str) -> dict[str, dict[str, str]]:
    """Return the cells of `clipmill compare`'s table by method and head."""
    table = method_table([*chain.from_iterable([*method.runs, *method.tuned] for method in methods)], baseline)
    assert table is not None  # there is a baseline
    return {line[0]: dict(zip(table.heads, line, strict=True)) for line in table.rows}


def provenance(row: Row) -> str:
    """Return where, when and on how much a row was trained, as all are."""
    config = row.method.runs[0].run.config
    pairs = f"{config['steps']} steps of {config['batch_size']} pairs"
    seeds = ", ".join(str(one.run.config["seed"]) for one in row.method.runs)
    return f"Seeds {seeds}, {pairs} (MiniViT: 64 images), written on {date.today()}; {cpu_name()}, a thread a run.\n"


def read_methods(study: Path, names: list[str], seeds: list[str]) -> list[Method]:
    """Return the rows' methods, of the runs that there are."""
    names_of_runs = [f"{name}-{seed}" for name, seed in product(names, seeds)]
    folders = [study / kind / name for kind, name in product(("rows", *TUNED), names_of_runs)]
    return group_methods(read_runs([str(folder) for folder in folders if folder.is_dir()]))


def main() -> None:
    """Write the page and both charts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path, help="files to write, without their ending")
    parser.add_argument("--teacher", type=Path, required=True, help="RUN of the teacher of `make real`")
    parser.add_argument(
        "--rows", nargs="+", required=True, help="names of the rows, in their order, scratch among them"
    )
    parser.add_argument("--seeds", nargs="+", required=True)
    args = parser.parse_args()
    methods = read_methods(args.study, args.rows, args.seeds)
    rows = {row.name: row for row in map(read_row, methods)}
    texts = compared(methods, rows["scratch"].method.name)
    to_scratch = {name: cells[f"samples to {rows['scratch'].method.name}'s end"] for name, cells in texts.items()}
    charts = {"parameters": args.out.with_suffix(".svg"), "latency": Path(f"{args.out}-latency.svg")}
    parts = [
        provenance(rows["scratch"]),
        quality_table(list(rows.values()), to_scratch),
        costs_table(list(rows.values()), texts),
        "".join(f"![accuracy against {name}]({chart.name})\n" for name, chart in charts.items()),
        cached_and_live(rows, {name: cells["training"] for name, cells in texts.items()}),
        teacher_table(args.study, args.teacher),
        "## As in the papers?\n",
        claims_table(rows),
        "## Which method for which aim\n",
        advice(rows),
    ]
    block = "\n".join(filter(None, parts))
    page = args.out.with_suffix(".md")
    if not page.exists():
        page.write_text(PAGE.read_text())
    fill_block(page, Path(__file__).name, block)
    print(block)
    parameters = {name: row.parameters for name, row in rows.items()}
    charts["parameters"].write_text(scatter(list(rows.values()), parameters, "parameters"))
    times = {name: latency(row.method.runs[0]) for name, row in rows.items()}
    charts["latency"].write_text(scatter(list(rows.values()), times, "ms per image, one thread"))


if __name__ == "__main__":
    main()
