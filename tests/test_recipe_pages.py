"""docs/recipes: every command is one that the product takes, what is submitted becomes jobs, hours are the plan's."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_words import parse_command
from page_tables import tables_script
from test_docs import blocks

from pipeline.plan.rates import RATES, read_rates
from shards_spec.files import UserError, read_json
from slurm.submit import submit

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "recipes").glob("*.md"))
LISTS = {  # that pages name, with a row each
    "cc12m.tsv": "http://host/0.jpg\ta dog\n",
    "Train_GCC-training.tsv": "a dog\thttp://host/0.jpg\n",
}


def commands(page: Path) -> Iterator[list[str]]:
    """The words after ``clipmill`` of the commands in a page's blocks."""
    shell = "\n".join(blocks(page.read_text(), "bash")).replace("\\\n", " ")
    for line in shell.splitlines():
        if line.startswith("clipmill "):
            yield shlex.split(line, comments=True)[1:]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with the lists that pages name, and ImageNet's folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLIPMILL_SITE", raising=False)
    for name, rows in LISTS.items():
        Path(name).write_text(rows)
    for name in ("laion400m", "datacomp"):
        folder = tmp_path / "lists" / name
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"url": ["http://host/0.jpg"], "caption": ["a dog"]}), folder / "0.parquet")
    images = tmp_path / "imagenet" / "train" / "n01440764"
    images.mkdir(parents=True)
    images.joinpath("0.jpg").write_bytes(b"not looked at")
    return tmp_path


def placed(words: list[str], folder: Path) -> list[str]:
    """A command whose absolute paths are below a folder."""
    return [re.sub(r"^/(?=data/|lists/|imagenet/)", f"{folder}/", word) for word in words]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_recipe_pages_parse(page, here):
    found = [placed(words, here) for words in commands(page)]
    for words in found:
        parse_command(words)
    assert len(found) >= 5 or page.stem == "clipkd"


def test_a_wrong_command_of_a_page_is_found(tmp_path):
    for words in (["pack", "ROOT", "--captionr", "none"], ["train", "siclip", "--data", "ROOT", "--fd-weight", "much"]):
        with pytest.raises(UserError):
            parse_command(words)
    with pytest.raises(UserError):
        parse_command(["submit", "pipeline", "ROOT", "--", "train", "siclip", "--out", "RUN", "--pm-wight", "0"])


def dry(words: list[str]) -> list[str]:
    """The words after ``submit`` of a dry run; a pipeline's own options stand before its first command."""
    start = words.index("--") if "--" in words else len(words)
    return [*words[1:start], "--dry-run", *words[start:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_submissions_of_recipe_pages_become_jobs(page, here, capsys):
    for words in commands(page):
        if words[0] == "submit":
            assert submit(dry(placed(words, here)), lambda step: 0) == 0
            assert capsys.readouterr().out.count("#SBATCH --job-name") >= words.count("--")


# tables


@pytest.fixture(scope="module")
def recipes() -> Any:
    """tests/bench/recipes.py, as docs/tables.py takes it."""
    return tables_script()["recipes"]


MEASURED = read_rates(RATES)
SLOWER = MEASURED.ceiling / 165.2e12  # times that a job takes longer on README's card


def hours(recipes: Any, page: str, setting: int, name: str) -> float:
    """Hours of a command, by a setting of a page."""
    _, machine, rows = recipes.PAGES[page](MEASURED)[setting]
    [row] = [row for row in rows if row.name == name]
    return row.cost.hours(machine.hardware)[0]


def test_hours_of_a_measured_step_are_those_of_its_rate(recipes):
    seconds = 32 * 10_968_539 / recipes.figure_rate("train: SiCLIP-S0, batch 1,536 bf16")
    assert hours(recipes, "siclip", 0, "train siclip, 32 epochs") == pytest.approx(seconds * SLOWER / 3600)
    assert hours(recipes, "siclip", 1, "train siclip, 32 epochs") == pytest.approx(seconds / 8 / 3600)


def test_hours_of_a_counted_step_are_those_of_its_kind(recipes):
    """TinyMIM: three forward passes of the student and one of the teacher; in chunks each has one more."""
    share = MEASURED.share("step of ViT-B-16")
    images = 300 * 1_281_167
    whole, chunked = 3 * 32.92 + 88.53, 4 * 32.92 + 2 * 88.53
    one_gpu = images * chunked * 1e9 / (share * 165.2e12) / 3600
    assert hours(recipes, "tinymim", 0, "train tinymim, 300 epochs") == pytest.approx(one_gpu)
    on_64 = images * whole * 1e9 / (share * MEASURED.ceiling) / 64 / 3600
    assert hours(recipes, "tinymim", 1, "train tinymim, 300 epochs") == pytest.approx(on_64)


def test_operations_are_those_of_the_architectures(recipes):
    """`--flops` counts all of them; these two take no second."""
    import open_clip
    import timm
    import torch

    from training.evaluation.cost import count_macs

    config = read_json(str(ROOT / "runs" / "ViT-T-16" / "open_clip_config.json"))["model_cfg"]
    with torch.device("meta"):
        student = open_clip.CLIP(**config).eval()
        teacher = timm.create_model("regnety_160").eval()
        pixels, tokens = torch.empty(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long)
        macs = count_macs(student.encode_image, pixels) + count_macs(student.encode_text, tokens)
        assert recipes.JOBS["step of ViT-T/16"].forward == pytest.approx(2 * macs / 1e9, abs=0.005)
        of_teacher = 2 * count_macs(teacher, pixels) / 1e9
        assert recipes.JOBS["image of RegNetY-16GF"].frozen == pytest.approx(of_teacher, abs=0.005)


def test_every_table_has_all_its_rows_and_their_sum(recipes):
    for name in recipes.PAGES:
        lines = recipes.page_table(name, MEASURED).split("\n\n")[0].splitlines()
        settings = recipes.PAGES[name](MEASURED)
        assert len(lines) == 3 + len({row.name for setting in settings for row in setting.rows})
        assert {line.count("|") for line in lines[2:]} == {2 + 2 * len(settings)}
        assert lines[-1].startswith("| together |")
