"""Rows and images that are left out, each with its reason."""

import hashlib
import json

import pytest
from small_ingest import config, rows_of, write_list
from web_server import make_image, serve

from pipeline.ingest.stage import ingest
from shards_spec.files import UserError


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


def test_selection_names_each_reason(server, tmp_path):
    wide = f"{server.url}/sized/200x50"
    rows = [
        (f"{server.url}/good/1", "a good caption"),
        (f"{server.url}/good/2?out", "no"),
        (f"{server.url}/good/3", "long " * 30),
        (f"{server.url}/good/4", "12345 !!! 678"),
        (f"{server.url}/good/5", "IMG_2041.jpg"),
        (f"{server.url}/sized/20x20", "a small image"),
        (wide, "a wide image"),
        (f"{server.url}/good/6?out", "an excluded link"),
        (f"{server.url}/good/9", "an excluded picture"),
        (f"{server.url}/good/1?copy", "a copy of the first"),
        (f"{server.url}/scene/1", "a scene"),
        (f"{server.url}/again/1", "the scene at another quality"),
        (f"{server.url}/scene/8", "another scene"),
    ]
    links, hashes = tmp_path / "links.txt", tmp_path / "hashes.txt"
    links.write_text(f"{server.url}/good/6?out\n\nhttp://elsewhere/x\n")
    hashes.write_text(hashlib.sha256(make_image(9)).hexdigest().upper() + "\n")
    source = write_list(tmp_path / "l.tsv", rows)
    options = {
        "min_caption_chars": 4,
        "max_caption_chars": 100,
        "sane_captions": True,
        "min_size": 30,
        "dedup": "near",
        "max_aspect_ratio": 3.0,
        "exclude": (str(links), str(hashes)),
        "shard_size": 50,
    }
    ingest(config(tmp_path / "D", source, **options))
    assert [row["error_message"] for row in rows_of(tmp_path / "D")] == [
        None,
        "caption too short",
        "caption too long",
        "caption has no letters",
        "caption is an address",
        "resize: picture too small",
        "resize: aspect ratio too large",
        "excluded address",
        "excluded picture",
        "duplicate image",
        None,
        "near-duplicate image",
        None,
    ]
    assert server.requests["good/6?out"] == server.requests["good/2?out"] == 0, "refused before a request"
    stats = json.loads((tmp_path / "D/raw/00000_stats.json").read_text())
    assert (stats["successes"], stats["failed_to_resize"], stats["failed_to_download"]) == (3, 2, 8)
    assert ingest(config(tmp_path / "D", source, **options)).made == 0
    links.write_text("http://elsewhere/x\n")
    with pytest.raises(UserError, match=r"another config .*exclusions: '[0-9a-f]{64}' before"):
        ingest(config(tmp_path / "D", source, **options))
    with pytest.raises(UserError, match=r"--exclude \S+nowhere: no such file"):
        ingest(config(tmp_path / "E", source, exclude=(str(tmp_path / "nowhere"),)))
