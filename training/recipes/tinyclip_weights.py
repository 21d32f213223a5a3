"""Where TinyCLIP's student takes its weights from, and its teacher: options, sources by name, inheritance by hand."""

import copy
import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shards_spec.files import UserError
from shards_spec.models import LoadedModel, Trust, weights_sha256
from training.config import EnsembleConfig
from training.configs.tinyclip import InheritanceConfig
from training.data.batches import load_batches
from training.data.samples import Samples
from training.data.teacher_cache import TeacherCache, TeacherCaches
from training.losses.contrastive import clip_loss
from training.models.teacher import FrozenTeacher, TeacherEnsemble
from training.models.tinyclip_convert import State
from training.models.tinyclip_inheritance import (
    ClipWeights,
    Side,
    clip_weights,
    inherit_manual,
    taylor_terms,
)
from training.models.unit_importance import gradients_of
from training.recipes.pairs import check_same_inputs
from training.runs.student import load_student, parse_model

log = logging.getLogger(__name__)
RANKED_AT_ONCE = 32  # pairs of one contrastive loss by whose gradient units are ranked


def check_activation(name: str) -> None:
    """Raise UserError for a source that would run with another activation than its weights were trained with.

    open_clip says so in a warning only. Inheritance by hand reads no more than the weights and looks at the student's.
    """
    import open_clip

    config = parse_model(name).config
    tag = open_clip.get_pretrained_cfg(config.model.replace("/", "-"), config.pretrained) if config.pretrained else {}
    described = open_clip.get_model_config(config.model) or {}
    if tag.get("quick_gelu") and not described.get("quick_gelu"):
        raise UserError(
            f"{name!r}: these weights were trained with QuickGELU, which {config.model} does not compute; take "
            f"{config.model}-quickgelu with them"
        )


class NamedModels:
    """Models by what a command line names them by, each loaded once.

    Args:
        seed: Of random weights.
        trust: What they may do.
    """

    def __init__(self, seed: int, trust: Trust) -> None:
        self._seed = seed
        self._trust = trust
        self._loaded: dict[str, LoadedModel] = {}

    def keep(self, name: str, loaded: LoadedModel) -> None:
        """Take a model that was loaded already."""
        self._loaded[name] = loaded

    def load(self, name: str) -> LoadedModel:
        """Return a model with its weights. Raises UserError."""
        if name not in self._loaded:
            config, is_random = parse_model(name, self._trust)
            self._loaded[name] = load_student(config, self._seed, random_weights=is_random)
        return self._loaded[name]

    def weights(self, name: str) -> ClipWeights:
        """Return the same as a source of inheritance."""
        loaded, named = self.load(name), parse_model(name).config
        return clip_weights(named.model, named.pretrained, loaded.config, loaded.model.state_dict())


def open_teachers(
    config: InheritanceConfig,
    ensemble: EnsembleConfig,
    student: LoadedModel,
    caches: TeacherCaches | None,
    models: NamedModels,
    *,
    is_new: bool,
) -> TeacherEnsemble:
    """Return the teachers: caches' features, or live weights.

    A new run none of whose caches is of the teacher that is inherited from gets a warning that names both. Raises
    UserError where a live teacher takes other images or texts than the student, or there are other numbers of scales.
    """
    name = config.teacher_weights
    if caches is not None:
        if name and is_new:
            _warn_of_others(caches, name, models.load(name).model)
        return TeacherEnsemble.cached(caches, ensemble)
    members = []
    for number, source in enumerate((name, *config.more_teachers)):
        check_activation(source)
        loaded = models.load(source)
        check_same_inputs(f"{'--more-teachers' if number else '--teacher-weights'} {source!r}", loaded, student)
        members.append(FrozenTeacher.live(source, loaded))
    return TeacherEnsemble(members, ensemble)


def _warn_of_others(caches: TeacherCaches, name: str, model: nn.Module) -> None:
    """Warn where no cache is of these weights."""
    if not any(_is_of(cache, model) for cache in caches.members):
        described = [f"{cache.name} is of {_weights_of(cache)}" for cache in caches.members]
        log.warning(
            "the teacher cache %s, the student inherits from %s, which has other weights: the paper found a teacher of "
            "the inherited weights better than a larger one",
            ", ".join(described),
            name,
        )


def _weights_of(cache: TeacherCache) -> str:
    pretrained = cache.meta["pretrained"]
    model: str = cache.meta["model"]
    return model if pretrained is None else f"{model} ({pretrained})"


def _is_of(cache: TeacherCache, model: nn.Module) -> bool:
    """Whether a cache is of a model's weights, in the precision that it was made in; an imported one may be."""
    if cache.meta["weights_sha256"] is None:
        return True
    dtype = getattr(torch, cache.meta.get("precision", "float32"))
    if dtype != torch.float32:
        model = copy.deepcopy(model).to(dtype)
    return bool(weights_sha256(model) == cache.meta["weights_sha256"])


def inherit_by_hand(
    config: InheritanceConfig, student: LoadedModel, name: str, samples: Samples, models: NamedModels
) -> None:
    """Give a student the layers and units of its sources that fit.

    Args:
        config: Names the sources, and how layers and units are chosen.
        student: The student, whose own weights are replaced but for the logit scale.
        name: The student's name.
        samples: Pairs for the rank ``taylor``.
        models: Where sources come from.

    Raises:
        UserError: They do not fit together.
        DataError: A pair cannot be read.
    """
    sources: dict[Side, str] = {"image": config.source, "text": config.teacher_weights_text or config.source}
    options = {"image": "--from-run" if config.from_run else "--teacher-weights", "text": "--teacher-weights-text"}
    for side, source in sources.items():
        check_same_inputs(f"{options[side]} {source!r}", models.load(source), student)
    terms: dict[Side, list[State]] | None = None
    if config.rank == "taylor":
        of_source = {source: _taylor(source, models, samples, config.rank_samples) for source in set(sources.values())}
        terms = {side: of_source[source] for side, source in sources.items()}
    own = clip_weights(name, None, student.config, student.model.state_dict())
    image, text = (models.weights(source) for source in sources.values())
    state = inherit_manual(own, image, text, layers=config.layers, rank=config.rank, terms=terms)
    student.model.load_state_dict(state)


def _taylor(name: str, models: NamedModels, samples: Samples, number: int) -> list[State]:
    """The `taylor_terms` of a source for the contrastive loss of the first pairs, one per batch."""
    check_activation(name)
    model = models.load(name).model
    number = min(number, samples.order.total)
    positions = [range(start, min(start + RANKED_AT_ONCE, number)) for start in range(0, number, RANKED_AT_ONCE)]
    losses = (partial(_contrastive_loss, model, batch) for batch in load_batches(samples, positions))
    weights = models.weights(name)
    return [taylor_terms(weights, gradients) for gradients in gradients_of(model, losses)]


def _contrastive_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    image = model.encode_image(batch["images"], normalize=True)
    text = model.encode_text(batch["tokens"], normalize=True)
    return clip_loss(image, text, model.logit_scale.exp())
