"""The report: what it shows of datasets and runs, whole, half made and broken; and that it opens without a network."""

import http.server
import io
import json
import math
import re
import shutil
import subprocess
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import skip_or_fail
from PIL import Image
from report_page import page_of
from small_runs import metrics_line, write_masked_run, write_plain_run

from pipeline.labels.wordnet import load_wordnet
from pipeline.report import ReportConfig, report
from pipeline.report.axes import linear, logarithmic, percent, short
from pipeline.report.charts import thin
from pipeline.report.columns import count_dataset
from pipeline.report.compare import CompareConfig, compare
from pipeline.report.curves import smooth
from pipeline.report.histogram import Scale, bin_counts, histogram
from pipeline.report.run import read_metrics
from pipeline.report.samples import evenly
from shards_spec.embeddings import write_embeddings
from shards_spec.files import UserError, write_json
from shards_spec.manifest import Done, write_stage
from shards_spec.predictions import Guess, GuessedImage, Guesses
from shards_spec.sample import Sample
from shards_spec.tar import write_shard
from shards_spec.vocab import build_vocabulary

SHARDS, ROWS = 3, 10
EVIL = '<script>alert(1)</script><img src="http://evil.test/x.png">'
LONG = "unbroken" * 30
DOG, CAT, RARE = "n02084071", "n02121620", "n00000001"


def make_image(shard: int, row: int) -> bytes:
    image = Image.new("RGB", (96 + 8 * row, 64), (40 * shard, 20 * row, 128))
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


def write_table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def status(row: int) -> str:
    return {0: "HTTP Error 404: Not Found", 1: "timeout", 2: "timeout"}.get(row, "success")


def make_shard(root: Path, shard: int) -> None:
    """Ten listed rows: seven downloaded, six packed."""
    raw, captions, packed, samples = [], [], [], []
    for row in range(ROWS):
        key, ok = f"{shard:05d}{row:04d}", status(row) == "success"
        original = EVIL if row == 4 else LONG if row == 5 else "a dog and a cat"
        raw.append(
            {
                "url": f"http://evil.test/{key}",
                "key": key,
                "caption": original,
                "status": "success" if ok else "failed_to_download",
                "error_message": None if ok else status(row),
                "width": 96 + 8 * row if ok else None,
                "height": 64 if ok else None,
                "original_width": 800 if ok else None,
                "original_height": 600 if ok else None,
            }
        )
        if not ok:
            continue
        captions.append(
            {
                "key": key,
                "captions": ["a dog", "a dog", f"cat {row}"],
                "logprobs": [-4.0, -6.0, math.nan],
                "num_tokens": [4, 4, 4],
                "similarities": [0.251, 0.259, -0.105],
                "original_similarity": 0.305 if row % 2 else None,
            }
        )
        if row == 3:
            continue
        synsets = [[DOG, CAT], [DOG], [DOG], [RARE] if row == 9 else []]
        packed.append(
            {
                "key": key,
                "caption": original,
                "synthetic": captions[-1]["captions"],
                "synsets": synsets,
                "width": 96 + 8 * row,
                "height": 64,
            }
        )
        samples.append(Sample(key, {"jpg": make_image(shard, row), "txt": original.encode(), "json": b"{}"}))
    name = f"{shard:05d}"
    for folder, rows in (("raw", raw), ("captions/toy", captions), ("shards", packed)):
        write_table(root / folder / f"{name}.parquet", rows)
    for folder in ("raw", "shards"):
        write_shard(str(root / folder / f"{name}.tar"), samples)
    Done("ingest", shard, {}, dict(Counter(map(status, range(ROWS)))), {}, {}).write(str(root / "raw"))
    keys = [row["key"] for row in packed]
    columns = {f"{kind}_{i}": np.ones((len(keys), 8), np.float32) for kind in ("image", "text") for i in range(2)}
    meta = {"model": "ViT-L-14", "pretrained": "toy_tag", "logit_scale": 100.0}
    write_embeddings(str(root / "teacher" / "toy" / f"{name}.parquet"), keys, columns, meta)


