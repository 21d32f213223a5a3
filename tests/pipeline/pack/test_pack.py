"""pack: captions of several captioners, captions chosen by similarity, final shards of equal size."""

import io
import itertools
import json
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import tree, vouch, write_raw

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.core.runner import ShardsFailed
from pipeline.dedup.config import DedupConfig
from pipeline.dedup.stage import dedup
from pipeline.pack.config import PackConfig
from pipeline.pack.selection import DISSIMILAR
from pipeline.pack.stage import pack
from shards_spec.files import UserError, join, names, read_bytes, read_json, sha256_file, write_bytes, write_json
from shards_spec.layout import shard_name
from shards_spec.manifest import Done, shard_ids, shard_sizes, write_stage
from shards_spec.sample import Sample
from shards_spec.tar import read_shard, shard_keys, write_shard

SHARDS, PER_SHARD = 3, 5  # samples; write_raw's sixth input failed


def write_captions(root: str, name: str, described: dict[str, tuple[list[str], list[float], float | None]]) -> None:
    """ROOT/captions/NAME as `caption --similarity` leaves it, for every raw shard; keys not described have "said"."""
    shards = shard_ids(join(root, "raw"))
    for shard in shards:
        rows = []
        for key in shard_keys(join(root, f"raw/{shard_name(shard)}.tar")):
            captions, similarities, original = described.get(key, ([f"{name} said"], [0.5], 0.5))
            rows.append(
                {"key": key, "captions": captions, "similarities": similarities, "original_similarity": original}
                | {"logprobs": [0.0] * len(captions), "num_tokens": [1] * len(captions)}
            )
        path = f"captions/{name}/{shard_name(shard)}.parquet"
        write_bytes(join(root, path), b"")
        floats, own = pa.list_(pa.float32()), pa.float32()
        kinds = {"key": pa.string(), "captions": pa.list_(pa.string()), "logprobs": floats, "num_tokens": floats}
        kinds |= {"similarities": floats, "original_similarity": own}
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(list(kinds.items()))), join(root, path))
        outputs = {path: sha256_file(join(root, path))}
        Done(f"caption/{name}", shard, {}, {"success": len(rows)}, {}, outputs).write(join(root, f"captions/{name}"))
    total = sum(len(shard_keys(join(root, f"raw/{shard_name(shard)}.tar"))) for shard in shards)
    write_stage(root, f"caption/{name}", {"config": {}, "shards": len(shards), "counts": {"success": total}})


def samples_of(root: str, folder: str) -> list[Sample]:
    samples = list[Sample]()
    for shard in shard_ids(join(root, folder)):
        samples += shard_of(root, shard, folder)
    return samples


def final(root: str) -> list[Sample]:
    return samples_of(root, "shards")


def shard_of(root: str, shard: int, folder: str = "shards") -> list[Sample]:
    return list(read_shard(join(root, folder, f"{shard_name(shard)}.tar")))


def raw(root: str) -> list[Sample]:
    return samples_of(root, "raw")


def without_captions(root: str, keys: set[str]) -> None:
    """Raw samples lose their caption; the done-records tell the new hashes."""
    for shard in shard_ids(join(root, "raw")):
        path = f"raw/{shard_name(shard)}.tar"
        changed = [Sample(s.key, {**s.members, "txt": b"" if s.key in keys else s.members["txt"]}) for s in raw(root)]
        write_shard(join(root, path), [s for s in changed if s.key[:5] == shard_name(shard)])
        vouch(root, "raw", shard, path)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> str:
    root = str(tmp_path_factory.mktemp("data") / "ds")
    write_raw(root, SHARDS, per_shard=PER_SHARD + 1)
    write_captions(root, "one", {})
    return root


@pytest.fixture
def root(made, tmp_path) -> str:
    return shutil.copytree(made, tmp_path / "ds").as_posix()


# captioners


