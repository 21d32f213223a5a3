"""The student: made anew from a seed, or rebuilt from a RUN folder."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from shards_spec.files import UserError
from shards_spec.models import NO_TRUST, LoadedModel, Trust, load_model
from training.config import ModelConfig
from training.models.classifier import is_classifier, load_classifier
from training.runs.run_folder import RunDir, load_checkpoint


def new_student(config: ModelConfig, seed: int) -> LoadedModel:
    """The model with its weights, or with random ones that depend on ``seed`` alone. Raises UserError."""
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
    """torch.empty gives NaN within."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory, too
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _described(path: str, trust: Trust) -> LoadedModel:
    """A RUN's student with random weights."""
    if is_classifier(path):
        return load_classifier(path)
    logging.disable(logging.WARNING)  # open_clip would say that the weights are random
    try:
        return load_model(f"local-dir:{path}", random_weights=True, trust=trust)
    finally:
        logging.disable(logging.NOTSET)


def load_run(path: str, raw: bool = False, best: bool = False, trust: Trust = NO_TRUST) -> tuple[LoadedModel, int]:
    """The student of a RUN folder with its newest (or best) checkpoint's weights, in eval mode, and that one's step.

    Where the run kept an average of the weights, that is what they are, unless ``raw``. A damaged newest checkpoint is
    named in a warning, and the one before it is taken. Raises UserError when there is none, DataError when none is
    whole.
    """
    run = RunDir(path)
    config, best_one = run.config(), run.best() if best else None
    state = run.load_newest() if not best else load_checkpoint(best_one) if best_one else None
    if state is None:
        hint = "train with --eval-data EVAL" if best else f"run `clipmill train {config['recipe']}` longer"
        raise UserError(f"{run.checkpoints} has no {'best ' if best else ''}checkpoint yet: {hint}")
    student = _described(path, trust)
    prefix = "student."
    weights = {name.removeprefix(prefix): value for name, value in state["task"].items() if name.startswith(prefix)}
    student.model.load_state_dict(weights if raw else weights | (state.get("ema") or {}))
    return student, state["progress"]["step"]
