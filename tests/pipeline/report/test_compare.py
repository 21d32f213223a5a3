"""The page that compares runs: of any recipe, in stages, unfinished, measured on other sets, and bad input."""

import html
import json
import re
import shutil

import pytest
from report_page import Page
from small_data import draw
from small_runs import write_masked_run, write_plain_run

from pipeline.report.compare import CompareConfig, compare, read_runs, short_names
from pipeline.report.run import read_run, results
from shards_spec.files import UserError, write_json
from shards_spec.predictions import Guess, GuessedImage, Guesses

EVIL = '<script>alert(1)</script><img src="http://evil.test/x.png">'


@pytest.fixture
def runs(tmp_path):
    """A plain run with results and cost, a short one of another batch without results, and a training in stages."""
    one = write_plain_run(tmp_path / "runs" / "one", EVIL)
    config = {"recipe": "clip", "model": "ViT-B-32", "steps": 100, "lr": 0.001, "out": "runs/one", "batch_size": 64}
    write_json(str(one / "config.json"), config)
    write_json(str(one / "environment.json"), {"parameters": {"total": 151_000_000, "image": 88_000_000}})
    speed = {"device": "cpu", "name": "EPYC", "threads": 2, "images_per_s": {"1": 25.0}}
    write_json(str(one / "eval" / "cost.json"), {"task": "cost", "macs": {"image": 4.4e9}, "speed": [speed]})
    two = write_plain_run(tmp_path / "runs" / "two")
    shutil.rmtree(two / "eval")
    write_json(str(two / "config.json"), config | {"lr": 0.002, "out": "runs/two", "steps": 400, "x": EVIL})
    lines = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()][:40]
    text = "".join(json.dumps(line | {"eval": {"acc1": 0.25}}) + "\n" for line in lines)
    (two / "metrics.jsonl").write_text(text + '{"step": 41, "lo')  # it is being written
    for stage, start in (("stage-1", 1.0), ("stage-2", 0.75)):
        write_masked_run(tmp_path / "runs" / "chain" / stage, start, start - 0.25, eval_data="/sets/cifar")
    return [str(tmp_path / "runs" / name) for name in ("one", "two", "chain")]


def page_of_runs(runs, tmp_path, guesses=None, **options) -> Page:
    return Page(compare(CompareConfig(tuple(runs), output=str(tmp_path / "page.html"), **options), guesses))


def _text(tag: re.Match[str]) -> str:
    return " " if tag[0] == "&nbsp;" else ""


def table_row(page: Page, start: str) -> list[str]:
    """The cells of the first row whose text begins so."""
    for row in re.findall(r"<tr>(.*?)</tr>", page.source, re.S):
        cells = [
            html.unescape(re.sub(r"<[^>]*>|&nbsp;", _text, cell))
            for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)
        ]
        if " ".join(cells).startswith(start):
            return cells
    raise AssertionError(f"no row {start}")


def test_runs_their_state_and_results(runs, tmp_path):
    page = page_of_runs(runs, tmp_path)
    assert " ".join(table_row(page, "1 one")) == "1 one clip ViT-B-32 151M 64 100 6,400 1 min finished"
    assert table_row(page, "2 two")[-1] == "unfinished, step 40 of 400"
    assert table_row(page, "3 chain")[3:7] == ["200k", "–", "120", "480"]
    assert table_row(page, "cifar, zeroshot classification top-1")[2:] == ["61.5 %", "–", "50.0 %"]
    assert re.search(r"<b>61.5 %</b>", page.source)
    assert table_row(page, "coco, zeroshot retrieval text→image R@5")[2:] == ["25.0 %", "–", "–"]
    assert table_row(page, "images/s, batch 1, EPYC, 2 threads")[1:] == ["25", "–", "–"]


def test_curves_of_all_runs_share_a_frame(runs, tmp_path):
    page = page_of_runs(runs, tmp_path)
    loss = page.source[page.source.index("<figcaption>Total loss") :].split("</figure>")[0]
    legend = re.findall(r'<i class="(c\d)"></i>(.*?)</li>', loss)
    assert legend == [("c0", "1 one"), ("c1", "2 two"), ("c2", "3 chain")]
    assert set(re.findall(r'<polyline class="(c\d)"', loss)) == {"c0", "c1", "c2"}
    hovers = re.findall(r"<title>(.*?)</title>", loss)
    assert hovers[0].startswith("step about 1.5: 1 one ")
    assert "2 two" not in hovers[-1]  # it ended before
    assert page.source.count("<figcaption>Total loss") == 3  # over steps, samples and time
    assert "<figcaption>Logit scale" not in page.source  # the same constant in all runs


