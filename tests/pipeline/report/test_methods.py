"""The table of methods: seeds as one row, probes and fine-tunings beside their towers, samples to reach a baseline."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from small_runs import write_masked_run

from pipeline.report.compare import CompareConfig, compare, read_runs
from pipeline.report.compare_charts import onnx_latency
from pipeline.report.methods import MethodTable, group_methods, method_table
from pipeline.report.results import results_of_runs
from pipeline.report.run import cost_rows
from shards_spec.files import UserError, write_json

BATCH = 64


def write_run(run: Path, accuracies: list[float], results: dict[str, float] | None = None, **config: Any) -> str:
    """A run that measured its accuracy at every step of 64 samples, and what `clipmill eval` said of it."""
    (run / "eval").mkdir(parents=True)
    fields = {
        "recipe": "clip",
        "model": "ViT-B-32",
        "steps": len(accuracies),
        "batch_size": BATCH,
        "eval_data": "/e/toys",
    }
    write_json(str(run / "config.json"), {**fields, **config})
    lines = [
        {"step": step, "samples_seen": BATCH * step, "loss": 1.0, "seconds": 30.0 * step, "eval": {"acc1": accuracy}}
        for step, accuracy in enumerate(accuracies, 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for dataset, value in (results or {}).items():
        write_result(run / "eval", dataset, value)
    return str(run)


def write_result(folder: Path, dataset: str, value: float, **more: Any) -> None:
    """A file as `clipmill eval` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    result = {"dataset": dataset, "task": "zeroshot_classification", "metrics": {"acc1": value, "acc5": 0.9}, **more}
    write_json(str(folder / f"{dataset}_zeroshot.json"), result)


@pytest.fixture
def study(tmp_path) -> list[str]:
    """Two methods of two seeds, the first probed once and fine-tuned with both seeds, and a run of another recipe."""
    rows = tmp_path / "rows"
    paths = [
        write_run(rows / "scratch-0", [0.1, 0.2, 0.4], {"birds": 0.3}, seed=0),
        write_run(rows / "scratch-1", [0.1, 0.3, 0.5], {"birds": 0.5}, seed=1),
        write_run(rows / "distilled-0", [0.4, 0.6, 0.8], {"birds": 0.7}, seed=0, recipe="tinyclip"),
        write_run(rows / "distilled-1", [0.2, 0.5, 0.7], {"birds": 0.6}, seed=1, recipe="tinyclip"),
    ]
    cost = {"macs": {"image": 4.4e9}, "speed": [{"device": "cpu", "images_per_s": {"1": 25.0}}]}
    write_json(f"{paths[3]}/eval/cost.json", {"task": "cost", "parameters": {"total": 151_000_000}, **cost})
    onnx = {"precision": "int8 dynamic", "runtime": "onnxruntime", "weights_bytes": 40_000_000}
    speed = {"device": "cpu", "name": "EPYC", "threads": 2, "images_per_s": {"1": 50.0}}
    write_json(f"{paths[3]}/eval/cost_onnx.json", {"task": "cost_onnx", "parameters": {}, **onnx, "speed": [speed]})
    for seed in (0, 1):
        tuned = {"recipe": "finetune", "model": paths[seed], "eval_data": "", "data": "/d/pets", "seed": seed}
        paths.append(write_run(tmp_path / "tuned" / str(seed), [0.5, 0.6 + 0.2 * seed], **tuned))
    probe = {"recipe": "probe", "model": paths[0], "eval_data": "", "data": "/d/pets", "seed": 0}
    return [*paths, write_run(tmp_path / "probe", [0.45], **probe)]


def cells(table: MethodTable | None, name: str) -> dict[str, str]:
    assert table is not None
    [row] = [row for row in table.rows if row[0] == name]
    return dict(zip(table.heads, row, strict=True))


