"""``clipmill submit`` where there is no cluster: flags, scripts, pickles, snapshot, local and debug."""

import json
import os
import pickle
import pkgutil
import re
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import pytest
from small_data import tree, write_raw

from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.files import UserError
from shards_spec.layout import STAGE_COMMANDS, STAGES
from slurm import scheduler
from slurm.division import as_ranges, divide
from slurm.jobs import ArrayJob
from slurm.options import Options, read_site
from slurm.snapshot import CODE, snapshot
from slurm.status import failure_reason
from slurm.step import Step, by_stage, parse_steps, stage_step
from slurm.submit import submit
from slurm.submitit_parts import failure_message

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
NOWHERE = {"PATH": "/usr/bin/none", "HOME": "/", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(*words: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "clipmill", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**NOWHERE, **environment},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture
def raw(tmp_path) -> str:
    write_raw(str(tmp_path / "ds"), shards=4, per_shard=6)
    return str(tmp_path / "ds")


@pytest.mark.parametrize("stage", STAGE_COMMANDS)
def test_submit_has_the_flags_of_the_command_and_no_name_twice(stage):
    import dataclasses

    own = {field.name for field in dataclasses.fields(pkgutil.resolve_name(STAGES[stage].config))}
    assert not own & {field.name for field in dataclasses.fields(Options)}
    needed = {"ingest": ("--source", "S"), "select": ("--where", "words > 1")}
    step = stage_step(stage, ["R", *needed.get(stage, ())], Options())
    assert step.root == "R"


@pytest.mark.parametrize(
    ("words", "stages"),
    [
        (("--inherit", "auto", "--stages", "1,0.75,0.5"), [1, 2]),
        (("--stage-models=A,B,C", "--inherit", "manual"), [1, 2, 3]),
        (("--inherit", "auto", "--stages", "1,0.75"), []),
        (("--inherit", "auto", "--stages", "1,0.75,0.5", "--stage", "2"), []),
    ],
)
def test_stages_of_a_training_are_a_chain(words, stages):
    (step,) = parse_steps(["train", "tinyclip", "--data", "D", "--out", "R", "--teacher-weights", "W", *words])
    own = [(*step.words, "--stage", str(stage)) for stage in stages] or [step.words]
    assert [one.words for one in by_stage(step)] == own
    assert [one.config.stages.stage for one in by_stage(step)] == (stages or [step.config.stages.stage])
    (plain,) = parse_steps(["train", "clip", "--data", "D", "--out", "R"])
    assert by_stage(plain) == [plain]


def test_each_stage_waits_for_the_one_before(tmp_path):
    out = ("--data", "D", "--out", str(tmp_path / "R"), "--teacher-weights", "W", "--nodes", "2", "--after", "7")
    done = command("submit", "train", "tinyclip", *out, "--stage-models", "A,B", "--inherit", "manual", "--dry-run")
    assert re.findall(r"--dependency=(\S+)", done.stdout)[0] == "afterok:7"
    assert len(re.findall(r"--dependency=(\S+)", done.stdout)) == 2
    assert done.stdout.count("#SBATCH --nodes=2\n") == 2
    shares = ("--inherit", "auto", "--stages", "0.5,0.75")
    wrong = command("submit", "train", "tinyclip", *out, *shares, "--dry-run", code=2)
    assert "--stages '0.5,0.75': must be shares of the parameters" in wrong.stderr
    short = ("--inherit", "auto", "--stages", "1,0.5,0.25", "--stage-prune-steps", "5,20", "--steps", "12")
    (step,) = parse_steps(["train", "tinyclip", *out, *short])
    with pytest.raises(UserError, match="--stage-prune-steps '5,20': a stage has 12 steps"):
        by_stage(step)


def test_without_a_cluster_there_is_one_clear_line(raw):
    done = command("submit", "pack", raw, "--captioner", "none", code=2)
    assert done.stderr.count("\n") == 1
    assert "no Slurm on this machine" in done.stderr
    assert not os.path.exists(f"{raw}/logs")


def test_dry_run_prints_scripts_and_writes_nothing(raw, tmp_path):
    site = tmp_path / "site.toml"
    site.write_text(
        'partition = "gpu"\naccount = "vision"\nsetup = ["module load cuda"]\nscratch = ["/fast tmp"]\n'
        'container = "apptainer exec c.sif"\ncpus_per_task = 4\nsbatch = {constraint = "a100"}\n'
        '[pack]\npartition = "cpu"\n'
    )
    words = ("submit", "pack", raw, "--captioner", "none", "--array", "3", "--time", "1-02:30:00", "--after", "7", "8")
    done = command(*words, "--site", str(site), "--dry-run")
    for line in (
        "an array of 3",
        "#SBATCH --partition=cpu",
        "#SBATCH --account=vision",
        "#SBATCH --constraint=a100",
        "#SBATCH --time=1590",
        "#SBATCH --dependency=afterok:7:8",
        "#SBATCH --dependency=afterany:ID_OF_THE_JOB_ABOVE\n",
        "module load cuda",
        "'/fast tmp'",
        "#SBATCH --requeue",
        "--cpus-per-task=4 apptainer exec c.sif",
    ):
        assert line in done.stdout, line
    assert not os.path.exists(f"{raw}/logs")
    many = ("submit", "pack", raw, "--captioner", "none", "--array", "3000", "--after", "7", "--dry-run")
    assert re.findall(r"an array of (\d+)", command(*many).stdout) == ["1001", "1001", "998"]
    assert re.findall(r"an array of (\d+)", command(*many, "--parallel", "5").stdout) == ["1001"]
    train = command(
        "submit", "train", "clip", "--data", "D", "--out", "R", "--nodes", "2", "--gpus-per-node", "4", "--dry-run"
    )
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"):
        assert f"#SBATCH {line}\n" in train.stdout
    stage = command("submit", "caption", raw, "--model", "m", "--array", "4", "--gpus-per-node", "1", "--dry-run")
    assert stage.stdout.count("#SBATCH --ntasks-per-node=1\n") == 2
    assert stage.stdout.count("#SBATCH --gpus-per-node=1\n") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("vocab X --save-s 30", "--save-s 30 would not be used by a stage"),
        ("vocab X --recheck", "--recheck would not be used by a stage that leaves no shards"),
        ("check X --recheck", "--recheck would not be used by a stage that leaves no shards"),
        ("pack X --incomplete", "--incomplete would not be used without --after JOB"),
        ("train clip --data X --out R --incomplete", "--incomplete would not be used without --after JOB"),
        (
            "pack X --shard-size 9 --array 32",
            "--array 32 would not be used by a stage that is one job, as these are: ing",
        ),
        ("cache X --export-lists --recheck", "--recheck would not be used by a stage that is one job"),
        ("ingest X --source S --retry-failed --parallel 2", "--parallel 2 would not be used by a stage that is one"),
        ("dedup X --overwrite --claim-s 9", "--claim-s 9.0 would not be used by a stage that is one job"),
        (
            "pack X --after 7 --cluster local",
            "--after 7 would not be used with --cluster local, which waits for no job",
        ),
        (
            "train clip --data X --out R --cluster debug --incomplete",
            "--incomplete would not be used with --cluster deb",
        ),
        ("pack X --cluster local --array 3", "--array 3 would not be used with --cluster local, which runs on this"),
        ("pack X --cluster debug --partition p", "--partition p would not be used with --cluster debug"),
        ("train clip --data X --out R --cluster local --nodes 2", "--nodes 2 would not be used with --cluster local"),
        ("pack X --cluster debug --dry-run", "--dry-run would not be used with --cluster debug"),
        ("pipeline X --cluster debug --after 7 -- pack", "--after 7 would not be used with --cluster debug"),
        ("pipeline X -- pack -- vocab --after 7", "--after behind -- vocab: it holds for all commands, say it before"),
        ("pipeline X -- pack --cluster local -- vocab", "--cluster behind -- pack: it holds for all"),
        (
            "train clip --data X --out R --save-s 600 --time 10",
            "--save-s 600: must be less .* --time 10 is 600 seconds",
        ),
    ],
)
def test_an_option_without_effect_is_refused(words, said):
    with pytest.raises(UserError, match=said):
        submit(words.split(), lambda step: 0)


