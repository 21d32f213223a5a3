"""Settings of the stage `caption`: what its command line shows."""

import os
from dataclasses import dataclass, field

from tyro.conf import OmitArgPrefixes

from pipeline.caption.decoding import Decoding
from pipeline.core.command_line import Root
from pipeline.core.model_choice import ModelChoice
from shards_spec.messages import require
from shards_spec.models import Trust
from shards_spec.precision import PrecisionOption


@dataclass(frozen=True)
class CaptionConfig(ModelChoice):
    """Write N synthetic captions per image with an open_clip CoCa model."""

    DEFAULT = ("coca_ViT-L-14", "mscoco_finetuned_laion2b_s13b_b90k")

    root: Root
    """the dataset: a folder or an fsspec URL; reads raw/, writes captions/NAME/"""
    model: str = DEFAULT[0]
    """open_clip name of a CoCa model, local-dir:PATH or hf-hub:ORG/NAME"""
    pretrained: str | None = None
    """open_clip tag or checkpoint file; of the default model by default mscoco_finetuned_laion2b_s13b_b90k"""
    name: str | None = None
    """folder below captions/; by default made from model and pretrained; several can stand side by side"""
    num_captions: int = 5
    """captions per image"""
    decoding: OmitArgPrefixes[Decoding] = field(default_factory=Decoding)
    redraws: int = 2
    """top_k, nucleus: how often an empty, looping or repeated caption is sampled again"""
    similarity: bool = False
    """also store each caption's cosine with its image by the model's contrastive heads, and the original's; warns of
    shards whose original captions score no better than shuffled ones"""
    precision: PrecisionOption = "auto"
    """auto: bf16 on a CUDA device that has it, else fp32"""
    batch_size: int | None = None
    """images at a time; by default what the device's memory holds, at most 512, on a CPU 32"""
    seed: int = 0
    """of the sampling; a caption depends on (seed, key, caption index) only"""
    threads: int = os.cpu_count() or 1
    """threads per process that decode images ahead of the device"""
    device: str = "auto"
    """auto (every CUDA device, else the CPU), cpu, cuda, cuda:N, or several with commas, a process each"""
    trust: OmitArgPrefixes[Trust] = field(default_factory=Trust)
    overwrite: bool = False
    """make finished shards again"""

    def __post_init__(self) -> None:
        self.choose_weights()
        require(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.threads >= 1, "threads", self.threads, "1 or more")
        require(self.redraws >= 0, "redraws", self.redraws, "0 or more")
        self.decoding.check_num_captions(self.num_captions)
