"""The page of a search: a section per query with the images found, without scripts or network access."""

from dataclasses import dataclass

from pipeline.report import render, write_page
from pipeline.report.samples import thumbnail
from pipeline.search.sources import ImageEntry, ImageSource, ReadImage
from pipeline.search.stage import QueryResult, SearchResult
from shards_spec.files import DataError


@dataclass(frozen=True)
class FoundImage:
    """An image of the page: ``image`` is a data URI, None where it cannot be shown."""

    rank: int
    score: float
    name: str
    image: str | None
    width: int
    height: int


@dataclass(frozen=True)
class QuerySection:
    """A query of the page with the images found; ``image`` is the query itself where it is one."""

    query: str
    image: str | None
    found: list[FoundImage]


def write_search_page(path: str, result: SearchResult) -> str:
    """Write the page and return its path. Raises UserError when it cannot be written there."""
    sections = [_section(one, result.source) for one in result.results]
    write_page(path, render("search.html.j2", {"result": result, "sections": sections}), "--html")
    return path


def _section(result: QueryResult, source: ImageSource) -> QuerySection:
    """Images of a dataset are read tar by tar, hence sorted by name first."""
    names = sorted(hit.name for hit in result.hits)
    images = {entry.name: _shown(read) for entry, read in source.read(ImageEntry(name, 0) for name in names)}
    found = [
        FoundImage(rank, hit.score, hit.name, *images.get(hit.name, (None, 0, 0)))
        for rank, hit in enumerate(result.hits, start=1)
    ]
    return QuerySection(result.query, thumbnail(result.image)[0] if result.image else None, found)


def _shown(read: ReadImage) -> tuple[str | None, int, int]:
    try:
        return thumbnail(read())
    except (DataError, OSError):  # changed since it was embedded
        return None, 0, 0
