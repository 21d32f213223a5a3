"""Where TinyCLIP's student takes its weights from, and its teacher: options, sources by name, inheritance by hand."""

import copy
import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shards_spec.files import UserError
from shards_spec.messages import require
from shards_spec.models import LoadedModel, Trust, weights_sha256
from training.config import EnsembleConfig, ModelConfig
from training.data.batches import load_batches
from training.data.samples import Samples
from training.data.teacher_cache import TeacherCache, TeacherCaches
from training.losses.contrastive import clip_loss
from training.models.teacher import FrozenTeacher, TeacherEnsemble
from training.models.tinyclip_convert import State
from training.models.tinyclip_inheritance import (
    ClipWeights,
    Layers,
    Rank,
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


@dataclass(frozen=True)
class InheritanceConfig:
    """Which weights the student starts from."""

    inherit: Literal["none", "manual", "auto"] = "none"
    """none: the student's own or random weights; manual: those layers and units of the teacher that it has room for;
    auto: all of the teacher, with masks that are learned and then applied"""
    teacher_weights: str = ""
    """the teacher, to inherit from and to run live: NAME:TAG_OR_FILE (ViT-B-32:laion2b_e16), local-dir:PATH,
    hf-hub:ORG/NAME or a RUN folder; NAME:random for a try"""
    more_teachers: tuple[str, ...] = ()
    """--teacher-from live: further teachers that run beside it, named in the same way"""
    teacher_weights_text: str = ""
    """manual: source of the text tower where it is another"""
    from_run: str = ""
    """RUN of the former stage, whose student is inherited from in place of the teacher"""
    layers: Layers = "interval"
    """manual: every so-many-th layer as released, evenly spread ones, or the first ones"""
    rank: Rank = "leading"
    """manual: heads, neurons and dimensions that are kept: the first ones as released, those of the largest weights, or
    those that the contrastive loss depends on most"""
    rank_samples: int = 256
    """pairs that rank taylor computes that loss of"""

    def __post_init__(self) -> None:
        least = 2
        require(self.rank_samples >= least, "rank_samples", self.rank_samples, f"{least} or more")

    def after(self, run: str) -> "InheritanceConfig":
        """Return the same for the stage after ``run``: both towers are its student's."""
        return replace(self, from_run=run, teacher_weights_text="")

    def check(self, student: ModelConfig, default_model: str, *, is_live: bool) -> None:
        """Raise UserError where something is missing, or was named and would not be used.

        Args:
            student: The student.
            default_model: Its name where none is given.
            is_live: Whether the teacher's weights teach.
        """
        if self.inherit != "none" and not self.teacher_weights and not self.from_run:
            raise UserError(
                f"--inherit {self.inherit} needs --teacher-weights: NAME:TAG_OR_FILE, local-dir:PATH, hf-hub:ORG/NAME "
                "or a RUN folder"
            )
        if is_live and not self.teacher_weights:
            raise UserError("--teacher-from live needs --teacher-weights, the weights that teach")
        if self.inherit != "none" and student.pretrained is not None:
            raise UserError(
                f"--pretrained {student.pretrained!r} would not be used: with --inherit {self.inherit} the student's "
                "weights are inherited"
            )
        if self.inherit == "auto" and student.model != default_model:
            raise UserError(
                f"--model {student.model!r} would not be used: with --inherit auto the student is a copy of "
                "--teacher-weights, or of --from-run's student"
            )
        uses = {
            "--teacher-weights": (self.teacher_weights, is_live or self.inherit != "none"),
            "--teacher-weights-text": (self.teacher_weights_text, self.inherit == "manual"),
            "--from-run": (self.from_run, self.inherit != "none"),
            "--more-teachers": (" ".join(self.more_teachers), is_live),
        }
        for option, (value, is_used) in uses.items():
            if value and not is_used:
                why = "--teacher-from cache" if option == "--more-teachers" else f"--inherit {self.inherit}"
                raise UserError(f"{option} {value!r} would not be used with {why}")
        if len({self.teacher_weights, *self.more_teachers}) <= len(self.more_teachers):
            raise UserError(f"--more-teachers {' '.join(self.more_teachers)}: name each teacher once")

    @property
    def source(self) -> str:
        """What the student inherits from; of its text tower it may be another."""
        return self.from_run or self.teacher_weights


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