def test_seeds_are_one_row_with_mean_and_range(study):
    table = method_table(read_runs(study))
    assert [row[0] for row in table.rows] == ["rows/scratch", "rows/distilled"]
    scratch, distilled = cells(table, "rows/scratch"), cells(table, "rows/distilled")
    assert scratch["seeds"] == "2"
    assert scratch["top-1, birds"] == "40.0 (30.0–50.0)"
    assert scratch["top-1, toys"] == "45.0 (40.0–50.0)"
    assert distilled["top-1, toys"] == "75.0 (70.0–80.0)"
    assert scratch["training"] == "2 min"
    assert (scratch["parameters"], distilled["parameters"]) == ("–", "151M")
    assert (distilled["MACs, image"], distilled["images/s, batch 1, cpu"]) == ("4.4G", "25")
    assert distilled["images/s, batch 1, ONNX int8 dynamic"] == "50"


def test_an_exports_cost_has_rows_of_its_own(study):
    run = read_runs([study[3]])[0].run
    assert cost_rows(run.evaluations.onnx_cost) == [
        ("Weights, ONNX int8 dynamic", "40MB"),
        ("images/s, batch 1, ONNX int8 dynamic, EPYC, 2 threads", "50"),
    ]
    assert ("MACs, one image", "4.4G") in cost_rows(run.evaluations.cost)


def test_probes_and_fine_tunings_stand_beside_their_towers(study):
    table = method_table(read_runs(study))
    assert cells(table, "rows/scratch")["finetune: top-1, pets"] == "70.0 (60.0–80.0)"
    assert cells(table, "rows/scratch")["probe: top-1, pets"] == "45.0"
    assert cells(table, "rows/distilled")["finetune: top-1, pets"] == "–"
    alone = group_methods(read_runs([study[-1], study[2]]))  # what it probes is not among the runs
    assert [(method.name, len(method.tuned)) for method in alone] == [("probe", 0), ("rows/distilled", 0)]


@pytest.mark.parametrize("baseline", ["rows/scratch", "rows/scratch-1"])
def test_samples_to_reach_the_baseline(study, baseline):
    """Seed 0 has scratch's 0.4 after one step, seed 1 its 0.5 after two."""
    table = method_table(read_runs(study), baseline)
    head = "samples to rows/scratch's end"
    assert cells(table, "rows/distilled")[head] == "96 (64–128)"
    assert cells(table, "rows/scratch")[head] == "192 (192–192)"


def test_what_did_not_reach_the_baseline_is_said(study, tmp_path):
    slow = [write_run(tmp_path / "rows" / f"slow-{seed}", [0.1, 0.45], seed=seed) for seed in (0, 1)]
    never = write_run(tmp_path / "rows" / "never-7", [0.1], seed=7)  # no such seed of the baseline: its mean counts
    unmeasured = write_run(tmp_path / "rows" / "blind-0", [], seed=0)
    table = method_table(read_runs([*study[:2], *slow, never, unmeasured]), study[0])
    head = "samples to scratch's end"
    assert cells(table, "slow")[head] == "128, 1 of 2"
    assert cells(table, "never")[head] == "not reached"
    assert cells(table, "blind")[head] == "–"


def test_a_dot_is_the_mean_of_a_methods_seeds(study, tmp_path):
    write_json(f"{study[1]}/eval/cost.json", {"task": "cost", "parameters": {"total": 40_000_000}, "macs": {}})
    page = tmp_path / "page.html"
    compare(CompareConfig(tuple(study), str(page)))
    source = page.read_text()
    chart = source[source.index("top-1, birds, against parameters") :].split("</figure>")[0]
    assert re.findall(r"<title>(.*?)</title>", chart) == [
        "1 rows/scratch: parameters 40M, per cent 40",
        "2 rows/distilled: parameters 151M, per cent 65",
    ]
    one, *_ = group_methods(read_runs(study[2:4]))
    assert [onnx_latency(run) for run in one.runs[1:]] == [20.0]


def test_only_the_student_that_is_left_counts(study, tmp_path):
    """A training in two stages of 60 steps of 4, whose masks are gone from step 40 on; stage 1 measures 0.5 before."""
    chain = tmp_path / "rows" / "chain-0"
    for number, start in ((1, 1.0), (2, 0.75)):
        write_masked_run(chain / f"stage-{number}", start, start - 0.25, seed=0)
    table = method_table(read_runs([study[0], str(chain)]), study[0])  # the end of scratch-0 is 0.4
    assert cells(table, "chain")["samples to scratch's end"] == "400"


