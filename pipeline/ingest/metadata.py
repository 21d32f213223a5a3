"""Files that list a folder's images with their captions, as they are published beside images.

Hugging Face's ``metadata.csv``, ``.jsonl``, ``.parquet`` (``file_name``, ``text`` or ``caption``); Flickr's
``captions.txt``, ``results.csv`` and ``.token``; COCO's and Karpathy's JSON. Their captions are in memory at once.
"""

import json
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from pipeline.ingest.cells import NO_URL, shown
from pipeline.ingest.parquet_lists import parquet_rows
from pipeline.ingest.rows import (
    CAPTION_NAMES,
    NOT_FOUND,
    NOT_UTF8,
    Caption,
    Row,
    decode_text,
    find_column,
    json_text,
)
from pipeline.ingest.source_io import lines, open_parquet
from pipeline.ingest.text_lists import (
    HEAD_LINES,
    NO_COLUMN,
    captions_of,
    delimited_rows,
    header_of,
    json_rows,
)
from shards_spec.files import UserError, exists, is_url, join, open_read
from shards_spec.library_errors import no_regular_file, parquet_errors, parse_json
from shards_spec.names import IMAGE_ENDINGS, clean_name, file_ending, is_image
from shards_spec.sample import parse_object

log = logging.getLogger(__name__)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
LISTS = re.compile(
    r"(?!.*lemma)"  # Flickr8k's captions come in basic forms, too
    r"(.*caption.*\.(txt|csv|tsv|json)|metadata\.(tsv|json)|results.*\.(csv|token)|.*\.token(\.txt)?|dataset_.*\.json)",
    re.IGNORECASE,
)
TEXT_NAMES = ("text", "caption", *CAPTION_NAMES, "captions", "texts", "comment", "sentence")
FILE_NAMES = ("file_name", "filename", "image", "image_name", "file", "img", "filepath", "image_path")
TOKEN = re.compile(r"(?P<file>[^\t]+?\.\w+)(#\d+)?\t(?P<text>.*)")  # Flickr8k.token.txt
MAX_JSON_BYTES = 1 << 27  # COCO's captions of 2017 have 92 MB
NO_FILE = "metadata row without file_name"
TRIED_FILES, TRIED_FOLDERS = 5, 100  # to find where the images of a list lie

Entry = tuple[str | None, list[Caption]]  # file name, its captions


def is_list(name: str, files: dict[str, Any]) -> bool:
    """Whether a file of a folder may list images; ``captions.txt`` beside ``captions.jpg`` does not."""
    if name.lower() in METADATA:
        return True
    stem = os.path.splitext(name)[0]
    if not LISTS.fullmatch(name):
        return False
    return not any(f"{stem}{end}" in files for ending in IMAGE_ENDINGS for end in (ending, ending.upper()))


def read_lists(folder: str, found: list[str], prefixes: list[str], given: str | None) -> dict[str, list[Caption]]:
    """Path below the folder to its captions in the lists ``found``; of a line without a file, the line's number.

    A metadata file comes before those above it and before other lists; of several others each text counts once.
    ``prefixes`` are those of all folders, ``given`` names the caption column. Raises UserError for a list that cannot
    be read or has not the columns.
    """
    captions = dict[str, list[Caption]]()
    for below in found:
        prefix, _, name = below.rpartition("/")
        prefix += "/" if prefix else ""
        path = join(folder, below)
        if (reason := no_regular_file(path)) is not None:
            log.warning("%s: left out, it %s", path, reason)
            continue
        entries = list((_table_entries if name.lower() in METADATA else _list_entries)(path, given) or ())
        if name.lower() not in METADATA:
            where = _where(folder, prefix, prefixes, [file for file, _ in islice(entries, TRIED_FILES) if file])
            if where is None:
                why = "none of its images is here" if entries else "it is no list of captions"
                log.warning("%s: left out, %s", path, why)
                continue
            prefix = where
        listed = dict[str, list[Caption]]()
        for number, (file, own) in enumerate(entries, start=1):
            if file is None:
                problem = next((one.problem for one in own if one.problem == NO_COLUMN), NO_FILE)
                listed[f"{below}:{number}"] = [Caption(None, problem)]
            else:
                listed.setdefault(prefix + _plain(join(folder, prefix), file), []).extend(own)
        for inside, own in listed.items():
            before = captions.get(inside, []) if name.lower() not in METADATA else []
            captions[inside] = before + [one for one in own if not before or one not in before]
    return captions


