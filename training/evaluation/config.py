"""The options of `clipmill eval`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from shards_spec.files import UserError
from shards_spec.messages import require
from shards_spec.models import Trust
from shards_spec.unused_options import Unused

# tyro takes it for optional, since no word at all makes an empty tuple
Models = Annotated[
    tyro.conf.Positional[tuple[str, ...]],
    tyro.conf.arg(metavar="RUN_OR_MODEL", help_behavior_hint="(required)"),
]


@dataclass(frozen=True)
class EvalConfig:
    """Measure runs' students or any open_clip models on evaluation sets; what is measured already is not again."""

    model: Models
    """one or more of: RUN folder, folder with an open_clip_config.json, open_clip NAME or NAME:TAG_OR_FILE"""
    data: tuple[str, ...] = ()
    """one or more EVAL roots: folders or URLs in CLIP_benchmark's WebDataset layout, with test/CLASS/*.jpg, or a ROOT
    of labelled images; needed without --cost"""
    pretrained: str | None = None
    """open_clip tag or checkpoint file, when model is one name"""
    task: Literal["auto", "zeroshot", "retrieval", "retrieval-first-caption", "linear-probe", "knn"] = "auto"
    """auto: what dataset_type.txt says; retrieval-first-caption: one caption per image, as CLIP-KD; linear-probe, knn:
    learned from the set's train split"""
    neighbours: int = 20
    """training images that vote in knn"""
    raw: bool = False
    """use a run's weights themselves where it kept an average of them"""
    best: bool = False
    """use a run's best checkpoint by its eval_data, not the newest"""
    output: str | None = None
    """folder for the results, DATASET_TASK.json each (DATASET: the EVAL root's name, with its parents' where several
    have that), of several models in a folder each, and summary.json; by default RUN/eval, and none for a model that is
    no RUN"""
    features: bool = True
    """keep features of images and captions beside the results, for other tasks on the same set"""
    overwrite: bool = False
    """measure again what was measured with the same weights, set and options"""
    batch_size: int = 64
    """images or texts per forward pass"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast"""
    cost: bool = False
    """measure what the model costs, too (or alone, without data): parameters, MACs, speed, memory -> cost.json; of
    an ONNX export speed and bytes -> cost_onnx.json"""
    cost_images: int = 1000
    """images that cost takes one by one; SiCLIP's table 3 has 1000"""
    trust: OmitArgPrefixes[Trust] = field(default_factory=Trust)
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""

    def unused(self) -> Iterator[Unused]:
        """Yield the options that belong to what is not measured."""
        if self.task != "knn":
            yield Unused(("neighbours",), "without --task knn")
        if not self.cost:
            yield Unused(("cost_images",), "without --cost")
        if not self.data:
            yield Unused(("task", "batch_size", "features", "overwrite"), "without --data: they are of sets of images")

    def __post_init__(self) -> None:
        if isinstance(self.model, str):  # from Python a single model needs no tuple
            object.__setattr__(self, "model", (self.model,))
        if not self.model:
            raise UserError("eval: a RUN or model is needed; for example: clipmill eval runs/clip --data EVAL")
        require(self.neighbours >= 1, "neighbours", self.neighbours, "1 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        if not self.data and not self.cost:
            raise UserError("eval: --data is needed: one EVAL root or more (--cost alone measures no data)")
        require(self.cost_images >= 1, "cost_images", self.cost_images, "1 or more")
