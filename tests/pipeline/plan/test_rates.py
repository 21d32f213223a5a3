"""Files of measured rates: shares, and what is refused by name."""

import json
from pathlib import Path

import pytest

from pipeline.plan.costs import FLOP
from pipeline.plan.rates import read_rates
from shards_spec.files import UserError

RUN = {
    "card": "NVIDIA H100 80GB HBM3",
    "date": "2026-11-26",
    "torch": "2.11.0+cu130",
    "ceiling": 8e14,
    "rates": {"image, ViT-L/14": 2400.0, "step of ViT-B-16": 1000},
}


def written(path: Path, **changes) -> Path:
    path.write_text(json.dumps({**RUN, **changes}))
    return path


def test_a_share_is_operations_times_rate_over_the_ceiling(tmp_path):
    found = read_rates(written(tmp_path / "rates.json"))
    assert (found.card, found.date, found.torch) == ("NVIDIA H100 80GB HBM3", "2026-11-26", "2.11.0+cu130")
    assert found.share("image, ViT-L/14") == pytest.approx(162.03e9 * 2400 / 8e14)
    assert found.share("step of ViT-B-16") == pytest.approx(3 * (35.13 + 5.96) * 1e9 * 1000 / 8e14)
    assert found.share("text, ViT-L/14") is None


def test_fields_that_a_run_adds_are_ignored(tmp_path):
    assert read_rates(written(tmp_path / "rates.json", cuda="13.0")).ceiling == 8e14


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rates": {"image, ViT-L/4": 1.0}}, r"rates: no job 'image, ViT-L/4'; did you mean image, ViT-L/14\?"),
        ({"rates": {"image, ViT-L/14": 4938.0}}, r"'image, ViT-L/14': 4938 samples/s would be 1 of the ceiling"),
        ({"rates": {"image, ViT-L/14": 0}}, r"rates: 'image, ViT-L/14' is 0, not a positive number"),
        ({"rates": {"image, ViT-L/14": -3.5}}, r"'image, ViT-L/14' is -3.5, not a positive number"),
        ({"rates": {"image, ViT-L/14": float("nan")}}, r"'image, ViT-L/14' is nan, not a positive number"),
        ({"rates": {"image, ViT-L/14": True}}, r"'image, ViT-L/14' is True, not a positive number"),
        ({"rates": {"image, ViT-L/14": "2400"}}, r"'image, ViT-L/14' is '2400', not a positive number"),
        ({"rates": [2400]}, "rates is not an object"),
        ({"ceiling": None}, "ceiling is None, not a positive number"),
        ({"ceiling": 10**400}, "ceiling is 1000+, not a positive number"),
        ({"card": ""}, "card is '', not a text"),
        ({"torch": 2.11}, "torch is 2.11, not a text"),
        ({"date": "26 November"}, "date is '26 November', not a day as 2026-11-26"),
    ],
)
def test_what_is_wrong_is_named_with_its_file_and_key(tmp_path, changes, said):
    path = written(tmp_path / "rates.json", **changes)
    with pytest.raises(UserError, match=said) as error:
        read_rates(path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_rate_that_just_fits_the_ceiling_is_taken(tmp_path):
    most = 8e14 / (FLOP["image, ViT-L/14"] * 1e9)
    found = read_rates(written(tmp_path / "rates.json", rates={"image, ViT-L/14": most * (1 - 1e-9)}))
    assert found.share("image, ViT-L/14") == pytest.approx(1)


@pytest.mark.parametrize("content", [b"", b" \n", b"{", b"\xff\xfe\x00", b"[" * 5000, b"3"])
def test_what_is_not_json_is_named(tmp_path, content):
    path = tmp_path / "rates.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"rates.json:? .*take the rates.json that `bash tests/gpu/run.sh` writes"):
        read_rates(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none.json cannot be read \(No such file or directory\)"):
        read_rates(tmp_path / "none.json")