def test_captions_of_several_captioners_stand_in_the_order_named(root):
    write_captions(root, "two", {"000000001": (["first", "", "second"], [0.1, 0.1, 0.1], None)})
    assert pack(PackConfig(root, captioner=("two", "one"), workers=1)).counts == {"success": SHARDS * PER_SHARD}
    sample = shard_of(root, 0)[1]
    assert [sample.meta[f"syn_{i}"] for i in range(3)] == ["first", "second", "one said"]
    assert len(sample.meta["synsets"]) == 4
    assert pq.read_table(join(root, "shards/00000.parquet")).column("synthetic")[1].as_py() == sample.captions[1:]
    assert read_json(join(root, "dataset.json"))["stages"]["pack"]["config"]["captioner"] == ["two", "one"]
    assert check(CheckConfig(root)) == []
    with pytest.raises(UserError, match=r"--captioner: \['two', 'one'\] before, \['one', 'two'\] now"):
        pack(PackConfig(root, captioner=("one", "two"), workers=1))


def test_a_shard_is_made_again_when_any_of_its_captions_changed(root):
    write_captions(root, "two", {})
    pack(PackConfig(root, captioner=("one", "two"), workers=1))
    write_captions(root, "two", {"000010001": (["another"], [0.5], 0.5)})
    assert pack(PackConfig(root, captioner=("one", "two"), workers=1)).made == 1
    assert shard_of(root, 1)[1].meta["syn_1"] == "another"


def test_a_image_counts_as_described_when_one_captioner_could(root):
    nothing = ([], [], None)
    write_captions(root, "two", {"000000000": nothing, "000000001": nothing})
    write_captions(root, "three", {"000000001": nothing})
    summary = pack(PackConfig(root, captioner=("two", "three"), workers=1))
    assert summary.counts == {"picture does not decode": 1, "success": SHARDS * PER_SHARD - 1}


def test_the_only_captioner_is_the_default_and_none_stands_alone(root):
    pack(PackConfig(root, workers=1))
    assert read_json(join(root, "dataset.json"))["stages"]["pack"]["config"]["captioner"] == "one"
    with pytest.raises(UserError, match=r"no captions/none in .*'none' cannot be combined with others"):
        pack(PackConfig(root, captioner=("one", "none")))
    with pytest.raises(UserError, match="--captioner one one: name each once"):
        pack(PackConfig(root, captioner=("one", "one")))
    assert pack(PackConfig(root, captioner=("none",), workers=1, overwrite=True)).made == SHARDS
    assert read_json(join(root, "dataset.json"))["stages"]["pack"]["config"]["captioner"] is None


# similarity


def test_captions_below_the_similarity_are_left_out(root):
    nan = float("nan")
    described = {
        "000000000": (["good", "bad", "", "broken"], [0.25, 0.24, 0.1, nan], 0.3),
        "000000001": (["good"], [0.3], 0.2),  # the original goes
        "000000002": (["bad"], [0.1], 0.3),  # only the original stays
        "000000003": (["bad"], [0.1], 0.1),
    }
    write_captions(root, "one", described)
    summary = pack(PackConfig(root, min_similarity=0.25, workers=1))
    assert summary.counts == {DISSIMILAR: 1, "success": SHARDS * PER_SHARD - 1}
    assert summary.counters == {
        "original captions below min_similarity": 1,
        "synthetic captions below min_similarity": 3,
    }
    samples = {sample.key: sample for sample in final(root)}
    originals = {sample.key: sample.caption for sample in raw(root)}
    assert samples["000000000"].captions == [originals["000000000"], "good"]
    assert samples["000000001"].captions == ["", "good"]
    assert samples["000000001"].meta["synsets"][0] == []
    assert samples["000000002"].captions == [originals["000000002"]]
    assert "000000003" not in samples
    assert check(CheckConfig(root)) == []
    with pytest.raises(UserError, match=r"--min-similarity: 0\.25 before, None now"):
        pack(PackConfig(root, workers=1))


