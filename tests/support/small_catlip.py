"""A small labelled dataset, made by the real stages, and images of classes, for the tests of CatLIP."""

from pathlib import Path

from conftest import skip_or_fail
from small_data import draw, write_raw

from pipeline.labels.vocab_stage import VocabConfig, vocab
from pipeline.labels.wordnet import load_wordnet
from pipeline.pack.config import PackConfig
from pipeline.pack.stage import pack
from shards_spec.files import UserError
from shards_spec.sample import Sample
from shards_spec.tar import write_shard

TINY = "timm:catlip_vit_tiny"


def need_wordnet():
    """WordNet, or the test is skipped."""
    try:
        return load_wordnet()
    except UserError as error:
        return skip_or_fail(str(error))


def write_labelled(root, shards=3, per_shard=6, min_count=0):
    """ROOT/shards with synsets and ROOT/vocab/all.tsv; returns the vocabulary."""
    need_wordnet()
    write_raw(str(root), shards, per_shard)
    pack(PackConfig(root=str(root), workers=1))
    return vocab(VocabConfig(str(root), min_count=min_count))


def class_images(count, split, classes=("red", "blue")):
    """(class, JPEG) of drawn shapes whose colour is the class, ``count`` of each."""
    found = {name: [] for name in classes}
    number = 0
    while any(len(own) < count for own in found.values()):
        image, caption = draw(f"{split}/{number}")
        colour = caption.split()[1]
        if colour in found and len(found[colour]) < count:
            found[colour].append(image)
        number += 1
    return [(name, image) for name in classes for image in found[name]]


def write_folders(root: Path, train=12, test=6, classes=("red", "blue")):
    """ROOT/train and ROOT/test of class folders."""
    for split, count in (("train", train), ("test", test)):
        for number, (name, image) in enumerate(class_images(count, split, classes)):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:03d}.jpg").write_bytes(image)
    return str(root)


def write_bench(root: Path, train=12, test=6, classes=("blue", "red")):
    """The same as a CLIP_benchmark WebDataset of two shards a split."""
    root.mkdir(parents=True)
    (root / "classnames.txt").write_text("\n".join(classes) + "\n")
    for split, count in (("train", train), ("test", test)):
        samples = [
            Sample(f"s{number:04d}", {"jpg": image, "cls": str(classes.index(name)).encode()})
            for number, (name, image) in enumerate(class_images(count, split, classes))
        ]
        (root / split).mkdir()
        (root / split / "nshards.txt").write_text("2")
        for shard, part in enumerate((samples[: count + 1], samples[count + 1 :])):
            write_shard(str(root / split / f"{shard}.tar"), part)
    return str(root)
