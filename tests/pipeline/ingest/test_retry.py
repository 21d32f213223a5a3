"""`ingest --retry-failed`: additional shards, keys that stay, a retry that is killed."""

import pytest
from small_ingest import config, rows_of, write_list
from web_server import serve

from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.ingest.stage import ingest
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.files import UserError
from shards_spec.tar import read_shard

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


def test_retry_failed_adds_shards_and_keeps_keys(server, tmp_path):
    root = tmp_path / "D"
    rows = [(f"{server.url}/flaky/{n}?r", f"flaky {n}") for n in range(12)]
    rows += [(f"{server.url}/good/{n}?r", f"good {n}") for n in range(10)]
    rows += [(f"{server.url}/status/503?{n}", f"down {n}") for n in range(4)] + [(f"{server.url}/gone", "gone")]
    run = config(root, write_list(tmp_path / "l.tsv", rows), retries=0)
    with pytest.raises(UserError, match=r"ingest has not finished in .*without --retry-failed first"):
        ingest(config(root, run.source, retries=0, retry_failed=True))
    assert ingest(run).counts == {"HTTP 404": 1, "HTTP 503": 16, "success": 10}
    before = {path.name: path.read_bytes() for path in (root / "raw").iterdir()}
    again = config(root, run.source, retries=0, retry_failed=True)
    summary = ingest(again)
    assert (summary.shards, summary.made) == (5, 2)
    assert summary.counts == {"HTTP 404": 1, "HTTP 503": 4, "success": 22}
    assert {name: (root / "raw" / name).read_bytes() for name in before} == before, "finished shards stay"
    assert [row["key"] for row in rows_of(root, 3)] == [f"00000{n:04d}" for n in range(10)]
    assert [row["key"] for row in rows_of(root, 4)] == [
        "000010000",
        "000010001",
        *(f"00002{n:04d}" for n in range(2, 6)),
    ]
    assert [sample.caption for sample in read_shard(str(root / "raw/00003.tar"))] == [f"flaky {n}" for n in range(10)]
    assert check(CheckConfig(str(root))) == []
    assert ingest(run).counts == summary.counts, "a plain run keeps what the retry made"
    third = ingest(again)
    assert (third.shards, third.made, third.counts) == (6, 1, summary.counts)
    assert check(CheckConfig(str(root))) == []
    pack(PackConfig(str(root), captioner=("none",), workers=1))
    assert check(CheckConfig(str(root))) == []
    write_list(tmp_path / "l.tsv", [*rows, *[(f"{server.url}/good/1", "new")] * 10])
    with pytest.raises(UserError, match="has more rows than when its failed rows were tried again"):
        ingest(run)


def test_a_killed_retry_resumes(server, tmp_path):
    root = tmp_path / "D"
    rows = [(f"{server.url}/flaky/{n}?k", f"flaky {n}") for n in range(60)]
    run = config(root, write_list(tmp_path / "l.tsv", rows), retries=0)
    assert ingest(run).counts == {"HTTP 503": 60}
    dataset = (root / "dataset.json").read_text()
    again = config(root, run.source, retries=0, retry_failed=True)
    assert ingest(again).shards == 12
    # as a kill leaves it: one additional shard is missing in the middle, the totals are those of before
    (root / "dataset.json").write_text(dataset)
    for ending in ("_stats.json", ".tar", ".parquet"):
        (root / "raw" / f"00008{ending}").unlink()
    for n in range(20, 30):
        server.requests[f"flaky/{n}?k"] = 5
    summary = ingest(again)
    assert (summary.shards, summary.made, summary.counts) == (12, 4, {"success": 60})
    assert check(CheckConfig(str(root))) == []
    keys_before = list[str]()
    keys_after = list[str]()
    for shard in range(6):
        keys_before += [row["key"] for row in rows_of(root, shard)]
        keys_after += [row["key"] for row in rows_of(root, 6 + shard)]
    assert keys_after == keys_before
