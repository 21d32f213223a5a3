"""How a model is named, loaded and identified: caches record it, captioner, teacher and student load by it.

Names are open_clip's: a built-in architecture with ``pretrained`` a tag or a checkpoint file, ``local-dir:PATH`` or
``hf-hub:ORG/NAME``. ``timm:NAME`` is timm's model of that name, an image-only teacher. torch is imported inside the
functions only.

Architectures that neither ships come from installed packages' entry points of the group ``clipmill.models``: modules
that are imported before a model is built and make their names known to open_clip or timm (training's are in pyproject).
"""

import contextlib
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

from shards_spec.checkpoints import describe_mismatch, load_checkpoint
from shards_spec.files import UserError
from shards_spec.library_errors import checkpoint_errors, parse_json, product_error, short
from shards_spec.messages import counted
from shards_spec.open_clip_plugins import reading_weights, unavailable, without_remote_code_prompt
from shards_spec.precision import Precision, dtype_of
from shards_spec.suggest import did_you_mean

TIMM = "timm:"
LOCAL_DIR = "local-dir:"
HUB = "hf-hub:"
CONFIG_FILE = "open_clip_config.json"
ENTRY_POINTS = "clipmill.models"
MAE_DECODER = ("decoder_", "mask_token")  # names that begin so belong to what MAE drops after pre-training
BUILD_ERRORS = (
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
    OSError,
    ImportError,
)
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pth")  # what open_clip looks for in a folder
MAX_TAGS = 4  # in a message


@dataclass(frozen=True)
class Trust:
    """What a model made by others may do besides computing."""

    trust_checkpoint: bool = False
    """load pickled checkpoints that hold more than weights; they can run any code of their author"""
    trust_remote_code: bool = False
    """let a model's tokenizer run the Python that its folder or repository brings (trust_remote_code, auto_map)"""


NO_TRUST = Trust()


class EvalCrop(NamedTuple):
    """How an image is cut for a timm model, in the words of timm's data config."""

    crop_pct: float
    """share of the resized side that is kept"""
    interpolation: str
    crop_mode: str
    """center, squash or border"""


@dataclass(frozen=True)
class LoadedModel:
    """An open_clip model in eval mode with what is needed to feed it.

    ``mean`` and ``std`` are per channel for pixels in [0, 1]; ``image_size`` in pixels; ``config`` is open_clip's
    model_cfg (timm's data config); ``tokenizer`` maps a list of texts to int64 (N, context_length), None without a text
    tower; ``crop`` is a classifier's that was made elsewhere, None the plain crop that our own are measured on.
    """

    model: Any
    tokenizer: Any
    config: dict[str, Any]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: EvalCrop | None = None

    def normalise(self, pixels: Any) -> Any:
        """Images (N, 3, S, S) of 0 to 255 -> input of the image tower, float32; float32 images are overwritten."""
        mean = _per_channel(tuple(self.mean), pixels.device)
        std = _per_channel(tuple(self.std), pixels.device)
        return pixels.float().div_(255).sub_(mean).div_(std)


@lru_cache(maxsize=32)
def _per_channel(values: tuple[float, ...], device: Any) -> Any:
    """(3, 1, 1) float32, kept: making one would wait for all that a CUDA device has queued."""
    import torch

    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(3, 1, 1)


def model_label(model: str, pretrained: str | None) -> str:
    """A folder name for a model: the last part of its name and of its tag, safe characters only."""
    name = re.split(r"[/:]", model.rstrip("/"))[-1]
    tag = (pretrained or "").split("/")[-1]
    return re.sub(r"[^A-Za-z0-9_\-]+", "_", "-".join(part for part in (name, tag) if part))


