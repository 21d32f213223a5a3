#!/usr/bin/env python3
"""How right the synthetic captions are: things they name against the things that the scenes show.

python demo/named.py ROOT TRUTH.jsonl [CAPTIONER ...]

Precision: of the demo's nouns in the captions, the share that the image shows. Recall: of the shown things, the
share that the caption names. Both per captioner, over all captions.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq


def captions(folder: Path, root: Path) -> Iterator[tuple[str, list[str]]]:
    """(file name of the image, its captions) of one captioner."""
    for path in sorted(folder.glob("*.parquet")):
        raw = pq.read_table(root / "raw" / path.name, columns=["key", "url"]).to_pylist()
        files = {row["key"]: row["url"].rpartition("/")[2] for row in raw}
        for row in pq.read_table(path, columns=["key", "captions"]).to_pylist():
            yield files[row["key"]], row["captions"]


def rates(folder: Path, root: Path, truth: dict[str, set[str]]) -> tuple[int, float, float]:
    """Captions, precision and recall."""
    nouns = set().union(*truth.values())
    number = named = right = shown = 0
    for file, texts in captions(folder, root):
        for text in texts:
            found = nouns & set(re.findall(r"\w+", text.lower()))
            number, named, right = number + 1, named + len(found), right + len(found & truth[file])
            shown += len(truth[file])
    return number, right / max(1, named), right / max(1, shown)


def main() -> None:
    """Print a line per captioner."""
    root, lines = Path(sys.argv[1]), Path(sys.argv[2]).read_text().splitlines()
    scenes = map(json.loads, lines)
    truth = {scene["file"]: {thing["name"] for thing in scene["things"]} for scene in scenes}
    for folder in sorted((root / "captions").iterdir()):
        if not sys.argv[3:] or folder.name in sys.argv[3:]:
            number, precision, recall = rates(folder, root, truth)
            print(f"{folder.name}: {number} captions name things with precision {precision:.3f}, recall {recall:.3f}")


if __name__ == "__main__":
    main()
