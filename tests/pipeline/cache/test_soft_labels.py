"""Soft labels in the cache: the teacher's own, grown by views, validated, of one class list; what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from small_data import tree, vouch, write_raw

from pipeline.cache.config import CacheConfig
from pipeline.cache.stage import cache
from pipeline.check.config import CheckConfig
from pipeline.check.stage import check
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from pipeline.report.dataset import dataset_page
from pipeline.why.config import WhyConfig
from pipeline.why.stage import why
from shards_spec.class_names import class_list_hash
from shards_spec.embeddings import EmbeddingFile, Vectors, write_vectors
from shards_spec.files import DataError, UserError, join
from shards_spec.images import decode_rgb
from shards_spec.manifest import read_done
from shards_spec.soft_labels import SoftLabelFormat
from shards_spec.tar import read_shard
from shards_spec.timm_classifiers import load_timm_classifier
from shards_spec.views import ViewSpec, apply_view, draw_view
from training.data.teacher_cache import TeacherCache
from training.export import to_timm
from training.export.config import ExportConfig
from training.models.classifier import new_classifier

VIEWS = ViewSpec(ops=1)
NAMES = ["cat", "dog", "emu", "fox", "gnu", "hen", "ibex"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> str:
    root = str(tmp_path_factory.mktemp("data") / "ds")
    write_raw(root, 2)
    pack(PackConfig(root, captioner=("none",), workers=1))
    return root


@pytest.fixture
def root(packed, tmp_path) -> str:
    return shutil.copytree(packed, tmp_path / "ds").as_posix()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A classifier as `clipmill export` writes it, whose logits differ much."""
    student = new_classifier("timm:test_vit", len(NAMES))
    student.model.names = NAMES
    with torch.no_grad():
        student.model.head.weight.mul_(100)
    folder = tmp_path_factory.mktemp("models") / "classifier"
    to_timm.write(folder, student, ExportConfig("run", str(folder)))
    return f"timm:local-dir:{folder}"


def run(root: str, model: str, **changes):
    return cache(CacheConfig(root, model, **{"name": "soft", "views": 2, "spec": VIEWS, "device": "cpu", **changes}))


def read(root: str, column: str = "soft_0", shard: int = 0) -> tuple[EmbeddingFile, np.ndarray]:
    file = EmbeddingFile(join(root, f"teacher/soft/{shard:05d}.parquet"))
    return file, file.vectors(column).values


def expected(root: str, model: str, view: int) -> np.ndarray:
    """(n, C) the teacher's probabilities of a view of the first shard, computed directly."""
    loaded = load_timm_classifier(model)
    logits = []
    for sample in read_shard(join(root, "shards/00000.tar")):
        image = apply_view(decode_rgb(sample.image), VIEWS, draw_view(VIEWS, sample.key, view), loaded.image_size)
        pixels = loaded.normalise(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])
        with torch.no_grad():
            logits.append(loaded.model(pixels)[0])
    return torch.stack(logits).softmax(1).numpy()


@pytest.mark.parametrize("kept", [3, "all"])
def test_labels_are_the_teachers_and_more_views_are_added(root, folder, kept):
    run(root, folder, soft_labels=kept)
    before = tree(root)
    assert run(root, folder, soft_labels=kept).made == 0
    summary = run(root, folder, soft_labels=kept, views=3)
    assert summary.measurements["new_image_vectors"] == 10
    assert all(tree(root)[path] == before[path] for path in before if path.endswith(".parquet"))
    assert check(CheckConfig(root)) == []
    file, rows = read(root, "soft_1")
    own = SoftLabelFormat(len(NAMES), kept)
    assert (file.names, file.dim) == (["soft_0", "soft_1"], {3: 16, "all": 14}[kept])
    assert file.meta["class_names"] == NAMES
    config = read_done(join(root, "teacher/soft"), 0).config
    assert (config["soft_labels"], config["classes"], config["classes_sha256"]) == (kept, 7, class_list_hash(NAMES))
    truth = expected(root, folder, 1)
    stored = own.distributions(rows)
    if kept == "all":
        assert np.abs(stored - truth).max() < 1e-3
        return
    records = own.decode(rows)
    order = np.argsort(-truth, axis=1)[:, :kept]
    assert (records["classes"] == order).all()
    assert np.abs(records["probabilities"] - np.take_along_axis(truth, order, 1)).max() < 1e-3
    assert np.abs(records["rest"] - (1 - np.take_along_axis(truth, order, 1).sum(1))).max() < 1e-5
    others = np.argsort(-truth, axis=1)[:, kept:]
    spread = np.take_along_axis(stored, others, 1)
    assert np.abs(spread - spread.mean(1, keepdims=True)).max() < 1e-7
    assert np.abs(stored.sum(1) - 1).max() < 1e-6