def test_an_original_goes_only_when_every_captioner_puts_it_below(root):
    write_captions(root, "one", {"000000000": (["a"], [0.5], 0.1), "000000001": (["a"], [0.5], 0.1)})
    write_captions(root, "two", {"000000000": (["b"], [0.5], 0.1), "000000001": (["b"], [0.5], 0.4)})
    pack(PackConfig(root, captioner=("one", "two"), min_similarity=0.3, workers=1))
    assert [bool(sample.caption) for sample in shard_of(root, 0)[:2]] == [False, True]


def test_similarity_without_the_columns_says_how_to_get_them(root):
    for path in Path(root, "captions/one").glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.drop_columns(["similarities", "original_similarity"]), path)
    with pytest.raises(UserError, match=r"captions/one has no column similarities.*clipmill caption \.\.\. --similar"):
        pack(PackConfig(root, min_similarity=0.2, workers=1))
    with pytest.raises(UserError, match="no captions are packed"):
        pack(PackConfig(root, captioner=("none",), min_similarity=0.2, workers=1))
    with pytest.raises(UserError, match="--min-similarity 2: must be a cosine"):
        PackConfig(root, min_similarity=2)


def test_a_captions_file_that_does_not_fit_costs_its_shard(root):
    path = join(root, "captions/one/00001.parquet")
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["similarities"]), path)
    with pytest.raises(ShardsFailed, match=r"1 of 3 shards failed\n  00001: .*no column similarities"):
        pack(PackConfig(root, min_similarity=0.2, workers=1))
    short = table.to_pylist()
    short[2]["similarities"] = []
    pq.write_table(pa.Table.from_pylist(short, table.schema), path)
    with pytest.raises(ShardsFailed, match="key 000010002 has not one similarity per caption"):
        pack(PackConfig(root, min_similarity=0.2, workers=1))


def test_a_foreign_json_member_costs_only_its_sizes(root):
    samples = shard_of(root, 0, "raw")
    odd = json.dumps({**samples[0].meta, "width": "wide", "height": 1 << 40}).encode()
    samples[0] = Sample(samples[0].key, {**samples[0].members, "json": odd})
    write_shard(join(root, "raw/00000.tar"), samples)
    pack(PackConfig(root, workers=1))
    table = pq.read_table(join(root, "shards/00000.parquet"), columns=["width", "height"]).to_pylist()
    assert table[0] == {"width": None, "height": None}
    assert table[1]["width"] > 0


@pytest.mark.parametrize("captioner", [(), ("none",)])
@pytest.mark.parametrize("size", [None, 4])
def test_a_source_with_fields_of_ours_is_packed_as_check_wants_it(root, captioner, size):
    """Final shards of somebody else, say, as a source: their synthetic captions and synsets are not of these shards."""
    samples, captions = shard_of(root, 0, "raw"), 1 if captioner else 2
    theirs = [
        {"syn_0": "a lie", "syn_1": "another"},
        {f"syn_{captions - 1}": "behind"},
        {"synsets": [["n02084071"]] * 9},
        {"synsets": "dog", "caption": "somebody's", "syn_0": 5},
        {"syn_00": "kept", "synset": "kept", "syn_a": None},
    ]
    odd = [
        Sample(s.key, {**s.members, "json": json.dumps({**s.meta, **more}).encode()})
        for s, more in zip(samples, theirs, strict=False)
    ]
    write_shard(join(root, "raw/00000.tar"), [*odd, *samples[len(odd) :]])
    vouch(root, "raw", 0, "raw/00000.tar")
    summary = pack(PackConfig(root, captioner, workers=1, shard_size=size))
    assert summary.counters["json members with syn_N or synsets of the source, left out"] == 4
    assert check(CheckConfig(root)) == []
    packed = shard_of(root, 0)
    assert [len(sample.captions) for sample in packed] == [captions] * len(packed)
    assert all(sample.meta["caption"] == sample.caption for sample in packed)


