"""What users see is what it was: `freeze.py` makes it all again, and it is that of tests/golden/freeze/.

Floats of models may differ a little: other processors add in another order. All else may not. When a difference is
wanted, see the head of `freeze.py`.
"""

import json
import math
from pathlib import Path
from typing import Any

import freeze
import pytest
from conftest import skip_or_fail
from warm_process import WarmProcess

pytestmark = pytest.mark.integration

GOLDEN = Path(__file__).parent / "golden" / "freeze"
RTOL, NORMS = 1e-3, 1e-2  # of floats, and of gradients' norms: 1e-4 and 1e-3 between kernels with AVX2 and without
ATOL = {"teacher/int/": 0.01, "runs/": 0.1}  # a step of int8; a sample of an evaluation set. Else 1e-4


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What `freeze.py` writes, in a process of its own: it changes the folder and the environment."""
    out = tmp_path_factory.mktemp("freeze")
    code = f"import runpy, torch; torch.set_num_threads(1); runpy.run_path({freeze.__file__!r}, {{}}, '__main__')"
    process = WarmProcess(code, str(out))
    errors = process.communicate()[1]
    if "WordNet 3.0 is not in" in errors:
        skip_or_fail("WordNet is not there")
    assert process.returncode == 0, errors[-3000:]
    return out


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def apart(one: Any, other: Any, atol: float, where: str = "") -> list[str]:
    """The places where two JSON values are not nearly the same."""
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        names = [name for name in one if name != "sha256"]
        return [found for name in names for found in apart(one[name], other[name], atol, f"{where}/{name}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for index, pair in pairs for found in apart(*pair, atol, f"{where}/{index}")]
    if isinstance(one, float) and isinstance(other, float):
        rtol = NORMS if where.endswith("/grad_norm") else RTOL
        return [] if math.isclose(one, other, rel_tol=rtol, abs_tol=atol) else [f"{where}: {one} was, {other} is"]
    return [] if one == other and type(one) is type(other) else [f"{where}: {one} was, {other} is"]


@pytest.mark.parametrize("section", ["help", "recipes"])
def test_texts_are_the_same(made, section):
    there, here = freeze.read(GOLDEN, section), freeze.read(made, section)
    assert list(here) == list(there)
    assert not freeze.differences(GOLDEN, made)[section]


def test_files_of_all_stages_are_the_same(made):
    there, here = ((folder / "dataset.sha256").read_text().splitlines() for folder in (GOLDEN, made))
    assert [line[66:] for line in here] == [line[66:] for line in there]
    assert not [line for line in here if line not in there]


def test_what_models_compute_is_nearly_the_same(made):
    there, here = load(GOLDEN / "floats.json"), load(made / "floats.json")
    assert list(here) == list(there)
    for name, own in there.items():
        atol = next((own for part, own in ATOL.items() if part in name), 1e-4)
        assert not apart(own, here[name], atol, name)


@pytest.mark.parametrize("recipe", [*sorted(freeze.RECIPES), "export"])
def test_curves_and_checkpoints_are_nearly_the_same(made, recipe):
    assert not apart(load(GOLDEN / "curves.json")[recipe], load(made / "curves.json")[recipe], 0.0)


def test_every_recipe_is_among_them():
    assert sorted(freeze.RECIPES) == sorted(path.stem for path in (GOLDEN / "recipes").iterdir())


def test_what_is_compared_can_differ():
    value = load(GOLDEN / "curves.json")["clip"]
    assert not apart(value, json.loads(json.dumps(value)), 0.0)
    other = json.loads(json.dumps(value))
    other["metrics"][2]["loss"] *= 1.002
    other["tensors"].append("one more")
    assert len(apart(value, other, 0.0)) == 2
