#!/usr/bin/env python3
"""Writes docs/data-path.svg, the diagram in README: which command reads what and writes what.

python docs/diagram.py

Folders are boxes, commands stand on arrows. Colours follow the reader's light or dark theme.
"""

from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH = 1096
HEIGHT = 390
MIDDLE = 190  # of the row with the main path
OFFSET = 32  # of lines that leave or reach the middle row, from the centre of the box
STYLE = """
  .page { fill: #ffffff } .box { fill: #f3f6f9; stroke: #8795a5 } .out { fill: #fbf3ec; stroke: #b98a63 }
  .name { fill: #1c2530; font: 600 15px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }
  .note { fill: #566372; font: 12.5px system-ui, "Segoe UI", Helvetica, Arial, sans-serif }
  .arrow { stroke: #8795a5; stroke-width: 1.6; fill: none } .head { fill: #8795a5 }
  .chip { fill: #2b6a8c } .command { fill: #ffffff; font: 600 13px ui-monospace, Menlo, Consolas, monospace }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 } .box { fill: #1a222c; stroke: #5d6b7a } .out { fill: #2a221b; stroke: #94704f }
    .name { fill: #e8edf2 } .note { fill: #a3b0bd } .arrow { stroke: #5d6b7a } .head { fill: #5d6b7a }
    .chip { fill: #7fb8d8 } .command { fill: #0d1117 }
  }
"""


@dataclass(frozen=True)
class Box:
    """A folder or a file: its centre, its width, its name and what is in it, a line each."""

    x: int
    y: int
    width: int
    name: str
    notes: tuple[str, ...]
    style: str = "box"

    @property
    def height(self) -> int:
        """Pixels: a line for the name and one per note."""
        return 32 + 17 * len(self.notes)

    @property
    def left(self) -> int:
        """Where arrows arrive."""
        return self.x - self.width // 2

    @property
    def right(self) -> int:
        """Where arrows leave."""
        return self.x + self.width // 2

    def svg(self) -> str:
        """The rectangle and its lines."""
        top = self.y - self.height // 2
        lines = [f'<text class="name" x="{self.x}" y="{top + 22}" text-anchor="middle">{escape(self.name)}</text>']
        for index, note in enumerate(self.notes):
            y = top + 41 + 17 * index
            lines.append(f'<text class="note" x="{self.x}" y="{y}" text-anchor="middle">{escape(note)}</text>')
        size = f'x="{self.left}" y="{top}" width="{self.width}" height="{self.height}"'
        return f'<rect class="{self.style}" {size} rx="8"/>' + "".join(lines)


BOXES = {
    "source": Box(90, MIDDLE, 152, "source", ("list of links, folder", "of images, Parquet,", "WebDataset tars")),
    "raw": Box(316, MIDDLE, 132, "raw/", ("images, a reason", "for each lost row")),
    "dedup": Box(470, 66, 116, "dedup/", ("duplicates",)),
    "captions": Box(470, 314, 116, "captions/", ("N per image,", "by CoCa")),
    "shards": Box(612, MIDDLE, 132, "shards/", ("image, captions,", "WordNet synsets")),
    "vocab": Box(766, 66, 116, "vocab/", ("synset classes",)),
    "teacher": Box(766, 314, 152, "teacher/", ("embeddings of views", "and captions")),
    "run": Box(908, MIDDLE, 116, "RUN", ("checkpoints,", "metrics")),
    "model": Box(1024, 66, 116, "open_clip", ("model folder",), "out"),
    "scores": Box(1024, 314, 116, "scores", ("zero-shot,", "retrieval"), "out"),
}
# from, to, command; none on what a command reads besides: pack reads dedup/, train reads teacher/
ARROWS = (
    ("source", "raw", "ingest"),
    ("raw", "dedup", "dedup"),
    ("raw", "captions", "caption"),
    ("raw", "shards", "pack"),
    ("dedup", "shards", ""),
    ("captions", "shards", ""),
    ("shards", "vocab", "vocab"),
    ("shards", "teacher", "cache"),
    ("shards", "run", "train"),
    ("vocab", "run", ""),
    ("teacher", "run", ""),
    ("run", "model", "export"),
    ("run", "scores", "eval"),
)


def arrow(start: Box, end: Box, command: str) -> str:
    """A line with a head, and the command on it: straight in a row, else with one corner."""
    towards = 1 if end.y > start.y else -1
    if start.y == end.y:
        path, head = f"M{start.right} {start.y}H{end.left - 9}", across(end.left, end.y)
        label = chip((start.right + end.left) // 2 - 4, start.y, command)
    elif start.y == MIDDLE:  # out of the top or bottom, into the left side
        x, y = start.x + OFFSET, start.y + towards * start.height // 2
        path, head = f"M{x} {y}V{end.y}H{end.left - 9}", across(end.left, end.y)
        label = chip(x, (y + end.y) // 2, command)
    else:  # out of the right side, into the bottom or top
        x, y = end.x - OFFSET, end.y - towards * end.height // 2
        path, label = f"M{start.right} {start.y}H{x}V{y - 9 * towards}", ""
        head = f"{x - 5},{y - 9 * towards} {x + 5},{y - 9 * towards} {x},{y}"
    return f'<path class="arrow" d="{path}"/><polygon class="head" points="{head}"/>{label}'


def across(x: int, y: int) -> str:
    """The points of a head that arrives from the left."""
    return f"{x - 9},{y - 5} {x - 9},{y + 5} {x},{y}"


def chip(x: int, y: int, command: str) -> str:
    """A command's name on a filled round rectangle."""
    width = 8 * len(command) + 14
    return (
        f'<rect class="chip" x="{x - width // 2}" y="{y - 11}" width="{width}" height="22" rx="11"/>'
        f'<text class="command" x="{x}" y="{y + 4.5}" text-anchor="middle">{command}</text>'
    )


def main() -> None:
    """Write the file."""
    title = "From a list of links to a trained student: which command reads and writes which folder"
    parts = [arrow(BOXES[start], BOXES[end], command) for start, end, command in ARROWS]
    parts += [box.svg() for box in BOXES.values()]
    note = "check and report read everything, at any time; submit runs each command on Slurm"
    parts.append(f'<text class="note" x="{WIDTH // 2}" y="{HEIGHT - 12}" text-anchor="middle">{note}</text>')
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    page = f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="10"/>'
    body = "\n".join([head, f"<title>{title}</title>", f"<style>{STYLE}</style>", page, *parts, "</svg>"])
    Path(__file__).with_name("data-path.svg").write_text(f"{body}\n")


if __name__ == "__main__":
    main()
