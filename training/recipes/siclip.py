"""SiCLIP (H. Liu, arXiv 2411.14789): a MobileCLIP-S0 with simpler attention blocks, trained on one 24 GB GPU.

The student is MobileCLIP-S0 whose attention blocks became SAS-P blocks that share their token mixer's weights with
their neighbours. Everything else is S0's and frozen; S0 is the teacher, too (WIKD: weight inheritance and distillation
in three spaces); pair matching adds hard negatives; texts are CC12M's and CoCa's, one at random per epoch (CC12M-SYN).

    L = L_CLIP + 4000 L_FD + L_CRD + L_ICL + 0.1 L_PM

Target (the cells of its tables were not seen, only its prose): text-to-image recall about 1 % below MobileCLIP-S0's
40.4 (MSCOCO) and 67.7 (Flickr30k); table 5: ImageNet zero-shot 13.0 (WI) and 25.4 (WIKD) above plain training, most
with WIKD + PM; table 3: 39.5 images/s on a CPU where S0 has 38.2. Cost: 32 epochs of 12.4 million pairs are 0.40
billion samples, 259,000 steps. Sizes: 9.8 M + 38.8 M parameters, 12.7 M of them trained.

    clipmill train siclip --data ROOT --base-weights mobileclip_s0.pt --out RUN                     WIKD + PM
      --pm-weight 0                                                                                 table 5: WIKD
      --pm-weight 0 --fd-weight 0 --crd-weight 0 --icl-weight 0                                     table 5: WI
      --pm-weight 0 --fd-weight 0 --crd-weight 0 --icl-weight 0 --no-inherit                        table 5: plain
      --captions original                                                                           table 4: CC12M

The paper gives: batch 1536, AdamW, lr 1e-3, weight decay 0.1, warm-up 10,000, 32 epochs, crops of (0.08, 1),
RandAugment with "31 default methods", the five weights, "all other settings" CLIP-KD's (arXiv 2307.12732). Readings,
each the default here where sources are silent, the other one being an option where it has a name:
- RandAugment is torchvision's default: 2 operations of magnitude 9 out of 31. No flip: none is mentioned.
- betas (0.9, 0.999) and eps 1e-8 are CLIP-KD's for models without "vit" in their name. Its fp16 is bf16 here.
- FD is over normalised features and the mean over elements (CLIP-KD's code). A weight of 4000 fits this and 512
  dimensions: 15.6 [(1 - cos) + (1 - cos)] of images and texts. Other widths take 4000 D / 512 for the same.
- CRD is KL(teacher || student) with each model's own scale, and a mean over directions (CLIP-KD's code).
- ICL's scale is the exponential of a parameter, clamped to 100 and saved. CLIP-KD uses the parameter, ln(1/0.07), as
  it is, which cannot go below 4.69 at batch 1536: --icl-raw-scale.
- The order of the weights, and that CLIP's has weight 1.
- Pair matching: see `training.losses.pair_matching`; --pm-logits, --pm-raw, --pm-similarity.
- What is frozen: all that has S0's weights outside of the SAS-P blocks, also after them: --train-tail. Inside of the
  blocks norm and FFN start from S0's and are trained: --no-inherit-ffn, --inherit-keys, --exact-norm.
- S0 sees the student's image and text (live). From a cache, the views are the cache's, and any teacher will do.
- open_clip ships no S0. Its MobileCLIP2-S0 has S0's image tower and another text tower (12 layers, no RepMixer), which
  makes it another experiment: --base MobileCLIP2-S0 --base-weights dfndr2b --model SiCLIP2-S0.
- Text blocks share in one group of four; --model SiCLIP-S0 says so ("share" in its open_clip config).
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from shards_spec.files import UserError
from shards_spec.models import NO_TRUST, LoadedModel, Trust
from training.config import ModelConfig, is_run
from training.configs.siclip import SiclipConfig
from training.data.paired_views import KEEP
from training.data.teacher_cache import TeacherCaches
from training.losses.contrastive import clip_loss
from training.losses.distillation import element_feature_loss, ensemble_relation_loss, interactive_loss
from training.losses.pair_matching import PairHead, key_ids, pair_loss, sample_negatives, text_ids
from training.losses.similarity import Similarity, upcast
from training.models.inheritance import freeze, inherit_siclip
from training.models.mobileclip import forward_shared, forward_tail, with_text_tower
from training.models.teacher import FrozenTeacher, TeacherEnsemble
from training.recipes.clip_kd import ClipKd, MaskedStudent
from training.recipes.pairs import MAX_LOGIT_SCALE, check_same_inputs, clamp_logit_scale, open_pairs
from training.runs.student import load_student
from training.task import Batch, Features, Losses, Prepared, Task

TAIL = (
    "visual.trunk.final_conv.",
    "visual.trunk.head.",
    "text.last.",
    "text.ln_final.",
    "text.text_projection",
)
OPEN_CLIPS = "--base MobileCLIP2-S0 --base-weights dfndr2b --model SiCLIP2-S0"


class SiclipTask(Task):
    """Student, ICL's scale and the pair-matching head.

    Args:
        config: The recipe's config.
        student: The student.
        width: Numbers of a student's feature.
        base: The model whose layers before the attention blocks the student has inherited: they run once, without a
            graph, for the student and a live teacher. None where nothing is inherited and no live teacher is needed.
        teacher: The base again, or caches; None where no term needs one.
        masked: The student's pass over a part of the patches, where there is one.
    """

    def __init__(
        self,
        config: SiclipConfig,
        student: Any,
        width: int,
        base: FrozenTeacher | None,
        teacher: TeacherEnsemble | None,
        *,
        masked: MaskedStudent | None = None,
    ) -> None:
        fields = teacher.item_fields if teacher is not None else ()
        super().__init__(student, ("images", "tokens", *fields, *((KEEP,) if masked is not None else ())))
        self.config = config
        self.base = base
        self.teacher = teacher
        if config.icl_weight:
            self.icl_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if config.pm_weight:
            self.head = PairHead(width, config.pm_logits, config.pm_raw)
        self.clip_kd = None
        if teacher is not None:
            self.clip_kd = ClipKd(config.clip_kd, width, teacher, compares=config.compares)
        self.masked = masked

    def draw(self, batch: Batch) -> Batch:
        """Return the batch with ``key_ids`` (B,), by which pairs of equal keys are no negatives of each other."""
        if not self.config.pm_weight:
            return batch
        return {**batch, "key_ids": key_ids(batch["keys"], batch["tokens"].device)}

    def forward(self, batch: Batch) -> Features:
        """Return features (B, D) of any length and the ids that tell which pairs are no negatives of each other.

        ``image``, ``text``, ``teacher_image``, ``teacher_text`` and those of further teachers; (B,) int64 ``text_ids``
        and ``key_ids``: where they are equal, pairs are no negatives; ``masked_image`` of a part of the patches.
        """
        images, tokens = batch["images"], batch["tokens"]
        if self.config.inherit:
            image, text, taught = self._from_shared_layers(batch)
        else:
            taught = self.teacher.features(batch) if self.teacher is not None else {}
            image, text = self.student.encode_image(images), self.student.encode_text(tokens)
        features = {"image": upcast(image), "text": upcast(text)}
        features |= {name: upcast(value) for name, value in taught.items()}
        if self.masked is not None:
            features["masked_image"] = upcast(self.masked.encode(self.student, batch))
        if self.config.pm_weight:
            features |= {"text_ids": text_ids(tokens), "key_ids": batch["key_ids"]}
        return features

    def _from_shared_layers(self, batch: Batch) -> tuple[Tensor, Tensor, Features]:
        """Return image and text features and the teachers'; what student and base share is computed once."""
        assert self.base is not None
        tokens = batch["tokens"]
        with torch.no_grad():
            image = forward_shared(self.base.model, batch["images"])
            text = self.base.model.text.forward_shared(tokens)

        def encode_tail(model: Any) -> tuple[Tensor, Tensor]:
            return forward_tail(model, image), model.text.forward_tail(text, tokens)

        taught = self.teacher.features(batch, encode_tail) if self.teacher is not None else {}
        return *encode_tail(self.student), taught

    def losses(self, features: Features, step: int) -> Losses:
        """Return ``contrastive``, ``feature``, ``relation``, ``interactive``, ``pairs``: those of weight above 0.

        Further ones are those of `ClipKd.losses`.
        """
        config, scale = self.config, self.student.logit_scale.exp()
        unit = {name: F.normalize(value, dim=-1) for name, value in features.items() if value.is_floating_point()}

        image, text = unit["image"], unit["text"]

        students = list[tuple[Tensor, Tensor]]()
        if self.clip_kd is not None:
            students = self.clip_kd.towards_teachers((image, text), (features["image"], features["text"]))

        def compared(loss: Callable[..., Tensor]) -> Tensor:
            assert self.clip_kd is not None
            return self.clip_kd.compared(loss, students, unit)

        def relation() -> Tensor:
            assert self.teacher is not None
            loss = partial(ensemble_relation_loss, Similarity(image, text, scale), share=self.row_share)
            return self.teacher.relational(loss, unit)

        terms: dict[str, tuple[float, Callable[[], Tensor]]] = {
            "contrastive": (config.clip_weight, lambda: clip_loss(image, text, scale, share=self.row_share)),
            "feature": (config.fd_weight, lambda: compared(element_feature_loss)),
            "relation": (config.crd_weight, relation),
            "interactive": (
                config.icl_weight,
                lambda: compared(partial(interactive_loss, scale=self._icl_scale(), share=self.row_share)),
            ),
            "pairs": (config.pm_weight, lambda: self._pair_loss(features, unit, step)),
        }
        losses = {name: weight * loss() for name, (weight, loss) in terms.items() if weight}
        if self.clip_kd is not None:
            losses |= self.clip_kd.losses(features, unit, students, scale, share=self.row_share)
        return losses

    def _icl_scale(self) -> Tensor:
        return self.icl_logit_scale if self.config.icl_raw_scale else self.icl_logit_scale.exp()

    def _pair_loss(self, features: Features, unit: Features, step: int) -> Tensor:
        """Return the loss of pair matching; what the negatives are drawn by has no gradient."""
        own = self.row_share.rows(len(unit["image"]))
        by_image, by_text = self._pair_logits(unit, own)
        ids = (features["text_ids"], features["key_ids"])
        seed = self.config.run.seed
        negatives = sample_negatives(by_image, by_text, ids, seed=seed, step=step, start=own.start)
        return pair_loss(self.head, features["image"], features["text"], negatives, share=self.row_share)

    @torch.no_grad()
    def _pair_logits(self, unit: Features, rows: slice) -> tuple[Tensor, Tensor]:
        """Return logits (n, N) of some pairs' images, and of their texts: the student's, or its teachers' mean."""
        if self.config.pm_similarity == "student":
            return Similarity(unit["image"], unit["text"], self.student.logit_scale.exp()).both_directions(rows)
        assert self.teacher is not None
        logits = [similarity.both_directions(rows) for similarity in self.teacher.similarities(unit)]
        if len(logits) == 1:
            return logits[0]
        by_image = torch.stack([both[0] for both in logits]).mean(0)
        return by_image, torch.stack([both[1] for both in logits]).mean(0)

    def after_step(self, step: int) -> None:
        """Keep the scales at 100 at most."""
        clamp_logit_scale(self.student)
        if self.clip_kd is not None:
            self.clip_kd.clamp()
        if self.config.icl_weight and not self.config.icl_raw_scale:
            with torch.no_grad():
                self.icl_logit_scale.clamp_(max=MAX_LOGIT_SCALE)


