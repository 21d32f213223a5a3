"""A list's other columns in raw shards, conditions on them, several lists as one, options that mean nothing."""

import datetime
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_ingest import config, rows_of
from web_server import make_image, serve

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.ingest import listing
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.files import UserError
from shards_spec.manifest import read_done
from shards_spec.tar import read_shard

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


def records(server, count: int = 4) -> list[dict]:
    """As LAION's and DataComp's lists are; ``sha256`` and ``syn_0`` are names that shards have themselves."""
    return [
        {
            "uid": f"00{n}",
            "url": f"{server.url}/good/{n}",
            "caption": f"c{n}",
            "similarity": 0.25 + n / 100,
            "NSFW": "UNLIKELY" if n % 2 else "NSFW",
            "WIDTH": 100 + n,
            "sha256": f"theirs{n}",
            "syn_0": f"other{n}",
        }
        for n in range(count)
    ]


def write_list(folder: Path, rows: list[dict], form: str) -> Path:
    path = folder / f"list.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        sign = "," if form == "csv" else "\t"
        path.write_text(
            "".join(sign.join(map(str, line)) + "\n" for line in (rows[0], *(row.values() for row in rows)))
        )
    return path


def other(row: dict, form: str) -> dict:
    """The other columns of a record as a raw shard has them."""
    renamed = {"sha256": "source_sha256", "syn_0": "source_syn_0"}
    cells = {renamed.get(name, name): value for name, value in row.items() if name not in ("url", "caption")}
    return {name: str(value) for name, value in cells.items()} if form in ("csv", "tsv") else cells


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet"])
def test_other_columns_stand_in_raw_shards_and_their_json(server, tmp_path, form):
    listed = records(server)
    source = write_list(tmp_path, listed, form)
    root = tmp_path / "D"
    ingest(config(root, source, shard_size=3))
    for shard, part in enumerate((listed[:3], listed[3:])):
        rows = rows_of(root, shard)
        samples = list(read_shard(str(root / f"raw/{shard:05d}.tar")))
        assert [sample.meta for sample in samples] == rows
        expected = [other(row, form) for row in part]
        assert [{name: row[name] for name in expected[0]} for row in rows] == expected
        assert list(rows[0])[: len(expected[0])] == list(expected[0]), "first, as img2dataset has them"
        assert rows[0]["sha256"] != "theirs0"
    assert ingest(config(root, source, shard_size=3)).made == 0
    assert check(CheckConfig(str(root))) == []
    pack(PackConfig(str(root)))
    meta = next(read_shard(str(root / "shards/00000.tar"))).meta
    assert {name: meta[name] for name in other(listed[0], form)} == other(listed[0], form)
    assert check(CheckConfig(str(root))) == []
    listed[3]["similarity"] = 0.99
    write_list(tmp_path, listed, form)
    assert ingest(config(root, source, shard_size=3)).made == 1, "a changed cell is a changed row"


def test_parquet_types_stay_also_in_a_shard_of_nulls(server, tmp_path):
    columns = {
        "url": [f"{server.url}/good/{n}" for n in range(3)],
        "caption": list("abc"),
        "score": pa.array([None, None, 0.5], pa.float32()),
        "when": pa.array([None, None, 0], pa.timestamp("s")),
        "boxes": pa.array([None, None, [[0.5]]], pa.list_(pa.list_(pa.float64()))),
        "word": pa.array([None, None, "w"], pa.dictionary(pa.int8(), pa.string())),
        "nan": [1.0, float("nan"), 2.0],
        "image": pa.array([b"\xff\xd8"] * 3),
        "vector": [[0.1] * 768] * 3,
    }
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    ingest(config(tmp_path / "D", tmp_path / "l.parquet", shard_size=2, format="parquet", url_col="url"))
    schemas = [pq.read_schema(tmp_path / f"D/raw/0000{n}.parquet") for n in range(2)]
    assert schemas[0] == schemas[1]
    names = ["score", "when", "boxes", "word", "nan"]
    assert schemas[0].names[:5] == names, "no bytes, no long vectors"
    kinds = [pa.float32(), pa.timestamp("ms"), pa.list_(pa.list_(pa.float64())), pa.string(), pa.float64()]
    assert [schemas[0].field(name).type for name in names] == kinds
    (sample,) = read_shard(str(tmp_path / "D/raw/00001.tar"))
    assert [sample.meta[name] for name in names] == [0.5, "1970-01-01T00:00:00", [[0.5]], "w", 2.0]
    assert rows_of(tmp_path / "D", 1)[0]["when"] == datetime.datetime(1970, 1, 1)
    assert [sample.meta["nan"] for sample in read_shard(str(tmp_path / "D/raw/00000.tar"))] == [1.0, None]


