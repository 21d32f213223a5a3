"""A stage without one sample ends with exit code 1, the most common reason and what to try."""

import sys

import pytest
from small_data import write_raw

import clipmill
from pipeline.core.no_success import explain_no_success
from shards_spec.files import read_json

pytestmark = pytest.mark.integration

STAGE_INPUTS = {"ingest": "the list", "dedup": "raw/", "caption": "raw/", "pack": "raw/", "cache": "shards/"}


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that runs ``clipmill WORDS`` in this process and returns what it said."""

    def run(*words: str, code: int) -> str:
        monkeypatch.setattr(sys, "argv", ["clipmill", *words])
        with pytest.raises(SystemExit) as left:
            clipmill.main()
        said = capsys.readouterr().err
        assert left.value.code == code, said
        assert "Traceback" not in said
        return said

    return run


def test_a_list_of_dead_links(tmp_path, command):
    (tmp_path / "l.tsv").write_text("".join(f"caption {n}\thttp://127.0.0.1:9/{n}.jpg\n" for n in range(3)))
    words = ("ingest", str(tmp_path / "D"), "--source", str(tmp_path / "l.tsv"))
    said = command(*words, code=1)
    assert (
        "ingest: none of 3 inputs became a sample; the most common reason, 3 times, is 'not a public address': --a"
        in said
    )
    assert read_json(str(tmp_path / "D/dataset.json"))["stages"]["ingest"]["counts"] == {"not a public address": 3}
    command(*words, code=1)  # and again, when nothing is left to do
    assert "pack: no samples, because raw/ has none; check the previous stage" in command(
        "pack", str(tmp_path / "D"), code=1
    )


def test_images_without_captions(tmp_path, command):
    root = str(tmp_path / "D")
    write_raw(root, 1, captions=False)
    assert "is 'no caption': run `clipmill caption`" in command("pack", root, code=1)
    write_raw(root, 1)
    command("pack", root, code=0)


@pytest.mark.parametrize(
    "reason",
    [
        "HTTP 404",
        "timeout",
        "opted out",
        "resize: not an image",
        "caption too short",
        "resize: picture too small",
        "near-duplicate image",
        "file not found",
        "every caption below min_similarity",
        "other sha256 than the list's",
        "its tar is not in --from",
        "name not found",
        "caption is not UTF-8",
        "damaged tar",
    ],
)
def test_each_reason_has_its_advice(reason):
    said = explain_no_success("ingest", {"other": 2, reason: 3})
    assert f"the most common reason, 3 times, is {reason!r}: " in said
    assert "clipmill report" not in said or reason.startswith("every")
    assert "\n" not in said


@pytest.mark.parametrize("command", STAGE_INPUTS)
def test_one_sample_is_enough(command):
    assert explain_no_success(command, {"success": 1, "timeout": 10**6}) is None
    assert explain_no_success(command, {}).startswith(
        f"{command}: no samples, because {STAGE_INPUTS[command]} has none; check "
    )
