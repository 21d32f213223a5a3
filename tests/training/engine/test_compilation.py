"""When a task is compiled, and what becomes of a run where that fails; simple backends stand in for the compiler."""

import json
import logging
from pathlib import Path

import pytest
import torch
from small_training import assert_same_run, final_weights, tiny_clip, tiny_config, write_packed, write_teacher
from torch import nn

from shards_spec.files import UserError
from training.engine import compilation
from training.engine.compilation import give_up_compiling, resolve_compile
from training.task import Task
from training.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")
FIGURES = Path(__file__).parents[2] / "gpu" / "figures.jsonl"


@pytest.fixture
def compiler(monkeypatch):
    """Sets the backend; afterwards the process compiles as before."""
    yield lambda backend: monkeypatch.setattr(compilation, "BACKEND", backend)
    torch.compiler.set_stance("default")
    torch.compiler.reset()


class Reshaped(Task):
    """A task that changes its shape."""

    changes_shape = True


@pytest.mark.parametrize(
    ("option", "device", "kind", "expected"),
    [
        ("off", "cuda", Task, "off"),
        ("on", "cpu", Task, "on"),
        ("on", "cuda", Task, "on"),
        ("on", "cuda", Reshaped, "off"),
        ("auto", "cpu", Task, "off"),
        ("auto", "cuda", Task, "on"),
        ("auto", "cuda:1", Task, "on"),
        ("auto", "cuda", Reshaped, "off"),
    ],
)
def test_what_is_compiled(option, device, kind, expected, monkeypatch):
    monkeypatch.setattr(compilation, "MEASURED_GAINS", {"clip": 1.2})
    assert resolve_compile(option, "clip", kind(nn.Linear(1, 1)), device) == expected


@pytest.mark.parametrize("gains", [{}, {"clip": 1.02}])
def test_auto_says_why_it_does_not_compile(gains, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(compilation, "MEASURED_GAINS", gains)
    assert resolve_compile("auto", "clip", Task(nn.Linear(1, 1)), "cuda") == "off"
    assert "no GPU was measured to train clip faster with it; --compile on tries" in caplog.text


def test_gains_are_those_of_the_figures():
    measured = {}
    for line in FIGURES.read_text().splitlines():
        figure = json.loads(line)
        words = figure["name"].removeprefix("loop: ").removesuffix(", compile over eager")
        if figure["name"] == f"loop: {words}, compile over eager":
            measured[words] = pytest.approx(figure["value"], abs=0.005)
    assert measured == compilation.MEASURED_GAINS


def test_a_compiled_run_has_the_usual_names_and_values(tmp_path, compiler):
    """Its batches have other keys at each step, and the pass is compiled once."""
    graphs = []

    def eager(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiler(eager)
    write_teacher(str(tmp_path), write_packed(str(tmp_path), [9, 8]))
    tiny_clip(tmp_path / "models" / "clip")
    usual, compiled = (
        train("tinyclip", tiny_config("tinyclip", str(tmp_path), str(tmp_path / option), steps=3, compile=option))
        for option in ("off", "on")
    )
    assert len(graphs) == 1
    assert list(final_weights(compiled)) == list(final_weights(usual))
    assert_same_run(compiled, usual)


def test_a_run_goes_on_where_the_compiler_fails(clip_root, tmp_path, compiler, caplog):
    caplog.set_level(logging.WARNING)

    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    compiler(broken)
    compiled = train("clip", tiny_config("clip", clip_root, str(tmp_path / "on"), steps=3, compile="on"))
    assert [record.message for record in caplog.records if "compile" in record.message] == [
        "torch.compile failed (no C++ compiler): the run goes on without it"
    ]
    assert_same_run(compiled, train("clip", tiny_config("clip", clip_root, str(tmp_path / "off"), steps=3)))


def test_of_several_processes_all_stop():
    with pytest.raises(UserError, match=r"torch\.compile failed \(no C\+\+ compiler\): train with --compile off"):
        give_up_compiling(RuntimeError("no C++ compiler"), 2)
