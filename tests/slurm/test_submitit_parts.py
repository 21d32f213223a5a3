"""submitit's inside that we count on: it is there in the installed version, and what happens without it."""

import pickle
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from submitit import SlurmExecutor
from submitit.core.utils import JobPaths, cloudpickle_dump

from slurm.submitit_parts import (
    dry_executor,
    error_logs,
    result_path,
    result_succeeded,
    results,
    script_text,
    submission_errors,
    submitted_jobs,
)

ROOT = Path(__file__).parents[2]


def test_the_installed_version_is_one_that_was_tried():
    assert "submitit>=1.5.2" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert (1, 5, 2) <= tuple(map(int, version("submitit").split(".")[:3])) < (1, 6, 0)
    for name in ("affinity", "_make_submission_file_text", "_submitit_command_str"):
        assert hasattr(SlurmExecutor, name)
    assert [kind.__name__ for kind in submission_errors()] == ["FailedJobError", "FailedSubmissionError"]


def test_a_script_is_shown_and_without_submitits_function_the_options(tmp_path, monkeypatch):
    executor = dry_executor(tmp_path, 3, None)
    executor.update_parameters(job_name="clipmill-pack", time=5)
    assert "#SBATCH --job-name=clipmill-pack\n" in script_text(executor, {"time": 5})
    monkeypatch.delattr(SlurmExecutor, "_make_submission_file_text")
    monkeypatch.delattr("submitit.core.core.PicklingExecutor._make_submission_file_text")
    text = script_text(executor, {"job_name": "clipmill-pack", "time": 5})
    assert "shows no script" in text
    assert "\n# Parameters\n# job_name = 'clipmill-pack'\n# time = 5\n" in text


@pytest.mark.parametrize(
    ("outcome", "succeeded"), [(("success", None), True), (("error", "Traceback: success"), False)]
)
def test_results_are_told_by_their_first_bytes_or_unpickled(tmp_path, outcome, succeeded):
    cloudpickle_dump(outcome, tmp_path / "new.pkl")
    (tmp_path / "old.pkl").write_bytes(pickle.dumps(outcome, protocol=0))
    assert result_succeeded(tmp_path / "new.pkl") is succeeded
    assert result_succeeded(tmp_path / "old.pkl") is succeeded


def test_files_have_submitits_names(tmp_path):
    paths = JobPaths(tmp_path, job_id="7_2", task_id=0)
    for path in (paths.result_pickle, paths.submitted_pickle, paths.stderr):
        path.write_bytes(b"")
    assert results(tmp_path) == [("7_2", paths.result_pickle)]
    assert result_path(tmp_path, "7_2") == paths.result_pickle
    assert submitted_jobs(tmp_path) == ["7_2"]
    assert error_logs(tmp_path, "7_2") == [paths.stderr]
