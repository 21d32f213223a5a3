"""Captions: what is fixed, what is dropped, what stays as it is."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import skip_or_fail
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import draw

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.labels.wordnet import load_wordnet
from pipeline.pack.caption_cleaning import EMPTY_AFTER_CLEANING, FIXES, clean_caption, strict_json
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.files import UserError, join, json_bytes, sha256_file
from shards_spec.manifest import Done, write_stage
from shards_spec.sample import Sample
from shards_spec.tar import read_shard, write_shard


@pytest.mark.parametrize(
    ("caption", "stored", "fix"),
    [
        ("Tom &amp; Jerry", "Tom & Jerry", "html entities"),
        ("the dog&amp;#39;s toy", "the dog's toy", "html entities"),
        ("&lt;b&gt;dog&lt;/b&gt;", "<b>dog</b>", "html entities"),
        ("dog &#55357;&#56832;", "dog 😀", "html entities"),
        ("a&nbsp;dog&#x21;", "a\u00a0dog!", "html entities"),
        ("a\x00 d\x08og", "a dog", "control characters"),
        ("it\x92s a dog", "it’s a dog", "control characters"),
        ("two\x0cpages\x1fmore\u2028lines", "two pages more lines", "control characters"),
        ("\u202egod\u202c a", "god a", "invisible marks"),
        ("שלום\u200f!", "שלום!", "invisible marks"),
        ("\ufeffa do\u200bg", "a dog", "invisible marks"),
        ("a wel\u00adcome mat", "a welcome mat", "invisible marks"),
        ("dog \ud83d\ude00 \ud83d", "dog 😀", "surrogates"),
    ],
    ids=ascii,
)
def test_fixes(caption, stored, fix):
    assert clean_caption(caption) == (stored, [fix])
    assert clean_caption(stored) == (stored, [])


@pytest.mark.parametrize(
    "caption",
    [
        "a dog",
        "AT&T and R&B, 5 &copy 6 &bogus; <b>",
        " spaces  stay ",
        "two\nlines\tand a tab\r\n",
        "👩\u200d👩\u200d👧\u200d👦 ❤\ufe0f",
        "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
        "می\u200cخواهم",
        "שלום עולם",
        "مرحبا، كلب",
        "नमस्ते क्\u200dष",
        "犬と猫",
        "café",
        "e\u0301",
        "“quotes” – ’",
        "x\u00a0y",
        "",
        "   ",
    ],
    ids=ascii,
)
def test_what_nobody_may_touch(caption):
    assert clean_caption(caption) == (caption, [])


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(), max_size=30) | st.text("a &#;x39amp\x00\x92\u200b\ud83d\ude00\u202e", max_size=30))
def test_what_is_stored_is_utf8_and_names_its_fixes(caption):
    stored, fixes = clean_caption(caption)
    stored.encode()
    assert (stored != caption) == bool(fixes)
    assert set(fixes) <= set(FIXES)
    assert not set(clean_caption(stored)[1]) & {"surrogates", "control characters", "invisible marks"}


def test_json_with_half_surrogates_can_be_written():
    meta = json.loads('{"alt": "\\ud83d x", "n": [1, {"\\ud83d\\ude00": null}], "pair": "\\ud83d\\ude00"}')
    assert json.loads(json_bytes(strict_json(meta))) == {"alt": " x", "n": [1, {"😀": None}], "pair": "😀"}
    plain = {"a": [1, None, "x"]}
    assert strict_json(plain) == plain


CAPTIONS = {
    "0": b"a dog &amp; a cat",
    "1": "\u200b&nbsp;\u200f".encode(),
    "2": b"",
    "3": b"dog " * 2500 + b"x",
    "4": b"dog " * 2500,
    "5": b"\xff\xfe dog",
    "6": "dog \ud83d\ude00\x00".encode(errors="surrogatepass"),
    "7": "\u202ea\u202c dog".encode(),
    "8": b"   ",
    "9": b"a plain dog, kept as it is ",
}


def write_captions(root):
    image = draw("x")[0]
    meta = b'{"alt": "\\ud83d", "width": 9, "height": 9}'
    samples = [Sample(key, {"jpg": image, "txt": text, "json": meta}) for key, text in CAPTIONS.items()]
    _, digest = write_shard(join(root, "raw/00000.tar"), samples)
    rows = [{"key": key, "status": "success"} for key in CAPTIONS]
    pq.write_table(pa.Table.from_pylist(rows), join(root, "raw/00000.parquet"))
    outputs = {"raw/00000.tar": digest, "raw/00000.parquet": sha256_file(join(root, "raw/00000.parquet"))}
    Done("ingest", 0, {}, {"success": len(rows)}, {}, outputs).write(join(root, "raw"))
    write_stage(root, "ingest", {"config": {}, "shards": 1, "counts": {"success": len(rows)}}, "test")


def test_pack_fixes_drops_and_counts(tmp_path):
    try:
        load_wordnet()
    except UserError as error:
        skip_or_fail(str(error))
    root = str(tmp_path / "ds")
    write_captions(root)
    summary = pack(PackConfig(root, workers=1))
    assert summary.counts == {
        EMPTY_AFTER_CLEANING: 1,
        "caption or json does not parse": 1,
        "caption too long": 1,
        "no caption": 2,
        "success": 5,
    }
    fixes = {"control characters": 1, "html entities": 1, "invisible marks": 1, "surrogates": 1}
    assert summary.counters == {f"{name} mended": number for name, number in fixes.items()}
    final = {sample.key: sample for sample in read_shard(join(root, "shards/00000.tar"))}
    assert {key: sample.caption for key, sample in final.items() if key != "4"} == {
        "0": "a dog & a cat",
        "6": "dog 😀",
        "7": "a dog",
        "9": "a plain dog, kept as it is ",
    }
    assert final["0"].meta["synsets"] == [["n02084071", "n02121620"]]
    assert final["9"].meta["alt"] == ""
    table = pq.read_table(join(root, "shards/00000.parquet"))
    assert table.column("caption").to_pylist() == [sample.caption for sample in final.values()]
    assert check(CheckConfig(root)) == []
    assert pack(PackConfig(root, workers=1, max_caption_chars=0, overwrite=True)).counts["success"] == 6
    assert pack(PackConfig(root, workers=1, max_caption_chars=0)).made == 0
    with pytest.raises(UserError, match="--max-caption-chars: 0 before, 10000 now"):
        pack(PackConfig(root, workers=1))
    with pytest.raises(UserError, match="--max-caption-chars -1: must be 0"):
        PackConfig(root, max_caption_chars=-1)
