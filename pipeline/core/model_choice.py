"""What the configs of stages with an open_clip model share: the default model's weights, and the output's name."""

from typing import Any, ClassVar

from shards_spec.models import TIMM, model_label
from shards_spec.names import check_name


class ModelChoice:
    """Base of configs with ``model``, ``pretrained`` and ``name``, and a ``DEFAULT``: a model and its open_clip tag."""

    DEFAULT: ClassVar[tuple[str, str]]
    model: str
    pretrained: str | None
    name: str | None

    def choose_weights(self) -> None:
        """Give the default model its weights where none are named. Raises UserError for a name that is no folder's."""
        model, tag = self.DEFAULT
        if self.pretrained is None and self.model == model:
            object.__setattr__(self, "pretrained", tag)  # configs are frozen
        check_name(self.label)

    @property
    def label(self) -> str:
        """The name of the stage's folder: as given, else made from the model and its weights."""
        return model_label(self.model, self.pretrained) if self.name is None else self.name


def recorded_models(record: dict[str, Any], given: tuple[str, ...]) -> list[str]:
    """Models that a record's may be: those ``given`` that have its name, then what the name itself means."""
    label = record["model"]
    named = [model for model in given if model_label(model, None) == label]
    return [*named, f"{TIMM}{label}" if record.get("library") == "timm" else label]
