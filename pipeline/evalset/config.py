"""The options of `clipmill evalset`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from shards_spec.files import UserError
from shards_spec.messages import require


@dataclass(frozen=True)
class EvalsetConfig:
    """Write an evaluation set in CLIP_benchmark's WebDataset layout, from class folders or from captions."""

    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EVAL")]
    """folder to write, which `clipmill eval --data` and CLIP_benchmark read; it may hold one set's test and train"""
    classes: str | None = None
    """folder with a folder of images per class (names or WNIDs; ImageNet-V2's 0 to 999), or a Parquet file, or a folder
    of them, with images and an integer label"""
    images: str | None = None
    """folder with the images that --captions names"""
    captions: str | None = None
    """COCO's captions_*.json, Karpathy's dataset_*.json, Flickr's captions.txt, results.csv or .token, or a table"""
    split: Literal["test", "train"] = "test"
    """what is written, and what is taken of a Karpathy file and of Parquet files named train-*, test-*"""
    class_names: str | None = None
    """file with a line per class, in the order of labels or of the folders' names; by default names of the Parquet
    file, ImageNet's for its WNIDs, else the folders' names"""
    prompts: str | None = None
    """file with a prompt per line, {c} for the class; by default CLIP's 80 for ImageNet's classes, else one"""
    label_col: str | None = None
    """column of the Parquet file with the labels; by default label, or the only one with class names"""
    caption_col: str | None = None
    """column of a table with the captions"""
    shard_size: int = 10_000
    """most images per tar, as CLIP_benchmark's own sets have it"""
    overwrite: bool = False
    """write a set anew that was made from something else"""

    def __post_init__(self) -> None:
        require(self.shard_size >= 1, "shard_size", self.shard_size, "1 or more")
        with_captions = self.images is not None and self.captions is not None
        if (self.classes is not None) == with_captions or (self.classes is not None and (self.images or self.captions)):
            raise UserError("evalset needs either --classes (class folders or Parquet) or both --images and --captions")
