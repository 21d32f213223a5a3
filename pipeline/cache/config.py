"""Settings of the stage `cache`: what its command line shows."""

import os
from dataclasses import dataclass, field, replace

from tyro.conf import OmitArgPrefixes

from pipeline.core.command_line import Root
from pipeline.core.model_choice import ModelChoice
from shards_spec.embeddings import Dtype
from shards_spec.files import UserError
from shards_spec.messages import flag, require
from shards_spec.models import Trust
from shards_spec.precision import PrecisionOption
from shards_spec.soft_labels import Kept
from shards_spec.timm_classifiers import check_classifier_name
from shards_spec.views import ViewSpec


@dataclass(frozen=True)
class VectorSource:
    """Vectors that others published."""

    from_: tuple[str, ...] = ()
    """embed nothing; take the vectors of DataCompDR, whose tars ROOT was ingested from: --views of its augmentations,
    which are replayed, and the captions that it knows; --model and --pretrained name one of its two teachers"""
    part: str = ""
    """with --from, of other teachers: which part of the stored vectors is this one's, such as 1/2"""

    def __post_init__(self) -> None:
        part, slash, parts = self.part.partition("/")
        is_part = not self.part or (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts))
        require(bool(is_part), "part", self.part, "N/M, such as 1/2")
        if self.part and not self.from_:
            raise UserError("--part goes with --from, which is not given")


@dataclass(frozen=True)
class CacheConfig(ModelChoice):
    """Store a teacher's image embeddings of K views and text embeddings of all captions, or a classifier's labels."""

    DEFAULT = ("ViT-L-14", "datacomp_xl_s13b_b90k")

    root: Root
    """the dataset; reads shards/, writes teacher/NAME/"""
    model: str = DEFAULT[0]
    """open_clip name of the teacher, local-dir:PATH, hf-hub:ORG/NAME, or timm:NAME for an image-only one; an exported
    classifier is timm:local-dir:PATH"""
    pretrained: str | None = None
    """open_clip tag or checkpoint file; of the default model by default datacomp_xl_s13b_b90k; for timm a checkpoint
    file, or None for timm's own weights"""
    name: str | None = None
    """folder below teacher/; by default made from model and pretrained; several can stand side by side"""
    views: int = 8
    """replayable views per image; a larger number than before adds views to the existing ones"""
    soft_labels: Kept | None = None
    """of a classifier: its so many largest probabilities of each view in place of embeddings, or all, as logits"""
    dtype: Dtype = "float16"
    """how vectors are stored; int8 has one scale per row"""
    spec: OmitArgPrefixes[ViewSpec] = field(default_factory=ViewSpec)
    augment: bool = True
    """views: --no-augment caches the plain centre crop only (one view)"""
    precision: PrecisionOption = "auto"
    """of the teacher; auto: bf16 on a CUDA device that has it, else fp32"""
    batch_size: int | None = None
    """images per forward pass on a CUDA device, 256 by default, and four times as many texts, halved when memory runs
    out; 16 on a CPU"""
    processes: int | None = None
    """processes per device that decode and augment ahead of it, and an eighth as many that tokenise; by default one
    per core with CUDA devices, 0 (threads instead) with a CPU"""
    threads: int = os.cpu_count() or 1
    """threads that decode and augment where there are no such processes"""
    device: str = "auto"
    """auto (every CUDA device, else the CPU), cpu, cuda, cuda:N, or several with commas, a process each"""
    export_lists: bool = False
    """embed nothing; write teacher/NAME/lists/, one file per shard with lists of float32, for pandas and DuckDB"""
    trust: OmitArgPrefixes[Trust] = field(default_factory=Trust)
    source: OmitArgPrefixes[VectorSource] = field(default_factory=VectorSource)
    overwrite: bool = False
    """make finished shards again"""

    def __post_init__(self) -> None:
        self.choose_weights()
        require(self.views >= 1, "views", self.views, "1 or more")
        require(self.threads >= 1, "threads", self.threads, "1 or more")
        require(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.processes is None or self.processes >= 0, "processes", self.processes, "0 or more")
        if self.soft_labels is not None:
            self._check_soft_labels(self.soft_labels)
        if self.source.from_:
            self._check_imported()
        if not self.augment and self.views != 1:
            raise UserError(
                f"--views {self.views} of the same centre crop would be equal: say --views 1 with --no-augment"
            )

    def _check_soft_labels(self, kept: Kept) -> None:
        require(kept == "all" or kept >= 1, "soft_labels", kept, "1 or more, or all")
        check_classifier_name(self.model)
        if self.dtype != "float16":
            raise UserError(f"--dtype {self.dtype}: soft labels are stored as float16; leave it out")

    def _check_imported(self) -> None:
        """Raise UserError for what only a teacher that runs here can have."""
        if self.spec != ViewSpec() or not self.augment:
            raise UserError("--from brings its own augmentations: leave out the options of views but --views")
        for name in ("soft_labels", "export_lists"):
            if getattr(self, name):
                raise UserError(f"{flag(name)} means nothing with --from; leave one of them out")

    @property
    def label(self) -> str:
        """The name of the stage's folder; by default that of soft labels says so."""
        soft = f"-soft-{self.soft_labels}" if self.name is None and self.soft_labels is not None else ""
        return super().label + soft

    @property
    def view_spec(self) -> ViewSpec:
        """What the views are drawn from."""
        return self.spec if self.augment else replace(self.spec, scale=None)
