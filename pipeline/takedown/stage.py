"""`clipmill takedown`: samples out of every file of a dataset, with proof, and out of what ingest makes later."""

import logging
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from pipeline.core.taken_down import HASHES, TakedownHashes, read_takedown_hashes
from pipeline.takedown.config import TakedownConfig
from pipeline.takedown.edits import TakedownEdits, stage_folders
from pipeline.takedown.matches import Matches, find_matches
from pipeline.takedown.other_files import stage_other_files
from pipeline.takedown.proof import TakedownSearch
from pipeline.takedown.request import TakedownRequest, read_request
from pipeline.takedown.staging import TakedownJournal, TakedownStaging
from shards_spec import SPEC_VERSION
from shards_spec.files import DataError, UserError, exists, join, names, remove_stale, write_json
from shards_spec.layout import RAW, SHARDS, TAKEDOWN, VOCAB
from shards_spec.lock import locked
from shards_spec.manifest import check_no_takedown
from shards_spec.messages import counted

log = logging.getLogger(__name__)
LOCKS = (".takedown.lock", ".pack.lock")  # below ROOT; the second one is pack's
MOST_NAMED = 20  # keys in a line of the outcome


@dataclass
class TakedownOutcome:
    """What a takedown did: the path of its report (empty for a dry run), and lines for people.

    ``is_matched``: a line of the list names something of the dataset, or what was taken down before.
    """

    report: str
    lines: list[str] = field(default_factory=list)
    is_matched: bool = True


def takedown(config: TakedownConfig) -> TakedownOutcome:
    """Take down what the list names.

    Raises:
        UserError: There is no dataset or no such list, or another process writes ROOT.
        DataError: A file is broken; nothing was changed then. Or something is left after the takedown.
    """
    root = config.root
    if not exists(join(root, RAW)) and not exists(join(root, SHARDS)):
        raise UserError(f"{root}: no raw/ and no shards/ in it; it is not a clipmill dataset")
    request = read_request(config.list, config.by)
    if config.dry_run:
        return _preview(config, request)
    with ExitStack() as locks:
        for name in LOCKS:
            locks.enter_context(locked(join(root, name), root))
        staging = TakedownStaging(root)
        journal = staging.read_journal()
        if journal is not None:
            log.warning("takedown: an interrupted one goes on first")
            staging.follow(journal)
            _finish(root, staging, journal)
        staging.clear()
        try:
            journal = _prepare(config, request, staging)
        except BaseException:
            staging.clear()  # the files may be large, and the disk full
            raise
        staging.commit(journal)
        return _finish(root, staging, journal)


def _preview(config: TakedownConfig, request: TakedownRequest) -> TakedownOutcome:
    """What would go; nothing is written. Raises UserError where a takedown was interrupted."""
    root = config.root
    check_no_takedown(root)
    matches = find_matches(root, request, config.duplicates)
    report = {**_report(root, matches, []), **_unmatched(request, matches, read_takedown_hashes(root))}
    keys = f": {_some(report['samples'])}" if report["samples"] else ""
    first = f"takedown: {_counted_samples(report)} would go from {root}{keys}"
    return TakedownOutcome("", [first, *_notes(report)], _is_matched(report))


def _prepare(config: TakedownConfig, request: TakedownRequest, staging: TakedownStaging) -> TakedownJournal:
    """Stage all new files; nothing of the dataset changes yet."""
    root = config.root
    remove_stale(root)
    for _, folder in stage_folders(root):
        remove_stale(join(root, folder))
    matches = find_matches(root, request, config.duplicates)
    searched = _searched(request, matches)
    search = TakedownSearch(root, searched)
    known = read_takedown_hashes(root)
    hashes = known.extended(
        [*request.urls, *_unshared(matches, "url")],
        [*request.images, *_unshared(matches, "sha256")],
        [(row.url, row.caption) for row in matches.last_rows()],
        [row.uid for row in matches.last_rows() if row.uid],
    )
    staging.stage(HASHES, lambda new: write_json(new, hashes.as_json()))
    if matches.reasons:
        TakedownEdits(root, matches, staging).run()
    pages = stage_other_files(root, search, staging) if any(searched.values()) else []
    return TakedownJournal(
        staging.changes, {**_report(root, matches, pages), **_unmatched(request, matches, known)}, searched
    )


def _searched(request: TakedownRequest, matches: Matches) -> dict[str, list[str]]:
    """The values that must be in no file afterwards; not those that samples share that stay."""
    return {
        "key": sorted(matches.keys | matches.gone),
        "url": sorted({*request.urls, *_unshared(matches, "url")}),
        "sha256": sorted({*request.images, *_unshared(matches, "sha256")}),
    }


def _unshared(matches: Matches, name: str) -> set[str]:
    """Links or image hashes of what goes that no row has that stays."""
    values = {getattr(row, name) for row in chain.from_iterable(matches.rows.values())}
    return {value for value in values if value and value not in matches.shared}