def load_model(
    model: str,
    pretrained: str | None = None,
    *,
    device: str = "cpu",
    random_weights: bool = False,
    precision: Precision = "fp32",
    trust: Trust = NO_TRUST,
    text_weights: bool = True,
) -> LoadedModel:
    """Build an open_clip model and load its weights as open_clip does.

    ``random_weights`` allows a model for which no weights are named; unless ``text_weights`` is false, a text tower of
    transformers' then has those of its own name. All of it is cast to ``precision`` (open_clip's pure_bf16 and
    pure_fp16). Raises UserError when the name, the tag or the file is unknown, no weights are named, or
    the model wants more than ``trust`` allows.
    """
    import open_clip

    import_extensions()
    _check_names(model, pretrained, random_weights)
    try:
        config = open_clip.get_model_config(model)
        own_text = _text_of_folder(model, config, text_weights)
        code = remote_code(model, config)
        if code and not trust.trust_remote_code:
            raise UserError(
                f"model {model!r} wants to run Python of its own ({code}); if you trust its author, give "
                "--trust-remote-code"
            )
        with reading_weights(model, trust.trust_checkpoint), without_remote_code_prompt():
            built = open_clip.create_model(
                model,
                pretrained=pretrained,
                device=device,
                precision=precision if precision == "fp32" else f"pure_{precision}",
                require_pretrained=not random_weights,
                pretrained_text=text_weights,
                **own_text,
            )
            tokenizer = load_tokenizer(model, trust.trust_remote_code)
    except UserError:
        raise
    except BUILD_ERRORS as error:
        reason = _build_failure(error)
        weights = f" with --pretrained {pretrained!r}" if pretrained is not None else ""
        raise UserError(f"model {model!r}{weights} cannot be loaded: {reason}") from error
    config |= own_text
    for part, tower in (("vision_cfg", "visual"), ("text_cfg", "text")):  # one may have taken a checkpoint's sizes
        config[part] |= getattr(getattr(built, tower, None), "description", {})
    preprocess = open_clip.get_model_preprocess_cfg(built)
    size = preprocess["size"]
    return LoadedModel(
        model=built.eval(),
        tokenizer=tokenizer,
        config=config,
        image_size=size if isinstance(size, int) else size[0],
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
    )


def _text_of_folder(model: str, config: Any, text_weights: bool) -> dict[str, Any]:
    """``text_cfg`` of a folder whose text tower of transformers' is described in it; {} for any other.

    open_clip would look for a relative ``hf_model_name`` in the current folder, then on the Hub. Whether the tower's
    own weights are loaded is as open_clip has it: not where the whole model has some.
    """
    text = (config or {}).get("text_cfg") or {}
    named = text.get("hf_model_name")
    if not named or not model.startswith(LOCAL_DIR):
        return {}
    folder = Path(model.removeprefix(LOCAL_DIR), named).resolve()
    if Path(named).is_absolute() or not (folder / "config.json").is_file():
        return {}
    weights = text_weights and not names_weights(model)
    return {"text_cfg": text | {"hf_model_name": str(folder), "hf_model_pretrained": weights}}


def _build_failure(error: Exception) -> str:
    """What open_clip's error means to the user, and what to do."""
    reason = short(error)
    if reason.startswith("Required pretrained weights"):
        return "it has no weights; say --pretrained TAG_OR_FILE, or name a folder that has them"
    if reason.startswith("Failed to download"):
        return f"its weights are not here and cannot be fetched; --pretrained FILE takes a file of them ({reason})"
    return reason


def _check_names(model: str, pretrained: str | None, random_weights: bool) -> None:
    """Raise UserError for names that cannot be loaded, before a model is built, which can take minutes.

    That is a name that open_clip does not know, a tag or file that it would not use, and, unless ``random_weights``, a
    model without weights when none are named.
    """
    import open_clip

    if model.startswith(LOCAL_DIR):
        _check_folder(Path(model.removeprefix(LOCAL_DIR)), random_weights or pretrained is not None)
    if model.startswith((LOCAL_DIR, HUB)):
        if pretrained is not None:
            raise UserError(_other_weights_advice(model, pretrained))
        return
    known = open_clip.list_models()
    name = model.replace("/", "-")
    if name in unavailable:
        raise UserError(f"model {model!r} cannot be built: {unavailable[name]}")
    if name not in known:
        if Path(model, CONFIG_FILE).is_file():
            raise UserError(f"no model {model!r}: the model in that folder is {LOCAL_DIR}{model}")
        nor_folder = ", nor such a folder" if "/" in model and not Path(model).exists() else ""
        raise UserError(
            f"no model {model!r}{nor_folder}: {did_you_mean(name, known)}; folders are named {LOCAL_DIR}PATH, the "
            f"Hub's {HUB}ORG/NAME"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None and not random_weights:
        raise UserError(
            f"model {model!r} cannot be loaded: it has no weights; say --pretrained TAG_OR_FILE "
            f"({_tags_in_words(tags)}), or name a folder that has them"
        )
    if pretrained is None or Path(pretrained).is_file():
        return
    if open_clip.get_pretrained_cfg(name, pretrained):
        return
    if Path(pretrained).exists():
        raise UserError(
            f"--pretrained {pretrained!r} is no file; name a checkpoint file, or the folder as --model {LOCAL_DIR}PATH"
        )
    tagged = did_you_mean(pretrained, tags) if tags else "it has no tags"
    raise UserError(f"--pretrained {pretrained!r} is no tag of {model} and no file: {tagged}")


def names_weights(model: str, pretrained: str | None = None) -> bool:
    """Whether weights of a whole model are named: by ``pretrained``, or by a folder that has them, or the Hub's."""
    if model.startswith(LOCAL_DIR):
        folder = Path(model.removeprefix(LOCAL_DIR))
        return any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES)
    return pretrained is not None or model.startswith(HUB)


