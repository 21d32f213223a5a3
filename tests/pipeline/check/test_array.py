"""`check` divided: parts of one run below ROOT, summed up to what the plain command prints, after kills, too."""

import shutil
from pathlib import Path

import pytest
from small_data import write_raw

from pipeline.check import divided
from pipeline.check.config import CheckConfig, CheckJobConfig
from pipeline.check.divided import ProblemsFound, check_array, longest_folder
from pipeline.check.parts import Part, part_path
from pipeline.check.stage import check
from pipeline.core.runner import ShardAssignment
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.files import UserError
from shards_spec.layout import CHECK, FOLDERS, STAGES, stage_output
from shards_spec.manifest import finished_shards
from slurm.claims import Finished
from slurm.division import divide, upstream_folder
from slurm.options import Options
from slurm.step import Step, parse_steps

SHARDS = 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = str(tmp_path_factory.mktemp("array") / "ds")
    write_raw(root, shards=SHARDS, per_shard=3)
    pack(PackConfig(root, ("none",), workers=1))
    return Path(root)


@pytest.fixture
def damaged(whole, tmp_path) -> Path:
    root = Path(shutil.copytree(whole, tmp_path / "ds"))
    (root / "raw/00001.tar").write_bytes(b"")
    (root / "shards/00003.parquet").unlink()
    (root / "shards/x.txt").write_text("odd")
    return root


class Some(ShardAssignment):
    """Those of a list, as a task of an array has them; it is killed when it comes to ``killed_at``."""

    def __init__(self, shards: list[int], killed_at: int | None = None) -> None:
        self._shards, self._killed_at = shards, killed_at

    @property
    def is_complete(self) -> bool:
        return False

    def claim(self, shard: int) -> bool:
        if shard == self._killed_at:
            raise KeyboardInterrupt
        return shard in self._shards


def finish(root: Path, run: str) -> list[str]:
    """What the last job of a run says; the parts are gone then."""
    folder = root / CHECK.folder(run)
    assignment = Finished(str(folder))
    with pytest.raises(ProblemsFound) as caught:
        check_array(CheckJobConfig(str(root), 1).of_run(run), assignment)
    assert not folder.exists()
    head, *told = str(caught.value).split("\n")
    assert head == f"{root}: {len(told)} problems"
    return [line.removeprefix(f"  {number}: ") for number, line in enumerate(told, 1)]


def test_an_array_says_what_the_plain_command_says(damaged):
    config = CheckJobConfig(str(damaged), 1).of_run("one")
    for shards in ([0, 2, 4], [1, 3]):
        assert check_array(config, Some(shards)).made == len(shards)
    plain = check(CheckConfig(str(damaged), workers=1))
    assert finish(damaged, "one") == plain
    for said in ("00001.tar", "00003.parquet: is not there", "shards/x.txt: no stage writes it"):
        assert any(said in problem for problem in plain), said
    assert not (damaged / ".check/one").exists()
    assert check(CheckConfig(str(damaged), workers=1)) == plain


def test_a_valid_dataset_ends_well_and_nothing_stays(whole, tmp_path):
    root = Path(shutil.copytree(whole, tmp_path / "ds"))
    before = sorted(root.rglob("*"))
    config = CheckJobConfig(str(root), 1).of_run("fine")
    assert check_array(config, Some(list(range(SHARDS)))).made == SHARDS
    assert check(CheckConfig(str(root), workers=1)) == [], "the parts are nobody's shards"
    assert check_array(config, Finished(str(root / ".check/fine"))).made == 0
    assert sorted(root.rglob("*")) == before


def test_a_killed_task_goes_on_where_it_was(damaged):
    config = CheckJobConfig(str(damaged), 1).of_run("one")
    with pytest.raises(KeyboardInterrupt):
        check_array(config, Some([0, 1, 2, 3, 4], killed_at=2))
    assert finished_shards(str(damaged / ".check/one")) == [0, 1]
    assert check_array(config, Some([0, 1, 2, 3, 4])).made == 3
    assert finish(damaged, "one") == check(CheckConfig(str(damaged), workers=1))


