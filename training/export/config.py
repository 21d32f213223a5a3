"""The options of `clipmill export`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from shards_spec.files import UserError, is_url
from shards_spec.messages import require
from shards_spec.models import Trust

Format = Literal["open_clip", "timm", "transformers", "onnx"]


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's student for others to load."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """RUN folder of `clipmill train`, or timm:local-dir:FOLDER of a timm model"""
    to: str
    """folder to write, which can be moved; load it with open_clip or timm as local-dir:FOLDER (a student with byte
    pairs of its own: open_clip.get_tokenizer(..., bpe_path='FOLDER/bpe.txt.gz'))"""
    raw: bool = False
    """take the run's weights themselves where it kept an average of them"""
    best: bool = False
    """take the run's best checkpoint by its eval_data, not the newest"""
    format: Format | None = None
    """open_clip: open_clip_config.json and open_clip_model.safetensors; timm: the image tower alone, or a classifier;
    transformers: CLIPModel and CLIPProcessor, for plain CLIPs; onnx: image.onnx and, of a CLIP, text.onnx. By default
    timm for an image classifier, else open_clip"""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """of the weights in the files"""
    reparameterize: bool = False
    """fuse the parallel branches of MobileCLIP's and SiCLIP's towers into one convolution each, which computes the same
    faster and cannot be trained further; always done for onnx"""
    int8: Literal["dynamic", "static"] | None = None
    """onnx: matrix products in 8 bits with scales found at run time (dynamic), or convolutions too with scales from the
    samples of --calibrate (static)"""
    calibrate: str | None = None
    """dataset whose samples give the scales of --int8 static: a ROOT with shards, or an EVAL root"""
    check: str | None = None
    """dataset on whose samples the export is compared with the student, in place of noise: a ROOT with shards, or an
    EVAL root; prints speeds and, for onnx, fails below a cosine of 0.9999"""
    samples: int = 64
    """of --check, and of --calibrate"""
    opset: int | None = None
    """onnx: version of the operators; by default the one that this torch recommends"""
    license: str = "unknown"
    """of the weights, for the model card; an identifier of the Hub, say apache-2.0"""
    results: tuple[str, ...] = ()
    """folders of `clipmill eval --output`, whose results of this step stand in the model card, too, beside RUN/eval"""
    overwrite: bool = False
    """replace another model in the folder"""
    trust: OmitArgPrefixes[Trust] = field(default_factory=Trust)

    def __post_init__(self) -> None:
        """Raise UserError for options that contradict each other."""
        if is_url(self.to):
            raise UserError(f"--to {self.to!r}: give a local folder and copy it from there")
        require(self.samples >= 1, "samples", self.samples, "1 or more")
        for name in ("int8", "opset"):
            if getattr(self, name) is not None and self.format != "onnx":
                raise UserError(f"--{name} {getattr(self, name)} would not be used: it belongs to --format onnx")
        if self.int8 == "static" and self.calibrate is None:
            raise UserError("--int8 static needs --calibrate ROOT: samples that its scales are found on")
        if self.int8 != "static" and self.calibrate is not None:
            raise UserError(f"--calibrate {self.calibrate} would not be used: it belongs to --int8 static")
        if self.int8 is not None and self.dtype != "fp32":
            raise UserError(f"--int8 {self.int8} with --dtype {self.dtype}: give one of them")
