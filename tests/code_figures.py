"""Figures of the code itself: length of functions, documentation, and constructs that are hard to read aloud.

    python tests/code_figures.py [CHECKOUT ...]

Prints a table, a column per checkout (default: this one), over `clipmill.py`, `pipeline`, `shards_spec`, `slurm` and
`training`. A line is a physical line of a file; "per 1,000" is per 1,000 of them.
"""

import ast
import io
import statistics
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("pipeline", "shards_spec", "slurm", "training")
LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def sources(checkout: Path) -> list[Path]:
    """Every module of the product."""
    return [
        checkout / "clipmill.py",
        *(path for folder in FOLDERS for path in sorted((checkout / folder).rglob("*.py"))),
    ]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions and methods, inner ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS))


def is_tuple_assignment(node: ast.AST) -> bool:
    """``a, b = x, y``: several values in one statement."""
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple)


def is_public(node: ast.AST) -> bool:
    """A class or function whose name does not begin with an underscore."""
    return isinstance(node, (ast.ClassDef, *FUNCTIONS)) and not node.name.startswith("_")


def is_typed(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the result and every argument but self and cls have annotations."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return function.returns is not None and all(a.annotation or a.arg in ("self", "cls") for a in arguments)


def comments(text: str) -> list[str]:
    """Comments, those at the end of a line of code too."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def figures(checkout: Path) -> dict[str, str]:
    """Name to figure, as text."""
    paths = sources(checkout)
    texts = [path.read_text() for path in paths]
    trees = [ast.parse(text) for text in texts]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    lines = sum(len(text.splitlines()) for text in texts)
    notes = [comment for text in texts for comment in comments(text)]
    lengths = [function.end_lineno - function.lineno + 1 for tree in trees for function in functions(tree)]
    public = [node for tree in trees for node in tree.body if is_public(node)]
    documented = sum(ast.get_docstring(node) is not None for node in public)
    in_one_folder = {folder: len(list((checkout / folder).glob("*.py"))) for folder in FOLDERS}

    def per_thousand(count: int) -> str:
        return f"{1000 * count / lines:.1f}"

    def share(part: int, whole: int) -> str:
        return f"{100 * part / whole:.0f} %"

    return {
        "modules": str(len(paths)),
        "lines": f"{lines:,}",
        "lines of the longest module": str(max(len(text.splitlines()) for text in texts)),
        **{f"modules directly in {folder}/": str(count) for folder, count in in_one_folder.items()},
        "functions": str(len(lengths)),
        "median lines of a function": f"{statistics.median(lengths):.0f}",
        "lines of the longest function": str(max(lengths)),
        "public functions and classes with a docstring": share(documented, len(public)),
        "functions with all types": share(sum(is_typed(f) for tree in trees for f in functions(tree)), len(lengths)),
        "tuple assignments per 1,000 lines": per_thousand(sum(map(is_tuple_assignment, nodes))),
        "conditional expressions per 1,000": per_thousand(sum(isinstance(node, ast.IfExp) for node in nodes)),
        "comprehensions of two loops per 1,000": per_thousand(
            sum(isinstance(node, LOOPS) and len(node.generators) > 1 for node in nodes)
        ),
        "lines that the formatter must not touch": str(sum("fmt: skip" in note for note in notes)),
        "comments per 100 lines": f"{100 * len(notes) / lines:.1f}",
    }


def main() -> None:
    """Print the table as Markdown."""
    checkouts = [Path(word) for word in sys.argv[1:]] or [ROOT]
    columns = [figures(checkout) for checkout in checkouts]
    print("| |" + "".join(f" {checkout.resolve().name} |" for checkout in checkouts))
    print("|---|" + "---|" * len(checkouts))
    for name in columns[0]:
        print(f"| {name} |" + "".join(f" {column[name]} |" for column in columns))


if __name__ == "__main__":
    main()