def test_a_missing_part_holds_the_sum(damaged):
    config = CheckJobConfig(str(damaged), 1).of_run("one")
    check_array(config, Some([0, 1, 2]))
    assignment = Finished(str(damaged / ".check/one"))
    check_array(config, assignment)
    assert assignment.missing == [3, 4]
    assert (damaged / ".check/one").exists()


def test_a_part_of_another_run_is_not_taken(damaged):
    """What an earlier run found is not today's state, wherever its parts lie."""
    check_array(CheckJobConfig(str(damaged), 1).of_run("old"), Some(list(range(SHARDS))))
    (damaged / "shards/x.txt").unlink()
    shutil.copy(damaged / "raw/00000.tar", damaged / "raw/00001.tar")
    config = CheckJobConfig(str(damaged), 1).of_run("new")
    assert check_array(config, Some([0, 1])).made == 2
    for path in (damaged / ".check/old").glob("0000[234]*"):
        shutil.copy(path, damaged / ".check/new")
    assert check_array(config, Some(list(range(SHARDS)))).made == 3
    assert finish(damaged, "new") == check(CheckConfig(str(damaged), workers=1))
    assert (damaged / ".check/old").exists()


def test_a_damaged_part_is_made_again(damaged):
    config = CheckJobConfig(str(damaged), 1).of_run("one")
    check_array(config, Some(list(range(SHARDS))))
    Path(part_path(str(damaged / ".check/one"), 2)).write_bytes(b"PK\3\4")
    for path in (damaged / ".check/one").glob("00003*"):  # of a shard with a problem
        shutil.copy(str(path).replace("00003", "00004"), path)
    assert finish(damaged, "one") == check(CheckConfig(str(damaged), workers=1))


def test_without_an_array_a_job_fails_by_the_same_problems(damaged, whole, monkeypatch):
    monkeypatch.setattr(divided, "PROBLEMS_TOLD", 1)
    problems = check(CheckConfig(str(damaged), workers=1))
    with pytest.raises(ProblemsFound) as caught:
        check_array(CheckJobConfig(str(damaged), 1))
    head, told = str(caught.value).split("\n")
    assert head == f"{damaged}: {len(problems)} problems (the first 1 are named here, all above)"
    assert told == f"  1: {problems[0]}"
    assert check_array(CheckJobConfig(str(whole), 1)) is None


def test_check_is_submitted_as_an_array_of_a_run(whole, tmp_path):
    (step,) = parse_steps(["check", str(whole), "--array", "2", "--workers", "3"])
    assert step.config == CheckJobConfig(str(whole), 3)
    own = Step("check", Options(array=2), check_array, step.config.of_run("r1"))
    division = divide(own, False, None, tmp_path)
    assert division == (".check/r1", [((0, 2),), ((2, 5),)], SHARDS)
    assert upstream_folder(own, division) in (f"{whole}/raw", f"{whole}/shards")
    chained = divide(own, True, 7, tmp_path)
    assert chained == (".check/r1", [()] * 2, None), "what is checked is known when the jobs before have ended"
    assert upstream_folder(own, chained) is None
    with pytest.raises(UserError, match="no finished shards in it"):
        longest_folder(str(tmp_path))
    with pytest.raises(UserError, match="no option --repair"):
        parse_steps(["check", str(whole), "--repair"])


def test_the_parts_of_a_check_are_no_stage():
    """Readers of the table of stages do not see them, and their folder is none of a dataset's."""
    assert CHECK.name not in STAGES
    assert stage_output("check/r1") is None
    assert CHECK.folder("r1").split("/")[0] not in FOLDERS


def test_a_part_has_no_pickles(tmp_path):
    """Whoever can write below ROOT runs no code in the job that sums up."""
    import io

    import numpy as np

    file = io.BytesIO()
    np.savez(file, findings=np.array([{}], object))
    with pytest.raises(ValueError, match="allow_pickle"):
        Part.from_bytes(0, file.getvalue())