def test_all_by_number_and_names_of_caches(root, folder):
    run(root, folder, soft_labels=7)
    assert read(root)[0].meta["soft_labels"] == "all"
    assert CacheConfig(root, folder, soft_labels=3).label == "classifier-soft-3"
    assert CacheConfig(root, folder).label == "classifier"


def test_a_checkpoint_with_another_head(root, tmp_path):
    model = timm.create_model("test_vit", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "five.pt")
    run(root, "timm:test_vit", pretrained=str(tmp_path / "five.pt"), soft_labels=2)
    meta = read(root)[0].meta
    assert (meta["classes"], meta["class_names"], meta["classes_sha256"]) == (5, None, None)
    torch.save({k: v for k, v in model.state_dict().items() if "head" not in k}, tmp_path / "none.pt")
    with pytest.raises(UserError, match=r"none\.pt: no head\.weight in it, so it gives no soft labels"):
        run(root, "timm:test_vit", pretrained=str(tmp_path / "none.pt"), soft_labels=2)
    torch.save({"head.weight": torch.zeros(5, 64)}, tmp_path / "part.pt")
    with pytest.raises(UserError, match=r"part\.pt with its 5 classes does not fit 'timm:test_vit'"):
        run(root, "timm:test_vit", pretrained=str(tmp_path / "part.pt"), soft_labels=2)


def test_what_is_refused(root, folder, tmp_path, monkeypatch):
    for changes, message in (
        ({"soft_labels": 8}, r"--soft-labels 8: --model '.*' has 7 classes; keep fewer, or all"),
        ({"soft_labels": 0}, r"--soft-labels 0: must be 1 or more, or all"),
        ({"soft_labels": 3, "dtype": "int8"}, r"--dtype int8: soft labels are stored as float16"),
        ({"soft_labels": 3, "model": "ViT-B-32"}, r"--model 'ViT-B-32' is no classifier of timm's; .*clipmill export"),
        ({"soft_labels": 3, "model": f"timm:local-dir:{tmp_path}/no"}, r"no has no config\.json .*clipmill export RUN"),
    ):
        with pytest.raises(UserError, match=message):
            run(root, **{"model": folder, **changes})
    headless = timm.create_model("test_vit", num_classes=0)
    timm.models.save_for_hf(headless, tmp_path / "headless", safe_serialization=True)
    with pytest.raises(UserError, match="has no classifier, so it gives no soft labels"):
        run(root, f"timm:local-dir:{tmp_path}/headless", soft_labels=1)
    monkeypatch.setattr("pipeline.cache.embedder.MOST_CLASSES", 6)
    with pytest.raises(UserError, match="--soft-labels 3: 7 classes are more than the 6 that 16 bits count"):
        run(root, folder, soft_labels=3)


def test_another_number_and_vectors_are_other_caches(root, folder):
    run(root, folder, soft_labels=3)
    with pytest.raises(UserError, match=r"was made with another config .*--soft-labels: 3 before, 2 now"):
        run(root, folder, soft_labels=2)
    with pytest.raises(UserError, match="was made with another config"):
        run(root, folder)


def test_rows_are_read_alone_and_from_urls(root, folder):
    run(root, folder, soft_labels=3)
    path = join(root, "teacher/soft/00000.parquet")
    whole = EmbeddingFile(path).vectors("soft_1").values
    for file in (EmbeddingFile(path), EmbeddingFile(path, f"file://{path}")):
        assert np.array_equal(file.stored_row("soft_1", 3), whole[3])
        with pytest.raises(DataError, match="no column soft_2"):
            file.stored_row("soft_2", 0)


def test_recipes_of_pairs_refuse_such_a_cache(root, folder):
    run(root, folder, soft_labels=3)
    with pytest.raises(UserError, match="--teacher 'soft' is a cache of soft labels; take one that has captions too"):
        TeacherCache(root, "soft", 2)


def damage(root: str, edit) -> str:
    """The one problem that `check` finds after ``edit(records, meta)`` of the first shard's first view."""
    path = "teacher/soft/00000.parquet"
    file, rows = read(root)
    records = SoftLabelFormat(7, file.meta["soft_labels"]).decode(rows).copy()
    meta = dict(file.meta)
    edit(records, meta)
    changed = records.view(np.uint8).reshape(len(rows), -1)
    columns = {name: file.vectors(name) for name in file.names}
    columns["soft_0"] = Vectors(changed, None, columns["soft_0"].present)
    write_vectors(join(root, path), file.keys, columns, {"id_image": file.ids("soft_0")}, meta)
    vouch(root, "teacher/soft", 0, path)
    (problem,) = check(CheckConfig(root))
    return problem


