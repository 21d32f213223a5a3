"""A page of `clipmill report` as a reader sees it."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from pipeline.report import ReportConfig, report


class Page(HTMLParser):
    """Tags with their attributes, visible text, and text of table rows."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.source = Path(path).read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.words.append("\n" if tag == "tr" else "")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] != "style":
            self.words.append(data.replace("\n", " "))

    @property
    def text(self) -> str:
        """Visible text, a line per row of a table."""
        return re.sub(r"[ \t]+", " ", " ".join(self.words))


def page_of(path: Path, **options: Any) -> Page:
    """The page of a dataset, a run or a training in stages."""
    return Page(report(ReportConfig(str(path), **options)))