def test_options_with_an_effect_are_taken():
    assert [Options(time=time).signal_s for time in ("1", "2", "3", "12:00:00")] == [30, 60, 90, 90]
    assert Options(time="1", save_s=59).signal_s == 59
    assert stage_step("pack", ["X", "--recheck"], Options()).options.recheck
    assert stage_step("pack", ["X", "--shard-size", "9", "--time", "9"], Options(array=64)).array_folder is None
    assert (
        stage_step("cache", ["X", "--array", "4"], Options()).array_folder == "teacher/ViT-L-14-datacomp_xl_s13b_b90k"
    )
    steps = parse_steps(["pipeline", "X", "--incomplete", "--save-s", "30", "--", "pack", "--", "vocab"])
    assert [(step.options.incomplete, step.options.save_s) for step in steps] == [(True, 30)] * 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["submit", "report", "X"], "cannot submit 'report'"),
        (["submit", "pack", "X", "--time", "soon"], "--time 'soon'"),
        (["submit", "pack", "X", "--array", "0"], "--array 0"),
        (["submit", "pack", "X", "--after", "job"], "--after job"),
        (["submit", "train", "nothing"], "no recipe 'nothing'"),
        (["submit", "train", "clip"], "--out RUN"),
        (["submit", "pipeline"], "ROOT is needed; for example: clipmill submit pipeline /data/cc3m"),
        (["submit", "pipeline", "X"], "a command behind each -- is needed; for example"),
        (["submit", "pipeline", "X", "--", "pack", "--"], "a command behind each -- is needed"),
        (["submit", "pipeline", "X", "--", "report"], "cannot submit 'report'"),
        (["submit", "pack", "X", "--site", "/nowhere.toml", "--dry-run"], "site file /nowhere.toml"),
        (["submit", "pack", "s3://b/x", "--dry-run"], 'jobs = "FOLDER" in the site file'),
        (["submit", "pack", "X", "--partition", "a\nb", "--dry-run"], "--partition 'a"),
        (["submit", "pack", "/x/100%j", "--dry-run"], "would misread '%'"),
        (["submit", "train", "clip", "--data", "D", "--out", "a\\\\b", "--dry-run"], "would misread"),
        (["submit", "caption", "/x/%A", "--cluster", "local"], "would misread '%'"),
        (["jobs", "/tmp"], "nothing was submitted for /tmp"),
        (["jobs", "/tmp", "--logs", "-1"], "--logs -1: must be 0 or more"),
    ],
)
def test_a_users_mistake_is_one_line_with_the_fix(words, said):
    done = command(*words, code=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "said"), [("colour = 1", "no key 'colour'"), ("account = 3", "account = 3 must be"), ("a b", "site file")]
)
def test_a_site_file_is_checked(tmp_path, text, said):
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(UserError, match=said):
        read_site(str(tmp_path / "site.toml"), "pack", STAGE_COMMANDS)


