#!/usr/bin/env python3
"""How accurate the synthetic captions are: the things that they name against the things that the scenes show.

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
    """Yield each image's file name and its captions by one captioner."""
    for path in sorted(folder.glob("*.parquet")):
        raw = pq.read_table(root / "raw" / path.name, columns=["key", "url"]).to_pylist()
        files = {row["key"]: row["url"].rpartition("/")[2] for row in raw}
        for row in pq.read_table(path, columns=["key", "captions"]).to_pylist():
            yield files[row["key"]], row["captions"]


def rates(folder: Path, root: Path, truth: dict[str, set[str]]) -> tuple[int, float, float]:
    """Return the number of captions, their precision and their recall."""
    nouns = set().union(*truth.values())
    captions_seen = 0
    named = 0
    correct = 0
    shown = 0
    for file, texts in captions(folder, root):
        for text in texts:
            named_here = nouns & set(re.findall(r"\w+", text.lower()))
            captions_seen += 1
            named += len(named_here)
            correct += len(named_here & truth[file])
            shown += len(truth[file])
    return captions_seen, correct / max(1, named), correct / max(1, shown)


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
