"""`cache --from`: published vectors reach the right rows, recorded augmentations are replayed to the pixel."""

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps
from small_data import tar_bytes, tree, vouch, write_final
from small_datacompdr import (
    DIM,
    Reinforced,
    draw_parameters,
    final_sample,
    packed,
    reinforced,
    replay,
    write_reinforced,
)
from small_ingest import config as ingest_config
from web_server import make_image, serve

from pipeline.cache.config import CacheConfig, VectorSource
from pipeline.cache.datacompdr_sample import (
    BAD_PARAMETERS,
    BAD_VECTORS,
    OTHER_NUMBER,
    OUTSIDE,
    UNREADABLE,
    parse_augmentations,
    recorded_views,
)
from pipeline.cache.imported import SourceTars
from pipeline.cache.stage import cache
from pipeline.caption.config import CaptionConfig, ListOptions
from pipeline.caption.stage import caption
from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.ingest.detect import detect
from pipeline.ingest.source_files import source_files
from pipeline.ingest.stage import ingest
from pipeline.ingest.url_lists import list_rows
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from pipeline.why.config import WhyConfig
from pipeline.why.stage import why
from shards_spec.files import DataError, UserError
from shards_spec.manifest import read_done
from shards_spec.teacher_shard import TeacherShard
from shards_spec.views import RECORDED_BYTES, RecordedSpec, apply_view, unpack_recorded

VIEWS = 3
NAME = "ViT-L-14-openai"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[str, list[Reinforced]]:
    """A tar of four samples, in both forms of vectors."""
    samples = [reinforced(number, "http://h", form="pth.gz" if number % 2 else "npz") for number in range(4)]
    return write_reinforced(tmp_path_factory.mktemp("dr"), [samples]), samples


def imported(root, source: str, part: str = "", **options):
    defaults = {"model": "ViT-L-14", "pretrained": "openai", "views": VIEWS, "processes": 1, "dtype": "float32"}
    return cache(CacheConfig(str(root), source=VectorSource((source,), part), **{**defaults, **options}))


def cache_problems(root) -> list[str]:
    """What `check` says of the cache; the other folders are not as `pack` leaves them."""
    return [problem for problem in check(CheckConfig(str(root))) if "teacher/" in problem]