def test_debug_behaves_as_the_plain_command(raw, tmp_path):
    words = ("--captioner", "none", "--workers", "1")
    here = command("submit", "pack", raw, *words, "--cluster", "debug")
    write_raw(str(tmp_path / "other"), shards=4, per_shard=6)
    plain = command("pack", str(tmp_path / "other"), *words)
    assert tree(raw)["shards/00000.tar"] == tree(str(tmp_path / "other"))["shards/00000.tar"]
    assert here.stdout.split(" (")[0] == plain.stdout.split(" (")[0]
    wrong = ("--captioner", "nobody")
    assert (
        command("submit", "pack", raw, *wrong, "--cluster", "debug", code=2).stderr
        == command("pack", raw, *wrong, code=2).stderr
    )


def test_local_runs_a_chain_in_the_background(raw):
    done = command(
        "submit",
        "pipeline",
        raw,
        "--cluster",
        "local",
        "--wait",
        "--time",
        "2",
        "--",
        "pack",
        "--captioner",
        "none",
        "--workers",
        "1",
        "--",
        "vocab",
        "--min-count",
        "1",
        PATH=os.environ["PATH"],
    )
    assert "clipmill jobs" in done.stdout
    assert os.path.exists(f"{raw}/vocab/all.tsv")
    assert "1 completed" in command("jobs", raw).stdout