def prepare(config: SiclipConfig) -> Prepared:
    """Return student, samples and task.

    Raises UserError and DataError, among others when base, teacher and student do not fit together.
    """
    check_base_weights(config)  # before anything is built
    student, samples = open_pairs(config.data, config.views, config.student, config.run.seed)
    task = build_task(config, student, samples.cache)
    if task.masked is not None:
        task.masked.draw_in(samples, config.run.seed)
    return Prepared(student, samples, task)


def check_base_weights(config: SiclipConfig) -> None:
    """Raise UserError where the base has no weights to take."""
    model, weights = config.base, config.base_weights
    if not config.inherit and not (config.taught and config.teacher_from == "live"):
        return
    _need_weights(model, weights)
    if weights and weights != "random" and not Path(weights).exists():
        import open_clip

        tags = open_clip.list_pretrained_tags_by_model(model)
        if weights not in tags:
            raise UserError(
                f"--base-weights {weights!r}: no such file, RUN folder or tag of {model} (tags: "
                f"{', '.join(tags) or 'none'}); open_clip itself has {OPEN_CLIPS}"
            )


def _need_weights(model: str, weights: str) -> None:
    if not weights and ":" not in model:
        raise UserError(
            f"--base-weights is needed: {model}'s weights (Apple's mobileclip_s0.pt, another checkpoint file, or a RUN "
            f"folder), or random for a try; open_clip itself has {OPEN_CLIPS}"
        )


