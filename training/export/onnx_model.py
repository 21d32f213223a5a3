"""A folder that `clipmill export --format onnx` wrote, as a model: its towers run in onnxruntime.

    model = load_onnx("exported")                      # a LoadedModel, as `load_model` returns it
    model.model.embed_images([Image.open("cat.jpg")])  # (1, E) float32 of unit length
    model.model.embed_texts(["a photo of a cat"])      # (1, E)

``onnx_config.json`` of the folder says what the graphs take and give, for code without this package:

image.onnx   pixels (B, 3, S, S) float32: RGB in [0, 1], resized and cropped by the preprocessing, minus mean, by std
text.onnx    tokens (B, T) int64
both         features (B, E) float32 of unit length; a logit is logit_scale times their product, plus logit_bias

An image tower without a text tower is a folder without text.onnx, loaded as a `Classifier`; its image.onnx gives

logits       (B, K) float32 over the classes, where it has any
features     (B, D) float32 that the classes are told from, not of unit length
"""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from shards_spec.files import DataError, UserError, exists, read_json
from shards_spec.library_errors import short
from shards_spec.models import BUILD_ERRORS, CONFIG_FILE, LOCAL_DIR, LoadedModel, load_tokenizer
from shards_spec.vocab import read_vocabulary
from training.data.eval_crop import crop_of
from training.models.classifier import DESCRIPTION as CLASSIFIER
from training.models.classifier import VOCABULARY, Classifier

DESCRIPTION = "onnx_config.json"
IMAGE_FILE = "image.onnx"
TEXT_FILE = "text.onnx"
PIXELS = "pixels"
TOKENS = "tokens"
FEATURES = "features"
LOGITS = "logits"
JSON_TYPES = {str: "string", int: "number", float: "number", list: "array", dict: "object"}
FIX = "export again, or copy the whole folder"
CLASSIFIER_KEYS = {"model": str, "classes": int, "names": list, "image_size": int, "mean": list, "std": list}
INSTALL = "install them with `pip install -c constraints.txt -e .[onnx]` (the extra clipmill[onnx])"


def is_onnx(folder: str) -> bool:
    """Whether a folder holds towers as ONNX."""
    return Path(folder, DESCRIPTION).is_file()


def graph_files(folder: str) -> list[Path]:
    """Return the graphs of an ONNX folder, that of images first. Raises UserError where the folder is none."""
    description = _description(folder)
    return [Path(folder, description[tower]["file"]) for tower in ("image", "text") if tower in description]


def _description(folder: str) -> dict[str, Any]:
    """What the folder says of its graphs. Raises UserError where it says nothing, DataError where that is damaged."""
    path = Path(folder, DESCRIPTION)
    if not path.is_file():
        raise UserError(f"{path} is not there: {folder} is no folder of `clipmill export --format onnx`")
    described = _read_object(path, {"dtype": str, "image": dict})
    for tower in ("image", "text"):
        if tower in described:
            _check_keys(path, described[tower], {"file": str, "output": str}, f"{tower}.")
    if "text" in described:
        _check_keys(path, described, {"logit_scale": float})
    return described


def _read_object(path: Path, keys: Mapping[str, type]) -> dict[str, Any]:
    """A JSON object of an export with keys of these types. Raises UserError where it is not there, and DataError."""
    if not path.is_file():
        raise UserError(f"{path} is not there; {FIX}")
    found: dict[str, Any] = read_json(str(path), fix=FIX)
    _check_keys(path, found, keys)
    return found


def _check_keys(path: Path, found: object, keys: Mapping[str, type], prefix: str = "") -> None:
    """Raise DataError where an object of a file lacks a key, or has it of another type."""
    for key, kind in keys.items():
        if not isinstance(found, dict) or not isinstance(found.get(key), (kind, int) if kind is float else kind):
            raise DataError(f"{path} is damaged: {prefix}{key} is no {JSON_TYPES[kind]}; {FIX}")