def _other_weights_advice(model: str, pretrained: str) -> str:
    """What to do where weights are named beside a folder, which may have none, or a model of the Hub."""
    if names_weights(model):
        return f"--pretrained {pretrained!r} would not be used: {model!r} brings its own weights; drop one of them"
    run = pretrained if (Path(pretrained) / "checkpoints").is_dir() else "RUN"
    return (
        f"--pretrained {pretrained!r} would not be used: a model {LOCAL_DIR}FOLDER has the weights of its folder, and "
        f"{model!r} has none there; for a run's weights say `clipmill export {run} --to FOLDER`, then --model "
        f"{LOCAL_DIR}FOLDER; a file of weights goes into the folder, as one of {', '.join(WEIGHT_FILES)}"
    )


def _tags_in_words(tags: list[str]) -> str:
    if not tags:
        return "it has no tags"
    more = ", ..." if len(tags) > MAX_TAGS else ""
    return f"its tags are {', '.join(tags[:MAX_TAGS])}{more}"


def _check_folder(folder: Path, random_weights: bool) -> None:
    """Raise UserError when a folder holds no readable description of an open_clip model, or no weights."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        what = "is not there" if not folder.exists() else f"has no {CONFIG_FILE}"
        raise UserError(f"{LOCAL_DIR}{folder}: the folder {what}; name one that holds an open_clip model")
    try:
        description = parse_json(str(path), path.read_bytes(), given=True)
    except OSError as error:
        raise product_error(str(path), error, "JSON file", given=True) from error
    config = description.get("model_cfg") if isinstance(description, dict) else None
    missing = ["model_cfg"]
    if isinstance(config, dict):
        missing = [part for part in ("embed_dim", "vision_cfg", "text_cfg") if part not in config]
    if missing:
        raise UserError(f"{path}: no description of an open_clip model; it lacks {', '.join(missing)}")
    if not random_weights and not names_weights(f"{LOCAL_DIR}{folder}"):
        if (folder / "checkpoints").is_dir():
            raise UserError(
                f"{LOCAL_DIR}{folder}: a RUN folder holds checkpoints, no model; name the one that `clipmill export "
                f"{folder} --to FOLDER` writes"
            )
        raise UserError(f"{LOCAL_DIR}{folder}: it has no weights; put them there as one of {', '.join(WEIGHT_FILES)}")


def remote_code(model: str, config: Any) -> str | None:
    """Where a model asks to run Python that its folder or repository brings; None where it does not.

    That is ``trust_remote_code`` anywhere in its description, and, where its text side is transformers', ``auto_map``
    in one of the folder's JSON files.
    """
    paths = _paths_of_key(config, "trust_remote_code")
    if paths:
        return f"trust_remote_code in {CONFIG_FILE}, {paths[0]}"
    text = (config or {}).get("text_cfg") or {}
    if not model.startswith(LOCAL_DIR) or not (text.get("hf_tokenizer_name") or text.get("hf_model_name")):
        return None
    for path in sorted(Path(model.removeprefix(LOCAL_DIR)).rglob("*.json")):
        with contextlib.suppress(UserError, OSError):  # a file that is no JSON maps nothing
            if _paths_of_key(parse_json(str(path), path.read_bytes(), given=True), "auto_map"):
                return f"auto_map in {path}"
    return None


def _paths_of_key(value: Any, key: str, path: str = "") -> list[str]:
    """Where in nested mappings and lists a key has a value that counts as true: dotted paths."""
    paths = list[str]()
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        if value.get(key):
            paths.append(f"{path}.{key}".lstrip("."))
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    for name, part in parts:
        paths += _paths_of_key(part, key, f"{path}.{name}")
    return paths


def import_extensions() -> None:
    """Make the names of architectures known that come with installed packages."""
    for module in entry_points(group=ENTRY_POINTS):
        module.load()


def load_teacher(
    model: str,
    pretrained: str | None = None,
    *,
    device: str = "cpu",
    precision: Precision = "fp32",
    trust: Trust = NO_TRUST,
) -> LoadedModel:
    """As `load_model`, or timm's ``timm:NAME`` without its classifier: pixels to pooled features (N, D).

    ``pretrained`` is then a checkpoint file, or None for timm's own weights. Raises UserError when the name is unknown,
    the file is not there or does not fit.
    """
    if not model.startswith(TIMM):
        return load_model(model, pretrained, device=device, precision=precision, trust=trust)
    import_extensions()
    built = create_timm_model(model, pretrained is None, num_classes=0)
    if pretrained is not None:
        load_backbone(built, pretrained, trust.trust_checkpoint)
    loaded = as_loaded(built)
    return replace(loaded, model=loaded.model.to(device, dtype_of(precision)))


def as_loaded(built: Any) -> LoadedModel:
    """A timm model in eval mode, with the data config that it has of timm."""
    from timm.data.config import resolve_model_data_config

    data = resolve_model_data_config(built)  # type: ignore[no-untyped-call]
    return LoadedModel(
        model=built.eval(),
        tokenizer=None,
        config={key: list(value) if isinstance(value, tuple) else value for key, value in data.items()},
        image_size=data["input_size"][-1],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def create_timm_model(model: str, pretrained: bool, **options: Any) -> Any:
    """``timm:NAME`` by timm, with timm's own weights if ``pretrained``; timm unpickles nothing but weights by itself.

    Raises UserError when the name is unknown, naming near ones, or the weights are not there; TypeError for an option
    that the architecture does not have.
    """
    import timm

    name = model.removeprefix(TIMM)
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except TypeError:
        raise
    except Exception as error:  # of its own, of the Hub's client, of damaged files
        if "Unknown model" in str(error):
            raise UserError(
                f"no model {model!r} in timm: {did_you_mean(name.partition('.')[0], timm.list_models())}"
            ) from error
        raise UserError(f"model {model!r} cannot be loaded: {short(error)}") from error


def load_backbone(built: Any, file: str, trusted: bool = False) -> None:
    """A checkpoint's weights but for its classifier's and for MAE's decoder, into a timm model without them.

    Raises UserError when the file cannot be read, or other weights are missing or left over.
    """
    if Path(file).suffix in (".npz", ".npy"):
        with checkpoint_errors(file):
            built.load_pretrained(file)
        return
    try:
        weights = load_checkpoint(file, trusted, built.state_dict().keys())
        result = built.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"{file} does not fit: {describe_mismatch(error)}") from error
    classifiers = built.default_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    ignored = (*(f"{classifier}." for classifier in classifiers), *MAE_DECODER)
    missing = result.missing_keys
    left_over = [name for name in result.unexpected_keys if not name.startswith(ignored)]
    if missing or left_over:
        raise UserError(
            f"{file} does not fit: {counted(len(missing), 'weight')} missing {missing[:3]}, "
            f"{len(left_over)} left over {left_over[:3]}"
        )


def load_tokenizer(model: str, trusted: bool = False) -> Any:
    """open_clip's tokenizer of a model; a relative ``bpe_path`` is looked up in the model's local-dir.

    ``trusted`` lets transformers run Python that comes with a tokenizer.
    """
    import open_clip

    config = open_clip.get_model_config(model) or {}
    text = config.get("text_cfg") or {}
    if text.get("hf_tokenizer_name"):
        return open_clip.get_tokenizer(model, trust_remote_code=trusted)
    bpe_path = (text.get("tokenizer_kwargs") or {}).get("bpe_path")
    if bpe_path and model.startswith(LOCAL_DIR):
        in_folder = Path(model.removeprefix(LOCAL_DIR), Path(bpe_path).name)
        if in_folder.exists():
            return open_clip.get_tokenizer(model, bpe_path=str(in_folder))
    return open_clip.get_tokenizer(model)


def weights_sha256(module: Any) -> str:
    """Hash of names, shapes, dtypes and bytes of a module's state dict."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pick_device(device: str) -> str:
    """``auto`` becomes ``cuda`` where there is one, else ``cpu``. Raises UserError for a device that is not there."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device!r}: give auto, cpu, cuda or cuda:N") from error
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device!r}: this torch sees no CUDA device; use --device cpu")
    return device


def pick_devices(device: str) -> list[str]:
    """``auto`` becomes every CUDA device, or ``cpu`` where there is none; else a list with commas, one process each.

    Raises UserError for a device that is not there.
    """
    import torch

    if device == "auto" and torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [pick_device(name.strip()) for name in device.split(",")]