def build_task(config: SiclipConfig, student: LoadedModel, caches: TeacherCaches | None) -> SiclipTask:
    """Return the task of a config; the student takes the base's weights.

    Raises UserError when base, teacher and student do not fit together.
    """
    width = student.config["embed_dim"]
    base, teacher = None, None
    if config.inherit or (config.taught and caches is None):
        loaded = load_base(config.base, config.base_weights, config.run.seed, config.student.trust)
        check_same_inputs(f"--base {config.base!r}", loaded, student)
        if config.inherit:
            _inherit(config, student, loaded)
        base = FrozenTeacher.live(config.base, replace(loaded, model=reparameterize_model(loaded.model, inplace=True)))
    if config.taught and caches is not None:
        teacher = TeacherEnsemble.cached(caches, config.ensemble)
    elif config.taught and base is not None:
        teacher = TeacherEnsemble([base], config.ensemble)
    masked = None
    if config.clip_kd.mfd_weight:
        masked = MaskedStudent(config.clip_kd, student.model, config.student.model)
    return SiclipTask(config, student.model, width, base, teacher, masked=masked)


def load_base(model: str, weights: str, seed: int, trust: Trust = NO_TRUST) -> LoadedModel:
    """Return the model to inherit and to learn from. Raises UserError when there is none or it cannot be loaded."""
    if is_run(weights):
        return load_student(ModelConfig(weights, trust=trust), seed)
    _need_weights(model, weights)
    is_random = weights == "random"
    named = ModelConfig(model, None if is_random else weights or None, trust)
    base = load_student(named, seed, random_weights=is_random)
    return replace(base, model=with_text_tower(base.model)) if model == "MobileCLIP2-S0" else base


def _inherit(config: SiclipConfig, student: LoadedModel, base: LoadedModel) -> None:
    """Give the student the base's weights and freeze them. Raises UserError when they do not fit."""
    try:
        state, frozen = inherit_siclip(
            student.model.state_dict(),
            base.model.state_dict(),
            random_ffn=not config.inherit_ffn,
            keys=config.inherit_keys,
            exact_norm=config.exact_norm,
        )
    except ValueError as error:
        raise UserError(
            f"--model {config.student.model!r} cannot inherit from --base {config.base!r} ({error}); --no-inherit "
            "starts from the student's own weights"
        ) from error
    if set(state) <= {*frozen, "logit_scale"}:
        raise UserError(
            f"--model {config.student.model!r} has no SAS-P blocks, so all of it would be inherited and frozen: take "
            "SiCLIP-S0 or one of its kind, or --no-inherit"
        )
    student.model.load_state_dict(state)
    freeze(student.model, [name for name in frozen if not (config.train_tail and name.startswith(TAIL))])