def _unmatched(request: TakedownRequest, matches: Matches, known: TakedownHashes) -> dict[str, Any]:
    """How many entries the list has, and the lines that name nothing: taken down before, or never there."""
    entries = {("key", value): line for value, line in request.keys.items()}
    entries |= {("url", value): line for value, line in request.urls.items()}
    entries |= {("sha256", value): line for value, line in request.images.items()}
    before = {("key", key) for key in matches.gone}
    before |= {("key", uid) for uid in request.keys if known.has_uid(uid)}
    before |= {("url", url) for url in request.urls if known.has_url(url)}
    before |= {("sha256", image) for image in request.images if known.has_image(image)}
    unmatched = {entry: line for entry, line in entries.items() if entry not in matches.used - before}
    return {
        "requested": {"keys": len(request.keys), "urls": len(request.urls), "sha256": len(request.images)},
        "lines_taken_down_before": sorted(line for entry, line in unmatched.items() if entry in before),
        "lines_without_a_match": sorted(line for entry, line in unmatched.items() if entry not in before),
    }


def _report(root: str, matches: Matches, pages: list[str]) -> dict[str, Any]:
    """What the report says of samples and pages: keys, and no link, no hash of an image."""
    return {
        "spec_version": SPEC_VERSION,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "samples": dict(sorted(matches.reasons.items())),
        "rows_without_an_image": sorted(row.key for row in matches.last_rows() if row.status != "success"),
        "same_link_or_image": dict(sorted(matches.same_image.items())),
        "near_duplicates": dict(sorted(matches.near_duplicates.items())),
        "pages_deleted": pages,
        "vocabularies": names(join(root, VOCAB)),
    }


def _finish(root: str, staging: TakedownStaging, journal: TakedownJournal) -> TakedownOutcome:
    """Prove that all is gone, write the report, and delete the journal.

    Raises DataError when something is left; the report names it.
    """
    search = TakedownSearch(root, journal.searched)
    left = [f"{path}: {found}" for path, found in search.findings()]
    path = join(root, TAKEDOWN, f"report-{_next_number(root)}.json")
    files = [asdict(change) for change in journal.changes]
    write_json(path, {**journal.report, "files": files, "searched_files": search.files, "left": left})
    staging.clear()
    if left:
        raise DataError(
            f"takedown: what was to go is left in {counted(len(left), 'place')} below {root}, in files that no stage "
            f"writes: {'; '.join(left[:MOST_NAMED])}; delete or edit them, then run the same command again. The report "
            f"is {path}"
        )
    lines = [*_lines(root, journal, search.files), f"report: {path}"]
    return TakedownOutcome(path, lines, _is_matched(journal.report))


def _next_number(root: str) -> int:
    return 1 + sum(name.startswith("report-") for name in names(join(root, TAKEDOWN)))


def _lines(root: str, journal: TakedownJournal, searched_files: int) -> list[str]:
    """The outcome for people."""
    report = journal.report
    lines = [f"takedown: {_counted_samples(report)} gone from {root}"]
    changed = Counter(change.path.rpartition("/")[0] for change in journal.changes if change.removed)
    if changed:
        folders = ", ".join(f"{number} in {folder}" for folder, number in sorted(changed.items()))
        lines.append(f"files made without them: {folders}")
    lines += _notes(report)
    lines += [f"deleted: {page}; `clipmill report {root}` makes it again" for page in report["pages_deleted"]]
    if report["samples"] and report["vocabularies"]:
        lines.append(
            "vocabularies keep their counts, since models and class maps name their hash; `clipmill vocab` counts again"
        )
    if any(change.path.startswith(f"{SHARDS}/") for change in journal.changes):
        lines.append(
            "runs that read this dataset cannot be resumed bit-exactly: the order of samples depends on the sizes of "
            "shards. What a finished model learned is not taken back"
        )
    lines.append(
        f"searched {counted(searched_files, 'file')}: no key, link or image hash of these is left; raw/ keeps rows "
        "without content, which say `taken down`, and ingest leaves them out"
    )
    return lines


def _counted_samples(report: dict[str, Any]) -> str:
    without = len(report["rows_without_an_image"])
    rows = f" and {counted(without, 'row')} without an image" if without else ""
    return counted(len(report["samples"]) - without, "sample") + rows


def _is_matched(report: dict[str, Any]) -> bool:
    """Whether any line of the list names what is there or was."""
    requested: int = sum(report["requested"].values())
    return len(report["lines_without_a_match"]) < requested


def _notes(report: dict[str, Any]) -> list[str]:
    """Lines of the list that name nothing, and samples that stay and are like those that go."""
    lines = list[str]()
    if before := report["lines_taken_down_before"]:
        lines.append(f"taken down before: {counted(len(before), 'line')} of the list ({_some(before)})")
    if unmatched := report["lines_without_a_match"]:
        lines.append(f"not in this dataset: {counted(len(unmatched), 'line')} of the list ({_some(unmatched)})")
    if not _is_matched(report):
        lines.append(
            "no line of the list names anything here: is it of this dataset, and of the form that --list takes (a key, "
            "link or sha256 per line, or a TSV or Parquet file with such a column)?"
        )
    if same := report["same_link_or_image"]:
        lines.append(
            f"staying, with the same link or image: {_some(same)}; give the link or the sha256 in place of the key to "
            "take them down"
        )
    if near := report["near_duplicates"]:
        lines.append(
            f"staying, though dedup/ holds them for duplicates: {_some(near)}; --duplicates takes them down, too"
        )
    return lines


def _some(values: Any) -> str:
    shown = [str(value) for value in list(values)[:MOST_NAMED]]
    return ", ".join([*shown, f"and {len(values) - MOST_NAMED} more"] if len(values) > MOST_NAMED else shown)
