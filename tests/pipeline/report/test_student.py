"""The report of runs whose student is cut: curves of its masks, what is left per layer, and stages in one page."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from report_page import Page, page_of
from small_runs import CUT, STEPS, description_of, table_of, write_masked_run

from pipeline.report.axes import linear
from pipeline.report.chain import joined, stage_folders
from pipeline.report.charts import Line, Plot, line_chart, parts_between
from pipeline.report.run import read_run
from pipeline.report.student import Bar, bar_chart
from shards_spec.files import write_json
from shards_spec.student_table import student_markdown

MASK_CHARTS = ("Sparsity and its target", "Multipliers", "Parameters left")
VIEWS = 3  # over steps, samples and time
SIZE_CHARTS = (
    "Dimensions of the residual stream",
    "Heads per layer, image",
    "Neurons per layer, image",
    "Heads per layer, text",
    "Neurons per layer, text",
)


@pytest.fixture
def run(tmp_path):
    write_masked_run(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def stages(tmp_path):
    """Three stages, the third of which has begun; its files were moved after the second."""
    folder = tmp_path / "whole-chain"
    write_masked_run(folder / "stage-1", 1.0, 0.75)
    write_masked_run(folder / "stage-2", 0.75, 0.5, from_run=str(folder / "stage-1"))
    third = folder / "stage-3"
    third.mkdir()
    write_json(str(third / "config.json"), {"recipe": "tinyclip", "inherit": "auto", "sparsity": 0.75})
    return folder


def titles(page: Page) -> list[str]:
    return [re.sub(r"<.*?>", "", text).strip() for text in re.findall(r"<figcaption>([^<\n]*)", page.source)]


def hovers(page: Page, figure: str) -> list[str]:
    """The texts under the pointer of the first chart of that title."""
    part = page.source[page.source.index(f"<figcaption>{figure}\n") :]
    return re.findall(r"<title>(.*?)</title>", part[: part.index("</figure>")])


def test_curves_of_a_run_with_masks(run):
    page = page_of(run)
    assert [title for title in MASK_CHARTS if titles(page).count(title) != VIEWS] == []
    assert [title for title in SIZE_CHARTS if titles(page).count(title) != 1] == []
    sparsity = hovers(page, "Sparsity and its target")
    assert sparsity[0] == "step 1: p, expected 0.0125; q, its target 0.5"
    assert sparsity[-1] == f"step {STEPS}: p, expected 0.5"
    assert hovers(page, "Multipliers")[0] == "step 1: λ 10.12; β 10.11"
    assert hovers(page, "Parameters left")[-1] == f"step {STEPS}: 200k"
    legend = re.search(r"<figcaption>Multipliers\s+<ul class=\"legend\">(.*?)</ul>", page.source, re.S)[1]
    assert re.findall(r'<i class="(c\d)"></i>(.)', legend) == [("c0", "λ"), ("c1", "β")]
    assert page.source.count(">cut</text>") == 5 * VIEWS  # the loss, wide and narrow, and the three curves
    assert re.search(r"200k\s+parameters left", page.text)


def test_a_loss_that_ends_with_the_masks_is_not_called_infinite(run):
    page = page_of(run)
    assert "not finite" not in page.text
    assert hovers(page, "sparsity")[-1] == f"step {CUT - 1}: {2 / (CUT - 1):.4g}"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    broken = json.loads(lines[5]) | {"loss": None, "losses": {"affinity": 1.0, "sparsity": None}}
    (run / "metrics.jsonl").write_text("\n".join([*lines[:5], json.dumps(broken), *lines[6:]]) + "\n")
    assert "1 of 39 values are not finite" in page_of(run).text


def test_bars_of_what_is_left(run):
    page = page_of(run)
    assert hovers(page, "Heads per layer, image") == ["layer 1: 2 of 4", "layer 2: 0 of 4"]
    assert hovers(page, "Neurons per layer, text") == ["layer 1: 128 of 256", "layer 2: 100 of 256"]
    assert hovers(page, "Dimensions of the residual stream") == ["tower image: 32 of 64", "tower text: 30 of 64"]
    assert "50.0 % of the weights in attention and MLP are gone" in page.text


def test_a_bar_has_three_heights():
    chart = bar_chart("T", "H", "layer", [Bar("1", left=1, before=2, whole=4), Bar("2", left=0, before=4, whole=4)])
    found = re.findall(r'<rect class="([^"]*)" x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)">', chart.svg)
    bars = [(style, float(tall)) for style, _, tall in found if style != "strip"]
    whole = bars[2][1]
    assert [style for style, _ in bars] == ["pale c0", "c0", "whole"] * 2
    assert [tall / whole for _, tall in bars] == pytest.approx([0.5, 0.25, 1, 1, 0, 1], abs=2e-3)
    assert all(float(top) + float(tall) == pytest.approx(154, abs=0.11) for _, top, tall in found)
    assert "T: 1 of 8 are left" in chart.svg
    assert "layer 1: 1 of 4, 2 at the start of the run" in chart.svg


def test_marks_of_bars_are_whole_numbers_and_few():
    one = bar_chart("T", "H", "layer", [Bar("1", 1, 1, 1)]).svg
    assert re.findall(r'text-anchor="end">(\d[^<]*)<', one) == ["0", "1"]
    many = bar_chart("T", "H", "layer", [Bar(str(i), 1, 1, 1) for i in range(1, 49)]).svg
    assert re.findall(r'text-anchor="middle">(\d+)<', many) == [str(i) for i in range(1, 49, 4)]


def test_the_table_and_its_markdown(run):
    page = page_of(run)
    assert re.search(r"image\s+32\s+2 0\s+128 100\s+32k\s+0\s+640k", page.text)
    assert re.search(r"sum\s+200k\s+1.5M", page.text)
    expected = student_markdown(table_of(0.5))
    assert expected.splitlines()[2] == "| image | 32 | 2 0 | 128 100 | 0.03 | 0.00 | 0.001 |"
    assert f"<pre>{expected}</pre>" in page.source


def test_masks_that_are_not_applied_yet(run):
    write_json(str(run / "student.json"), table_of(1.0) | {"masks": True, "step": 0})
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[: CUT - 1]) + "\n")
    page = page_of(run)
    assert "its masks are not applied yet" in page.text
    assert ">cut</text>" not in page.source
    assert [title for title in MASK_CHARTS if title not in titles(page)] == []


BROKEN = [
    "{",
    "[]",
    "{}",
    '{"image": {"width": 3}}',
    json.dumps(table_of(0.5) | {"text": None}),
    json.dumps(table_of(0.5) | {"image": table_of(0.5)["image"] | {"heads": [1, 2, 3]}}),
    json.dumps(table_of(0.5) | {"image": table_of(0.5)["image"] | {"neurons": [-1, "x"]}}),
    json.dumps(table_of(0.5) | {"image": table_of(0.5)["image"] | {"heads": [], "neurons": []}}),
    json.dumps(table_of(0.5) | {"parameters": None}),
    json.dumps({name: value for name, value in table_of(0.5).items() if name != "sparsity"}),
    json.dumps({"groups": [1, 2, 3]}),
]


@pytest.mark.parametrize("text", BROKEN)
def test_another_table_or_half_of_one_costs_its_section_alone(text, run):
    (run / "student.json").write_text(text)
    page = page_of(run)
    assert not set(SIZE_CHARTS) & set(titles(page))
    assert set(MASK_CHARTS) < set(titles(page))
    assert ("student.json: not a readable JSON file" in page.text) == (text == "{")


NO_ORIGINAL = [None, "{", "{}", '{"model_cfg": 3}', '{"model_cfg": {"vision_cfg": {"original": {}}}}']


@pytest.mark.parametrize("text", NO_ORIGINAL)
def test_without_the_original_sizes_the_outline_is_what_is_left(text, run):
    (run / "open_clip_config.json").unlink()
    if text is not None:
        (run / "open_clip_config.json").write_text(text)
    assert hovers(page_of(run), "Heads per layer, image") == ["layer 1: 2 of 2", "layer 2: 0 of 0"]


def test_a_run_without_masks_shows_none_of_that(run):
    (run / "student.json").unlink()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = ("sparsity", "sparsity_target", "lambda", "beta", "parameters")
    kept = [{name: value for name, value in line.items() if name not in own} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    page = page_of(run)
    assert not {*MASK_CHARTS, *SIZE_CHARTS} & set(titles(page))
    assert [word for word in ("parameters left", "Markdown", "student.json", ">cut<") if word in page.source] == []


def test_a_stage_shows_what_it_began_with(stages):
    texts = ["layer 1: 2 of 4, 3 at the start of the run", "layer 2: 0 of 4, 0 at the start of the run"]
    assert hovers(page_of(stages / "stage-2"), "Heads per layer, image") == texts
    moved = stages.with_name("moved")
    stages.rename(moved)
    assert hovers(page_of(moved / "stage-2"), "Heads per layer, image") == texts
    shutil.rmtree(moved / "stage-1")
    assert hovers(page_of(moved / "stage-2"), "Heads per layer, image") == ["layer 1: 2 of 4", "layer 2: 0 of 4"]


def test_a_run_shows_what_the_folder_of_its_weights_has(tmp_path):
    for name, description in (("cut", description_of(0.75)), ("plain", {"model_cfg": {"vision_cfg": {"layers": 2}}})):
        write_json(str(tmp_path / name / "open_clip_config.json"), description)
        write_masked_run(tmp_path / f"run-{name}", teacher_weights=f"local-dir:{tmp_path / name}")
    heads = [hovers(page_of(tmp_path / name), "Heads per layer, image")[0] for name in ("run-cut", "run-plain")]
    assert heads == ["layer 1: 2 of 4, 3 at the start of the run", "layer 1: 2 of 4"]


def test_stages_beneath_each_other(stages):
    write_json(
        str(stages / "stage-1" / "eval" / "toy.json"),
        {"dataset": "toy", "task": "zeroshot_classification", "model": "x", "metrics": {"acc1": 0.5, "acc5": 0.75}},
    )
    page = page_of(stages)
    rows = [line.strip() for line in page.text.split("\n") if re.match(r"\s*Stage \d\s+by masks", line)]
    assert re.fullmatch(r"Stage 1\s+by masks\s+25.0 % 25.0 % 300k\s+1.5M\s+60\s+0.08333\s+65.0 % 50.0 %.*", rows[0])
    assert re.match(r"Stage 2\s+by masks\s+50.0 % 50.0 % 200k\s+1.5M\s+60\s+0.08333\s+50.0 % –", rows[1])
    assert re.match(r"Stage 3\s+by masks\s+75.0 % – – – – – – –", rows[2])
    assert "toy top-1" in page.text
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["#stage-1", "#stage-2", "#stage-3"]
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section" and "id" in attributes] == [
        link[1:] for link in links
    ]
    assert titles(page).count("Parameters left") == 3 * VIEWS  # joined, and of each stage that has steps
    assert hovers(page, "Parameters left")[-1] == f"step {2 * STEPS}: 200k"
    assert (
        page.source.count(">stage 2</text>") == 6 * VIEWS
    )  # the loss twice, three of masks, top-1 (top-5 is constant)
    assert "No step is logged yet" in page.text
    assert "to look at" not in page.text


def test_stages_by_hand_name_their_students_and_no_sparsity(tmp_path):
    for stage, model in enumerate(("first-model", "second-model"), 1):
        run = tmp_path / "hand" / f"stage-{stage}"
        write_masked_run(run, inherit="manual", model=model)
        (run / "student.json").unlink()
        line = {"step": 5, "loss": 0.25, "lr": 1e-3, "eval": {"acc1": stage / 10}}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    text = page_of(tmp_path / "hand").text
    assert re.search(r"Stage Student\s+Steps Last loss\s+top-1", text)
    assert re.search(r"Stage 1\s+first-model\s+5 0.25\s+10.0 %\s.*\n\s*Stage 2\s+second-model\s+5 0.25\s+20.0 %", text)


def test_joined_metrics_by_hand(stages):
    columns, rules = joined([read_run(folder) for folder in stage_folders(str(stages))])
    assert columns["step"].tolist() == list(range(1, 2 * STEPS + 1))
    assert [(rule.value, rule.text) for rule in rules] == [(STEPS, "stage 2")]
    target = columns["sparsity_target"]
    assert target[[0, STEPS]].tolist() == [0.25, 0.5]
    assert np.isnan(target[CUT : STEPS - 1]).all()
    assert joined([]) == ({}, [])


def test_stages_come_by_number_and_other_folders_are_none(tmp_path):
    for name in ("stage-10", "stage-2", "stage-1", "stage-x", "stage-3", "data"):
        (tmp_path / name).mkdir()
        if name != "stage-3":
            (tmp_path / name / "config.json").write_text("{}")
    assert [Path(folder).name for folder in stage_folders(str(tmp_path))] == ["stage-1", "stage-2", "stage-10"]


def test_a_broken_stage_is_named_and_the_others_are_shown(stages):
    (stages / "stage-1" / "metrics.jsonl").write_text("")
    (stages / "stage-1" / "config.json").write_text("{")
    (stages / "stage-2" / "student.json").write_text("{")
    page = page_of(stages)
    assert "stage-1/config.json: not a readable JSON file" in page.text
    assert "stage-2/student.json: not a readable JSON file" in page.text
    assert "Parameters left" in titles(page)


def test_lines_begin_anew_at_a_break():
    steps = np.arange(1.0, 7)
    assert [steps[part].tolist() for part in parts_between(steps, (4, 2))] == [[1, 2], [3, 4], [5, 6]]
    plot = Plot(linear("step", 0, 6), linear("loss", 0, 6))
    whole, broken = (line_chart("T", plot, [Line(steps, steps, breaks=breaks)]).svg for breaks in ((), (2.0, 4)))
    assert whole.count("<polyline") == 1
    assert broken.count("<polyline") == 3


def test_lines_of_several_colors_keep_them():
    x = [0.0, 1.0, 2.0]
    lines = [Line(x, x, name="a"), Line(x, [1.0, math.nan, 1.0], color=1, name="b")]
    chart = line_chart("T", Plot(linear("x", 0, 2), linear("y", 0, 2)), lines)
    assert chart.legend == ("a", "b")
    assert re.findall(r'<(?:polyline|circle) class="(c\d)"', chart.svg) == ["c0", "c1", "c1"]
    assert "T: a 0 first, 2 last; b 1 first, 1 last" in chart.svg


def test_blocks_of_a_run_that_logged_them(tmp_path):
    lines = []
    for step in (10, 20, 30, 40, 50):
        line = {"step": step, "loss": 1 / step}
        if step > 10:
            line |= {f"use_grad_norm.{block}": (block + 1) / step for block in range(12)}
            line |= {"cka.1-1": 0.25, "cka.3-9": step / 100}
        lines.append(json.dumps(line))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = page_of(folder)
    gradients = hovers(page, "Gradient norm of shared weights, per use")
    assert gradients[0] == "block 0: step 20 0.05; step 40 0.025; step 50 0.02"
    assert gradients[-1] == "block 11: step 20 0.6; step 40 0.3; step 50 0.24"
    assert hovers(page, "CKA with the teacher&#39;s block")[-1] == "block 3: step 20 0.2; step 40 0.4; step 50 0.5"
    assert "Blocks of student and teacher: 3 with 9." in page.text
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1, "use_grad_norm.0": null, "cka.x": 0.5}\n')
    page = page_of(folder)
    assert [title for title in titles(page) if "per use" in title] == []
