"""Peak memory that one process predicts and another one measures, by the command line as a user has it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_only import only_on_cuda
from small_training import read_metrics, write_every_root

import clipmill

ROOT = Path(__file__).parents[2]
PRINTED = "peak memory of a process: about "


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    """A dataset for every recipe, with tiny models for the dry run."""
    return write_every_root(tmp_path_factory.mktemp("data"))


def start(words: list[str], device: str) -> subprocess.Popen[str]:
    """`clipmill train` as a process of its own; on cpu the card is hidden, as on a login node."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path]))}
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "clipmill", "train", *words]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output_of(process: subprocess.Popen[str]) -> str:
    """What it printed and logged, when it has ended well."""
    printed, said = process.communicate(timeout=80)
    assert process.returncode == 0, said[-3000:]
    return printed + said


def words_for(root: str, device: str, fit: int, is_large: bool) -> list[str]:
    """SiCLIP with random weights, or a tiny one."""
    model, base = ("SiCLIP-S0", "MobileCLIP-S0") if is_large else ("SiCLIP-tiny", "MobileCLIP-tiny")
    words = ["siclip", "--data", root, "--model", model, "--base", base, "--base-weights", "random"]
    words += ["--batch-size", "512" if is_large else "8", "--workers", "4" if is_large else "0"]
    return [*words, "--precision", "bf16", "--device", device, "--fit", str(fit)]


TRAINING = ("--steps", "3", "--log-every", "3", "--warmup", "2")


def mib_of(printed: str) -> float:
    """The number that was predicted."""
    return float(printed.split(PRINTED)[1].split(" MiB")[0].replace(",", ""))


def chunk_of(printed: str) -> int | None:
    """The chunk size that was chosen."""
    found = printed.partition("in chunks of ")[2].split(" samples")[0].replace(",", "")
    return int(found) if found else None


def test_another_process_predicts_the_peak(root, device, tmp_path):
    """The whole batch, and the chunks that fit 4 GB."""
    only_on_cuda(device)
    predicting, training = {}, {}
    for fit in (40, 4):
        words = words_for(root, device, fit, is_large=True)
        predicting[fit] = start([*words, "--predict-memory"], device)
        training[fit] = start([*words, *TRAINING, "--out", str(tmp_path / f"fit-{fit}")], device)
    without = start([*words_for(root, "cpu", 40, is_large=True), "--predict-memory"], "cpu")
    for fit in (40, 4):
        printed, said = output_of(predicting[fit]), output_of(training[fit])
        assert chunk_of(printed) == chunk_of(said)
        assert (chunk_of(printed) is None) == (fit == 40)
        [line] = read_metrics(tmp_path / f"fit-{fit}")
        print(f"fit {fit}: predicted {mib_of(printed)} MiB, measured {line['memory_mib']}")
        assert mib_of(printed) == pytest.approx(line["memory_mib"], rel=0.1), printed
        assert line["memory_predicted_mib"] == pytest.approx(mib_of(printed), rel=0.01), "of the run itself"
    print(f"without a device: {output_of(without)}")


def test_the_commands_run(root, device, tmp_path, capsys, monkeypatch):
    """Those of the test above, at tiny sizes on the CPU and in this process."""
    if device.startswith("cuda"):
        pytest.skip("the test above runs them")
    for more in (["--predict-memory"], [*TRAINING, "--out", str(tmp_path / "run")]):
        monkeypatch.setattr(sys, "argv", ["clipmill", "train", *words_for(root, device, 40, is_large=False), *more])
        with pytest.raises(SystemExit) as ended:
            clipmill.main()
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        assert (PRINTED in printed) == (more == ["--predict-memory"])
    assert "memory_mib" not in read_metrics(tmp_path / "run")[0]
