"""Teachers that are not trained: models that run beside the student, or teacher caches' features."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from shards_spec.files import UserError
from shards_spec.messages import counted
from shards_spec.models import LoadedModel
from training.config import EnsembleConfig
from training.data.teacher_cache import TeacherCache, TeacherCaches, teacher_fields
from training.losses.similarity import Similarity
from training.models.taps import Tapped, run_with_taps

CACHED_FIELDS = teacher_fields(0)


class FrozenTeacher:
    """One interface to a live teacher and to a cached one.

    It is no module: a task that holds one neither trains nor saves the teacher's weights, but moves them between
    devices (`training.task.Task`).

    Attributes:
        name: For messages.
        width: Numbers of a feature, D.
        logit_scale: The scale of its logits, not the logarithm; 1 for a teacher of images alone.
        model: The live model in eval mode, without gradients; None for a cached teacher.
    """

    def __init__(self, name: str, *, width: int, logit_scale: float = 1.0, model: Any = None) -> None:
        self.name = name
        self.width = width
        self.logit_scale = logit_scale
        self.model: Any = model if model is None else model.requires_grad_(False).eval()

    @classmethod
    def live(cls, name: str, loaded: LoadedModel) -> "FrozenTeacher":
        """Return a CLIP model that runs on each batch. Its parameters are frozen in place.

        A teacher of images alone (timm's) is made by the constructor, and read by `intermediate`.
        """
        scale = loaded.model.logit_scale.exp().item()
        return cls(name, width=loaded.config["embed_dim"], logit_scale=scale, model=loaded.model)

    @classmethod
    def cached(cls, cache: TeacherCache) -> "FrozenTeacher":
        """Return a teacher whose features come with the samples."""
        return cls(cache.name, width=cache.dim, logit_scale=cache.logit_scale)

    @property
    def item_fields(self) -> tuple[str, ...]:
        """Fields that samples must carry for it."""
        return CACHED_FIELDS if self.model is None else ()

    @torch.no_grad()
    def features(
        self, batch: dict[str, Any], encode: Callable[[Any], tuple[Tensor, Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """Return ``teacher_image`` and ``teacher_text``, (n, D) of any length.

        Args:
            batch: Images and tokens for a live teacher, its features for a cached one.
            encode: Called with the live model in place of its two towers, where student and teacher share a part of
                the forward pass.
        """
        if self.model is None:
            return {name: batch[name] for name in CACHED_FIELDS}
        if encode is None:
            image, text = self.model.encode_image(batch["images"]), self.model.encode_text(batch["tokens"])
        else:
            image, text = encode(self.model)
        return {"teacher_image": image, "teacher_text": text}

    @torch.no_grad()
    def intermediate(self, run: Callable[[Any], Any], taps: Sequence[str], until: str | None = None) -> Tapped:
        """Run the live model and return its output and what the modules ``taps`` returned.

        Args:
            run: Called with the model, say ``lambda model: model.encode_image(images)``.
            taps: Names of submodules.
            until: Name of a submodule after which the forward pass stops: nothing behind it is computed.

        Raises:
            UserError: The teacher is cached, and a cache holds final features only.
        """
        if self.model is None:
            raise UserError(f"teacher cache {self.name} has final features only; this recipe needs a live teacher")
        return run_with_taps(self.model, run, taps, until)

    def tensors(self) -> list[Tensor]:
        """Return the live model's weights and buffers; none of a cached teacher."""
        return [] if self.model is None else [*self.model.parameters(), *self.model.buffers()]

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply what `torch.nn.Module.to` does to each tensor."""
        if self.model is not None:
            self.model._apply(fn)


class TeacherEnsemble:
    """The teachers of a student, in their order; most students have one.

    Attributes:
        members: The teachers.
        scales: The logit scale at which each of them teaches.

    Args:
        members: The teachers: all live, or all cached.
        config: How they teach together, and scales in place of their own.

    Raises:
        UserError: There are not as many scales as teachers.
    """

    def __init__(self, members: Sequence[FrozenTeacher], config: EnsembleConfig) -> None:
        self.members = tuple(members)
        self.is_mean = config.ensemble == "mean"
        scales = config.teacher_scale
        if scales and len(scales) != len(self.members):
            given = " ".join(f"{scale:g}" for scale in scales)
            raise UserError(
                f"--teacher-scale {given}: {counted(len(scales), 'number')} for {counted(len(self.members), 'teacher')}"
                f" ({', '.join(self.names)}); give one for each"
            )
        self.scales = tuple(scales) or tuple(member.logit_scale for member in self.members)

    @classmethod
    def cached(cls, caches: TeacherCaches, config: EnsembleConfig) -> "TeacherEnsemble":
        """Return teachers whose features come with the samples."""
        return cls([FrozenTeacher.cached(cache) for cache in caches.members], config)

    @property
    def names(self) -> list[str]:
        """The teachers' names."""
        return [member.name for member in self.members]

    @property
    def item_fields(self) -> tuple[str, ...]:
        """Fields that samples must carry for them."""
        cached = [teacher_fields(number) for number, member in enumerate(self.members) if member.model is None]
        return tuple(chain.from_iterable(cached))

    @torch.no_grad()
    def features(
        self, batch: dict[str, Any], encode: Callable[[Any], tuple[Tensor, Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """Return every teacher's features, (n, D) of any length, named by `teacher_fields`.

        Args:
            batch: Images and tokens for live teachers, the features of cached ones.
            encode: As `FrozenTeacher.features` takes it.
        """
        taught = {name: batch[name] for name in self.item_fields}
        for number, member in enumerate(self.members):
            if member.model is not None:
                taught |= zip(teacher_fields(number), member.features(batch, encode).values(), strict=True)
        return taught

    def pairs(self, features: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return the image and text features (N, D) of each teacher among those that `features` gave."""
        names = [teacher_fields(number) for number in range(len(self.members))]
        return [(features[image], features[text]) for image, text in names]

    def similarities(self, features: dict[str, Tensor]) -> list[Similarity]:
        """Return each teacher's similarities of images and texts, from features of unit length."""
        pairs = zip(self.pairs(features), self.scales, strict=True)
        return [Similarity(image, text, scale) for (image, text), scale in pairs]

    def relational(self, loss: Callable[[list[Similarity]], Tensor], features: dict[str, Tensor]) -> Tensor:
        """Return a loss against the teachers' distributions over a batch, from features of unit length.

        Args:
            loss: Of the similarities of all teachers, whose distributions it averages; for the sum it is called once a
                teacher.
            features: Features of the whole batch.
        """
        similarities = self.similarities(features)
        if self.is_mean:
            return loss(similarities)
        return torch.stack([loss([similarity]) for similarity in similarities]).sum()

    def combined(self, losses: Sequence[Tensor]) -> Tensor:
        """Return the mean or the sum of losses that know one teacher each."""
        stacked = torch.stack(list(losses))
        return stacked.mean() if self.is_mean else stacked.sum()
