"""The student, or the model that one starts from: made anew from a seed, loaded, or rebuilt from a RUN folder."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from shards_spec.files import UserError
from shards_spec.models import HUB, LOCAL_DIR, NO_TRUST, TIMM, LoadedModel, Trust, load_model
from training.config import ModelConfig, is_run
from training.models.classifier import is_classifier, load_classifier, new_classifier
from training.models.tinyclip_convert import is_pruned
from training.models.tinyclip_pruning import reshape_like
from training.runs.checkpoint_files import load_checkpoint
from training.runs.run_folder import RunFolder

RANDOM = "random"
STUDENT = "student."  # prefix of the student's weights in a checkpoint's task


def load_student(config: ModelConfig, seed: int, *, random_weights: bool = True) -> LoadedModel:
    """Load a model by whatever names it.

    - open_clip's name: ``pretrained`` is a tag or a checkpoint file;
    - ``local-dir:PATH``, ``hf-hub:ORG/NAME``: the weights that lie there;
    - ``timm:NAME``: a `Classifier` with a head over one class, ``pretrained`` as `new_classifier` takes it;
    - a RUN folder of `clipmill train`: the weights of its newest checkpoint.

    Args:
        config: The model's name and its weights.
        seed: Of random weights.
        random_weights: Without any weights they are random; otherwise that is a UserError.

    Raises:
        UserError: There is no such model, its weights do not fit, or they were named and would not be used.
    """
    if config.model.startswith(TIMM):
        return new_classifier(config.model, 1, pretrained=config.pretrained, seed=seed, trust=config.trust)
    if is_run(config.model):
        if config.pretrained is not None:
            raise UserError(
                f"--pretrained {config.pretrained!r} would not be used: RUN {config.model} brings its own weights"
            )
        return load_run(config.model, trust=config.trust)[0]
    if random_weights:
        return new_student(config, seed)
    return load_model(config.model, config.pretrained, trust=config.trust)


class StartWeights(NamedTuple):
    """A model by name, and whether its weights may be random where none are named."""

    config: ModelConfig
    is_random: bool


def parse_model(name: str, trust: Trust = NO_TRUST) -> StartWeights:
    """Return the model and its weights of one word.

    It is ``NAME:TAG_OR_FILE`` (or ``NAME:random``), ``local-dir:PATH``, ``hf-hub:ORG/NAME`` or a RUN folder. Raises
    UserError when it has no weights.
    """
    if name.startswith((LOCAL_DIR, HUB, TIMM)) or is_run(name):
        return StartWeights(ModelConfig(name, trust=trust), is_random=False)
    model, _, weights = name.partition(":")
    if not weights:
        raise UserError(
            f"{name!r} is no RUN folder and names no weights: say NAME:TAG_OR_FILE (NAME:random for a try), "
            "local-dir:PATH or hf-hub:ORG/NAME"
        )
    is_random = weights == RANDOM
    return StartWeights(ModelConfig(model, None if is_random else weights, trust), is_random)


def new_student(config: ModelConfig, seed: int) -> LoadedModel:
    """Return the model with its weights, or with random ones that depend on ``seed`` alone. Raises UserError."""
    torch.manual_seed(seed)
    with _nan_for_uninitialised():
        student = load_model(config.model, config.pretrained, random_weights=True, trust=config.trust)
    initialise_leftovers(student.model)
    return student


def initialise_leftovers(model: nn.Module) -> None:
    """Draw the matrices that open_clip leaves as uninitialised memory, here marked by NaN.

    In 3.3 that is CoCa's ``text_decoder.text_projection`` (width, vocabulary): its class defines
    ``init_parameters``, where this tensor is normal with std width**-0.5, and never calls it.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.isnan().any():
                assert parameter.isnan().all(), name
                assert parameter.ndim == 2, name
                nn.init.normal_(parameter, std=len(parameter) ** -0.5)


@contextmanager
def _nan_for_uninitialised() -> Iterator[None]:
    """Within, torch.empty gives NaN."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory, too
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _rebuild(path: str, trust: Trust) -> LoadedModel:
    """Return a RUN's student with random weights."""
    if is_classifier(path):
        return load_classifier(path)
    logging.disable(logging.WARNING)  # open_clip would say that the weights are random
    try:
        return load_model(f"local-dir:{path}", random_weights=True, trust=trust, text_weights=False)
    finally:
        logging.disable(logging.NOTSET)


def load_run(path: str, raw: bool = False, best: bool = False, trust: Trust = NO_TRUST) -> tuple[LoadedModel, int]:
    """Return the student of a RUN folder, in eval mode, and the step of its checkpoint.

    A damaged newest checkpoint is named in a warning, and the one before it is taken.

    Args:
        path: The RUN folder.
        raw: Take the weights themselves where the run kept an average of them.
        best: Take the best checkpoint by the run's eval_data, not the newest.
        trust: What the student's tokenizer may do.

    Raises:
        UserError: There is no checkpoint.
        DataError: No checkpoint is intact.
    """
    run = RunFolder(path)
    config = run.config()
    state = None
    if not best:
        state = run.load_newest()
    elif (checkpoint := run.best()) is not None:
        state = load_checkpoint(checkpoint)
    if state is None:
        hint = "train with --eval-data EVAL" if best else f"run `clipmill train {config['recipe']}` longer"
        raise UserError(f"{run.checkpoints} has no {'best ' if best else ''}checkpoint yet: {hint}")
    student = _rebuild(path, trust)
    weights = {name.removeprefix(STUDENT): value for name, value in state["task"].items() if name.startswith(STUDENT)}
    if is_pruned(student.model):  # the folder describes the newest shape, and this checkpoint may be older
        reshape_like(student.model, student.config, weights)
    student.model.load_state_dict(weights if raw else weights | (state.get("ema") or {}))
    return student, state["progress"]["step"]