def test_single_runs_need_a_baseline_to_be_methods(study):
    assert method_table(read_runs([study[0], study[2]])) is None
    assert cells(method_table(read_runs([study[0], study[2]]), study[0]), "scratch")["seeds"] == "1"
    with pytest.raises(UserError, match=r"--baseline 'scrach': did you mean scratch\?"):
        method_table(read_runs([study[0], study[2]]), "scrach")


def test_a_run_of_another_recipe_is_another_method(tmp_path):
    paths = [write_run(tmp_path / "a-0", [0.1], seed=0), write_run(tmp_path / "a-1", [0.2], seed=1, recipe="coca")]
    assert [len(method.runs) for method in group_methods(read_runs(paths))] == [1, 1]
    paths = [write_run(tmp_path / "b-0", [0.1], seed=3), write_run(tmp_path / "b-1", [0.2], seed=4)]
    assert [method.name for method in group_methods(read_runs(paths))] == ["b-0", "b-1"]  # these are no seeds


def test_results_that_were_written_elsewhere_count(study, tmp_path):
    out = tmp_path / "results"
    write_result(out / "scratch-0", "fish", 0.25, pretrained=study[0], recipe="clip")
    write_result(out / "scratch-0", "birds", 0.99, pretrained=study[0], recipe="clip")  # the run's own counts
    write_result(out / "ViT-B-32", "fish", 0.8, pretrained="openai")
    write_json(str(out / "summary.json"), {"models": []})
    page = tmp_path / "page.html"
    table = tmp_path / "table.md"
    compare(CompareConfig(tuple(study), str(page), results=(str(out),), markdown=str(table), baseline="rows/scratch"))
    lines = table.read_text().splitlines()
    assert lines[0].startswith("| method | seeds |")
    assert set(lines[1]) == {"|", " ", "-"}
    assert len(lines) == 4
    found = results_of_runs([str(out)], [])
    assert found[study[0]].values["fish", "zeroshot_classification", "acc1"] == 0.25
    text = page.read_text()
    assert "<h2>Methods</h2>" in text
    assert "25.0 %" in text
    assert "99.0 %" not in text


def test_folders_without_results_are_named(study, tmp_path):
    problems = list[str]()
    assert results_of_runs([str(tmp_path / "none")], problems) == {}
    assert problems == [
        f"{tmp_path / 'none'} has no results of runs: name the folder that `clipmill eval --output` was given"
    ]


def test_no_table_is_no_markdown(study, tmp_path):
    config = CompareConfig((study[0],), str(tmp_path / "page.html"), markdown=str(tmp_path / "table.md"))
    with pytest.raises(UserError, match="--markdown: each run is a method of its own"):
        compare(config)
    assert not (tmp_path / "page.html").exists()


def test_accuracy_of_a_classifier_is_not_mixed_with_zero_shot_accuracy(tmp_path):
    clip = write_run(tmp_path / "rows/scratch-0", [0.2], seed=0, eval_data="/e/toys")
    classifier = write_run(tmp_path / "rows/tied-0", [0.7], seed=0, recipe="minivit", eval_data="", data="/e/toys")
    tuned = write_run(
        tmp_path / "tuned/tied-0", [0.8], seed=0, recipe="finetune", eval_data="", data="/e/toys", model=classifier
    )
    table = method_table(read_runs([clip, classifier, tuned]), clip)
    assert table is not None
    shown = dict(zip(table.heads, zip(*table.rows, strict=True), strict=True))
    assert shown["top-1, toys"] == ("20.0", "–")
    assert shown["top-1, toys (trained on its labels)"] == ("–", "70.0")
    assert shown["finetune: top-1, toys"] == ("–", "80.0")
    assert shown["samples to rows/scratch's end"] == ("64", "–")
