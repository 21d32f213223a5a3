"""The options of `clipmill search`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, UseAppendAction

from shards_spec.files import UserError
from shards_spec.messages import require
from shards_spec.models import Trust


@dataclass(frozen=True)
class SearchConfig:
    """Find images by a text or by another image: cosine of a model's features, kept in an index beside the images."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """RUN folder, open_clip name (with --pretrained), local-dir:FOLDER, or a folder that `clipmill export` wrote for
    open_clip or onnx"""
    images: str
    """folder of images at any depth, tars of samples among them too, or the ROOT of a dataset: its shards/, before
    `pack` its raw/; a path or URL"""
    text: UseAppendAction[tuple[str, ...]] = ()
    """what to look for; may be given several times"""
    image: UseAppendAction[tuple[str, ...]] = ()
    """image file to find similar ones of; may be given several times"""
    top: int = 10
    """images per query"""
    json: bool = False
    """print a JSON object per image found instead of text"""
    html: str | None = None
    """write a page with the images found to this file"""
    pretrained: str | None = None
    """open_clip tag or checkpoint file, when MODEL is a name"""
    raw: bool = False
    """use a run's weights themselves where it kept an average of them"""
    best: bool = False
    """use a run's best checkpoint by its eval_data, not the newest"""
    index: str | None = None
    """folder for the embeddings, with a folder in it for each model; by default IMAGES/.clipmill-search"""
    update: bool = True
    """embed new and changed images, and drop removed ones, before the search; --no-update takes the index as it is"""
    batch_size: int = 64
    """images or texts per forward pass"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast"""
    trust: OmitArgPrefixes[Trust] = field(default_factory=Trust)
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""

    def __post_init__(self) -> None:
        require(self.top >= 1, "top", self.top, "1 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        if not all(text.strip() for text in self.text):
            raise UserError("--text '': say what to look for")
        if self.html is not None and not (self.text or self.image):
            raise UserError(f"--html {self.html}: there is nothing to show without a --text or an --image")