def set_field(name: str, value):
    def edit(records, meta) -> None:
        records[name][2] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_field("classes", [0, 7, 1]), "a class that is not below 7"),
        (set_field("classes", [0, 1, 0]), "a class twice"),
        (set_field("probabilities", [0.2, 0.3, 0.1]), "probabilities that do not descend"),
        (set_field("probabilities", [np.nan, 0.3, 0.1]), "probabilities that do not descend"),
        (set_field("rest", 0.9), "probabilities that with the rest do not add up to 1"),
        (lambda _, meta: meta.update(class_names=NAMES[::-1]), "class_names are not the list whose hash"),
        (lambda _, meta: meta.update(classes=8), "its classes is 8, its done-record has 7"),
    ],
)
def test_check_finds_damage(root, folder, edit, message):
    run(root, folder, soft_labels=3)
    problem = damage(root, edit)
    assert "teacher/soft/00000.parquet" in problem
    assert message in problem


def test_check_finds_damaged_logits(root, folder):
    run(root, folder, soft_labels="all")
    assert "logits that are not finite with the largest at 0" in damage(root, set_field("logits", np.nan))


def test_a_teacher_without_numbers_is_named(root, tmp_path):
    model = timm.create_model("test_vit", num_classes=5)
    torch.nn.init.constant_(model.head.weight, torch.inf)
    torch.save(model.state_dict(), tmp_path / "inf.pt")
    with pytest.raises(Exception, match=r"of key 000000000 the teacher gives logits that are not finite"):
        run(root, "timm:test_vit", pretrained=str(tmp_path / "inf.pt"), soft_labels="all")


@pytest.mark.parametrize("kept", [1, 10, 99, "all"])
def test_distributions_are_the_probabilities(kept):
    """Also with classes that have next to nothing."""
    logits = 4 * torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    own = SoftLabelFormat(100, kept)
    rows = own.encode(logits).numpy()
    assert rows.shape == (64, own.width)
    assert own.check(rows) is None
    truth = logits.double().softmax(1).numpy()
    stored = own.distributions(rows)
    assert np.abs(stored.sum(1) - 1).max() < 1e-6
    assert (stored.argmax(1) == truth.argmax(1)).all()
    if kept in (99, "all"):
        assert np.abs(stored - truth).max() < 5e-4


def test_classes_above_32767_keep_their_number():
    logits = torch.zeros(1, 65_536)
    logits[0, 65_535], logits[0, 40_000] = 20.0, 18.0
    own = SoftLabelFormat(65_536, 2)
    assert own.decode(own.encode(logits).numpy())["classes"].tolist() == [[65_535, 40_000]]


def test_a_folder_is_needed_of_a_run(root, tmp_path):
    Path(tmp_path, "run/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"is no classifier of timm's; .*`clipmill export RUN --to FOLDER`"):
        run(root, str(tmp_path / "run"), soft_labels=3)


@pytest.mark.parametrize("kept", [3, "all"])
def test_lists_and_report(root, folder, kept):
    run(root, folder, soft_labels=kept)
    cache(CacheConfig(root, name="soft", export_lists=True))
    table = pd.read_parquet(join(root, "teacher/soft/lists/00000.parquet"))
    records = SoftLabelFormat(7, kept).decode(read(root)[1])
    fields = {3: ("classes", "probabilities", "rest"), "all": ("logits",)}[kept]
    assert [name for name in table.columns if name.startswith("soft_0")] == [f"soft_0_{name}" for name in fields]
    for name in fields:
        assert np.array_equal(np.stack(table[f"soft_0_{name}"]).astype(np.float64), records[name].astype(np.float64))
    (teacher,) = dataset_page(root, 0)["teachers"]
    facts = dict(teacher["facts"])
    assert facts["per sample"] == "soft labels of 2 views"
    assert (
        facts["soft labels"] == {3: "the 3 largest probabilities of 7 classes", "all": "the logits of 7 classes"}[kept]
    )
    assert facts["bytes per view"] == {3: "16", "all": "14"}[kept]


def test_why_names_the_most_probable_classes(root, folder):
    run(root, folder, soft_labels="all")
    key = read(root)[0].keys[1]
    mean = (expected(root, folder, 0)[1] + expected(root, folder, 1)[1]) / 2
    lines = why(WhyConfig(root, key)).lines
    assert f"  class {NAMES[mean.argmax()]}: {mean.max():.3f}" in lines