def _plain(folder: str, file: str) -> str:
    """A file name as a path below the folder, in the first of its spellings under which a file is there.

    Backslashes are Windows' separators; accents may be letters of their own (macOS) or not. Names of remote files are
    not looked up.
    """
    slashes = file.replace("\\", "/")
    if not is_url(folder):
        spellings = (file, slashes, *(unicodedata.normalize(form, slashes) for form in ("NFC", "NFD")))
        slashes = next((name for name in spellings if os.path.lexists(os.path.join(folder, name))), slashes)
        if os.path.isabs(slashes) and os.path.commonpath((os.path.abspath(folder), slashes)) == os.path.abspath(folder):
            slashes = os.path.relpath(slashes, folder)
    return clean_name(os.path.normpath(slashes).replace(os.sep, "/"))


def _where(folder: str, own: str, prefixes: list[str], files: list[str]) -> str | None:
    """The prefix below which the files lie: the list's own, one in it, the one above, or one beside."""
    above = own.rstrip("/").rpartition("/")[0]
    above += "/" if above else ""
    near = [own, *(prefix for prefix in prefixes if prefix.startswith(own)), above]
    near += [prefix for prefix in prefixes if prefix.startswith(above)]
    fitting = (
        prefix
        for prefix in list(dict.fromkeys(near))[:TRIED_FOLDERS]
        if any(exists(join(folder, prefix + _plain(join(folder, prefix), file))) for file in files)
    )
    first = next(fitting, None)
    if first is not None and first != own and not is_url(folder) and (other := next(fitting, None)) is not None:
        log.warning("%s: files of a list here are in %s and in %s; the first ones get its captions",
                    join(folder, own), first, other or folder)  # fmt: skip
    return first


# tables: Hugging Face's metadata, Flickr's lists


def _table_entries(path: str, given: str | None) -> Iterator[Entry] | None:
    """What the readers of lists make of a table; None for a file that is no list of ours.

    Raises UserError for a metadata file without the columns, and as those readers do.
    """
    names = [name.strip() for name in _names(path, given)]
    strict = os.path.basename(path).lower() in METADATA
    file = find_column(None, ("file_name",) if strict else FILE_NAMES, names)
    text = find_column(given, TEXT_NAMES, names)
    if not names and path.lower().endswith(".jsonl") and any(map(bytes.strip, lines(path))):
        raise UserError(f"{path}: none of its first lines is a JSON object; it needs file_name and text")
    if strict and names and file is None:
        raise UserError(f"{path}: its columns are {shown(names)}; it needs file_name and text")
    if strict and names and text is None and given is not None:
        raise UserError(f"{path}: no column {given!r}; its columns are {shown(names)}; change --caption-col")
    if file is None or (text is None and not strict):
        return None
    columns = names[file if text is None else text], names[file]
    reader = {".jsonl": json_rows, ".parquet": parquet_rows}.get(file_ending(path), delimited_rows)
    return _entries(reader(path, columns), has_text=text is not None)


def _names(path: str, given: str | None) -> list[str]:
    """The columns of a table; of JSON Lines, of several for captions those that most of the first lines have."""
    ending = file_ending(path)
    if ending == ".parquet":
        with parquet_errors(path, given=True), open_parquet(path) as table:
            names: list[str] = table.schema_arrow.names
        return names
    head = list(islice((line for line in lines(path) if line.strip()), HEAD_LINES))
    if ending == ".jsonl":
        counts = Counter(name for line in head for name in _object(line))
        most = max((count for name, count in counts.items() if name.lower() in TEXT_NAMES), default=0)
        return [name for name, count in counts.items() if given or name.lower() not in TEXT_NAMES or count == most]
    return header_of(head[0], (given, None))[0] if head else []