def test_a_local_jobs_failure_is_its_own_message_and_the_log(raw):
    words = ("submit", "check", raw, "--cluster", "local", "--wait", "--time", "2")
    Path(raw, "raw/00001.tar").write_bytes(b"damaged")
    done = command(*words, code=1, PATH=os.environ["PATH"])
    assert "Traceback" not in done.stderr
    assert "-----" not in done.stderr
    first, *_, log = done.stderr.strip().splitlines()
    assert first.startswith(f"{raw}: ")
    assert "raw/00001.tar" in done.stderr
    assert Path(log).read_text()


def test_a_local_trainings_failure_has_its_last_word_from_the_log(tmp_path):
    job = "Job (task=0) failed during processing with trace:\n----------------------\nTraceback (most recent ...\n"
    job += f"slurm.jobs.JobFailedError: clipmill train clip ended with exit code 2\n\n{'-' * 22}\nYou can check"
    log = tmp_path / "7_0_log.err"
    log.write_text("INFO step 1\nclipmill: D is not there\nsubmitit ERROR (now) - Submitted job\nTraceback\n")
    said = failure_message(RuntimeError(job), [log])
    assert said == "clipmill train clip ended with exit code 2\nclipmill: D is not there"
    assert failure_message(RuntimeError("Job 7 is lost"), []) == "Job 7 is lost"


def test_submitting_imports_no_torch_and_pickles_are_small(raw):
    code = (
        "import sys, clipmill; sys.argv = ['clipmill', *sys.argv[1:]]\n"
        "try: clipmill.main()\nexcept SystemExit: pass\n"
        "print('heavy:', {'torch', 'timm', 'open_clip', 'pandas'} & set(sys.modules))"
    )
    for words in (["caption", raw], ["train", "tinyclip", "--data", "D", "--out", "R"], ["cache", raw, "--after", "3"]):
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, "submit", *words, "--dry-run"], env=NOWHERE, capture_output=True, text=True
        )
        assert "heavy: set()" in done.stdout, done.stdout + done.stderr
        print(words[0], time.monotonic() - start)
    scattered = as_ranges(list(range(0, 100_000, 7)))
    job = ArrayJob(
        max_requeue=3,
        command="pack",
        function=pack,
        config=PackConfig(raw),
        ranges=scattered[:2000],
        folder="shards",
        upstream="raw",
        claims="c",
        submission="s",
        claim_s=1.0,
    )
    data = cloudpickle.dumps(job)
    assert len(data) < 50_000
    assert pickle.loads(data) == job


def test_lists_cover_what_is_missing_once(raw, tmp_path):
    pack(PackConfig(raw, ("none",), workers=1))
    for shard in (1, 3):
        os.unlink(f"{raw}/shards/{shard:05d}_stats.json")
    step = Step("pack", Options(array=8), pack, PackConfig(raw))
    assert divide(step, False, None, tmp_path) == ("shards", [((1, 2),), ((3, 4),)], 4)
    everything = Step("pack", Options(array=3, recheck=True), pack, PackConfig(raw))
    assert divide(everything, False, None, tmp_path)[1] == [((0, 1),), ((1, 2),), ((2, 4),)]
    assert divide(step, True, None, tmp_path) == ("shards", [()] * 8, None)  # unknown: tasks take what they find
    folder, ranges, total = divide(Step("pack", Options(), pack, PackConfig(raw, shard_size=9)), False, None, tmp_path)
    assert (folder, ranges, total) == (None, [()], None)
    with pytest.raises(UserError, match="--overwrite is for one process"):
        divide(Step("pack", Options(), pack, PackConfig(raw, overwrite=True)), False, None, tmp_path)


