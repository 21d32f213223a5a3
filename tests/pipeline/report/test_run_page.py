"""The page of a run: results and what was trained first, charts over steps, samples and time, none without a use."""

import html
import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from report_page import Page, page_of
from small_runs import write_plain_run

from pipeline.report.curves import value_axis
from shards_spec.files import write_json


@pytest.fixture
def run(tmp_path):
    return write_plain_run(tmp_path / "toy-run")


def figures(page: Page) -> list[tuple[str, str]]:
    """(title, unit of x) of every chart, in order."""
    found = re.findall(r"<figcaption>([^<\n]*).*?<svg class=.*?</svg>\s*</figure>", page.source, re.S)
    units = re.findall(r'text-anchor="end">([a-z ]+)</text>', page.source)
    return list(zip((html.unescape(title) for title in found), units, strict=True))


def test_no_chart_of_a_constant_and_none_twice(run):
    page = page_of(run)
    over_steps = [title for title, unit in figures(page) if unit == "step"]
    assert over_steps == ["Total loss", "Total loss", "contrastive = affinity", "top-1"]  # wide and narrow
    assert "Constant: Learning rate 0.001; Gradient norm 1; Logit scale 14.3; Throughput 100; text→image R@5 0.1" in (
        page.text
    )


def test_curves_over_steps_samples_and_time(run):
    page = page_of(run)
    assert Counter(unit for _, unit in figures(page)) == {"step": 4, "samples seen": 4, "seconds": 4}
    switches = [attributes["id"] for tag, attributes in page.tags if tag == "input"]
    assert switches == ["curves-steps", "curves-samples", "curves-time"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line | {"seconds": 7200}) + "\n" for line in lines[:1]))
    assert {unit for _, unit in figures(page_of(run))} == {"step", "samples seen", "hours"}
    without = [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in without))
    assert {unit for _, unit in figures(page_of(run))} == {"step", "samples seen"}


def test_a_loss_that_spans_decades_has_a_logarithmic_axis():
    values = np.array([5.0, 0.5, 0.04])
    axis, _ = value_axis("loss", values, may_be_log=True)
    assert axis.log
    assert not value_axis("loss", values[:2], may_be_log=True)[0].log
    assert not value_axis("share", values)[0].log
    assert not value_axis("loss", np.array([5.0, 0.0]), may_be_log=True)[0].log


def test_results_come_first_and_what_was_trained_on_what_below(run):
    config = {"recipe": "siclip", "model": "SiCLIP-S0", "data": "/data/cc3m", "batch_size": 1536, "steps": 200}
    write_json(str(run / "config.json"), config)
    counts = {"total": 48_590_669, "image": 9_830_628, "text": 13_463_144, "embedding": 25_296_896, "other": 1}
    about = {"device": "x86_64", "threads": 2, "parameters": counts}
    write_json(str(run / "environment.json"), about)
    page = page_of(run)
    tiles = re.findall(r'class="tile"><b>(.*?)</b><span>(.*?)</span>', page.source)
    assert tiles[:4] == [
        ("61.5 %", "top-1, cifar"),
        ("5.0 %", "text→image R@1, coco"),
        ("5.0 %", "image→text R@1, coco"),
        ("50.0 %", "top-1, cc3m"),  # measured last while training
    ]
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page.source))
    assert facts == {
        "Model": "SiCLIP-S0",
        "Data": "/data/cc3m",
        "Batch": "1,536",
        "Device": "x86_64, 2 threads",
        "Parameters": "48.6M: image 9.83M, text 13.5M, token embeddings 25.3M",
        "State": "unfinished, step 100 of 200",
    }
    shutil.rmtree(run / "eval")
    assert re.search(r"<b>50.0 %</b><span>top-1, cc3m</span>", page_of(run).source)


def test_cost_is_shown_and_is_no_unread_file(run):
    speed = {
        "device": "cpu",
        "name": "EPYC",
        "threads": 2,
        "images_per_s": {"1": 39.5, "64": 51},
        "in_a_row": 1000,
    }
    cost = {"task": "cost", "macs": {"image": 2_318_000_000}, "weights_bytes": 194_000_000, "speed": [speed]}
    write_json(str(run / "eval" / "cost.json"), cost)
    page = page_of(run)
    for row in (
        "MACs, one image 2.318G",
        "Weights 194MB",
        "images/s, batch 1, EPYC, 2 threads 39.5",
        "1,000 images one by one, EPYC, 2 threads 25.3 s",
    ):
        assert row in page.text, row
    assert "have no metrics" not in page.text
    write_json(str(run / "eval" / "cost.json"), {"task": "cost", "speed": [{"images_per_s": 3}, 4], "macs": 5})
    assert "cost of the form" not in page_of(run).text
