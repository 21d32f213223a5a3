"""The dataset page: its stages, its losses, and what images, captions, synsets and caches look like."""

import math
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from typing import Any

from pipeline.labels.wordnet import load_wordnet
from pipeline.report.axes import logarithmic, short, total
from pipeline.report.charts import Chart, Line, Plot, Rule, line_chart
from pipeline.report.columns import ASPECT_UNIT, COSINE_UNIT, LOGPROB_UNIT, Tally, count_dataset, parquet_files
from pipeline.report.evaluation_copies import draw_copies
from pipeline.report.histogram import Scale, histogram
from pipeline.report.samples import draw_pairs, draw_samples
from pipeline.report.stages import foreign_counts, funnel, losses, mismatches, ordered, stage_row
from pipeline.report.text import flatten
from shards_spec.embeddings import read_meta
from shards_spec.files import DataError, UserError, join, names, open_read
from shards_spec.layout import PLAN, RAW, SHARDS, TEACHER, VOCAB, teacher_folder
from shards_spec.manifest import read_dataset
from shards_spec.messages import counted
from shards_spec.parquet import open_parquet
from shards_spec.vocab import Vocabulary, read_vocabulary

TOP = 30  # synsets in the table


def dataset_page(root: str, samples: int) -> dict[str, Any]:
    """The variables of the template for a dataset."""
    dataset = read_dataset(root)
    stages = ordered(dataset["stages"])
    counts = {name: block["counts"] for name, block in stages.items() if block.get("counts") and name != PLAN}
    if "ingest" not in counts and (foreign := foreign_counts(root)):
        counts = {"ingest": foreign, **counts}
    tally = count_dataset(root)
    by = stages.get("pack", {}).get("config", {}).get("select")
    problems = mismatches(counts, f"select/{by}") + tally.problems
    vocabularies = _vocabularies(root, problems)
    lemmas = _lemmas(tally.synsets, vocabularies)
    return {
        "dataset": dataset,
        "headline": _headline(root, tally),
        "rows": [stage_row(root, name, block) for name, block in stages.items()],
        "funnel": funnel(counts),
        "losses": [losses(name, count) for name, count in counts.items() if set(count) - {"success"}],
        "tally": tally,
        "sizes": _size_charts(tally),
        "texts": _text_charts(tally),
        "captioners": tally.captioners,
        "vocabularies": vocabularies,
        "frequency": _frequency_chart(tally.synsets, vocabularies),
        "top": _top_synsets(tally.synsets, lemmas),
        "lemmas": lemmas,
        "teachers": [_teacher(root, name, problems) for name in names(join(root, TEACHER))],
        "sheet": draw_samples(root, samples, problems),
        "near": draw_pairs(root, samples // 2, problems),
        "copies": draw_copies(root, samples // 2, problems),
        "problems": problems,
    }


def _lemmas(synsets: Iterable[str], vocabularies: dict[str, Vocabulary]) -> dict[str, str]:
    """Names of synsets: the vocabularies', and WordNet's own, where it is at hand, for rare ones that none has."""
    rows = chain.from_iterable(vocabulary.rows for vocabulary in vocabularies.values())
    lemmas = {wnid: lemma for wnid, lemma, *_ in rows}
    unnamed = set(synsets) - set(lemmas)
    if unnamed:
        with suppress(UserError):
            heads = load_wordnet().heads
            lemmas |= {wnid: heads[wnid] for wnid in unnamed if wnid in heads}
    return lemmas


def _headline(root: str, tally: Tally) -> list[tuple[str, str]]:
    folder = SHARDS if parquet_files(join(root, SHARDS)) else RAW
    tiles = [(tally.samples, "samples"), (len(parquet_files(join(root, folder))), "shards")]
    tiles.append((tally.synthetic_words.total(), "synthetic captions"))
    if tally.synsets:
        tiles.append((len(tally.synsets), "synsets"))
    return [(total(value), what) for value, what in tiles]


def _vocabularies(root: str, problems: list[str]) -> dict[str, Vocabulary]:
    found = {}
    for name in names(join(root, VOCAB)):
        if name.endswith(".tsv"):
            try:
                found[name.removesuffix(".tsv")] = read_vocabulary(join(root, VOCAB, name))
            except DataError as error:
                problems.append(str(error))
    return found


def _charts(*charts: Chart | None) -> list[Chart]:
    return [chart for chart in charts if chart]


def _size_charts(tally: Tally) -> list[Chart]:
    octave = 4  # bins per octave of the original sides, which span three decades
    sides = Counter[int]()
    for side, count in tally.original_sides.items():
        sides[math.floor(octave * math.log2(side))] += count
    shapes = ((1, 8), (1, 4), (1, 2), (1, 1), (2, 1), (4, 1), (8, 1))
    ratios = {math.log2(wide / high): f"{wide}:{high}" for wide, high in shapes}
    powers = {float(power): str(2**power) for power in range(15)}
    octaves = Scale("pixels", 1 / octave, base=2, marks=powers)
    aspects = Scale("width : height", ASPECT_UNIT, base=2, marks=ratios)
    return _charts(
        histogram("Shorter side of the originals", octaves, {"images": sides}),
        histogram("Shorter side as stored", Scale("pixels"), {"images": tally.stored_sides}),
        histogram("Aspect ratio as stored", aspects, {"images": tally.aspects}),
    )


def _text_charts(tally: Tally) -> list[Chart]:
    words = {"original": tally.original_words, "synthetic": tally.synthetic_words}
    synsets = {"original": tally.original_synsets, "synthetic": tally.synthetic_synsets}
    nats = Scale("nats per token", LOGPROB_UNIT)
    return _charts(
        histogram("Caption length", Scale("words"), words),
        histogram("Synsets per caption", Scale("synsets"), synsets),
        *(
            histogram(f"Log-probability, {name}", nats, {"captions": c.logprobs})
            for name, c in tally.captioners.items()
        ),
        *(
            histogram(
                f"Cosine with the image, by {name} itself",
                Scale("cosine", COSINE_UNIT),
                {"original": c.original_cosines, "synthetic": c.cosines},
            )
            for name, c in tally.captioners.items()
        ),
    )


def _frequency_chart(synsets: Counter[str], vocabularies: dict[str, Vocabulary]) -> Chart | None:
    """Count against rank on logarithmic axes, with each vocabulary's threshold."""
    if not synsets:
        return None
    counts = sorted(synsets.values(), reverse=True)
    ranks = sorted({round(len(counts) ** (i / 200)) for i in range(201)})
    x, y = logarithmic("rank", 1, len(counts)), logarithmic("occurrences", 1, counts[0])
    line = Line(ranks, [counts[rank - 1] for rank in ranks])
    rules = list[Rule]()
    for vocabulary in vocabularies.values():
        if vocabulary.header.get("source", "all") != "all":
            continue  # it counted other captions than this curve
        threshold = vocabulary.header.get("min_count")
        if isinstance(threshold, int) and 0 < threshold <= counts[0]:
            rules.append(Rule("y", threshold, f"more than {threshold:,}"))
        if len(vocabulary) <= len(counts):
            rules.append(Rule("x", len(vocabulary), counted(len(vocabulary), "class", "classes", style=",")))
    return line_chart("Synset frequency by rank", Plot(x, y), [line], rules)


def _top_synsets(synsets: Counter[str], lemmas: dict[str, str]) -> list[tuple[int, str, str, int, float]]:
    """(rank, WNID, lemma, count, share of the most frequent one's count)."""
    ordered = sorted(synsets.items(), key=lambda pair: (-pair[1], pair[0]))[:TOP]
    return [
        (rank, wnid, lemmas.get(wnid, ""), count, count / ordered[0][1])
        for rank, (wnid, count) in enumerate(ordered, start=1)
    ]


def _teacher(root: str, name: str, problems: list[str]) -> dict[str, Any]:
    """A teacher cache: the first shard's metadata and columns, and bytes per sample over all shards."""
    folder = join(root, teacher_folder(name))
    files = [join(folder, file) for file in parquet_files(folder)]
    meta: dict[str, Any] = {}
    columns = list[str]()
    rows = size = 0
    for path in files:
        try:
            meta = meta or read_meta(path)
            with open_parquet(path) as footer:
                columns = columns or footer.schema_arrow.names
                rows += footer.metadata.num_rows
            with open_read(path) as file:
                size += file.seek(0, 2)
        except (DataError, UserError, FileNotFoundError) as error:
            problems.append(str(error))
    facts = [
        ("model", " ".join(str(meta[part]) for part in ("model", "pretrained") if meta.get(part)) or "–"),
        ("samples", f"{rows:,} in {counted(len(files), 'shard', style=',')}"),
        *_stored(meta, columns),
        ("size", f"{size / max(1, rows):,.0f} bytes per sample, {short(size)}B in all"),
    ]
    return {"name": name, "facts": facts, "everything": flatten(meta)}


def _stored(meta: dict[str, Any], columns: list[str]) -> list[tuple[str, str]]:
    """What a teacher cache has of each sample, and how."""
    if meta.get("soft_labels") is None:
        return [
            ("per sample", f"{_vectors(columns, 'image')} views and {_vectors(columns, 'text')} captions"),
            ("vectors", f"{meta.get('dim', '–')} numbers of {meta.get('dtype', '–')}"),
        ]
    kept = "the logits" if meta["soft_labels"] == "all" else f"the {meta['soft_labels']} largest probabilities"
    named = "" if meta.get("class_names") else ", whose names the teacher does not say"
    return [
        ("per sample", f"soft labels of {counted(_vectors(columns, 'soft'), 'view')}"),
        ("soft labels", f"{kept} of {counted(meta['classes'], 'class', 'classes')}{named}"),
        ("bytes per view", str(meta["dim"])),
    ]


def _vectors(columns: list[str], kind: str) -> int:
    return sum(name.startswith(f"{kind}_") and not name.endswith("_scale") for name in columns)