def test_the_snapshot_is_the_code_and_made_once(tmp_path):
    first = snapshot(tmp_path)
    before = (first / "clipmill.py").stat().st_mtime_ns
    assert snapshot(tmp_path) == first
    assert (first / "clipmill.py").stat().st_mtime_ns == before
    assert (first / "slurm" / "site.toml").exists()
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert not list(first.rglob("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", "from pipeline.core import runner; print(runner.__file__)"],
        cwd=ROOT,
        text=True,
        env={"PYTHONSAFEPATH": "1", "PYTHONPATH": str(first)},
        capture_output=True,
    )
    assert done.stdout.strip() == str(first / "pipeline" / "core" / "runner.py")


@pytest.mark.parametrize("planted", ["changed", "module", "compiled", "linked module", "linked folder", "other user's"])
def test_a_snapshot_that_is_not_the_code_is_not_believed(tmp_path, planted):
    first = snapshot(tmp_path / "code")
    assert first.stat().st_mode & 0o777 == 0o700
    if planted == "changed":
        (first / "clipmill.py").write_text("raise SystemExit")
    if planted == "module":
        (first / "sitecustomize.py").write_text("raise SystemExit")
    if planted == "compiled":
        (first / "pipeline" / "__pycache__").mkdir()
        (first / "pipeline" / "__pycache__" / "stage.cpython-311.pyc").write_bytes(b"")
    if planted == "linked module":
        (first / "slurm" / "jobs.py").rename(tmp_path / "jobs.py")
        (first / "slurm" / "jobs.py").symlink_to(tmp_path / "jobs.py")
    if planted == "linked folder":
        (first / "slurm").rename(tmp_path / "slurm")
        (first / "slurm").symlink_to(tmp_path / "slurm")
    if planted == "other user's":
        os.chown(first, 12345, 12345) if os.getuid() == 0 else pytest.skip("only root gives folders away")
    good = snapshot(tmp_path / "code")
    assert (good == first) == (planted == "compiled"), "compiled files go, the rest is made anew"
    assert snapshot(tmp_path / "code") == good
    assert {path.relative_to(good): path.read_bytes() for path in good.rglob("*") if path.is_file()} == {
        path.relative_to(ROOT): path.read_bytes()
        for name in CODE
        for path in [ROOT / name, *(ROOT / name).rglob("*")]
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert good.stat().st_mode & 0o777 == 0o700


def test_folders_that_a_script_slurm_or_python_would_misread_are_refused(raw, tmp_path):
    site = tmp_path / "site.toml"
    site.write_text(f'jobs = "{tmp_path}/jobs"\n')
    for name in ("a\nb", "%j", "a:b", "a\x1bb", "a\rb", "a\\b"):
        root = str(tmp_path / name)
        write_raw(root, shards=1, per_shard=1)
        words = ("submit", "pack", root, "--captioner", "none", "--dry-run")
        for cluster in ("slurm", "local"):
            done = command(*words[:-1], "--cluster", cluster, code=2, PATH=os.environ["PATH"])
            assert "in the site file" in done.stderr
            assert done.stderr.count("\n") == 1
        assert not os.path.exists(f"{root}/logs")
        script = command(*words, "--site", str(site)).stdout
        assert f"--output={tmp_path}/jobs/" in script.replace("'", "")
    site.write_text('jobs = "/a:b"\n')
    assert "'/a:b': jobs' scripts" in command(*words, "--site", str(site), code=2).stderr


@pytest.mark.parametrize(
    "line",
    [
        'partition = "a\\nb"',
        'setup = ["a\\nb"]',
        'container = "a\\nb"',
        'scratch = ["a\\rb"]',
        'jobs = "a\\nb"',
        'sbatch = {x = "a\\nb"}',
        'sbatch = {"x\\ny" = 1}',
        'sbatch = {x = ["a\\u0000"]}',
        '[pack]\nqos = "a\\nb"',
    ],
)
def test_no_value_of_a_site_file_makes_a_line_of_the_script(tmp_path, line):
    (tmp_path / "site.toml").write_text(line)
    with pytest.raises(UserError, match="one line each, without control characters"):
        read_site(str(tmp_path / "site.toml"), "pack", STAGE_COMMANDS)


def test_job_files_are_this_users_alone(raw):
    command("submit", "vocab", raw, "--cluster", "local", "--wait", "--time", "2", code=1, PATH=os.environ["PATH"])
    (folder,) = [path.parent for path in Path(raw, "logs", "jobs").glob("*/submission.json")]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.glob("*_submitted.pkl"))


