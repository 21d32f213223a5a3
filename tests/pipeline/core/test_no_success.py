"""A stage of which nothing came out ends with exit code 1, the commonest reason and what to try."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_data import write_raw

from pipeline.core.no_success import INPUT, nothing_came
from shards_spec.files import read_json

ROOT = Path(__file__).parents[3]


def clipmill(*words: str, code: int) -> str:
    done = subprocess.run([sys.executable, "-m", "clipmill", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_list_of_dead_links(tmp_path):
    (tmp_path / "l.tsv").write_text("".join(f"caption {n}\thttp://127.0.0.1:9/{n}.jpg\n" for n in range(3)))
    words = ("ingest", str(tmp_path / "D"), "--source", str(tmp_path / "l.tsv"))
    said = clipmill(*words, code=1)
    assert "ingest: not one sample came of 3; 3 times the reason is 'not a public address': --allow-private" in said
    assert read_json(str(tmp_path / "D/dataset.json"))["stages"]["ingest"]["counts"] == {"not a public address": 3}
    clipmill(*words, code=1)  # and again, where nothing is to be done
    assert "pack: nothing came out, raw/ has no sample" in clipmill("pack", str(tmp_path / "D"), code=1)


def test_images_without_captions(tmp_path):
    root = str(tmp_path / "D")
    write_raw(root, 1, captions=False)
    assert "is 'no caption': run `clipmill caption`" in clipmill("pack", root, code=1)
    write_raw(root, 1)
    clipmill("pack", root, code=0)


@pytest.mark.parametrize("reason", ["HTTP 404", "timeout", "opted out", "resize: not an image", "caption too short",
                                    "resize: picture too small", "near-duplicate image", "file not found",
                                    "every caption below min_similarity", "name not found"])  # fmt: skip
def test_each_reason_has_its_advice(reason):
    said = nothing_came("ingest", {"other": 2, reason: 3})
    assert f"3 times the reason is {reason!r}: " in said
    assert "clipmill report" not in said or reason.startswith("every")
    assert "\n" not in said


@pytest.mark.parametrize("command", INPUT)
def test_one_sample_is_enough(command):
    assert nothing_came(command, {"success": 1, "timeout": 10**6}) is None
    assert nothing_came(command, {}).startswith(f"{command}: nothing came out, {INPUT[command]} has no sample")
