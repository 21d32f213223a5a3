"""Code that reads aloud: constructs that pack several thoughts into one line are not used in the product.

ruff has the other rules (pyproject.toml): complexity, parameters, docstrings of all that is public.
"""

import ast
from collections.abc import Iterator

import pytest
from code_figures import LOOPS, ROOT, comments, is_tuple_assignment, sources

PATHS = sources(ROOT)
EVERY_PYTHON_FILE = [*PATHS, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "demo").rglob("*.py"))]


def too_dense(tree: ast.AST) -> Iterator[str]:
    """What is wrong, and in which line."""
    for node in ast.walk(tree):
        if is_tuple_assignment(node) and len(node.targets[0].elts) > 2:
            yield f"line {node.lineno}: an assignment of three values and more; write one per line"
        if isinstance(node, LOOPS) and len(node.generators) > 1:
            yield f"line {node.lineno}: a comprehension of two loops; write a loop, or name the inner one"
        if isinstance(node, ast.IfExp):
            inner = [part for child in ast.iter_child_nodes(node) for part in ast.walk(child)]
            if any(isinstance(part, ast.IfExp) for part in inner):
                yield f"line {node.lineno}: a conditional expression inside another; write if and else"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_line_has_one_thought(path):
    assert not list(too_dense(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", EVERY_PYTHON_FILE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_formatter_formats_all(path):
    assert not [note for note in comments(path.read_text()) if "fmt: " + "skip" in note or "fmt: " + "off" in note]


@pytest.mark.parametrize(
    "code",
    ["a, b, c = 1, 2, 3", "[x for y in z for x in y]", "a if b else (c if d else e)", "{x: 1 for y in z for x in y}"],
)
def test_the_rules_find_what_they_look_for(code):
    assert list(too_dense(ast.parse(code)))


@pytest.mark.parametrize("code", ["a, b = 1, 2", "a, b, c = f()", "[x for x in y if x]", "a if b else c"])
def test_the_rules_leave_plain_code_alone(code):
    assert not list(too_dense(ast.parse(code)))
