"""open_clip: a folder that `open_clip.create_model` loads as ``local-dir:FOLDER``."""

from pathlib import Path

import torch

from shards_spec.files import UserError
from shards_spec.models import LoadedModel, load_model
from training.export.comparison import Encoders, encoders_of
from training.export.config import ExportConfig
from training.models.classifier import Classifier
from training.models.text_tower import TextTower
from training.models.tinyclip_convert import is_pruned
from training.runs.model_folder import write_model, write_open_clip_config

USAGE = """```python
import open_clip
{imports}
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER"{text})
tokenizer = {tokenizer}
```
"""

# open_clip looks for the folder of a text tower in the current folder, whatever folder its own name is in
TEXT_USAGE = """import json

with open("FOLDER/open_clip_config.json") as file:
    text = json.load(file)["model_cfg"]["text_cfg"]
text |= {"hf_model_name": "FOLDER/text_tower", "hf_model_pretrained": False}
"""


def write(folder: Path, student: LoadedModel, config: ExportConfig) -> None:
    """Write open_clip_config.json, open_clip_model.safetensors and the tokenizer of a student that has its own.

    Raises UserError when the student is a classifier, a weight is too large for fp16, or the folder has another model.
    """
    from safetensors.torch import save

    if isinstance(student.model, Classifier):
        raise UserError(f"--format open_clip: {config.run} is an image classifier; use --format timm")
    tensors = as_dtype(student.model.state_dict(), config.dtype)
    weights = save(tensors, metadata={"format": "pt"})
    write_model(str(folder), "open_clip_model.safetensors", weights, config.overwrite)
    write_open_clip_config(str(folder), student, f"local-dir:{config.run}")


def as_dtype(state: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """Return a state dict whose floating-point tensors are of ``dtype``, fp32 or fp16.

    Raises UserError for a number that is too large for fp16.
    """
    if dtype == "fp32":
        return {name: tensor.contiguous() for name, tensor in state.items()}
    converted = {}
    for name, tensor in state.items():
        converted[name] = (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        if tensor.isfinite().all() and not converted[name].isfinite().all():
            raise UserError(f"--dtype fp16: {name} has numbers above 65,504, which fp16 cannot hold; use --dtype fp32")
    return converted


def load(folder: Path, student: LoadedModel, config: ExportConfig) -> Encoders:
    """Return the encoders of the folder's model."""
    return encoders_of(load_model(f"local-dir:{folder}", trust=config.trust))


def usage(student: LoadedModel) -> str:
    """Return how to load the folder, for its card."""
    text = student.config.get("text_cfg") or {}
    has_bpe = bool((text.get("tokenizer_kwargs") or {}).get("bpe_path"))
    own = ', bpe_path="FOLDER/bpe.txt.gz"' if has_bpe else ""
    module = needed_module(student)
    needs = "" if module is None else "It loads in open_clip where Clipmill is installed:\n\n"
    imports = "" if module is None else f"import {module}  # makes its towers known\n"
    has_text = Path(text.get("hf_model_name") or "").is_absolute()
    return needs + USAGE.format(
        imports=imports + TEXT_USAGE if has_text else imports,
        text=", text_cfg=text" if has_text else "",
        tokenizer=f'open_clip.get_tokenizer("local-dir:FOLDER"{own})',
    )


def needed_module(student: LoadedModel) -> str | None:
    """Return the module of this package that makes a student's architecture known; None for open_clip's own."""
    if is_pruned(student.model):
        return "training.models.tinyclip_pruned"
    ours = [type(module).__module__ for module in student.model.modules()]
    if isinstance(getattr(student.model, "text", None), TextTower):
        return "training.models.mobileclip"
    return next((name for name in ours if name.startswith("training.")), None)
