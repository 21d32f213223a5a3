"""A run's student.json: the sizes of a student whose layers differ, and its Markdown table for a README.

{"step": 3000, "masks": false, "image": TOWER, "text": TOWER, "parameters": N, "macs": N, "sparsity": 0.25} with TOWER
{"width": D, "heads": [H of each layer], "neurons": [F of each layer], "parameters": N, "token_embedding": N,
"blocks": N, "sparsity": 0.25, "macs": N}. Counts of parameters and multiplications are whole numbers.
"""

from typing import Any

STUDENT_TABLE = "student.json"
TOWERS = ("image", "text")


def student_markdown(table: dict[str, Any]) -> str:
    """Return the table of a student.json in Markdown, millions of parameters and thousands of millions of MACs."""
    lines = [
        "| tower | D | H of each layer | F of each layer | parameters (M) | token embedding (M) | MACs (G) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in TOWERS:
        tower = table[name]
        sizes = [" ".join(map(str, tower[kind])) for kind in ("heads", "neurons")]
        counts = [f"{tower[kind] / 1e6:.2f}" for kind in ("parameters", "token_embedding")]
        macs = f"{tower['macs'] / 1e9:.3f}"
        lines.append(f"| {' | '.join([name, str(tower['width']), *sizes, *counts, macs])} |")
    lines.append(f"| sum | | | | {table['parameters'] / 1e6:.2f} | | {table['macs'] / 1e9:.3f} |")
    return "\n".join(lines)
