"""docs/recipes: every command is one that the product takes, what is submitted becomes jobs, hours are the plan's."""

import re
import shlex
import sys
from collections.abc import Iterator
from itertools import chain
from math import log
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
from shards_spec.vocab import Vocabulary
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
    found = [placed(words, here) for words in commands(page) if words[0] != "submit"]  # the next test has these
    for words in found:
        parse_command(words)
    assert len(found) >= 4 or page.stem == "clipkd"


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
    rate = recipes.figure_rate("train: SiCLIP-S0, batch 1,536 bf16") / SLOWER
    assert f"| steps an hour, train siclip, 32 epochs | {3600 * rate / 1536:,.0f} |" in recipes.page_table(
        "siclip", MEASURED
    )


def test_hours_of_a_counted_step_are_those_of_its_kind(recipes):
    """TinyMIM: three forward passes of the student and one of the teacher; in chunks each has one more."""
    share = MEASURED.share("step of ViT-B-16")
    images = 300 * 1_281_167
    whole, chunked = 3 * 32.92 + 88.53, 4 * 32.92 + 2 * 88.53
    one_gpu = images * chunked * 1e9 / (share * 165.2e12) / 3600
    assert hours(recipes, "tinymim", 0, "train tinymim, 300 epochs") == pytest.approx(one_gpu)
    on_64 = images * whole * 1e9 / (share * MEASURED.ceiling) / 64 / 3600
    assert hours(recipes, "tinymim", 1, "train tinymim, 300 epochs") == pytest.approx(on_64)


def test_catlips_steps_have_as_many_pixels_whatever_their_sides(recipes):
    """The batches of its paper's sampler, of 1024 nominal images, and the steps of 25 epochs of CC3M."""
    assert recipes.mean_batch(range(128, 321, 16)) == pytest.approx(1.27, abs=0.005)
    rate = recipes.figure_rate("train: CatLIP B/16, batch 512 bf16") / SLOWER * 3 / 4  # in chunks
    images = 25 * 2_905_954 / recipes.mean_batch(range(128, 321, 16))
    assert hours(recipes, "catlip", 0, "train catlip") == pytest.approx(images / rate / 3600)
    steps = 200_000 * 65_536 / recipes.figure_rate("train: CatLIP B/16, batch 512 bf16") / 64
    assert hours(recipes, "catlip", 1, "train catlip") == pytest.approx(steps / 3600)


@pytest.mark.slow
def test_operations_are_those_of_the_architectures(recipes):
    """Two of those that `--flops` counts."""
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
        rows = chain.from_iterable(setting.rows for setting in settings)
        commands = {row.name: row.steps > 0 for row in rows}
        assert len(lines) == 3 + len(commands) + sum(commands.values())
        assert {line.count("|") for line in lines[2:]} == {2 + 2 * len(settings)}
        assert lines[2 + len(commands)].startswith("| together |")


# what to see after an hour


def said(page: str, value: float, form: str) -> None:
    """Assert that a page has a value."""
    text = (ROOT / "docs" / "recipes" / f"{page}.md").read_text()
    assert re.search(rf"(?<![\d.,]){re.escape(format(value, form))}(?![\d]|[.,]\d)", text), format(value, form)


def unrelated(count: int) -> tuple[Any, Any]:
    """Unit features of a student and of a teacher (count, 512), each at a right angle to the other's."""
    import torch

    axes = torch.eye(512)
    return axes[:1].expand(count, -1), axes[1:2].expand(count, -1)


@pytest.mark.integration
def test_values_of_pairs_follow_from_the_losses():
    import torch

    from training.losses.contrastive import clip_loss
    from training.losses.distillation import element_feature_loss, interactive_loss, relation_loss

    for page, count, weight, digits in (("siclip", 1536, 4000, ".2f"), ("clipkd", 1024, 2000, ".2f")):
        mine, theirs = unrelated(count)
        said(page, clip_loss(mine, mine, 14.3).item(), digits)
        said(page, weight * element_feature_loss(mine, mine, theirs, theirs).item(), ".1f")
        alike = torch.eye(count)  # the best that there is: the student's features are the teacher's, no two alike
        said(page, interactive_loss(alike, alike, alike, alike, log(1 / 0.07)).item(), digits)
    alike = torch.eye(64)
    even = [alike[:1].expand(64, -1)] * 2  # rows of a student that knows nothing
    sure = relation_loss(*even, alike, alike, student_scale=14.3, teacher_scale=100)
    unsure = relation_loss(*even, alike, alike, student_scale=14.3, teacher_scale=5)
    assert sure.item() == pytest.approx(log(64), abs=0.01)
    assert 0 < unsure.item() < log(64) - 1


def test_values_of_tinyclip_follow_from_its_losses():
    import torch

    from training.losses.distillation import affinity_loss
    from training.losses.sparsity import target_sparsity

    for count in (4096, 32768):
        said("tinyclip", log(count), ".2f")
    same, alike = torch.eye(64)[:1].expand(64, -1), torch.eye(64)
    assert affinity_loss(same, same, alike, alike).item() == pytest.approx(log(64))  # even rows, any teacher
    assert target_sparsity(500, 0.0, 0.25) == 0.125


def test_values_of_classifiers_follow_from_their_losses():
    import torch

    from training.losses.hidden_relations import attention_relation_loss
    from training.losses.multilabel import sigmoid_loss
    from training.losses.relations import soft_ce

    zeros = torch.zeros(1, 24_320)
    said("catlip", sigmoid_loss(zeros, torch.tensor([[3, 5]])).item(), ",.0f")
    logits = torch.randn(1, 24_320, generator=torch.Generator().manual_seed(0)) * (768 * 0.02**2) ** 0.5
    start = sigmoid_loss(torch.cat([logits, -logits]), torch.full((2, 1), -1)).mean().item()
    assert start == pytest.approx(17_750, rel=1e-3)
    said("catlip", 17_750, ",.0f")
    said("catlip", 24_320**0.5 / 2, ".0f")
    said("minivit", soft_ce(torch.zeros(1, 1000), torch.randn(1, 1000)).item(), ".2f")
    tokens = torch.zeros(1, 49, 96), torch.randn(1, 49, 128)  # projections of nothing attend evenly
    said(
        "minivit", attention_relation_loss(torch.cat([tokens[0]] * 3, -1), torch.cat([tokens[1]] * 3, -1)).item(), ".2f"
    )
    said("tinymim", log(197), ".2f")


def test_the_loss_of_frequencies_is_computed_as_the_page_says(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "recipes" / "catlip.md").read_text()
    code = re.search(r'^python -c "\n(.*?)^" /data', page, re.S | re.M)[1]
    path = tmp_path / "all.tsv"
    Vocabulary((("n1", "dog", 30, 25), ("n2", "cat", 10, 10)), {"source": "original", "captions": 100}).write(str(path))
    monkeypatch.setattr(sys, "argv", ["-c", str(path)])
    exec(code, {})
    at_zero, of_frequencies = map(float, capsys.readouterr().out.split())
    assert at_zero == pytest.approx(2 * log(2))
    parts = [-p * log(p) - (1 - p) * log(1 - p) for p in (0.25, 0.1)]
    assert of_frequencies == pytest.approx(sum(parts))