def test_cells_of_several_types_are_text(server, tmp_path):
    rows = [
        {"url": f"{server.url}/good/{n}", "caption": "c", "x": x} for n, x in enumerate([1, "two", [3], {"a": 4}, None])
    ]
    ingest(config(tmp_path / "D", write_list(tmp_path, rows, "jsonl")))
    assert [row["x"] for row in rows_of(tmp_path / "D")] == ["1", "two", "[3]", '{"a": 4}', None]


def test_which_columns_are_kept(server, tmp_path):
    source = write_list(tmp_path, records(server), "parquet")
    ingest(config(tmp_path / "A", source, save_additional_columns=("NSFW", "similarity")))
    assert list(rows_of(tmp_path / "A")[0])[:3] == ["similarity", "NSFW", "caption"]
    ingest(config(tmp_path / "B", source, save_additional_columns=()))
    assert next(iter(rows_of(tmp_path / "B")[0])) == "caption"
    with pytest.raises(
        UserError, match=r"--save-additional-columns: the list has no other column 'nsfw'; it has \['uid'"
    ):
        ingest(config(tmp_path / "C", source, save_additional_columns=("nsfw",)))
    with pytest.raises(UserError, match=r"--save-additional-columns: \['NSFW', 'similarity'\] before, \[\] now"):
        ingest(config(tmp_path / "A", source, save_additional_columns=()))


