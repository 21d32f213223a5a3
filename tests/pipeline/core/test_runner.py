"""caption, pack, vocab, cache, check: one small dataset through all of them, and everything that can be wrong."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_data import build_all, tiny_coca, tree, write_raw

from pipeline.cache.config import CacheConfig
from pipeline.cache.stage import cache
from pipeline.caption.config import CaptionConfig
from pipeline.caption.decoding import Decoding
from pipeline.caption.stage import caption
from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.core.runner import ShardsFailed
from pipeline.labels.vocab_stage import VocabConfig, vocab
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.embeddings import read_embeddings
from shards_spec.files import DataError, UserError, join, names, read_bytes, read_json, write_bytes
from shards_spec.images import decode_rgb
from shards_spec.manifest import read_done
from shards_spec.models import load_model, model_label
from shards_spec.sample import Sample
from shards_spec.tar import read_shard, write_shard
from shards_spec.views import apply_view, draw_view

EIGHT = Decoding(max_tokens=8)
SHARDS, VIEWS = 3, 2


def build(root: str, model: str) -> None:
    build_all(root, model, VIEWS)


@pytest.fixture(scope="module")
def built(tmp_path_factory, model) -> str:
    root = str(tmp_path_factory.mktemp("data") / "ds")
    write_raw(root, SHARDS)
    build(root, model)
    return root


@pytest.fixture
def root(built, tmp_path) -> str:
    """A copy that a test may break."""
    return shutil.copytree(built, tmp_path / "ds").as_posix()


def test_all_promises_hold(built):
    assert check(CheckConfig(built)) == []


def test_the_same_commands_give_the_same_bytes(built, tmp_path, model):
    again = str(tmp_path / "ds")
    write_raw(again, SHARDS)
    build(again, model)
    assert tree(again) == tree(built)


@pytest.mark.parametrize(
    ("deleted", "reader"), [("shards/00001.parquet", "vocab"), ("captions/cap/00001.parquet", "pack")]
)
def test_a_deleted_file_comes_back_by_the_advice_of_who_misses_it(root, model, deleted, reader):
    before = tree(root)
    Path(root, deleted).unlink()
    read = {
        "vocab": lambda: vocab(VocabConfig(root, min_count=2, name="again")),
        "pack": lambda: pack(PackConfig(root, captioner=("cap",), workers=1, overwrite=True)),
    }[reader]
    with pytest.raises((DataError, ShardsFailed)) as error:
        read()
    advice = re.search(r"delete (\S+_stats\.json) and run `clipmill \w+ \S+(?: --name \S+)?` again", str(error.value))
    assert advice
    Path(advice[1]).unlink()
    build(root, model)
    shutil.rmtree(join(root, "vocab/.again"), ignore_errors=True)  # its parts of the other shards
    assert tree(root) == before


def test_worker_processes_give_the_same_bytes(root):
    shutil.rmtree(join(root, "shards"))
    before = tree(root)
    pack(PackConfig(root, workers=2))
    assert {path: digest for path, digest in tree(root).items() if not path.startswith("shards/")} == before
    assert check(CheckConfig(root)) == []


def test_a_rerun_makes_nothing(root, model):
    before = tree(root)
    assert caption(CaptionConfig(root, model, name="cap", num_captions=2, decoding=EIGHT)).made == 0
    assert pack(PackConfig(root, workers=1)).made == 0
    assert cache(CacheConfig(root, model, name="tea", views=VIEWS)).made == 0
    assert tree(root) == before


def test_only_missing_shards_are_made(root):
    before = tree(root)
    Path(root, "shards", "00001_stats.json").unlink()
    Path(root, "shards", "00001.tar").write_bytes(b"half")
    assert pack(PackConfig(root, workers=1)).made == 1
    assert tree(root) == before


def test_a_stage_runs_on_a_url(built, model):
    fs = fsspec.filesystem("memory")
    for path in ("/ds",):
        if fs.exists(path):
            fs.rm(path, recursive=True)
    for path, _ in tree(join(built, "raw")).items():
        write_bytes(f"memory://ds/raw/{path}", read_bytes(join(built, "raw", path)))
    write_bytes("memory://ds/dataset.json", json.dumps({**read_json(join(built, "dataset.json"))}).encode())
    build("memory://ds", model)
    assert check(CheckConfig("memory://ds")) == []
    for name in names(join(built, "shards")):
        assert read_bytes(f"memory://ds/shards/{name}") == read_bytes(join(built, "shards", name)), name


def test_another_config_is_an_error_that_names_both(root, model):
    with pytest.raises(UserError, match=r"--num-captions: 2 before, 3 now.*--overwrite"):
        caption(CaptionConfig(root, model, name="cap", num_captions=3, decoding=EIGHT))
    with pytest.raises(UserError, match=r"--views: 2 before, 1 now"):
        cache(CacheConfig(root, model, name="tea", views=1))
    assert (
        caption(CaptionConfig(root, model, name="cap", num_captions=3, decoding=EIGHT, overwrite=True)).made == SHARDS
    )
    assert pack(PackConfig(root, workers=1)).made == SHARDS  # its input changed


def test_a_kill_while_overwriting_leaves_no_record_that_vouches_for_other_bytes(root, model, monkeypatch):
    """Dies between a shard's file and its record, under another config; the old record must be gone."""
    from pipeline.core import runner as stage

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "_publish", die)
    with pytest.raises(KeyboardInterrupt):
        caption(CaptionConfig(root, model, name="cap", num_captions=3, decoding=EIGHT, overwrite=True))
    monkeypatch.undo()
    before = tree(root)
    assert "captions/cap/00000_stats.json" not in before
    assert caption(CaptionConfig(root, model, name="cap", num_captions=2, decoding=EIGHT)).made == 1


