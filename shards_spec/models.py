"""How a model is named, loaded and identified: caches record it, captioner, teacher and student load by it.

Names are open_clip's: a built-in architecture with ``pretrained`` a tag or a checkpoint file, ``local-dir:PATH`` or
``hf-hub:ORG/NAME``. ``timm:NAME`` is timm's model of that name, an image-only teacher. torch is imported inside the
functions only.

Architectures that neither ships come from installed packages' entry points of the group ``clipmill.models``: modules
that are imported before a model is built and make their names known to open_clip or timm (training's are in pyproject).
"""

import hashlib
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from shards_spec.files import UserError

Precision = Literal["fp32", "bf16", "fp16"]
TIMM = "timm:"
EXTENSIONS = "clipmill.models"


@dataclass(frozen=True)
class LoadedModel:
    """An open_clip model in eval mode with what is needed to feed it.

    ``mean`` and ``std`` are per channel for pixels in [0, 1]; ``image_size`` in pixels; ``config`` is open_clip's
    model_cfg (timm's data config); ``tokenizer`` maps a list of texts to int64 (N, context_length), None without a text
    tower.
    """

    model: Any
    tokenizer: Any
    config: dict[str, Any]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, pixels: Any) -> Any:
        """Pictures (N, 3, S, S) of 0 to 255 -> what the image tower takes, float32; float32 ones are overwritten."""
        import torch

        mean, std = (torch.tensor(own, device=pixels.device).view(3, 1, 1) for own in (self.mean, self.std))
        return pixels.float().div_(255).sub_(mean).div_(std)


def load_model(
    model: str,
    pretrained: str | None = None,
    device: str = "cpu",
    random_weights: bool = False,
    precision: Precision = "fp32",
) -> LoadedModel:
    """Build an open_clip model and load its weights as open_clip does; without any only if ``random_weights``.

    All of it is cast to ``precision`` (open_clip's pure_bf16 and pure_fp16). Raises UserError when the name, the tag or
    the file is unknown, or no weights were named.
    """
    import open_clip

    import_extensions()
    try:
        built = open_clip.create_model(
            model,
            pretrained=pretrained,
            device=device,
            precision=precision if precision == "fp32" else f"pure_{precision}",
            require_pretrained=not random_weights,
        )
        tokenizer = load_tokenizer(model)
    except (RuntimeError, ValueError, FileNotFoundError) as error:
        reason = str(error)
        if pretrained is None and reason.startswith("Required pretrained weights"):
            reason = "it has no weights; say --pretrained TAG_OR_FILE, or name a folder that has them"
        raise UserError(f"model {model!r} with pretrained {pretrained!r} cannot be loaded: {reason}") from error
    preprocess = open_clip.get_model_preprocess_cfg(built)
    size = preprocess["size"]
    return LoadedModel(
        built.eval(),
        tokenizer,
        open_clip.get_model_config(model),
        size if isinstance(size, int) else size[0],
        tuple(preprocess["mean"]),
        tuple(preprocess["std"]),
    )


def import_extensions() -> None:
    """Make the names of the architectures known that installed packages bring."""
    for module in entry_points(group=EXTENSIONS):
        module.load()


def load_teacher(
    model: str, pretrained: str | None = None, device: str = "cpu", precision: Precision = "fp32"
) -> LoadedModel:
    """As `load_model`, or timm's ``timm:NAME`` without its classifier: pixels to pooled features (N, D).

    ``pretrained`` is then a checkpoint file, or None for timm's own weights. Raises UserError when the name is unknown,
    the file is not there or does not fit.
    """
    if not model.startswith(TIMM):
        return load_model(model, pretrained, device, precision=precision)
    import timm
    import torch

    import_extensions()
    name, dtype = model.removeprefix(TIMM), {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    try:
        built = timm.create_model(name, pretrained=pretrained is None, num_classes=0)
        if pretrained is not None:
            load_backbone(built, pretrained)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"model {model!r} with pretrained {pretrained!r} cannot be loaded: {error}") from error
    data = timm.data.resolve_model_data_config(built)  # type: ignore[no-untyped-call]
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}
    return LoadedModel(
        built.eval().to(device, dtype[precision]), None, config, data["input_size"][-1], data["mean"], data["std"]
    )


def load_backbone(built: Any, file: str) -> None:
    """A checkpoint's weights but for its classifier's, into a timm model without one.

    Raises ValueError when others are missing or left over.
    """
    import timm

    found = timm.models.load_checkpoint(built, file, strict=False)
    classifiers = built.default_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    over = [name for name in found.unexpected_keys if not name.startswith(tuple(f"{head}." for head in classifiers))]
    if found.missing_keys or over:
        raise ValueError(f"{file} lacks {found.missing_keys[:3]} and has {over[:3]} too many")


def load_tokenizer(model: str) -> Any:
    """open_clip's tokenizer of a model; a relative ``bpe_path`` is looked up in the model's local-dir."""
    import open_clip

    config = open_clip.get_model_config(model) or {}
    bpe = ((config.get("text_cfg") or {}).get("tokenizer_kwargs") or {}).get("bpe_path")
    folder = model.removeprefix("local-dir:")
    if bpe and folder != model and (Path(folder) / Path(bpe).name).exists():
        return open_clip.get_tokenizer(model, bpe_path=str(Path(folder) / Path(bpe).name))
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
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device!r}: this torch sees no CUDA device; use --device cpu")
    return device


def pick_devices(device: str) -> list[str]:
    """``auto`` becomes every CUDA device, or ``cpu`` where there is none; else a list with commas, one process each.

    Raises UserError for a device that is not there.
    """
    import torch

    if device == "auto" and torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [pick_device(name.strip()) for name in device.split(",")]