def _graphs_sha256(folder: str) -> Tensor:
    """A hash of the graphs as a tensor, which `weights_sha256` finds in a model's buffers."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in graph_files(folder))).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)


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
        DataError: A file is damaged, or of another export than the others.
    """

    def __init__(self, folder: str, threads: int = 0) -> None:
        super().__init__()
        self.folder = folder
        self.description = _description(folder)
        path = Path(folder, CONFIG_FILE)
        described = _read_object(path, {"model_cfg": dict, "preprocess_cfg": dict})
        preprocess = described["preprocess_cfg"]
        size = list if isinstance(preprocess.get("size"), list) else int
        _check_keys(path, preprocess, {"size": size, "mean": list, "std": list}, "preprocess_cfg.")
        self.config: dict[str, Any] = described["model_cfg"]
        self.visual = _Tower(preprocess)
        self.tokenizer = _tokenizer(folder)
        is_half = self.description["dtype"] == "fp16"
        self.image_session = _session(Path(folder, IMAGE_FILE), threads, is_half)
        self.text_session = _session(Path(folder, TEXT_FILE), threads, is_half)
        widths = {FEATURES: self.description.get("embed_dim")}
        _check_graph(self.image_session, Path(folder, IMAGE_FILE), PIXELS, self.visual.image_size, widths)
        _check_graph(self.text_session, Path(folder, TEXT_FILE), TOKENS, self.tokenizer.context_length, widths)
        self.register_buffer("graphs_sha256", _graphs_sha256(folder))
        self.logit_scale = torch.tensor(float(self.description["logit_scale"])).log()  # as open_clip keeps it

    def encode_image(self, pixels: Tensor, normalize: bool = True) -> Tensor:
        """Return the features (B, E) of normalised images (B, 3, S, S); they are of unit length in any case."""
        return _run(self.image_session, FEATURES, {PIXELS: pixels.float().cpu().numpy()})

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Return the features (B, E) of tokens (B, T) int64; they are of unit length in any case."""
        return _run(self.text_session, FEATURES, {TOKENS: tokens.long().cpu().numpy()})

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


class OnnxClassifier(Classifier):
    """An image tower in onnxruntime, with or without classes. Arguments and errors are those of `OnnxModel`.

    Its ``trunk`` is empty: nothing of it can be trained.
    """

    def __init__(self, folder: str, threads: int = 0) -> None:
        described = _read_object(Path(folder, CLASSIFIER), CLASSIFIER_KEYS)
        stored = str(Path(folder, VOCABULARY))
        vocabulary = read_vocabulary(stored) if exists(stored) else None
        super().__init__(described["model"], nn.Identity(), vocabulary, described["names"], described.get("options"))
        self.folder = folder
        self.described: dict[str, Any] = described
        self.description = _description(folder)
        is_half = self.description["dtype"] == "fp16"
        path = Path(folder, IMAGE_FILE)
        self.image_session = _session(path, threads, is_half)
        output = self.description["image"]["output"]
        widths = {output: described["classes"] if output == LOGITS else None}
        widths[FEATURES] = self.description.get("embed_dim")
        _check_graph(self.image_session, path, PIXELS, described["image_size"], widths)
        self.register_buffer("graphs_sha256", _graphs_sha256(folder))

    @property
    def classes(self) -> int:
        """The number of logits."""
        return int(self.described["classes"])

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, K) of normalised images (B, 3, S, S), or their features (B, D) without classes."""
        return self._compute(self.description["image"]["output"], images)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Return the features (B, D) that the head sees, of normalised images (B, 3, S, S)."""
        features = self._compute(FEATURES, images)
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def _compute(self, output: str, images: Tensor) -> Tensor:
        return _run(self.image_session, output, {PIXELS: images.float().cpu().numpy()})


def _tokenizer(folder: str) -> Any:
    """The tokenizer of a CLIP's export. Raises UserError and DataError."""
    try:
        return load_tokenizer(f"{LOCAL_DIR}{folder}")
    except (*BUILD_ERRORS, EOFError, zlib.error) as error:
        missing = isinstance(error, FileNotFoundError) and error.filename
        reason = f"{missing} is not there" if missing else short(error)
        raise DataError(f"{folder}: its tokenizer cannot be read ({reason}); {FIX}") from error


def _check_graph(session: Any, path: Path, name: str, size: Any, widths: Mapping[str, int | None]) -> None:
    """Raise DataError for a graph of another export than the files beside it.

    Args:
        session: Of the graph.
        path: The graph.
        name: Of the input.
        size: What its last axis is: pixels of a side, or tokens of a text.
        widths: The last axis of each output by its name. An axis is not checked where either side leaves it open.
    """
    side = size if isinstance(size, int) else size[-1]
    for axes, wanted in ((session.get_inputs(), {name: side}), (session.get_outputs(), widths)):
        last = {axis.name: axis.shape[-1] for axis in axes}
        for key, width in wanted.items():
            if key not in last:
                raise DataError(f"{path} has no {key} (but {', '.join(last)}), it is of another export; {FIX}")
            if isinstance(last[key], int) and width not in (None, last[key]):
                raise DataError(
                    f"{path} has {key} of width {last[key]}, the files beside it say {width}: it is of another "
                    f"export; {FIX}"
                )


def _run(session: Any, output: str, inputs: dict[str, np.ndarray]) -> Tensor:
    return torch.from_numpy(session.run([output], inputs)[0])


def load_onnx(folder: str, threads: int = 0) -> LoadedModel:
    """Return the model of an ONNX folder, with tokenizer and preprocessing.

    It is an `OnnxModel`, or an `OnnxClassifier` without a tokenizer where the folder has no text tower. Raises as
    `OnnxModel` does.
    """
    if "text" not in _description(folder):
        classifier = OnnxClassifier(folder, threads)
        described = classifier.described
        return LoadedModel(
            model=classifier.eval(),
            tokenizer=None,
            config={},
            image_size=described["image_size"],
            mean=tuple(described["mean"]),
            std=tuple(described["std"]),
            crop=crop_of(classifier.description["image"].get("preprocess", {})),
        )
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
        raise UserError(f"{path} is not there; {FIX}")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # its warnings are about optimisations
    if is_half:  # its changes of layout crash on a convolution of float16 on a CPU, as of onnxruntime 1.32
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it has a class of its own for each of its codes
        raise DataError(f"{path} cannot be read by onnxruntime ({short(error)}); export again") from error
