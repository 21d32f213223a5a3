"""The student of a run with masks, exported: what others do with its folder, by the commands."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_tinyclip import config_of, write_tinyclip_root
from small_training import write_retrieval

import clipmill
from shards_spec.models import load_model
from training.export import largest_difference
from training.models.tinyclip_table import markdown
from training.runs.student import load_run
from training.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ["--batch-size", "4", "--steps", "3", "--warmup", "1", "--workers", "0", "--precision", "fp32"]
ALONE = """
import open_clip, torch
import training.models.tinyclip_pruned
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER", bpe_path="FOLDER/bpe.txt.gz")
torch.save(model.eval().encode_image(torch.ones(1, 3, 32, 32)), "FOLDER/features.pt")
"""


def command(*words):
    """Run a command in this process; returns its exit status."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["clipmill", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            clipmill.main()
    return done.value.code or 0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_tinyclip_root(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    torch.set_num_threads(1)
    return train("tinyclip", config_of(root, tmp_path_factory.mktemp("runs") / "masked", "auto", steps=6))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "small-clip"
    assert command("export", run, "--to", folder) == 0
    return folder


def sizes(folder, part="vision_cfg"):
    described = json.loads(Path(folder, "open_clip_config.json").read_text())["model_cfg"][part]
    return {name: described[name] for name in ("width", "heads", "neurons", "original")}


def test_the_card_has_the_table(run, exported):
    text = (exported / "README.md").read_text()
    student, step = load_run(run)
    assert text.startswith("---\nlicense: unknown\n")
    assert "\n# small-clip\n" in text
    assert f"from step {step} of the run masked." in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert "\n".join(table) == markdown(student.model)
    assert table[2].startswith(f"| image | {student.config['vision_cfg']['width']} | ")


def test_a_card_of_someone_else_is_kept_without_overwrite(run, tmp_path, caplog):
    (tmp_path / "README.md").write_text("mine\n")
    assert command("export", run, "--to", tmp_path) == 0
    assert (tmp_path / "README.md").read_text() == "mine\n"
    assert "README.md is kept as it is" in caplog.text
    assert command("export", run, "--to", tmp_path, "--overwrite") == 0
    assert "| sum |" in (tmp_path / "README.md").read_text()


def test_the_card_says_how_to_load_it(exported):
    """In a process that has imported nothing else of this package."""
    named = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.S)[1]
    assert [line for line in named.split("\n") if line and line.split("  #")[0] not in ALONE] == []
    folder = str(exported)
    subprocess.run(
        [sys.executable, "-c", ALONE.replace("FOLDER", folder)], check=True, capture_output=True, timeout=120
    )
    own = load_model(f"local-dir:{folder}").model.encode_image(torch.ones(1, 3, 32, 32))
    assert torch.equal(torch.load(exported / "features.pt"), own)
    (exported / "features.pt").unlink()


def test_it_is_evaluated_as_the_run_is(run, exported, tmp_path):
    evaluation = write_retrieval(tmp_path / "eval")
    outputs = []
    for model in (run, f"local-dir:{exported}"):
        assert command("eval", model, "--data", evaluation, "--output", tmp_path) == 0
        outputs.append(json.loads((tmp_path / "eval_retrieval.json").read_text())["metrics"])
    assert outputs[0] == outputs[1]
    assert 0 <= outputs[0]["image_retrieval_recall@1"] <= 1


def test_it_is_a_teacher_from_a_cache_and_live(root, exported, tmp_path):
    model = f"local-dir:{exported}"
    assert command("cache", root, "--model", model, "--name", "cut", "--views", "2") == 0
    meta = json.loads(Path(root, "dataset.json").read_text())["stages"]["cache/cut"]
    assert meta["counts"]["success"] == 23
    half = ["--data", root, "--model", f"local-dir:{root}/models/half", *SHORT]
    assert command("train", "tinyclip", *half, "--teacher", "cut", "--out", tmp_path / "cached") == 0
    live = ["--teacher-from", "live", "--teacher-weights", model, "--out", tmp_path / "live"]
    assert command("train", "tinyclip", *half, *live) == 0


def test_it_is_the_student_of_the_next_run(root, exported, tmp_path):
    words = ["train", "clip", "--data", root, "--model", f"local-dir:{exported}", *SHORT, "--lr", "1e-9"]
    assert command(*words, "--out", tmp_path / "next") == 0
    assert sizes(tmp_path / "next") == sizes(exported)
    assert sizes(tmp_path / "next", "text_cfg") == sizes(exported, "text_cfg")
    same = load_run(str(tmp_path / "next"))[0]
    assert largest_difference(same, load_model(f"local-dir:{exported}")) < 1e-5
    assert command("export", tmp_path / "next", "--to", tmp_path / "again") == 0
    assert "| sum |" in (tmp_path / "again" / "README.md").read_text()


def test_masks_of_the_next_run_begin_with_what_is_left(root, exported, tmp_path):
    words = ["train", "tinyclip", "--data", root, "--teacher", "planted", "--inherit", "auto", *SHORT]
    words += ["--teacher-weights", f"local-dir:{exported}", "--sparsity", "0.95", "--prune-step", "2"]
    assert command(*words, "--mask-lr", "3", "--sparsity-ramp", "0", "--log-every", "1", "--out", tmp_path / "run") == 0
    before, after = sizes(exported), sizes(tmp_path / "run")
    assert before["original"] == after["original"]
    assert all(left <= start for left, start in zip(after["heads"], before["heads"], strict=True))
    assert after["width"] <= before["width"] < before["original"]["width"]
    assert command("report", tmp_path / "run") == 0
    page = (tmp_path / "run" / "report.html").read_text()
    titles = ("Sparsity and its target", "Multipliers", "Parameters left", "Heads per layer, text", ">cut<")
    assert [title for title in titles if title not in page] == []  # the names that a real run writes are those it reads
    assert f"tower image: {after['width']:,} of 64, {before['width']:,} at the start of the run" in page