def half(vectors: np.ndarray, part: int) -> np.ndarray:
    own = vectors[..., part * DIM // 2 : (part + 1) * DIM // 2]
    return own / np.linalg.norm(own, axis=-1, keepdims=True)


def rows_of(root, name: str, column: str) -> np.ndarray:
    shard = TeacherShard(str(root), name, 0)
    return shard.file(column).vectors(column).as_floats()


def test_vectors_follow_uids_and_captions(tmp_path, source):
    folder, samples = source
    order = [2, 0, 3]  # sample 1 was dropped, the rest has another order, captions are turned round and one is foreign
    finals = [final_sample(n, samples[n], [*reversed(samples[n].captions), "another's"]) for n in order]
    write_final(str(tmp_path), [finals])
    for part, tag in enumerate(("openai", "datacomp_xl_s13b_b90k")):
        summary = imported(tmp_path, folder, pretrained=tag)
        assert summary.counts == {"success": 3}
        assert summary.counters == {"image vectors": 9, "text vectors": 6, "captions without a vector": 3}
        name = f"ViT-L-14-{tag}"
        for view in range(VIEWS):
            expected = np.stack([half(samples[n].image_emb[view], part) for n in order])
            np.testing.assert_allclose(rows_of(tmp_path, name, f"image_{view}"), expected, atol=4e-3)  # bfloat16
        for number in (1, 2):  # the last one first
            expected = np.stack([half(samples[n].text_emb[3 - number], part) for n in order])
            np.testing.assert_allclose(rows_of(tmp_path, name, f"text_{number}"), expected, atol=4e-3)
        assert np.isnan(rows_of(tmp_path, name, "text_0")).all()
        assert np.isnan(rows_of(tmp_path, name, "text_3")).all()
    assert cache_problems(tmp_path) == []


def test_views_are_replayed_to_the_pixel(tmp_path, source):
    folder, samples = source
    write_final(str(tmp_path), [[final_sample(n, sample, sample.captions) for n, sample in enumerate(samples)]])
    imported(tmp_path, folder)
    shard = TeacherShard(str(tmp_path), NAME, 0)
    for row, sample in enumerate(samples):
        image = Image.open(io.BytesIO(sample.image)).convert("RGB")
        for view in range(VIEWS):
            stored = shard.file(f"view_{view}").stored_row(f"view_{view}", row)
            rendered = apply_view(image, RecordedSpec(), unpack_recorded(stored.tobytes()), 224)
            np.testing.assert_array_equal(np.asarray(rendered), replay(image, sample.parameters[view]))


def test_every_operation_is_replayed_to_the_pixel():
    generator = np.random.default_rng(0)
    image = Image.open(io.BytesIO(make_image(1, (300, 200))))
    seen = set()
    for _ in range(60):
        parameters = draw_parameters(image, generator)
        seen |= {index for index, _ in parameters[1]}
        (view,) = recorded_views(parse_augmentations([parameters]), image.size, 1)
        assert unpack_recorded(view.pack()) == view
        np.testing.assert_array_equal(
            np.asarray(apply_view(image, RecordedSpec(), view, 224)), replay(image, parameters)
        )
    assert len(seen) == 14


# what an image has to do with its boxes


def whole(*boxes: tuple[int, int, int, int]) -> list:
    """Augmentations of nothing but crops: top, left, height, width."""
    return parse_augmentations([[list(box), None] for box in boxes])


def test_boxes_count_in_the_copy_of_512_pixels_where_all_of_them_lie_in_it():
    reduced = recorded_views(whole((0, 0, 256, 512), (3, 4, 100, 100)), (1024, 512), 1)
    assert {view.frame for view in reduced} == {(512, 256)}
    own = recorded_views(whole((0, 0, 300, 512), (3, 4, 100, 100)), (1024, 512), 1)
    assert {view.frame for view in own} == {(1024, 512)}
    assert recorded_views(whole((0, 0, 10, 10)), (500, 400), 1)[0].frame == (500, 400)
    with pytest.raises(DataError, match=OUTSIDE):
        recorded_views(whole((0, 0, 401, 10)), (500, 400), 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_image_is_cropped_as_its_file_lies(orientation):
    """Apple's code opens the file and ignores its orientation; ours stores the image upright."""
    lying = Image.open(io.BytesIO(make_image(3, (120, 80), "PNG")))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    lying.save(file, "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(file))
    parameters = [[10, 20, 60, 70], [[1, 0.09], [3, 150 / 331 * 224 * 9 / 30]]]
    (view,) = recorded_views(parse_augmentations([parameters]), upright.size, orientation)
    assert view.frame == (120, 80)
    assert unpack_recorded(view.pack()) == view
    np.testing.assert_array_equal(np.asarray(apply_view(upright, RecordedSpec(), view, 224)), replay(lying, parameters))


def test_a_reduced_image_shows_the_same_part():
    image = Image.open(io.BytesIO(make_image(3, (400, 300), "PNG")))
    parameters = [[30, 40, 200, 210], []]
    (view,) = recorded_views(parse_augmentations([parameters]), image.size, 1)
    rendered = apply_view(image.resize((200, 150), Image.Resampling.BICUBIC), RecordedSpec(), view, 64)
    difference = np.abs(np.asarray(rendered).astype(int) - replay(image, parameters, 64).astype(int))
    assert difference.mean() < 3


@pytest.mark.parametrize(
    "stored",
    [
        None,
        "[",
        "{}",
        [],
        [[]],
        [[[0, 0, 5, 5]]],
        [[[0, 0, 5], []]],
        [[[0, 0, 0, 5], []]],
        [[[-1, 0, 5, 5], []]],
        [[[0, 0, 5, 5.5], []]],
        [[[0, 0, 5, 5], [[14, 0.0]]]],
        [[[0, 0, 5, 5], [[-1, 0.0]]]],
        [[[0, 0, 5, 5], [[5, 9.1]]]],
        [[[0, 0, 5, 5], [[5, float("nan")]]]],
        [[[0, 0, 5, 5], [[11, 300.0]]]],
        [[[0, 0, 5, 5], [[10, 3]]]],
        [[[0, 0, 5, 5], [[0, 0.0]] * 5]],
        [[[0, 0, 5, 5], 1, []]],
        "[" * 100_000,
    ],
)
def test_parameters_that_are_none_are_refused(stored):
    with pytest.raises(DataError, match=BAD_PARAMETERS):
        parse_augmentations(stored)


def test_a_flip_is_replayed():
    image = Image.open(io.BytesIO(make_image(3)))
    (plain,) = recorded_views(parse_augmentations([[[1, 2, 40, 50], []]]), image.size, 1)
    (flipped,) = recorded_views(parse_augmentations([[[1, 2, 40, 50], True, []]]), image.size, 1)
    mirrored = ImageOps.mirror(apply_view(image, RecordedSpec(), plain, 64))
    assert apply_view(image, RecordedSpec(), flipped, 64).tobytes() == mirrored.tobytes()


# members that are not what they should be


def spoilt(member: str, data: bytes | None):
    def change(sample: Reinforced) -> None:
        if data is None:
            del sample.members[member]
        else:
            sample.members[member] = data

    return change


def vectors(images: np.ndarray, texts: np.ndarray) -> bytes:
    return packed({"image_emb": images, "text_emb": texts}, "npz")


GOOD = reinforced(1, "")
NAN = np.full((3, DIM), np.nan, np.float32)
SPOILT = {
    UNREADABLE: spoilt("npz", b"no archive"),
    "no npz or pth.gz member": spoilt("npz", None),
    "paug.json is not there": spoilt("paug.json", None),
    "syn.json is not a JSON object": spoilt("syn.json", b"["),
    BAD_PARAMETERS: spoilt("paug.json", b'{"param_aug": 3}'),
    OUTSIDE: spoilt("paug.json", json.dumps({"param_aug": [[[0, 0, 999, 999], []]] * 3}).encode()),
    "fewer augmentations than --views": spoilt("npz", vectors(GOOD.image_emb[:2], GOOD.text_emb)),
    OTHER_NUMBER: spoilt("npz", vectors(GOOD.image_emb, GOOD.text_emb[:2])),
    BAD_VECTORS: spoilt("npz", vectors(NAN, GOOD.text_emb)),
    "vectors do not divide into the teachers": spoilt("npz", vectors(GOOD.image_emb[:, :5], GOOD.text_emb[:, :5])),
}


def test_a_sample_without_vectors_is_named_and_its_neighbours_keep_theirs(tmp_path, caplog):
    samples = [reinforced(n, "http://h") for n in range(len(SPOILT) + 4)]
    for sample, change in zip(samples[1:], SPOILT.values(), strict=False):
        change(sample)
    few = samples[7]
    few.members["paug.json"] = json.dumps({"param_aug": few.parameters[:2]}).encode()
    folder = write_reinforced(tmp_path / "dr", [samples[:-1]])  # the last one is not there
    finals = [final_sample(n, sample, sample.captions) for n, sample in enumerate(samples)]
    finals[-2] = final_sample(len(finals) - 2, samples[-2], samples[-2].captions, tar="other.tar")
    finals[-3] = final_sample(len(finals) - 3, samples[-3], samples[-3].captions, uid=None)
    root = tmp_path / "ds"
    write_final(str(root), [finals])
    summary = imported(root, folder)
    others = ["not in its tar", "its tar is not in --from", "no uid or tar in its json member"]
    assert summary.counts == {"success": 1, **dict.fromkeys([*SPOILT, *others], 1)}
    assert "00000.tar: key 000000001 has no vectors: embeddings not readable" in caplog.text
    stored = rows_of(root, NAME, "image_0")
    np.testing.assert_allclose(stored[0], half(samples[0].image_emb[0], 0), atol=1e-6)
    assert np.isnan(stored[1:]).all()
    assert cache_problems(root) == []


def test_check_names_views_and_vectors_that_are_damaged(tmp_path, source):
    folder, samples = source
    write_final(str(tmp_path), [[final_sample(n, sample, sample.captions) for n, sample in enumerate(samples)]])
    imported(tmp_path, folder)
    path = tmp_path / "teacher" / NAME / "00000-1.parquet"
    table = pq.read_table(path)
    column = table.schema.get_field_index("view_1")
    broken = pa.array([b"\xff" * RECORDED_BYTES] * len(table), pa.binary(RECORDED_BYTES))
    pq.write_table(
        table.set_column(column, "view_1", broken),
        path,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    vouch(str(tmp_path), f"teacher/{NAME}", 0, f"teacher/{NAME}/00000-1.parquet")
    with pytest.raises(SystemExit) if False else pytest.raises(Exception, match="view_1"):
        assert cache_problems(tmp_path) == []


def test_most_samples_tell_the_width_and_check_names_a_shard_of_another(tmp_path):
    samples = [reinforced(0, "http://h", dim=DIM // 2), *(reinforced(n, "http://h") for n in range(1, 4))]
    folder = write_reinforced(tmp_path / "dr", [samples])
    root = tmp_path / "ds"
    finals = [final_sample(n, sample, sample.captions) for n, sample in enumerate(samples)]
    write_final(str(root), [finals[:2], finals[2:3], finals[3:]])
    assert imported(root, folder).counts == {"success": 3, "vectors of another width than most": 1}
    assert rows_of(root, NAME, "image_0").shape == (2, DIM // 2)
    assert cache_problems(root) == []
    other = write_reinforced(tmp_path / "other", [[reinforced(n, "http://h", dim=DIM // 2) for n in range(4)]])
    with pytest.raises(UserError, match=f"dim: {DIM // 2} before, {DIM // 4} now"):
        imported(root, other)
    imported(tmp_path / "ds", other, name="narrow")
    folders = {name: str(root / "teacher" / name) for name in (NAME, "narrow")}
    narrow = read_done(folders["narrow"], 1)
    for path in narrow.outputs:
        shutil.copy(root / path, root / path.replace("narrow", NAME))
    outputs = {path.replace("narrow", NAME): digest for path, digest in narrow.outputs.items()}
    replace(read_done(folders[NAME], 1), outputs=outputs, inputs=narrow.inputs).write(folders[NAME])
    assert any("its vectors have 4 numbers, those of most shards" in problem for problem in cache_problems(root))


def test_shards_of_changed_tars_are_made_again_and_those_of_gone_ones_stay(tmp_path):
    samples = [reinforced(n, "http://h") for n in range(3)]
    folder = Path(write_reinforced(tmp_path / "dr", [samples[:1], samples[1:2]]))
    root = tmp_path / "ds"
    tars = [f"{n:08d}.tar" for n in range(3)]  # of which the last one comes later
    finals = [final_sample(n, sample, sample.captions, tar=tars[n]) for n, sample in enumerate(samples)]
    write_final(str(root), [[sample] for sample in finals])
    assert imported(root, str(folder)).made == 3
    assert imported(root, str(folder)).made == 0
    write_reinforced(tmp_path / "later", [samples[2:]])
    (tmp_path / "later" / tars[0]).rename(folder / tars[2])
    assert imported(root, str(folder)).counts == {"success": 3}
    samples[0].members["npz"] = vectors(-samples[0].image_emb, samples[0].text_emb)
    write_reinforced(tmp_path / "other", [samples[:1]])
    os.replace(tmp_path / "other" / tars[0], folder / tars[0])
    assert imported(root, str(folder)).made == 1
    np.testing.assert_allclose(rows_of(root, NAME, "image_0")[0], -half(samples[0].image_emb[0], 0), atol=1e-6)
    (folder / tars[1]).unlink()
    assert imported(root, str(folder)).made == 0
    assert cache_problems(root) == []


def test_a_cache_of_before_tars_and_width_were_recorded_stays_valid(tmp_path, source):
    folder, samples = source
    write_final(str(tmp_path), [[final_sample(0, samples[0], samples[0].captions)]])
    assert imported(tmp_path, folder).made == 1
    cached = str(tmp_path / "teacher" / NAME)
    done = read_done(cached, 0)
    config = {name: value for name, value in done.config.items() if name != "dim"}
    replace(done, config=config, inputs={"shards/00000.tar": done.inputs["shards/00000.tar"]}).write(cached)
    assert imported(tmp_path, folder).made == 0
    assert cache_problems(tmp_path) == []


# the command


def test_more_views_later_and_another_source_are_told_apart(tmp_path, source):
    folder, samples = source
    write_final(str(tmp_path), [[final_sample(n, sample, sample.captions) for n, sample in enumerate(samples)]])
    assert imported(tmp_path, folder, views=2).made == 1
    assert imported(tmp_path, folder, views=2).made == 0
    assert imported(tmp_path, folder).made == 1
    assert TeacherShard(str(tmp_path), NAME, 0).config["num_views"] == VIEWS
    with pytest.raises(UserError, match=r"--views 4: .*00000000.tar has 3 augmentations per sample"):
        imported(tmp_path, folder, views=4)
    with pytest.raises(UserError, match="part"):
        imported(tmp_path, folder, part="2/2")


def test_a_part_may_be_named(tmp_path, source):
    folder, samples = source
    write_final(str(tmp_path), [[final_sample(n, sample, sample.captions) for n, sample in enumerate(samples)]])
    imported(tmp_path, folder, model="ViT-B-32", pretrained="other", part="3/4", name="third")
    quarter = np.stack([sample.image_emb[0, DIM // 2 : 3 * DIM // 4] for sample in samples])
    expected = quarter / np.linalg.norm(quarter, axis=1, keepdims=True)
    np.testing.assert_allclose(rows_of(tmp_path, "third", "image_0"), expected, atol=8e-3)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_vectors_are_stored_as_asked(tmp_path, source, dtype):
    folder, samples = source
    write_final(str(tmp_path), [[final_sample(n, sample, sample.captions) for n, sample in enumerate(samples)]])
    imported(tmp_path, folder, dtype=dtype)
    expected = np.stack([half(sample.image_emb[0], 0) for sample in samples])
    np.testing.assert_allclose(rows_of(tmp_path, NAME, "image_0"), expected, atol=8e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "ViT-B-32"}, "DataCompDR's teachers are .*--part 1/2"),
        ({"part": "3/2"}, "--part '3/2': must be N/M"),
        ({"part": "x"}, "--part 'x': must be N/M"),
        ({"augment": False, "views": 1}, "--from brings its own augmentations"),
        ({"export_lists": True}, "--export-lists means nothing with --from"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, source, options, message):
    write_final(str(tmp_path), [[]])
    with pytest.raises(UserError, match=message):
        imported(tmp_path, source[0], **options)


def test_other_sources_are_refused(tmp_path):
    write_final(str(tmp_path / "ds"), [[]])
    with pytest.raises(UserError, match=r"--from .*/nothing: no such file"):
        imported(tmp_path / "ds", str(tmp_path / "nothing"))
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "0.tar").write_bytes(tar_bytes([("a.jpg", make_image(1)), ("a.txt", "c")]))
    with pytest.raises(UserError, match="none of its samples has vectors"):
        imported(tmp_path / "ds", str(plain))


def test_a_tar_that_cannot_be_read_ends_the_run(tmp_path, source):
    samples = source[1]
    folder = write_reinforced(tmp_path / "dr", [samples[:1], samples[1:2]])
    finals = [final_sample(n, sample, sample.captions, tar=f"0000000{n}.tar") for n, sample in enumerate(samples[:2])]
    root = tmp_path / "ds"
    write_final(str(root), [[sample] for sample in finals])
    gone = tmp_path / "dr" / "00000001.tar"
    content = gone.read_bytes()
    files = source_files(folder, "datacompdr")
    gone.unlink()
    tars = SourceTars(files)
    assert len(tars.read("00000000.tar", samples[0].uid).images) == VIEWS
    with pytest.raises(UserError, match=r"--from .*/00000001\.tar: cannot be read .*; the same command goes on"):
        tars.read("00000001.tar", samples[1].uid)
    gone.write_bytes(content)
    assert len(tars.read("00000001.tar", samples[1].uid).images) == VIEWS


def test_a_source_may_be_remote(tmp_path, source):
    folder, samples = source
    store = fsspec.filesystem("memory")
    store.pipe("/dr/00000000.tar", (Path(folder) / "00000000.tar").read_bytes())
    write_final(str(tmp_path), [[final_sample(n, sample, sample.captions) for n, sample in enumerate(samples)]])
    assert imported(tmp_path, "memory://dr").counts == {"success": 4}
    assert len(list(list_rows("memory://dr", detect("memory://dr")))) == 4


@pytest.mark.slow
def test_processes_write_the_same_bytes(tmp_path, source):
    folder, samples = source
    finals = [[final_sample(n, sample, sample.captions)] for n, sample in enumerate(samples)]
    for processes in (1, 2):
        write_final(str(tmp_path / str(processes)), finals)
        imported(tmp_path / str(processes), folder, processes=processes)
    assert tree(tmp_path / "1" / "teacher") == tree(tmp_path / "2" / "teacher")


def test_from_download_to_cache(tmp_path):
    """The whole path: a list of tars, images from a server, captions and vectors of those that are still the same."""
    with serve() as server:
        base = f"http://127.0.0.1:{server.server_port}"
        samples = [reinforced(n, base, form="pth.gz") for n in range(6)]
        samples[5].members["pth.gz"] = b"damaged"
        samples[1].members["url.txt"] = f"{base}/good/9".encode()
        samples[3].members["url.txt"] = f"{base}/status/404".encode()
        folder = write_reinforced(tmp_path / "dr", [samples[:2], samples[2:]])
        root = tmp_path / "ds"
        (tmp_path / "originals").mkdir()
        for name, of_tar in (("00000000.tar", samples[:2]), ("00000001.tar", samples[2:])):
            members = [(f"{sample.uid}.txt", f"original {sample.uid}") for sample in of_tar]
            (tmp_path / "originals" / name).write_bytes(tar_bytes(members))
        ingest(ingest_config(root, folder, image_size=32, original_captions=str(tmp_path / "originals")))
    caption(CaptionConfig(str(root), name="coca", lists=ListOptions((str(root / "raw" / "*.parquet"),))))
    pack(PackConfig(str(root), workers=1))
    summary = imported(root, folder, views=2)
    assert summary.counts == {"success": 3, UNREADABLE: 1}
    assert summary.counters == {"image vectors": 6, "text vectors": 9}
    assert "no vectors: the source of this imported cache had none" in str(why(WhyConfig(str(root), "000000005")))
    assert "text_2: cosine" in str(why(WhyConfig(str(root), "000000004")))
    assert check(CheckConfig(str(root))) == []
    kept = [samples[n] for n in (0, 2, 4)]
    for caption_number in range(3):
        expected = np.stack([half(sample.text_emb[caption_number], 0) for sample in kept])
        np.testing.assert_allclose(rows_of(root, NAME, f"text_{caption_number}")[:3], expected, atol=4e-3)
