"""timm's classifiers with their heads, as teachers of soft labels: timm's own, and folders that hold one.

``timm:NAME`` has timm's weights or those of a checkpoint file; ``timm:local-dir:FOLDER`` is a folder as `clipmill
export` writes it of a RUN, or timm's ``save_for_hf``, which has the names of the classes. torch is imported inside the
functions only.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from shards_spec.checkpoints import describe_mismatch, load_checkpoint
from shards_spec.files import UserError
from shards_spec.messages import counted
from shards_spec.models import (
    LOCAL_DIR,
    NO_TRUST,
    TIMM,
    LoadedModel,
    Trust,
    as_loaded,
    create_timm_model,
    import_extensions,
)
from shards_spec.precision import Precision, dtype_of

FROM_RUN = f"`clipmill export RUN --to FOLDER` writes one of a RUN, which is then {TIMM}{LOCAL_DIR}FOLDER"


def load_timm_classifier(
    model: str,
    pretrained: str | None = None,
    *,
    device: str = "cpu",
    precision: Precision = "fp32",
    trust: Trust = NO_TRUST,
) -> LoadedModel:
    """A classifier whose model maps normalised images to logits (N, C).

    ``pretrained`` is a checkpoint file with a head of any number of classes, or None for timm's own weights, or the
    folder's. Raises UserError when the name is unknown, the file is not there or does not fit, or there is no head.
    """
    check_classifier_name(model)
    import_extensions()
    built = create_timm_model(model, pretrained is None)
    if pretrained is not None:
        built = _with_weights(model, built, pretrained, trust)
    if not built.num_classes:
        raise UserError(f"--model {model!r} has no classifier, so it gives no soft labels; take one with a head")
    loaded = as_loaded(built)
    return replace(loaded, model=loaded.model.to(device, dtype_of(precision)))


def check_classifier_name(model: str) -> None:
    """Raise UserError for a name that is none of timm's, or a folder that holds no model of timm's."""
    if not model.startswith(TIMM):
        raise UserError(f"--soft-labels: --model {model!r} is no classifier of timm's; take {TIMM}NAME. {FROM_RUN}")
    name = model.removeprefix(TIMM)
    if name.startswith(LOCAL_DIR):
        folder = Path(name.removeprefix(LOCAL_DIR))
        if not (folder / "config.json").is_file():
            raise UserError(f"--model {model}: {folder} has no config.json of a timm model. {FROM_RUN}")


def class_names(model: Any) -> list[str] | None:
    """Names of a timm classifier's classes, in their order; None where the model does not say them."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if not isinstance(names, list | tuple) or len(names) != model.num_classes:
        return None
    return [str(name) for name in names]


def _with_weights(model: str, built: Any, file: str, trust: Trust) -> Any:
    """The model with a checkpoint's weights and as many classes as its head has. Raises UserError."""
    weights = load_checkpoint(file, trust.trust_checkpoint, built.state_dict().keys())
    head = built.pretrained_cfg.get("classifier")
    rows = weights.get(f"{head}.weight") if isinstance(head, str) else None
    if rows is None:
        wanted = f"no {head}.weight" if isinstance(head, str) else "more than one head"
        raise UserError(f"{file}: {wanted} in it, so it gives no soft labels of {model!r}; take a whole classifier's")
    classes = len(rows)
    if classes != built.num_classes:
        built = create_timm_model(model, False, num_classes=classes)
    try:
        built.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{file} with its {counted(classes, 'class', 'classes')} does not fit {model!r}: {describe_mismatch(error)}"
        ) from error
    return built