def test_numbers_that_json_has_no_word_for_are_null(root):
    """Python reads and writes NaN and Infinity, others refuse the whole file for them."""

    def no_json(word):
        raise AssertionError(word)

    samples = shard_of(root, 0, "raw")
    odd = b'{"width": NaN, "s": Infinity, "a": [1.5, -Infinity, {"b": 1e999, "c": "NaN"}], "u": "\\ud83d", "n": 1}'
    samples[0] = Sample(samples[0].key, {**samples[0].members, "json": odd})
    write_shard(join(root, "raw/00000.tar"), samples)
    vouch(root, "raw", 0, "raw/00000.tar")
    summary = pack(PackConfig(root, workers=1))
    assert summary.counters["json members with NaN or Infinity of the source, null instead"] == 1
    packed = shard_of(root, 0)
    for sample in packed:
        json.loads(sample.members["json"], parse_constant=no_json)
    theirs = {"width": None, "s": None, "a": [1.5, None, {"b": None, "c": "NaN"}], "u": "", "n": 1}
    assert {name: packed[0].meta[name] for name in theirs} == theirs
    (Path(root) / "members.jsonl").write_bytes(b"".join(sample.members["json"] for sample in packed))
    read = duckdb.sql(f"select n, width from read_json('{root}/members.jsonl')").fetchall()
    assert read[0] == (1, None)
    assert len(read) == len(packed)
    assert check(CheckConfig(root)) == []


@pytest.mark.integration
def test_two_at_once(root):
    """The second one names the first; when that is killed, the next one goes on."""
    slow = (
        "import time, sys, pipeline.pack.stage as p; p.final_sizes = lambda *_: time.sleep(600); "
        "p.pack(p.PackConfig(sys.argv[1]))"
    )
    first = subprocess.Popen([sys.executable, "-c", slow, root], cwd=Path(__file__).parents[3])
    while not Path(root, "shards/00002_stats.json").exists():
        assert first.poll() is None
        time.sleep(0.05)
    with pytest.raises(UserError, match=f"shards is being written by process {first.pid} on "):
        pack(PackConfig(root, workers=1))
    first.kill()
    first.wait()
    pack(PackConfig(root, workers=1))
    assert check(CheckConfig(root)) == []
    assert not Path(root, ".pack.lock").exists()


EMPTIES = [
    ({0: 5, 1: 5, 2: 0}, [5, 5]),
    ({0: 5, 1: 0, 2: 0}, [5]),
    ({0: 0, 1: 0, 2: 0}, [0]),
    ({0: 5, 1: 0, 2: 5}, [5, 0, 5]),
    ({0: 0, 1: 5, 2: 5}, [0, 5, 5]),
]


@pytest.mark.parametrize(("staying", "sizes"), EMPTIES)
def test_shards_without_samples_are_written_only_inside(root, staying, sizes, caplog):
    """At the end no number needs them: the last shard counts what was left out of the raw shards behind it."""
    gone = set[str]()
    for shard, left in staying.items():
        gone.update(shard_keys(join(root, f"raw/{shard:05d}.tar"))[left:])
    without_captions(root, gone)
    config = PackConfig(root, ("none",), workers=1)
    summary = pack(config)
    assert (summary.shards, summary.made) == (len(sizes), len(sizes))
    assert summary.counts == {what: n for what, n in {"success": sum(sizes), "no caption": len(gone)}.items() if n}
    assert shard_sizes(root) == sizes
    assert shard_ids(join(root, "shards")) == list(range(len(sizes)))
    assert ("without a sample" in caplog.text) == (0 in sizes)
    assert check(CheckConfig(root)) == []
    before = tree(root)
    assert pack(config).made == 0
    Path(root, "shards/sizes.json").unlink()
    assert pack(config).made == 0
    assert tree(root) == before
    for path in Path(root, "shards").glob("*0_*"):  # made again from the first shard on, as after a kill
        path.unlink()
    pack(config)
    assert tree(root) == before