def test_stages_refuse_unfinished_upstreams(root, tmp_path, model):
    with pytest.raises(UserError, match="has no finished shards: run `clipmill ingest"):
        caption(CaptionConfig(str(tmp_path / "empty"), model))
    Path(root, "raw", "00002_stats.json").unlink()
    with pytest.raises(UserError, match="ingest has not finished"):
        pack(PackConfig(root))


def samples_of(root: str, folder: str) -> list[Sample]:
    samples = list[Sample]()
    for shard in range(SHARDS):
        samples += read_shard(join(root, f"{folder}/0000{shard}.tar"))
    return samples


def test_final_samples(built):
    raw = {sample.key: sample for sample in samples_of(built, "raw")}
    final = samples_of(built, "shards")
    assert [s.key for s in final] == list(raw)
    for sample in final:
        assert sample.image == raw[sample.key].image
        assert sample.members["txt"] == raw[sample.key].members["txt"]
        meta = sample.meta
        assert meta["caption"] == sample.caption
        assert meta["url"] == raw[sample.key].meta["url"]
        assert isinstance(meta["syn_0"], str)
        assert len(meta["synsets"]) == len(sample.captions)
        assert "n04546855" in meta["synsets"][0]  # wall


def test_vocabulary_counts_what_is_packed(built):
    counted: dict[str, int] = {}
    for shard in range(SHARDS):
        for row in pq.read_table(join(built, f"shards/0000{shard}.parquet")).to_pylist():
            for wnid in row["synsets"][0]:  # the original caption's, as CatLIP counts
                counted[wnid] = counted.get(wnid, 0) + 1
    made = vocab(VocabConfig(built, name="check", min_count=2))
    assert made.header["source"] == "original"
    rows = made.rows
    assert {row[0]: row[2] for row in rows} == {wnid: n for wnid, n in counted.items() if n > 2}
    Path(built, "vocab", "check.tsv").unlink()
    stages = read_json(join(built, "dataset.json"))
    del stages["stages"]["vocab/check"]
    write_bytes(join(built, "dataset.json"), (json.dumps(stages, indent=2, ensure_ascii=False) + "\n").encode())