@pytest.mark.parametrize("form", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize(
    ("where", "kept"),
    [
        (("similarity >= 0.27",), [2, 3]),
        (("similarity>0.27",), [3]),
        (("similarity < 0.26",), [0]),
        (("NSFW == UNLIKELY",), [1, 3]),
        (("NSFW != NSFW", "similarity <= 0.26"), [1]),
        (("NSFW == 'unlikely'",), [1, 3]),
        (("WIDTH == 102.0",), [2]),
        (("uid != 002",), [0, 1, 3]),
    ],
)
def test_conditions(server, tmp_path, form, where, kept):
    source = write_list(tmp_path, records(server), form)
    summary = ingest(config(tmp_path / "D", source, where=where))
    rows = rows_of(tmp_path / "D")
    assert [n for n, row in enumerate(rows) if row["status"] == "success"] == kept
    assert summary.counts["success"] == len(kept)
    assert {row["error_message"] for row in rows} <= {None, *(f"not {text}".replace("'", "") for text in where)} or (
        where == ("similarity>0.27",)
    )
    with pytest.raises(UserError, match=r"made with another config \(--where: "):
        ingest(config(tmp_path / "D", source))


def test_conditions_that_cannot_be_used(server, tmp_path):
    source = write_list(tmp_path, records(server), "csv")
    for text in ("similarity", "similarity >= high", ">= 3", ""):
        with pytest.raises(UserError, match=r"--where '.*' is not a condition.*such as 'similarity >= 0.3'"):
            ingest(config(tmp_path / "D", source, where=(text,)))
    with pytest.raises(UserError, match=r"--where: the list has no other column 'score'; it has \['uid', 'similarity'"):
        ingest(config(tmp_path / "D", source, where=("score > 1",)))
    assert ingest(config(tmp_path / "D", source, where=("similarity > 0",))).counts["success"], "no shard was left"
    rows = [*records(server), {"url": f"{server.url}/good/9", "caption": "c"}]
    summary = ingest(config(tmp_path / "E", write_list(tmp_path, rows, "jsonl"), where=("similarity > 0",)))
    assert summary.counts == {"success": 4, "not similarity > 0": 1}, "a row without the cell"


def test_finished_shards_of_the_version_before_stand(server, tmp_path, monkeypatch):
    """It kept no other columns and hashed rows without them."""
    source, root = write_list(tmp_path, records(server), "csv"), tmp_path / "D"
    with monkeypatch.context() as patch:
        patch.setattr(listing, "json_value", lambda cell: None)
        patch.setattr("pipeline.ingest.raw_shard.kept_columns", lambda *_: {})
        patch.setattr(listing, "any", lambda _: False, raising=False)
        ingest(config(root, source))
    assert set(read_done(str(root / "raw"), 0).inputs) == {"rows"}
    assert ingest(config(root, source)).made == 0
    assert ingest(config(root, source, overwrite=True)).made == 1
    assert set(read_done(str(root / "raw"), 0).inputs) == {"rows", "columns"}


def test_rows_tried_again_keep_their_columns(server, tmp_path):
    rows = [{**row, "url": f"{server.url}/status/503/{n}"} for n, row in enumerate(records(server))]
    source, root = write_list(tmp_path, rows, "parquet"), tmp_path / "D"
    ingest(config(root, source, retries=0))
    ingest(config(root, source, retries=0, retry_failed=True))
    before, after = pq.read_table(root / "raw/00000.parquet"), pq.read_table(root / "raw/00001.parquet")
    assert after.schema == before.schema
    assert after.to_pylist() == before.to_pylist()


# several lists


def test_several_lists_are_one(server, tmp_path):
    names = ["b.csv", "a.csv", "c.csv"]
    for n, name in enumerate(names):
        (tmp_path / name).write_text(f"url,caption\n{server.url}/good/{n},c{n}\n")
    paths = [str(tmp_path / name) for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "clipmill", "ingest", str(tmp_path / "D"), "--source", *paths, "--allow-private"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [row["caption"] for row in rows_of(tmp_path / "D")] == ["c0", "c1", "c2"], "in the order given"
    assert json.loads((tmp_path / "D/dataset.json").read_text())["source"] == " ".join(paths)
    (tmp_path / "d.jsonl").write_text('{"url": "http://h/1", "caption": "c"}\n')
    with pytest.raises(UserError, match=r"lists of several forms \(.*b.csv is csv, .*d.jsonl is jsonl\)"):
        ingest(IngestConfig(str(tmp_path / "E"), (paths[0], str(tmp_path / "d.jsonl"))))
    for name in ("S", "T"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(make_image(1))
    with pytest.raises(UserError, match="several sources of form folder; only lists are read together"):
        ingest(IngestConfig(str(tmp_path / "E"), (str(tmp_path / "S"), str(tmp_path / "T"))))


def test_tars_that_the_shell_named_are_read_in_their_order(tmp_path):
    for name in ("b", "a"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for ending, data in (("jpg", make_image(1)), ("txt", name.encode())):
                member = tarfile.TarInfo(f"0.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    ingest(IngestConfig(str(tmp_path / "D"), (f"{tmp_path}/b.tar", f"{tmp_path}/a.tar"), workers=1))
    found = [(row["caption"], row["url"], row["status"]) for row in rows_of(tmp_path / "D")]
    assert found == [("b", "b.tar/0", "success"), ("a", "a.tar/0", "success")]
    with pytest.raises(UserError, match=r"no such file or folder; give a glob \('\*.tar'\), or leave the quotes away"):
        ingest(IngestConfig(str(tmp_path / "E"), (f"{tmp_path}/{{a..b}}.tar",)))


# options and sources that mean nothing


def tar_of(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.jpg": make_image(1)}, r"no column 'img'; its samples have \[\]; change --url-col"),
        ({"0.jpg": make_image(1), "0.txt": b"a"}, r"no column 'img'; its samples have \['txt'\]; change --url-col"),
        ({"0.jpg": make_image(1), "0.img": make_image(2)}, "--url-col 'img' holds no text in the first 1 sample"),
        ({"0.jpg": make_image(1), "0.json": b'{"img": 3}'}, "--url-col 'img' holds no text in the first 1 sample"),
        ({"0.jpg": make_image(1), "0.json": b'{"img": null}'}, "--url-col 'img' holds no text in the first 1 sample"),
    ],
)
def test_a_column_of_addresses_that_a_tar_has_not_is_refused(tmp_path, members, message):
    source = tar_of(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=message):
        ingest(config(tmp_path / "D", source, url_col="img"))
    assert not (tmp_path / "D").exists()
    source = tar_of(tmp_path / "y.tar", {"0.jpg": make_image(1), "0.json": b'{"img": "http://h/1"}'})
    ingest(config(tmp_path / "D", source, url_col="img"))
    assert rows_of(tmp_path / "D")[0]["url"] == "http://h/1"


@pytest.mark.parametrize("form", ["cc3m", "cc12m", "txt", "img2dataset"])
@pytest.mark.parametrize("option", ["caption_col", "url_col"])
def test_names_of_columns_that_have_none_are_refused(tmp_path, form, option):
    (tmp_path / "l.tsv").write_text("a\thttp://h/1\n")
    message = f"--{option.replace('_', '-')} 'x' means nothing for a source of form {form}"
    if (form, option) == ("txt", "url_col"):
        message = "no column 'x'; its first line is"  # a list of addresses may have a header
    with pytest.raises(UserError, match=message):
        ingest(config(tmp_path / "D", tmp_path / "l.tsv", format=form, **{option: "x"}))


def test_a_source_that_is_root_is_refused(tmp_path):
    root = tmp_path / "D"
    root.mkdir()
    (root / "x.jpg").write_bytes(make_image(1))
    (tmp_path / "link").symlink_to(root)
    for source in (
        root,
        f"{root}/",
        tmp_path / "link",
        root / "shards",
        root / "shards/00000.tar",
        root / "captions/x",
    ):
        with pytest.raises(UserError, match="is ROOT itself, or what its stages write: give another folder as ROOT"):
            ingest(config(root, source))
    with pytest.raises(UserError, match="is ROOT itself"):
        ingest(config("memory://same/D/", "memory://same/D"))
    assert [path.name for path in root.iterdir()] == ["x.jpg"]
    (root / "images").mkdir()
    (root / "images/x.jpg").write_bytes(make_image(1))
    assert ingest(config(root, root / "images")).counts == {"success": 1}