def test_a_shard_at_the_end_comes_back_with_its_samples(root):
    keys = set(shard_keys(join(root, "raw/00002.tar")))
    without_captions(root, keys)
    assert pack(PackConfig(root, ("none",), workers=1)).shards == 2
    write_raw(root, SHARDS, per_shard=PER_SHARD + 1)
    assert pack(PackConfig(root, ("none",), workers=1)).shards == 3
    assert shard_sizes(root) == [PER_SHARD] * 3
    assert check(CheckConfig(root)) == []


def test_a_finished_dataset_with_empty_shards_at_its_end_stays_as_it_is(root):
    """As packed before they were left out: somebody has a list of their names."""
    without_captions(root, set(shard_keys(join(root, "raw/00002.tar"))))
    config = PackConfig(root, ("none",), workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.pack.stage.final_sizes", lambda root, total: dict.fromkeys(map(str, range(total)), 1))
        pack(config)
    write_json(join(root, "shards/sizes.json"), {"00000.tar": 5, "00001.tar": 5, "00002.tar": 0})
    assert check(CheckConfig(root)) == []
    before = tree(root)
    assert pack(config).shards == 3
    assert tree(root) == before


# equal sizes


def write_pattern(root: str, pattern: list[str], style: str) -> None:
    """Raw shards by a string each: 1 has a caption, 0 has none and is dropped."""
    for shard, marks in enumerate(pattern):
        path, written = Path(root, f"raw/{shard_name(shard)}.tar"), list[str]()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for index, mark in enumerate(marks):
                written.append(f"{shard:05d}{index:04d}")
                members = {"jpg": b"p" * (index * 300), "txt": b"dog" if mark == "1" else b"", "json": b"{}"}
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{written[-1]}.{extension}")
                    info.size, info.mtime = len(data), (1.5 if style == "pax" else 0)  # a fraction needs a header more
                    tar.addfile(info, io.BytesIO(data))
        rows = pa.table({"key": written, "status": ["success"] * len(written)})
        pq.write_table(rows, path.with_suffix(".parquet"))
        stats = {"count": len(marks), "successes": len(marks), "status_dict": {"success": len(marks)}}
        path.with_name(f"{shard_name(shard)}_stats.json").write_text(json.dumps(stats))  # as img2dataset leaves it


PATTERNS = [["111", "111", "111"], ["0110", "", "000", "1011", "1"], ["000"], [""], ["1111111"], ["1", "00", "1", "0"]]


@pytest.mark.parametrize(
    ("pattern", "size", "style"),
    [
        (pattern, size, "pax" if (i + j) % 2 else "plain")
        for (i, pattern), (j, size) in itertools.product(enumerate(PATTERNS), enumerate((1, 2, 3, 100)))
    ],
)
def test_final_shards_are_ranges_of_the_survivors(pattern, size, style, tmp_path):
    root = str(tmp_path)
    write_pattern(root, pattern, style)
    marks = dict[str, str]()
    for shard, line in enumerate(pattern):
        marks |= {f"{shard:05d}{i:04d}": mark for i, mark in enumerate(line)}
    staying = [key for key, mark in marks.items() if mark == "1"]
    expected = [staying[i : i + size] for i in range(0, len(staying), size)] or [[]]

    summary = pack(PackConfig(root, shard_size=size, workers=1))
    shards = shard_ids(join(root, "shards"))
    assert [shard_keys(join(root, f"shards/{shard_name(shard)}.tar")) for shard in shards] == expected
    assert summary.counts == {
        reason: n for reason, n in (("no caption", len(marks) - len(staying)), ("success", len(staying))) if n
    }
    assert [read_json(join(root, f"shards/{shard_name(i)}_stats.json"))["successes"] for i in shards] == [
        len(keys) for keys in expected
    ]
    assert shard_sizes(root) == [len(keys) for keys in expected]
    images = {sample.key: sample.image for sample in raw(root)}
    assert all(sample.image == images[sample.key] for sample in final(root))
    assert check(CheckConfig(root)) == []


@pytest.fixture(scope="module")
def resharded(made, tmp_path_factory) -> str:
    """Duplicates and uncaptioned samples dropped, 5 to a shard."""
    root = shutil.copytree(made, tmp_path_factory.mktemp("data") / "equal").as_posix()
    without_captions(root, {"000000002"})
    dedup(DedupConfig(root, near_bits=-1, workers=1))
    write_captions(root, "one", {"000000002": ([""], [0.5], None), "000010003": ([], [], None)})
    pack(PackConfig(root, shard_size=5, workers=1))
    return root


@pytest.fixture
def equal(resharded, tmp_path) -> str:
    return shutil.copytree(resharded, tmp_path / "ds").as_posix()


def test_equal_shards_hold_all_promises(resharded):
    stage_blocks = read_json(join(resharded, "dataset.json"))["stages"]
    assert stage_blocks["plan"]["counts"] == stage_blocks["pack"]["counts"]
    assert stage_blocks["pack"]["counts"]["no caption"] == 1
    assert sum(stage_blocks["pack"]["counts"].values()) == SHARDS * PER_SHARD
    assert stage_blocks["pack"]["config"]["shard_size"] == 5
    sizes = shard_sizes(resharded)
    assert sizes[:-1] == [5] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= 5
    assert check(CheckConfig(resharded)) == []
    reasons = Counter[str | None]()
    for shard in range(SHARDS):
        reasons.update(pq.read_table(f"{resharded}/plan/0000{shard}.parquet").column("reason").to_pylist())
    assert reasons["picture does not decode"] == 1
    record = read_json(join(resharded, "shards/00000_stats.json"))["clipmill"]
    assert record["inputs"]["samples"] == "00000[0:5], 00001[0:1]"
    assert {
        "raw/00000.tar",
        "raw/00001.tar",
        "captions/one/00001.parquet",
        "dedup/00001.parquet",
        "plan/00001.parquet",
    } <= set(record["inputs"])


def test_equal_shards_have_the_samples_of_uneven_ones(resharded, equal):
    pack(PackConfig(equal, workers=1, overwrite=True))
    assert [(s.key, s.members) for s in final(equal)] == [(s.key, s.members) for s in final(resharded)]
    assert "plan" not in read_json(join(equal, "dataset.json"))["stages"]
    assert names(join(equal, "plan")) == []
    assert check(CheckConfig(equal)) == []


@pytest.mark.integration
def test_equal_shards_do_not_depend_on_workers(resharded, equal):
    for folder in ("plan", "shards"):
        shutil.rmtree(join(equal, folder))
    pack(PackConfig(equal, shard_size=5, workers=2))
    assert tree(equal) == tree(resharded)


def test_equal_shards_on_a_url(resharded):
    fs = fsspec.filesystem("memory")
    if fs.exists("/equal"):
        fs.rm("/equal", recursive=True)
    for path in tree(resharded):
        if path.split("/")[0] in ("raw", "dedup", "captions", "dataset.json"):
            write_bytes(f"memory://equal/{path}", read_bytes(join(resharded, path)))
    pack(PackConfig("memory://equal", shard_size=5, workers=1))
    for folder, name in itertools.chain.from_iterable(
        ((folder, name) for name in names(join(resharded, folder))) for folder in ("plan", "shards")
    ):
        assert read_bytes(f"memory://equal/{folder}/{name}") == read_bytes(join(resharded, folder, name)), name


def test_only_missing_equal_shards_are_made(resharded, equal):
    assert pack(PackConfig(equal, shard_size=5, workers=1)).made == 0
    Path(equal, "shards/00001_stats.json").unlink()
    Path(equal, "shards/00001.tar").write_bytes(b"half")
    Path(equal, "plan/00002_stats.json").unlink()
    assert pack(PackConfig(equal, shard_size=5, workers=1)).made == 1
    assert tree(equal) == tree(resharded)


def test_a_changed_raw_shard_makes_again_what_reads_it_or_moved(equal):
    made = shard_sizes(equal)
    before = tree(equal)
    without_captions(equal, {"000000002", "000020000"})  # it has a synthetic one
    pack_again = PackConfig(equal, shard_size=5, workers=1)
    with pytest.raises(UserError, match="was made from other raw shards"):
        pack(pack_again)
    dedup(DedupConfig(equal, near_bits=-1, workers=1))
    assert pack(pack_again).made > 0
    assert shard_sizes(equal) == made
    assert tree(equal)["shards/00000.tar"] == before["shards/00000.tar"]
    keys = {f"0000{shard}000{i}" for shard, i in itertools.product((0, 2), range(5))}
    write_captions(equal, "one", {key: ([""], [0.5], None) for key in sorted(keys)})
    without_captions(equal, keys)
    dedup(DedupConfig(equal, near_bits=-1, workers=1))
    pack(pack_again)
    assert len(shard_sizes(equal)) < len(made)
    assert [name for name in names(join(equal, "shards")) if name.endswith(".tar")] == list(
        read_json(join(equal, "shards/sizes.json"))
    )
    assert check(CheckConfig(equal)) == []


def test_another_shard_size_is_another_config(equal):
    before = tree(equal)
    for size, words in ((4, "5 before, 4 now"), (None, "5 before, None now")):
        with pytest.raises(UserError, match=f"--shard-size: {words}"):
            pack(PackConfig(equal, shard_size=size, workers=1))
    assert tree(equal) == before
    pack(PackConfig(equal, shard_size=100, workers=1, overwrite=True))
    assert len(shard_sizes(equal)) == 1
    assert not {f"shards/00001{ending}" for ending in (".tar", ".parquet", "_stats.json")} & set(tree(equal))
    assert check(CheckConfig(equal)) == []
    with pytest.raises(UserError, match="--shard-size 0: must be 1 or more"):
        PackConfig(equal, shard_size=0)


def test_nobody_trains_on_a_mixture_of_two_sizes(equal, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.pack.stage.final_sizes", die)  # all is made, some of it anew
        with pytest.raises(KeyboardInterrupt):
            pack(PackConfig(equal, shard_size=3, workers=1, overwrite=True))
    with pytest.raises(UserError, match="run `clipmill pack"):
        shard_sizes(equal)
    assert any("sizes.json: is not there" in problem for problem in check(CheckConfig(equal)))
    pack(PackConfig(equal, shard_size=3, workers=1))
    assert check(CheckConfig(equal)) == []


def test_a_broken_raw_shard_leaves_the_ranges_open(equal):
    path = Path(equal, "raw/00001.tar")
    path.write_bytes(path.read_bytes()[:5000])
    for folder in ("plan", "shards"):
        shutil.rmtree(join(equal, folder))
    with pytest.raises(ShardsFailed, match=r"plan: 1 of 3 shards failed\n  00001: .*truncated tar"):
        pack(PackConfig(equal, shard_size=5, workers=1))
    assert not Path(equal, "shards").exists()


def test_check_finds_what_is_wrong_with_equal_shards(equal):
    plan = join(equal, "plan/00001.parquet")
    table = pq.read_table(plan)
    pq.write_table(table.slice(1), plan)
    dataset = read_json(join(equal, "dataset.json"))
    dataset["stages"]["plan"]["counts"]["success"] -= 1
    write_bytes(join(equal, "dataset.json"), json.dumps(dataset).encode())
    stats = read_json(join(equal, "shards/00000_stats.json"))
    stats["clipmill"]["config"]["shard_size"] = 9
    write_bytes(join(equal, "shards/00000_stats.json"), json.dumps(stats).encode())
    problems = "\n".join(check(CheckConfig(equal)))
    assert "row 0 is key 000010001, " in problems
    assert "plan says" in problems
    assert "00000.tar has 5 samples, not 9" in problems