def test_results_against_cost_where_two_runs_have_both(runs, tmp_path):
    page = page_of_runs(runs, tmp_path)
    titles = re.findall(r"<figcaption>(.*?, against .*?)\n", page.source)
    assert titles == [  # latency is known of one run only, and so are parameters of those measured while training
        "top-1, cifar, against parameters",
        "top-1, cifar, against data",
        "top-1, while training, against data",
    ]
    part = page.source[page.source.index(titles[0]) :].split("</figure>")[0]
    assert re.findall(r"<title>(.*?)</title>", part) == [
        "1 one: parameters 151M, per cent 61.5",
        "3 chain: parameters 200k, per cent 50",
    ]


def test_only_the_differences_of_configs(runs, tmp_path):
    page = page_of_runs(runs[:2], tmp_path)
    part = page.text[page.text.index("Differences of the configs") :]
    assert table_row(page, "lr") == ["lr", "0.001", "0.002"]
    assert table_row(page, "x") == ["x", "–", EVIL]
    assert part.index("0.002") < part.index("1 field that not all of these recipes have") < part.index(EVIL)
    assert not re.search(r"\bmodel\b|\bout\b", part)
    same = shutil.copytree(runs[0], tmp_path / "same")
    assert "The configs are the same" in page_of_runs([runs[0], str(same)], tmp_path).text


def test_what_runs_say_of_images(runs, tmp_path):
    image, _ = draw("a")
    right = (Guess("a dog", 0.75, True), Guess(EVIL, 0.2, False))
    images = [GuessedImage("k1", image, ("a dog",), {runs[0]: right}), GuessedImage("k2", b"none", ("a cat",), {})]
    guesses = Guesses("toys", "its probability", images, {runs[1]: "no checkpoint yet"})
    page = page_of_runs(runs, tmp_path, guesses)
    assert re.search(r'<li class="right"><span>a dog</span><span class="n">0.75</span>', page.source)
    assert "2 two: no checkpoint yet" in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 1
    assert "key k2" in page.text[: page.text.index("Runs")]
    assert not [tag for tag, _ in page.tags if tag == "script"]


@pytest.mark.parametrize("files", [["config.json"], ["metrics.jsonl"]])
def test_runs_of_few_files(tmp_path, files):
    whole = write_plain_run(tmp_path / "whole")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in files:
        shutil.copy(whole / name, bare / name)
    page = page_of_runs([str(whole), str(bare)], tmp_path)
    assert table_row(page, "2 bare")[5] == ("100" if "metrics.jsonl" in files else "–")
    assert ("No step is logged yet" in page_of_runs([str(bare)], tmp_path).text) == (files == ["config.json"])


def test_bad_input_is_named(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    for paths, message in (
        ([*runs, f"{runs[0]}/"], "is named twice .*name it once"),
        ([runs[0], str(tmp_path / "none")], "none is not there"),
        ([runs[0], str(tmp_path / "empty")], "empty has no config.json.*clipmill train"),
        ([], "RUN is needed: one RUN folder or more"),
    ):
        with pytest.raises(UserError, match=message):
            page_of_runs(paths, tmp_path)
    with pytest.raises(UserError, match="is a folder"):
        compare(CompareConfig(tuple(runs), output=str(tmp_path)))


def test_names_are_as_short_as_they_tell_runs_apart():
    assert short_names(["/r/a/one", "/r/a/two"]) == ["one", "two"]
    assert short_names(["/r/a/run", "/r/b/run"]) == ["a/run", "b/run"]
    assert short_names(["/r/a"]) == ["a"]
    assert short_names(["/r", "/r/b"]) == ["r", "r/b"]


def test_results_while_training_have_the_names_of_eval(runs):
    assert results(read_run(runs[2] + "/stage-2")) == {
        ("cifar", "zeroshot_classification", "acc1"): 0.5,
        ("cifar", "zeroshot_classification", "acc5"): 0.9,
    }
    assert [one.run.name for one in read_runs(runs)] == ["one", "two", "stage-2"]