def make_stage(root: Path, name: str, counts: dict[str, int], config: dict, source: str | None = None) -> None:
    block = {"config": config, "config_sha256": "0", "shards": SHARDS, "counts": counts, "versions": {"python": "3.11"}}
    write_stage(str(root), name, block, source)
    log = root / "logs" / f"{name.replace('/', '-')}.jsonl"
    log.parent.mkdir(exist_ok=True)
    common = {"time": "t", "cpus": 2, "shards": SHARDS, "samples": counts["success"]}
    runs = [{**common, "made": made, "seconds": seconds} for made, seconds in ((2, 4.0), (1, 3.0), (0, 9.0))]
    log.write_text("".join(json.dumps(run) + "\n" for run in runs))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A dataset of three shards with all stages done."""
    root = tmp_path / "toy-set"
    for shard in range(SHARDS):
        make_shard(root, shard)
    ingested = {"success": 21, "HTTP Error 404: Not Found": 3, "timeout": 6}
    make_stage(root, "ingest", ingested, {"image_size": 256, "note": EVIL}, f"{EVIL}.tsv")
    make_stage(root, "caption/toy", {"success": 21}, {"model": "coca"})
    make_stage(root, "pack", {"success": 18, "no caption": 3}, {"captioner": "toy"})
    make_stage(root, "cache/toy", {"success": 18}, {"model": "ViT-L-14"})
    counts = {DOG: 54, CAT: 18, RARE: 3}
    vocabulary = build_vocabulary(
        counts, counts, {DOG: "dog", CAT: "cat", RARE: "rarity"}, {"source": "all"}, min_count=5
    )
    vocabulary.write(str(root / "vocab" / "all.tsv"))
    write_stage(str(root), "vocab/all", {"config": vocabulary.header, "synsets": 2, "sha256": "0", "shards": SHARDS})
    return root


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_plain_run(tmp_path / "toy-run", EVIL, LONG)


@pytest.fixture
def stages(tmp_path: Path) -> Path:
    """Two stages of a student with masks."""
    folder = tmp_path / "toy-stages"
    write_masked_run(folder / "stage-1", 1.0, 0.75, x=EVIL)
    write_masked_run(folder / "stage-2", 0.75, 0.5, from_run=str(folder / "stage-1"), environment=LONG)
    return folder


@pytest.fixture
def compared(run: Path, stages: Path, tmp_path: Path) -> str:
    """The page of both, with an image and long texts."""
    own = {str(run): (Guess(LONG, 0.5, True), Guess(EVIL, 0.25, False)), str(stages): (Guess("a dog", 1.0, False),)}
    images = [GuessedImage(f"k{row}", make_image(0, row), (LONG,), own) for row in range(3)]
    config = CompareConfig((str(run), str(stages)), output=str(tmp_path / "compared.html"))
    return compare(config, Guesses(LONG, "its probability", images))


def all_numbers(text: str) -> list[str]:
    return re.findall(r"[\d.,]*\d", text)


def test_dataset_page_shows_each_stage_with_its_time(root):
    page = page_of(root)
    assert "toy-set" in page.text
    assert "format version 1" in page.text
    row = next(line for line in page.text.split("\n") if re.match(r"\s*pack\s.*captioner", line))
    assert all_numbers(row)[:5] == [
        "3",
        "18",
        "3",
        "7",
        "2.57",
    ]  # shards, samples, lost, seconds, rate
    assert [t for t in ("ingest", "caption/toy", "pack", "vocab/all", "cache/toy") if t not in page.text] == []


def test_losses_add_up_to_the_list(root):
    page = page_of(root)
    assert "9 + 21 = 30" in page.text
    assert "3 + 18 = 21" in page.text
    ingest = page.text[page.text.index("Lost in ingest") : page.text.index("Lost in pack")]
    assert re.search(r"timeout\s+6\s+20.0 %", ingest)
    assert re.search(r"HTTP Error 404: Not Found\s+3\s+10.0 %", ingest)
    assert "to look at" not in page.text


def test_stage_that_missed_samples_is_named(root):
    make_stage(root, "pack", {"success": 18}, {})
    assert "pack counted 18 inputs, ingest left 21 samples" in page_of(root).text


def test_many_reasons_are_gathered_and_still_add_up(root):
    make_stage(root, "ingest", {"success": 21, **{f"error {i}": i for i in range(1, 41)}}, {})
    page = page_of(root)
    assert "25 other reasons" in page.text
    assert f"{sum(range(41))} + 21 = {sum(range(41)) + 21}" in page.text


def test_tally_counts_by_hand(root):
    tally = count_dataset(str(root))
    assert (tally.rows, tally.samples) == (30, 18)
    assert tally.original_sides == {600: 21}
    assert tally.stored_sides == {64: 18}
    assert tally.original_words == {5: 12, 1: 3, 2: 3}
    assert tally.synthetic_words == {2: 54}
    assert tally.original_synsets == {2: 18}
    assert tally.synthetic_synsets == {1: 39, 0: 15}
    assert tally.synsets == {DOG: 54, CAT: 18, RARE: 3}
    toy = tally.captioners["toy"]
    assert (toy.images, toy.captions, toy.distinct_per_image, toy.distinct_per_shard) == (21, 63, 42, 24)
    assert toy.logprobs == {-20: 21, -30: 21}
    assert toy.not_finite == 21
    assert toy.cosines == {25: 42, -11: 21}
    assert toy.original_cosines == {30: 12}


def test_dataset_page_shows_captions_synsets_and_cache(root):
    page = page_of(root)
    assert "66.7 %" in page.text  # distinct captions per image
    assert re.search(rf"1\s+dog\s+{DOG}\s+54", page.text)
    assert "2 classes" in page.source
    assert "more than 5" in page.source
    for fact in ("ViT-L-14 toy_tag", "2 views and 2 captions", "8 numbers of float16", "18 in 3 shards"):
        assert fact in page.text
    titles = [
        "Shorter side of the originals",
        "Aspect ratio as stored",
        "Caption length",
        "Synset frequency by rank",
        "Cosine with the image, by toy itself",
    ]
    assert [title for title in titles if title not in page.text] == []


def test_synsets_that_no_vocabulary_has_are_named_by_wordnet(root):
    try:
        load_wordnet()
    except UserError as error:
        skip_or_fail(str(error))
    shutil.rmtree(root / "vocab")
    assert f'<span title="{DOG}">dog</span>' in page_of(root).source


def test_contact_sheet_is_drawn_evenly_and_stays_the_same(root):
    page = page_of(root, samples=6)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 6
    keys = re.findall(r'class="key">(\d+)<', page.source)
    assert [key[:5] for key in keys] == ["00000", "00000", "00001", "00001", "00002", "00002"]
    assert all(attrs["src"].startswith("data:image/jpeg;base64,") and attrs["alt"] for attrs in images)
    assert f'<span title="{DOG}">dog</span>' in page.source
    assert f'<span title="{RARE}">{RARE}</span>' in page_of(root).source
    assert page_of(root, samples=6).source == page.source
    assert not [tag for tag, _ in page_of(root, samples=0).tags if tag == "img"]


@pytest.mark.parametrize("kind", ["root", "run", "stages"])
def test_untrusted_text_is_escaped_and_nothing_is_loaded(kind, request):
    page = page_of(request.getfixturevalue(kind))
    assert "&lt;script&gt;" in page.source
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "embed", "form", "base")]
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "xlink:href", "action", "data", "poster"):
                assert value.startswith(("data:", "#stage-")), (tag, name, value)
    style = re.search(r"<style>(.*?)</style>", page.source, re.S)[1]
    assert not re.search(r"url\(|@import|http", style)


@pytest.mark.parametrize("kept", [["raw"], ["raw", "captions"], ["raw", "captions", "shards"], ["shards"], []])
def test_page_of_a_dataset_that_is_not_finished(root, kept):
    for folder in {"raw", "captions", "shards", "teacher", "vocab", "logs"} - set(kept):
        shutil.rmtree(root / folder)
    dataset = json.loads((root / "dataset.json").read_text())
    owner = {"ingest": "raw", "caption": "captions", "pack": "shards"}
    stages = dataset["stages"].items()
    dataset["stages"] = {name: block for name, block in stages if owner.get(name.split("/")[0]) in kept}
    write_json(str(root / "dataset.json"), dataset)
    page = page_of(root)
    assert "Teacher caches" not in page.text
    assert ("Contact sheet" in page.text) == bool(kept)
    assert ("Synset frequency" in page.text) == ("shards" in kept)
    assert ("a dog" in page.text) == bool(kept)
    assert "cannot be read" not in page.text


def test_foreign_raw_shards_are_counted_from_their_stats(root):
    dataset = json.loads((root / "dataset.json").read_text())
    write_json(str(root / "dataset.json"), {**dataset, "stages": {}})
    assert "9 + 21 = 30" in page_of(root).text


def test_broken_files_are_named_and_the_rest_is_shown(root):
    (root / "shards" / "00001.parquet").write_bytes(b"no parquet")
    (root / "captions" / "toy" / "00000.parquet").write_bytes(b"")
    (root / "teacher" / "toy" / "00002.parquet").write_bytes(b"PAR1")
    (root / "shards" / "00002.tar").write_bytes(b"no tar")
    table = root / "vocab" / "all.tsv"
    table.write_text(table.read_text().replace("54", "55"))
    text = page_of(root).text
    names = ("shards/00001.parquet", "toy/00000.parquet", "toy/00002.parquet", "shards/00002.tar", "all.tsv")
    assert [name for name in names if name not in text[: text.index("Stages")]] == []
    assert "no image to show" in text


def test_a_vocabulary_that_is_a_folder_is_named(root):
    (root / "vocab" / "odd.tsv").mkdir()
    assert "odd.tsv is a folder" in page_of(root).text


def test_image_that_does_not_decode_costs_itself(root):
    path = str(root / "shards" / "00000.tar")
    keys = pq.read_table(root / "shards" / "00000.parquet").column("key").to_pylist()
    data = [b"broken", *(make_image(0, row) for row in range(1, len(keys)))]
    write_shard(path, [Sample(key, {"jpg": d, "txt": b"x"}) for key, d in zip(keys, data, strict=True)])
    page = page_of(root)
    assert f"key {keys[0]}: its image does not decode" in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 17


def test_run_page_shows_curves_evaluation_and_setup(run):
    page = page_of(run)
    for text in (
        "toy-run",
        "Recipe siclip",
        "Total loss",
        "contrastive",
        "Gradient norm",
        "Throughput",
        "optim.betas",
        "[0.9, 0.98]",
        "2.7.1",
        "checkpoints/step_100.pt",
        "2.5MB",
        "text→image R@1",
        "zeroshot retrieval",
        "text→image R@5",
        "1 of 100 values are not finite",
    ):
        assert text in page.text, text
    assert re.search(r"cifar\s+siclip\s+61.5 %\s+–\s+60.0 %", page.text)
    assert re.search(r"coco\s+siclip\s+5.0 %\s+25.0 %\s+50.0 %", page.text)
    for tile in (r"100\s+steps", r"6,400\s+samples seen", r"1 min\s+of training"):
        assert re.search(tile, page.text), tile
    assert "nan" not in re.sub(r"<title>.*?</title>", "", page.source)


@pytest.mark.parametrize(
    "lines", [[], [metrics_line(1, 5.0)], [metrics_line(1, math.nan)], [metrics_line(s, math.inf) for s in range(99)]]
)
def test_run_page_of_few_or_no_numbers(run, lines):
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    shutil.rmtree(run / "eval")
    (run / "config.json").unlink()
    (run / "environment.json").write_text("{")
    page = page_of(run)
    assert ("No step is logged yet" in page.text) == (not lines)
    assert "environment.json: not a readable JSON file" in page.text
    assert "Evaluation" not in page.text


def test_resumed_and_torn_metrics(run):
    steps = [1, 2, 3, 4, 3, 4, 5]
    text = "".join(metrics_line(step, float(n)) + "\n" for n, step in enumerate(steps))
    text += (
        "[" * 3000
        + "\n"
        + '{"step": '
        + "1" * 400
        + '}\n{"step": '
        + "1" * 5000
        + '}\n[1]\n\n{"step": "5", "loss": 6}\n'
    )
    (run / "metrics.jsonl").write_text(text + '{"step": 6, "lo')
    problems: list[str] = []
    columns = read_metrics(str(run / "metrics.jsonl"), problems)
    assert columns["step"].tolist() == [1, 2, 3, 4, 5]
    assert columns["loss"].tolist() == [0, 1, 4, 5, 6]
    assert "5 of 13 lines" in problems[0]


def test_long_runs_keep_the_page_small(run):
    (run / "metrics.jsonl").write_text("".join(metrics_line(s, 5 + math.sin(s)) + "\n" for s in range(20_000)))
    assert len(page_of(run).source) < 400_000


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda path: None, {}, "is not there"),
        (lambda path: path.mkdir(), {}, "neither a dataset.json nor a metrics.jsonl"),
        (lambda path: path.mkdir(), {"samples": -1}, "--samples -1"),
        (lambda path: path.mkdir(), {"output": "."}, "is a folder"),
    ],
)
def test_bad_inputs_get_a_message_with_the_fix(tmp_path, make, options, message):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        report(ReportConfig(str(tmp_path / "x"), **options))


def test_output_goes_where_asked(run, tmp_path):
    asked = tmp_path / "new" / "page.html"
    assert report(ReportConfig(str(run), output=str(asked))) == str(asked)
    assert report(ReportConfig(f"{run}/")) == f"{run}/report.html"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output"):
        report(ReportConfig(str(run), output=str(tmp_path / "file" / "page.html")))


def test_lone_surrogates_do_not_stop_the_page(run):
    (run / "config.json").write_text('{"name": "\\ud800"}')
    assert "name" in page_of(run).text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (150, "150"),
        (1234, "1.23k"),
        (999.9, "1k"),
        (5e-5, "5e-5"),
        (0.001, "0.001"),
        (2.5e6, "2.5M"),
        (-3.25, "-3.25"),
        (math.nan, "nan"),
        (1e15, "1e15"),
        (12.0, "12"),
    ],
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_shares_are_told_from_nothing_and_from_all():
    parts = [(5000, 5000), (0, 7), (0, 0), (2, 5054), (1, 3), (1, 2_000_000_000), (4999, 5000), (999_999_999, 10**9)]
    expected = ["100 %", "0 %", "0 %", "0.04 %", "33.3 %", "< 0.001 %", "99.98 %", "> 99.999 %"]
    assert [percent(part, whole) for part, whole in parts] == expected
    for whole in (1, 7, 1000, 5054, 123_456):
        for part in {0, 1, 2, whole // 3, whole - 1, whole} & set(range(whole + 1)):
            said = percent(part, whole)
            assert "e" not in said
            assert (said == "0 %") == (part == 0)
            assert (said == "100 %") == (part == whole)
            if said[0].isdigit():
                assert abs(float(said[:-2]) - 100 * part / whole) <= 0.05
    svg = histogram("x", Scale("y"), {"images": {3: 5000}}).svg
    assert "5,000 (100 %)" in svg
    shown = re.findall(r"<title>(.*?)</title>", histogram("x", Scale("y"), {"images": {1: 2, 2: 5052}}).svg)
    assert shown == ["1: 2 (0.04 %)", "2: 5,052 (99.96 %)"]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (14.2853, 14.2861), (0, 3e9), (-7, -2), (5, 5), (0, 0), (1e-9, 3e-9)]
)
def test_marks_are_round_distinct_and_inside(low, high):
    axis = linear("x", low, high)
    values, texts = zip(*axis.marks, strict=True)
    assert 2 <= len(values) <= 11
    assert len(set(texts)) == len(texts)
    assert all(-1e-9 <= axis.place(v) <= 1 + 1e-9 for v in values)
    assert all(math.isclose(v, axis.low + axis.place(v) * (axis.high - axis.low)) or v == 0 for v in values)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 30), (1, 117_000), (3, 5e6)])
def test_logarithmic_marks(low, high):
    axis = logarithmic("x", low, high)
    assert len(axis.marks) >= 2
    assert all(-1e-3 <= axis.place(v) <= 1 + 1e-3 for v, _ in axis.marks)


def test_bins_keep_every_value():
    counts = Counter(dict.fromkeys(range(1, 40), 100)) + Counter({5000: 2})
    bins = bin_counts([counts, Counter({3: 7})])
    assert [sum(row) for row in bins.heights] == [3902, 7]
    assert bins.pooled == 2
    assert bins.extremes == (1, 5000)
    assert len(bins.heights[0]) <= 40
    chart = histogram("T", Scale("words"), {"a": counts})
    assert "5k" in chart.note
    assert histogram("T", Scale("words"), {"a": Counter()}) is None


def test_thin_keeps_extremes_and_gaps():
    y = np.zeros(10_000)
    y[[4321, 7000]] = 9, -9
    y[100:400] = np.nan
    points = thin(np.arange(10_000.0), y)
    assert len(points) <= 300
    values = [value for _, value in points]
    assert {9.0, -9.0} <= set(values)
    assert any(math.isnan(value) for value in values)


def test_smoothing_has_no_lag_and_passes_over_gaps():
    ramp = np.arange(1000.0)
    ramp[500] = np.nan
    assert np.nanmax(np.abs(smooth(ramp) - np.arange(1000))) < 1
    assert np.isnan(smooth(np.full(50, np.nan))).all()
    assert smooth(np.array([3.0])).tolist() == [3.0]


def test_evenly():
    assert evenly(10, 3) == [1, 5, 8]
    assert evenly(2, 5) == [0, 1]
    assert evenly(0, 5) == []


class Recorder(http.server.BaseHTTPRequestHandler):
    """A proxy that refuses and remembers."""

    seen: list[str] = []

    def _refuse(self) -> None:
        self.seen.append(self.path)
        self.send_error(502)

    do_GET = do_POST = do_HEAD = do_CONNECT = do_PUT = _refuse

    def log_message(self, *_: object) -> None:
        pass


MEASURE = """<!doctype html><body><pre id="out"></pre>
<iframe src="PAGE" style="width:390px;height:800px;border:0"></iframe>
<iframe src="PAGE" style="width:1280px;height:800px;border:0"></iframe>
<script>
addEventListener("load", () => {
  const measured = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument.documentElement, width = page.clientWidth;
    const wide = [...page.querySelectorAll("h1,h2,p,table,td,th,figure,.chart,img,li")].filter(e =>
      getComputedStyle(e).display !== "none" && !e.closest(".stack thead, .columns table + table thead")
      && e.getBoundingClientRect().right > width + 1);
    return {width, scroll: page.scrollWidth, wide: wide.map(e => e.outerHTML.slice(0, 120)),
            text: page.innerText.length, images: [...page.querySelectorAll("img")].every(i => i.naturalWidth > 0)};
  });
  document.getElementById("out").textContent = JSON.stringify(measured);
});
</script>"""


@pytest.mark.parametrize("kind", ["root", "run", "stages", "compared"])
def test_page_fits_phone_and_desktop_and_asks_no_network(kind, request, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        skip_or_fail("chromium is not installed")
    made = str(request.getfixturevalue(kind))
    path = made if kind == "compared" else report(ReportConfig(made))
    if kind in ("root", "compared"):
        source = Path(path).read_text()
        Path(path).write_text(source.replace(' loading="lazy"', ""))  # all images decode, also those below the fold
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(MEASURE.replace("PAGE", Path(path).as_uri()))
    Recorder.seen = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        dom = subprocess.run(
            [
                chromium,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--allow-file-access-from-files",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--window-size=1400,900",
                f"--proxy-server=127.0.0.1:{server.server_port}",
                "--proxy-bypass-list=<-loopback>",
                "--dump-dom",
                wrapper.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
    finally:
        server.shutdown()
        server.server_close()
    found = re.search(r'<pre id="out">(\[.*?\])</pre>', dom, re.S)
    assert found, dom[:500]
    for width, measured in zip((390, 1280), json.loads(html_unescape(found[1])), strict=True):
        assert measured["wide"] == []
        assert measured["scroll"] <= measured["width"] <= width
        assert measured["text"] > 500
        assert measured["images"]
    asked = [url for url in Recorder.seen if not re.search(r"google(apis)?\.com|gstatic\.com|gvt1\.com", url)]
    assert asked == []


def html_unescape(text: str) -> str:
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
