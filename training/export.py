"""A run's student as an open_clip model folder, loaded back and compared before it counts as exported."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor
from tyro.conf import OmitArgPrefixes

from shards_spec.files import UserError, is_url, write_bytes
from shards_spec.models import LoadedModel, Trust, load_model
from training.models.classifier import Classifier, export_classifier
from training.models.tinyclip_convert import is_pruned
from training.models.tinyclip_pruning import masks_of, materialise
from training.models.tinyclip_table import markdown
from training.runs.model_folder import write_model, write_open_clip_config
from training.runs.student import load_run

log = logging.getLogger(__name__)
TOLERANCE = 1e-5  # largest difference of a feature, fp32 on the same CPU
CARD = """# {name}

A CLIP whose layers have their own numbers of heads and neurons (TinyCLIP, arXiv 2309.12314), made by `clipmill export`
from {origin}. D is the width, H the heads and F the neurons of the MLP.

{table}

It loads in open_clip where Clipmill is installed:

```python
import open_clip
import training.models.tinyclip_pruned  # makes its towers known

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
```
"""


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's student for others to load."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """RUN folder of `clipmill train`"""
    to: str
    """folder to write, which can be moved; load it with open_clip as local-dir:FOLDER (a student with byte pairs of its
    own: open_clip.get_tokenizer(..., bpe_path='FOLDER/bpe.txt.gz'))"""
    raw: bool = False
    """take the run's weights themselves where it kept an average of them"""
    best: bool = False
    """take the run's best checkpoint by its eval_data, not the newest"""
    format: Literal["open_clip"] = "open_clip"
    """open_clip: open_clip_config.json and open_clip_model.safetensors"""
    overwrite: bool = False
    """replace another model in the folder"""
    trust: OmitArgPrefixes[Trust] = field(default_factory=Trust)


def export(config: ExportConfig) -> None:
    """Write the folder, load it back, and compare features.

    Raises UserError when the run has no checkpoint, the folder has another model, or the loaded copy computes something
    else.
    """
    if is_url(config.to):
        raise UserError(f"--to {config.to!r}: give a local folder and copy it from there")
    student, step = load_run(config.run, config.raw, config.best, config.trust)
    folder = Path(config.to).resolve()
    if is_pruned(student.model) and masks_of(student.model):
        log.info("step %d of %s still has masks: what is exported is the student cut to them", step, config.run)
        materialise(student.model, student.config)
    if isinstance(student.model, Classifier):
        export_classifier(str(folder), student, config.overwrite)
        module = type(student.model.trunk).__module__
        needs = "loads it alone" if module.startswith("timm.") else f"needs `import {module}` for this architecture"
        log.info("%s: step %d of %s, timm's local-dir:%s; timm %s", folder, step, config.run, folder, needs)
        return
    _write_open_clip(folder, student, config)
    if is_pruned(student.model):
        _write_card(folder, student, f"step {step} of the run {Path(config.run).resolve().name}", config.overwrite)
    difference = largest_difference(student, load_model(f"local-dir:{folder}", trust=config.trust))
    if difference > TOLERANCE:
        raise UserError(
            f"{folder}: loaded back, its features differ by {difference:.2g} (more than {TOLERANCE:g}); do not use it"
        )
    same = f"features differ by {difference:.2g} at most" if difference else "features are the same"
    log.info("%s: step %d of %s, %s", folder, step, config.run, same)


def _write_open_clip(folder: Path, student: LoadedModel, config: ExportConfig) -> None:
    """Write weights and description of a student as open_clip reads them."""
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in student.model.state_dict().items()}
    weights = save(tensors, metadata={"format": "pt"})
    write_model(str(folder), "open_clip_model.safetensors", weights, config.overwrite)
    write_open_clip_config(str(folder), student, f"local-dir:{config.run}")


def _write_card(folder: Path, student: LoadedModel, origin: str, overwrite: bool) -> None:
    """Write README.md of a student whose layers have their own sizes, unless there is one that may not be replaced."""
    path = folder / "README.md"
    text = CARD.format(name=folder.name, origin=origin, table=markdown(student.model))
    if not path.exists() or overwrite:
        write_bytes(str(path), text.encode())
    elif path.read_text() != text:
        log.warning("%s is kept as it is; --overwrite writes the new student's", path)


@torch.no_grad()
def largest_difference(one: LoadedModel, other: LoadedModel) -> float:
    """Return the largest absolute difference of two models' features.

    They are those of eight images of noise and eight captions.
    """
    images = torch.randn(8, 3, one.image_size, one.image_size, generator=torch.Generator().manual_seed(0))
    captions = [f"a photo of {number} things" for number in ("no", "one", "two", "three", "four", "five", "six", "7")]

    def features(loaded: LoadedModel) -> list[Tensor]:
        image = loaded.model.encode_image(images, normalize=True)
        return [image, loaded.model.encode_text(loaded.tokenizer(captions), normalize=True)]

    pairs = zip(features(one), features(other), strict=True)
    return max(float((feature - counterpart).abs().max()) for feature, counterpart in pairs)