def test_the_environment_is_written_without_secrets(raw, monkeypatch):
    from slurm.snapshot import environment

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("CLIPMILL_API_KEY", "x")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    told = json.loads(json.dumps(environment()))
    assert told["variables"]["OMP_NUM_THREADS"] == "1"
    assert not {"AWS_SECRET_ACCESS_KEY", "CLIPMILL_API_KEY"} & set(told["variables"])
    assert "numpy" in told["packages"]


def test_what_slurm_answers_is_read(monkeypatch):
    """As Slurm 22.05 with accounts writes it, seen on one; squeue lists tasks one by one."""
    said = {
        "sacct": "7_0|COMPLETED\n7_1|CANCELLED by 0\n7_[2-4,9%3]|PENDING\n8|FAILED\n",
        "squeue": "7_2|PENDING|Resources\n7_3|PENDING|Priority\n",
        "scontrol": "MaxArraySize            = 1001\nSchedulerParameters     = bf_interval=2,max_array_tasks=500\n",
    }
    monkeypatch.setattr(scheduler, "ask", lambda name, *_: said[name])
    found = {"7_0": "COMPLETED", "7_1": "CANCELLED", "7_2": "PENDING (Resources)", "7_3": "PENDING", "8": "FAILED"}
    assert scheduler.states(["7", "8"]) == {**found, "7_4": "PENDING", "7_9": "PENDING"}
    assert scheduler.max_array_size() == 500
    said["scontrol"] = "Configuration data\n"
    assert scheduler.max_array_size() == 1001


def test_waiting_asks_once_a_minute_and_outlasts_a_silent_slurm(monkeypatch, tmp_path):
    clock, asked = [0.0], list[float]()

    def states(jobs: list[str]) -> dict[str, str] | None:
        asked.append(clock[0])
        return None if len(asked) == 2 else {"5": "RUNNING" if len(asked) < 4 else "CANCELLED"}

    monkeypatch.setattr(scheduler, "states", states)
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(scheduler.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    assert not scheduler.wait_for(tmp_path, "5")
    assert asked == pytest.approx([61, 122, 183, 244], abs=3)


def test_a_time_is_read_as_slurm_reads_it():
    for text, minutes in [
        ("90", 90),
        ("1:30", 2),
        ("90:00", 90),
        ("1:00:00", 60),
        ("0:00:01", 1),
        ("1-00", 1440),
        ("1-2:03", 1563),
        ("1-2:03:04", 1564),
    ]:
        assert Options(time=text).minutes == minutes, text
    for text in ("0", "00:00:00", "0-0", "1:99", "1:60:00", "1-2:60", "1:2:3:4", "1-1-1", "1-", "-1", "", "an hour"):
        with pytest.raises(UserError, match=r"must be minutes, \[hours:\]minutes:seconds or days-hours"):
            Options(time=text)


def test_jobs_says_why_a_job_failed_without_the_name_of_the_exception(tmp_path):
    log = tmp_path / "7_0_log.err"
    log.write_text("submitit ERROR\nslurm.jobs.JobFailedError: --where words >: is no condition\n")
    assert failure_reason(tmp_path, "7", "FAILED", 0)[0] == "7 failed: --where words >: is no condition"
