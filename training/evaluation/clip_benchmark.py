"""What CLIP_benchmark's WebDataset layout says about an evaluation dataset: its task, classes, prompts, captions.

EVAL/classnames.txt, zeroshot_classification_templates.txt   one per line; a template has {c}
EVAL/dataset_type.txt                                        "retrieval", or absent for classification
EVAL/test/nshards.txt, test/0.tar …                          members jpg|png|webp and cls (a number) or txt
                                                             (captions, one per line)
EVAL/test/CLASS/*.jpg (or val/)                              instead of shards; both text files may be left out then
"""

import logging
from collections.abc import Iterator
from typing import Literal

from shards_spec import imagenet
from shards_spec.class_names import class_text, numbered_shards, read_class_names, read_lines
from shards_spec.files import DataError, UserError, exists, join
from shards_spec.messages import counted
from shards_spec.sample import Sample
from shards_spec.tar import read_shard
from training.data.labelled_images import (
    FolderImages,
    LabelledImages,
    RootImages,
    find_split,
    has_class_folders,
    is_labelled_root,
    open_split,
)

log = logging.getLogger(__name__)
PROMPT = "a photo of a {c}."  # for class folders without prompts: the one of CLIP's paper


def dataset_task(root: str) -> Literal["zeroshot", "retrieval"]:
    """Return the task of a dataset by its dataset_type.txt. Raises UserError when it is another kind of data."""
    path = join(root, "dataset_type.txt")
    if not exists(path):
        return "zeroshot"
    kind = next(filter(None, read_lines(path, "the kind of data"))).lower()
    if kind not in ("classification", "retrieval"):
        raise UserError(f"{path} says {kind!r}: classification and retrieval can be measured")
    return "retrieval" if kind == "retrieval" else "zeroshot"


def check_root(root: str) -> None:
    """Check that a dataset can be measured, without reading its images.

    Raises:
        UserError: There is no dataset, or one of its files is missing or wrong.
    """
    split = find_split(root)
    if dataset_task(root) == "zeroshot":
        read_classes(root, open_split(root, split))
    elif not has_class_folders(root, split):
        numbered_shards(join(root, split))


def read_classes(root: str, images: LabelledImages) -> tuple[list[str], list[str]]:
    """Return the names of the classes and the prompts of a dataset.

    Class folders may do without a file of either: they are named by themselves, those of ImageNet as open_clip names
    them, with CLIP's 80 prompts. A ROOT may do without prompts. Raises UserError.
    """
    names_file = join(root, "classnames.txt")
    prompts_file = join(root, "zeroshot_classification_templates.txt")
    if isinstance(images, RootImages):
        return list(map(class_text, images.classes)), read_prompts(prompts_file) if exists(prompts_file) else [PROMPT]
    if not isinstance(images, FolderImages):
        return images.classes, read_prompts(prompts_file)
    prompts = [PROMPT]
    if exists(names_file):
        names = read_class_names(names_file)
    elif labels := imagenet.labels_of_folders(images.classes, str(images.folder), f"name them in {names_file}"):
        names = [imagenet.class_names()[labels[name]] for name in images.classes]
        prompts = list(imagenet.prompts())
    else:
        names = list(map(class_text, images.classes))
        log.info(
            "%s: classes are named as their folders; classnames.txt, a line per folder, names them otherwise", root
        )
    if len(names) != len(images.classes):
        lines, folders = counted(len(names), "line"), counted(len(images.classes), "class folder")
        raise UserError(
            f"{names_file} has {lines}, {images.folder} {folders}; give a line per folder, in their alphabetical order"
        )
    return names, read_prompts(prompts_file) if exists(prompts_file) else prompts


def read_prompts(path: str) -> list[str]:
    """Return the prompts of a file, each with ``{c}`` for the class. Raises UserError."""
    prompts = [line for line in read_lines(path, "one prompt per line with {c} for the class") if line]
    if bad := [prompt for prompt in prompts if "{c}" not in prompt]:
        raise UserError(f"{path}: {bad[0]!r} has no {{c}} for the class")
    return prompts


def captioned_samples(root: str) -> Iterator[tuple[str, Sample]]:
    """Yield the shard's path and the sample for each test image of a retrieval dataset. Raises UserError, DataError."""
    split = find_split(root)
    if has_class_folders(root, split) or is_labelled_root(join(root, split)):
        raise UserError(
            f"{root} has labelled images and no captions to retrieve: use --task zeroshot, knn or linear-probe"
        )
    for path in numbered_shards(join(root, split)):
        for sample in read_shard(path):
            yield path, sample


def captions_of(path: str, sample: Sample) -> list[str]:
    """Return the captions of a sample of `captioned_samples`. Raises DataError when there are none.

    By CLIP_benchmark's rule a blank line is a caption, the empty one.
    """
    captions = sample.caption.splitlines()
    if not captions:
        raise DataError(f"{path}: key {sample.key} has no caption (member txt); for classes use --task zeroshot")
    return captions