def test_cache_holds_the_teachers_features_of_the_replayed_views(built, model):
    loaded = load_model(model)
    keys, columns, meta = read_embeddings(join(built, "teacher/tea/00001.parquet"), ["image_1", "text_0", "text_2"])
    samples = list(read_shard(join(built, "shards/00001.tar")))
    assert keys == [sample.key for sample in samples]
    assert (meta["num_views"], meta["image_size"], meta["library"]) == (VIEWS, 32, "open_clip")
    spec = CacheConfig(built, views=VIEWS).view_spec
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (loaded.mean, loaded.std))
    for row, sample in enumerate(samples):
        view = apply_view(decode_rgb(sample.image), spec, draw_view(spec, sample.key, 1), 32)
        pixels = (torch.from_numpy(np.array(view)).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            image = loaded.model.encode_image(pixels[None], normalize=True)[0].numpy()
            texts = loaded.model.encode_text(loaded.tokenizer(sample.captions), normalize=True).numpy()
        assert np.abs(columns["image_1"][row] - image).max() < 1e-3
        assert np.abs(columns["text_0"][row] - texts[0]).max() < 1e-3
        assert np.abs(columns["text_2"][row] - texts[2]).max() < 1e-3


def test_a_image_that_does_not_decode_costs_itself_only(root, model, caplog):
    samples = list(read_shard(join(root, "raw/00000.tar")))
    samples[1] = Sample(samples[1].key, {**samples[1].members, "jpg": b"<html>"})
    write_shard(join(root, "raw/00000.tar"), samples)
    for folder in ("captions", "shards", "teacher"):
        shutil.rmtree(join(root, folder))
    for path in Path(root, "raw").glob("*_stats.json"):
        stats = json.loads(path.read_text())
        del stats["clipmill"]  # as img2dataset leaves them
        path.write_text(json.dumps(stats))
    summary = pack(PackConfig(root, captioner=("none",), workers=1))
    assert summary.counts == {"success": 15}  # nobody has looked at the images yet
    with pytest.raises(ShardsFailed, match=f"1 of 3 shards failed\n  00000: .*key {samples[1].key} does not decode"):
        cache(CacheConfig(root, model, name="tea", views=1))
    assert names(join(root, "teacher/tea")) == [
        "00001.parquet",
        "00001_stats.json",
        "00002.parquet",
        "00002_stats.json",
    ]
    summary = caption(CaptionConfig(root, model, name="cap", num_captions=1, decoding=EIGHT))
    assert summary.counts == {"picture does not decode": 1, "success": 14}
    assert f"key {samples[1].key} does not decode" in caplog.text
    assert pack(PackConfig(root, workers=1, overwrite=True)).counts == summary.counts
    assert cache(CacheConfig(root, model, name="tea", views=1)).counts == {"success": 14}


def test_a_truncated_raw_shard_costs_itself_and_is_named(root, model):
    path = Path(root, "raw", "00001.tar")
    path.write_bytes(path.read_bytes()[:5000])
    shutil.rmtree(join(root, "captions"))
    with pytest.raises(ShardsFailed, match=r"1 of 3 shards failed\n  00001: .*raw/00001\.tar: truncated tar"):
        caption(CaptionConfig(root, model, name="cap", num_captions=1, decoding=EIGHT))
    assert "00002.parquet" in names(join(root, "captions/cap"))


def test_check_names_the_first_broken_key_of_a_truncated_tar(root):
    path = Path(root, "shards", "00001.tar")
    path.write_bytes(path.read_bytes()[:7000])
    problems = check(CheckConfig(root))
    assert any("shards/00001.tar" in p and "truncated tar, last whole member 00001000" in p for p in problems), problems


def test_check_names_the_first_broken_key_of_a_shuffled_parquet(root):
    path = join(root, "shards/00001.parquet")
    table = pq.read_table(path)
    pq.write_table(table.take([0, 2, 1, *range(3, len(table))]), path)
    problems = check(CheckConfig(root))
    assert any("00001.parquet" in p and "row 1 is key 000010002, the tar has key 000010001" in p for p in problems), (
        problems
    )


def test_check_names_the_first_broken_key_of_a_foreign_cache(root):
    folder = join(root, "teacher/tea")
    own, foreign = read_done(folder, 0), read_done(folder, 1)
    for name in foreign.outputs:
        shutil.copy(join(root, name), join(root, name.replace("00001", "00000")))
    outputs = {name.replace("00001", "00000"): digest for name, digest in foreign.outputs.items()}
    replace(own, outputs=outputs).write(folder)
    problems = check(CheckConfig(root))
    assert any("row 0 is key 000010000, shards/00000.tar has key 000000000" in p for p in problems), problems


def test_check_finds_a_cache_of_other_images(root):
    samples = [
        Sample(s.key, {**s.members, "txt": s.members["txt"] + b"!"}) for s in read_shard(join(root, "shards/00002.tar"))
    ]
    write_shard(join(root, "shards/00002.tar"), samples)
    Path(root, "shards", "00002_stats.json").unlink()
    problems = check(CheckConfig(root))
    assert any("teacher/tea/00002.parquet: made from another shards/00002.tar" in p for p in problems), problems


def test_check_finds_totals_sizes_duplicates_and_edits(root):
    dataset = read_json(join(root, "dataset.json"))
    dataset["stages"]["pack"]["counts"]["success"] += 1
    write_bytes(join(root, "dataset.json"), json.dumps(dataset).encode())
    write_bytes(join(root, "shards/sizes.json"), b'{"00000.tar": 1}')
    path = Path(root, "vocab", "all.tsv")
    path.write_text(path.read_text().replace("wall", "wail"))
    problems = "\n".join(check(CheckConfig(root)))
    assert "pack says" in problems
    assert "sizes.json: 00000.tar has" in problems
    assert "it was edited" in problems
    assert check(CheckConfig(join(root, "vocab"))) == [
        f"{root}/vocab: no raw/ and no shards/ in it; it is not a clipmill dataset"
    ]


def test_check_finds_a_key_that_is_there_twice(tmp_path):
    root = str(tmp_path / "ds")
    write_raw(root, 2)
    shutil.copy(join(root, "raw/00000.tar"), join(root, "raw/00001.tar"))
    shutil.copy(join(root, "raw/00000.parquet"), join(root, "raw/00001.parquet"))
    for path in Path(root, "raw").glob("*_stats.json"):
        stats = json.loads(path.read_text())
        del stats["clipmill"]
        path.write_text(json.dumps(stats))
    Path(root, "dataset.json").unlink()  # as img2dataset leaves it
    assert check(CheckConfig(root)) == ["raw: 5 keys are there more than once; keys must be unique in a dataset"]


def test_captions_that_do_not_belong_are_errors(root):
    path = join(root, "captions/cap/00000.parquet")
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    Path(root, "shards", "00000_stats.json").unlink()
    with pytest.raises(ShardsFailed, match="key 000000000 has no row in captions/cap"):
        pack(PackConfig(root, workers=1))
    extra = {"key": ["zzz"], "captions": [["a"]], "logprobs": [[0.0]], "num_tokens": [[1]]}
    pq.write_table(pa.concat_tables([table, pa.table(extra, schema=table.schema)]), path)
    with pytest.raises(ShardsFailed, match=r"key zzz is not in raw/00000\.tar"):
        pack(PackConfig(root, workers=1))
    pq.write_table(pa.concat_tables([table, table]), path)
    with pytest.raises(ShardsFailed, match="key 000000000 twice"):
        pack(PackConfig(root, workers=1))


def test_several_captioners_must_be_told_apart(root, model):
    shutil.copytree(join(root, "captions/cap"), join(root, "captions/other"))
    with pytest.raises(UserError, match=r"several captioners .*\['cap', 'other'\]; say --captioner"):
        pack(PackConfig(root))
    with pytest.raises(UserError, match="no captions/nope"):
        pack(PackConfig(root, captioner=("nope",)))
    assert pack(PackConfig(root, captioner=("none",), workers=1, overwrite=True)).counts["success"] > 0
    assert len(next(read_shard(join(root, "shards/00000.tar"))).captions) == 1


def test_samples_without_any_caption_are_dropped_and_counted(tmp_path):
    root = str(tmp_path / "ds")
    write_raw(root, 1)
    samples = list(read_shard(join(root, "raw/00000.tar")))
    samples[0].members.pop("txt")
    write_shard(join(root, "raw/00000.tar"), samples)
    assert pack(PackConfig(root, workers=1)).counts == {"no caption": 1, "success": 4}


def test_models_that_are_not_there_are_one_clear_line(root):
    with pytest.raises(UserError, match="local-dir:/nope: the folder is not there"):
        caption(CaptionConfig(root, "local-dir:/nope"))
    with pytest.raises(UserError, match=r"no model 'ViT-NOPE': none of the .* names is like it; folders"):
        cache(CacheConfig(root, "ViT-NOPE"))
    with pytest.raises(UserError, match=r"no model 'runs/nope', nor such a folder: none of"):
        cache(CacheConfig(root, "runs/nope"))


def test_a_model_without_weights_is_refused(root, tmp_path):
    """open_clip only warns; random captions of twelve million images would be dear."""
    with pytest.raises(UserError, match=r"'coca_ViT-B-32' cannot be loaded: it has no weights; say --pretrained"):
        caption(CaptionConfig(root, "coca_ViT-B-32"))
    with pytest.raises(UserError, match="it has no weights"):
        cache(CacheConfig(root, "ViT-B-32"))


def test_defaults_name_a_model_and_a_tag_that_exist(root, monkeypatch):
    """And what cannot be had is refused before a model of gigabytes is built."""
    import huggingface_hub.constants
    import open_clip

    def build(*_, **__):
        raise AssertionError("built")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("CLIP", "CustomTextCLIP", "CoCa"):
        monkeypatch.setattr(open_clip.factory, name, build)
    for run, config in ((caption, CaptionConfig(root)), (cache, CacheConfig(root))):
        assert config.pretrained in open_clip.list_pretrained_tags_by_model(config.model)
        assert config.label == model_label(config.model, config.pretrained)
        with pytest.raises(
            UserError, match=rf"{config.model}.*{config.pretrained}.*cannot be fetched; --pretrained FILE"
        ):
            run(config)
        with pytest.raises(UserError, match=r"no weights; say --pretrained TAG_OR_FILE \(its tags are laion2b"):
            run(replace(config, model="coca_ViT-B-32", pretrained=None))
    with pytest.raises(UserError, match="ViT-B-32: caption needs an open_clip CoCa model"):
        caption(CaptionConfig(root, "ViT-B-32", "openai"))
    assert CaptionConfig(root, "local-dir:x").pretrained is CacheConfig(root, "timm:x").pretrained is None
    assert CacheConfig(root, pretrained="openai").label == "ViT-L-14-openai"


def test_a_folder_without_weights_is_refused(root, tmp_path):
    model = Path(tiny_coca(tmp_path / "coca").removeprefix("local-dir:"))
    (model / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"it has no weights; put them there as one of \*\.safetensors"):
        caption(CaptionConfig(root, f"local-dir:{model}"))
    (model / "checkpoints").mkdir()
    with pytest.raises(UserError, match=rf"a RUN folder .* the one that `clipmill export {model} --to FOLDER` writes"):
        caption(CaptionConfig(root, f"local-dir:{model}"))


def test_labels_of_models():
    assert model_label("local-dir:/a/b.c/", None) == "b_c"
    assert model_label("hf-hub:org/name", None) == "name"
    assert model_label("ViT-B-32", "/x/y.pt") == "ViT-B-32-y_pt"


def test_stage_logs_carry_the_times(built):
    line = json.loads(Path(built, "logs", "pack.jsonl").read_text().splitlines()[0])
    assert (line["shards"], line["made"], line["samples"]) == (SHARDS, SHARDS, 15)
    assert line["seconds"] > 0


def test_bad_options_name_field_and_value():
    with pytest.raises(UserError, match="--batch-size 0"):
        CaptionConfig("x", batch_size=0)
    with pytest.raises(UserError, match="--views 8 of the same centre crop"):
        CacheConfig("x", augment=False)
    with pytest.raises(UserError, match="--source 'x': must be all, original or synthetic"):
        VocabConfig("x", source="x")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "x/y",
        "/x",
        "x/",
        "-x",
        "--name",
        ".x",
        "a\0b",
        "a\nb",
        "a b ",
        " a",
        "x" * 300,
        "a\\b",
        "*",
        "a?b",
        "s3://x",
        "a:b",
        "{00000..00009}",
        "\udcff",
        "a\tb",
        "$HOME",
        "a;b",
    ],
)
@pytest.mark.parametrize("config", [CaptionConfig, CacheConfig, VocabConfig])
def test_names_are_no_paths(config, name):
    with pytest.raises(UserError, match=r"--name .* cannot be the name of a folder") as caught:
        config("x", name=name)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["a", "ViT-L-14_datacomp", "v1.2", "two words", "ÜberName", "7b", "a%jb", "x" * 200])
def test_good_names_stay(name):
    assert CaptionConfig("x", name=name).label == CacheConfig("x", name=name).label == VocabConfig("x", name=name).name
