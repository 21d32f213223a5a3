"""A shard of which nothing came, as the last one of a list may be: no stage stumbles over it, nor does training."""

from pathlib import Path

import pytest
from small_data import tiny_coca, write_raw
from small_training import tiny_clip

from clipmill import _train
from pipeline.cache.config import CacheConfig
from pipeline.cache.stage import cache
from pipeline.caption.config import CaptionConfig
from pipeline.caption.decoding import Decoding
from pipeline.caption.stage import caption
from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.dedup.config import DedupConfig
from pipeline.dedup.stage import dedup
from pipeline.labels.vocab_stage import VocabConfig, vocab
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from pipeline.report import ReportConfig, report
from shards_spec.files import read_json

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("lost", [0, 2])
def test_from_raw_shards_to_a_training(tmp_path, lost):
    root, coca = str(tmp_path / "ds"), tiny_coca(tmp_path / "coca")
    write_raw(root, shards=3, per_shard=5, lost=lost)
    dedup(DedupConfig(root, workers=1))
    caption(CaptionConfig(root, coca, name="cap", num_captions=1, decoding=Decoding(max_tokens=8), threads=1))
    pack(PackConfig(root, workers=1))
    vocab(VocabConfig(root, min_count=0))
    for views in (1, 2):  # the second time new views stand beside old ones
        cache(CacheConfig(root, coca, name="tea", views=views, threads=1))
        assert check(CheckConfig(root)) == []
    page = Path(report(ReportConfig(root))).read_text()
    assert page.count('<article class="card">') == 8
    assert "cannot be read" not in page
    sizes = read_json(f"{root}/shards/sizes.json")
    assert sizes == (
        {"00000.tar": 4, "00001.tar": 4} if lost == 2 else {"00000.tar": 0, "00001.tar": 4, "00002.tar": 4}
    )
    words = ["tinyclip", "--data", root, "--model", tiny_clip(tmp_path / "clip"), "--teacher", "tea", "--epochs", "2"]
    assert _train([*words, "--batch-size", "4", "--workers", "0", "--warmup", "0", "--out", str(tmp_path / "run")]) == 0