def _object(line: bytes) -> dict[str, Any]:
    try:
        return parse_object(line)
    except ValueError:
        return {}


def _entries(rows: Iterator[Row], has_text: bool) -> Iterator[Entry]:
    for row in rows:
        if row.url is None and row.caption is None and row.problem != NO_URL:
            continue  # an empty line
        caption = row.caption.strip() if row.caption is not None and has_text else None
        problem = None if row.problem == NOT_FOUND else row.problem  # where the image lies, is found out later
        yield row.url, [Caption(caption, problem, row.note)]


# lists of Flickr, COCO, Karpathy


def _list_entries(path: str, given: str | None) -> Iterator[Entry] | None:
    """File names with captions; None for a file that is no such list."""
    if path.lower().endswith(".json"):
        with open_read(path) as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise UserError(f"{path}: more than {MAX_JSON_BYTES >> 20} MiB of JSON; write it as metadata.jsonl")
        return _json_entries(parse_json(path, data, given=True), given)
    if TOKEN.fullmatch(next(lines(path), b"").decode(errors="replace")):
        return _token_entries(path)
    return _table_entries(path, given)


def _captions(text: str) -> list[Caption]:
    plain, broken = decode_text(text.encode(errors="surrogateescape"))
    return [Caption(plain or None, NOT_UTF8 if broken else None)]


def _token_entries(path: str) -> Iterator[Entry]:
    for line in lines(path):
        if found := TOKEN.fullmatch(line.decode(errors="surrogateescape")):
            yield found["file"], _captions(found["text"].strip())
        elif line.strip():
            yield None, []


def _json_entries(value: Any, given: str | None) -> Iterator[Entry] | None:
    if isinstance(value, dict) and isinstance(value.get("images"), list):
        images = [image for image in value["images"] if isinstance(image, dict)]
        if isinstance(annotations := value.get("annotations"), list):
            return _coco_entries(images, [one for one in annotations if isinstance(one, dict)], given or "caption")
        return _karpathy_entries(images) if any("sentences" in image for image in images) else None
    if isinstance(value, dict) and all(isinstance(name, str) and is_image(name) for name in value):
        return ((_name(name), captions_of(caption)) for name, caption in value.items())
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        names = list(value[0])
        file, text = find_column(None, FILE_NAMES, names), find_column(given, TEXT_NAMES, names)
        if file is not None and text is not None:
            return ((_name(row.get(names[file])), captions_of(row.get(names[text]))) for row in value)
    return None


def _name(value: object) -> str | None:
    """A file name out of JSON, where half surrogates are possible."""
    return json_text(value)[0] or None if isinstance(value, str) else None


def _coco_entries(images: list[Any], annotations: list[Any], column: str) -> Iterator[Entry] | None:
    if not any(column in annotation for annotation in annotations):
        return None
    texts = dict[str, list[Caption]]()
    for annotation in annotations:
        texts.setdefault(json.dumps(annotation.get("image_id")), []).extend(captions_of(annotation.get(column)))
    ids = [json.dumps(image.get("id")) for image in images]
    found = (
        (_name(image.get("file_name")), texts.get(own, [Caption()])) for image, own in zip(images, ids, strict=True)
    )
    known = set(ids)
    nobodys = ((None, [caption]) for own, captions in texts.items() if own not in known for caption in captions)
    return chain(found, nobodys)


def _karpathy_entries(images: list[Any]) -> Iterator[Entry]:
    for image in images:
        file = _name(image.get("filename"))
        folder = image.get("filepath")
        sentences = image.get("sentences")
        texts = [one.get("raw") for one in sentences if isinstance(one, dict)] if isinstance(sentences, list) else []
        name = _name(f"{folder}/{file}") if isinstance(folder, str) and file else file
        yield name, [caption for text in texts for caption in captions_of(text)] or [Caption()]
