"""A folder that `clipmill export --format onnx` wrote, as a model: the two towers run in onnxruntime.

    model = load_onnx("exported")                      # a LoadedModel, as `load_model` returns it
    model.model.embed_images([Image.open("cat.jpg")])  # (1, E) float32 of unit length
    model.model.embed_texts(["a photo of a cat"])      # (1, E)

``onnx_config.json`` of the folder says what the graphs take and give, for code without this package:

image.onnx   pixels (B, 3, S, S) float32: RGB in [0, 1], resized and cropped by the preprocessing, minus mean, by std
text.onnx    tokens (B, T) int64
both         features (B, E) float32 of unit length; a logit is logit_scale times their product, plus logit_bias
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from shards_spec.files import DataError, UserError, read_json
from shards_spec.library_errors import short
from shards_spec.models import CONFIG_FILE, LOCAL_DIR, LoadedModel, load_tokenizer

DESCRIPTION = "onnx_config.json"
IMAGE_FILE = "image.onnx"
TEXT_FILE = "text.onnx"
PIXELS = "pixels"
TOKENS = "tokens"
FEATURES = "features"
INSTALL = "install them with `pip install -c constraints.txt -e .[onnx]` (the extra clipmill[onnx])"


def is_onnx(folder: str) -> bool:
    """Whether a folder holds the towers of a CLIP as ONNX."""
    return Path(folder, DESCRIPTION).is_file()


def onnxruntime() -> Any:
    """Return the module. Raises UserError where it is not installed."""
    try:
        import onnxruntime as runtime
    except ImportError as error:
        raise UserError(f"onnxruntime is needed and not installed ({short(error)}); {INSTALL}") from error
    return runtime


class _Tower(nn.Module):
    """What `open_clip.get_model_preprocess_cfg` asks of a model's image tower."""

    def __init__(self, preprocess: dict[str, Any]) -> None:
        super().__init__()
        self.image_size = preprocess["size"]
        self.preprocess_cfg = preprocess


class OnnxModel(nn.Module):
    """Two towers in onnxruntime, with the methods of an open_clip model that need no gradient.

    Args:
        folder: As the export wrote it.
        threads: Of one pass; 0 lets onnxruntime choose.

    Raises:
        UserError: onnxruntime is not installed, or the folder is no such export.
        DataError: A graph is damaged.
    """

    def __init__(self, folder: str, threads: int = 0) -> None:
        super().__init__()
        path = Path(folder, DESCRIPTION)
        if not path.is_file():
            raise UserError(f"{path} is not there: {folder} is no folder of `clipmill export --format onnx`")
        self.folder = folder
        self.description: dict[str, Any] = read_json(str(path))
        described = read_json(str(Path(folder, CONFIG_FILE)))
        self.config: dict[str, Any] = described["model_cfg"]
        self.visual = _Tower(described["preprocess_cfg"])
        self.tokenizer = load_tokenizer(f"{LOCAL_DIR}{folder}")
        is_half = self.description["dtype"] == "fp16"
        self.image_session = _session(Path(folder, IMAGE_FILE), threads, is_half)
        self.text_session = _session(Path(folder, TEXT_FILE), threads, is_half)
        digest = hashlib.sha256(b"".join(Path(folder, name).read_bytes() for name in (IMAGE_FILE, TEXT_FILE))).digest()
        self.register_buffer("graphs_sha256", torch.tensor(list(digest), dtype=torch.uint8))  # for `weights_sha256`
        self.logit_scale = torch.tensor(float(self.description["logit_scale"])).log()  # as open_clip keeps it

    def encode_image(self, pixels: Tensor, normalize: bool = True) -> Tensor:
        """Return the features (B, E) of normalised images (B, 3, S, S); they are of unit length in any case."""
        return self._run(self.image_session, {PIXELS: pixels.float().cpu().numpy()})

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Return the features (B, E) of tokens (B, T) int64; they are of unit length in any case."""
        return self._run(self.text_session, {TOKENS: tokens.long().cpu().numpy()})

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return the features (N, E), float32 of unit length, of images of any size and mode."""
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        transform = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(self)), is_train=False)
        pixels = torch.stack([transform(image.convert("RGB")) for image in images])
        return self.encode_image(pixels).numpy()

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return the features (N, E), float32 of unit length, of texts."""
        return self.encode_text(self.tokenizer(list(texts))).numpy()

    @staticmethod
    def _run(session: Any, inputs: dict[str, np.ndarray]) -> Tensor:
        return torch.from_numpy(session.run([FEATURES], inputs)[0])


def load_onnx(folder: str, threads: int = 0) -> LoadedModel:
    """Return the model of an ONNX folder, with tokenizer and preprocessing. Raises as `OnnxModel` does."""
    model = OnnxModel(folder, threads)
    preprocess = model.visual.preprocess_cfg
    size = preprocess["size"]
    return LoadedModel(
        model=model.eval(),
        tokenizer=model.tokenizer,
        config=model.config,
        image_size=size if isinstance(size, int) else size[0],
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
    )


def _session(path: Path, threads: int, is_half: bool) -> Any:
    """A session of onnxruntime on the CPU."""
    runtime = onnxruntime()
    if not path.is_file():
        raise UserError(f"{path} is not there; export again, or copy the whole folder")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # its warnings are about optimisations
    if is_half:  # its changes of layout crash on a convolution of float16 on a CPU, as of onnxruntime 1.32
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it has a class of its own for each of its codes
        raise DataError(f"{path} cannot be read by onnxruntime ({short(error)}); export again") from error
