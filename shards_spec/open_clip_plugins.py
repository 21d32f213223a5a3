"""Everything that replaces private parts of open_clip and transformers, in one file.

open_clip 3 has no public way to choose how a checkpoint file is read, to add a text tower, to convert another project's
checkpoint, or to give a bare model name its preprocessing. So functions of ours take the place of some of its own
(`READING_PARTS`, `MODEL_PARTS`), and call the originals for everything that is not theirs. This was tried with
open_clip 3.1 and 3.3. Where a release lacks one of the parts, checkpoints are read by open_clip itself (weights only,
with its own messages), and the architectures that need the part are refused by name (`unavailable`).

open_clip is imported inside the functions only, because it imports torch.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shards_spec.checkpoints import describe_mismatch, load_checkpoint
from shards_spec.files import UserError
from shards_spec.library_errors import checkpoint_errors

READING_PARTS = ("factory.load_checkpoint", "factory.load_state_dict")
MODEL_PARTS = ("model._build_text_tower", "factory.convert_state_dict", "factory.create_model")
TOWER_PARTS = ("model._build_vision_tower", "model._build_text_tower")
TRIED_VERSIONS = "open_clip_torch>=3.1,<4"
TOKENIZER_KEYS = ("tokenizer_kwargs", "tokenizer_mode", "hf_tokenizer_name")  # of text_cfg, and not the tower's
NUMPY_SUFFIXES = (".npz", ".npy")  # checkpoints of big_vision; numpy unpickles nothing there

State = dict[str, Any]
unavailable: dict[str, str] = {}  # model name: why this open_clip cannot build it


def missing_parts(parts: Sequence[str]) -> list[str]:
    """Those of ``parts`` (``MODULE.NAME``) that the installed open_clip does not have."""
    import open_clip

    missing = []
    for part in parts:
        module, _, name = part.partition(".")
        if not hasattr(getattr(open_clip, module, None), name):
            missing.append(part)
    return missing


@contextlib.contextmanager
def reading_weights(model: str, trusted: bool) -> Iterator[None]:
    """Within it, open_clip reads checkpoint files by `checkpoints.load_checkpoint`, and converts them as always.

    ``model`` is the name for messages; ``trusted`` allows pickled objects. Raises UserError for a file that cannot be
    read or does not fit.
    """
    import open_clip

    if missing_parts(READING_PARTS):
        yield
        return
    factory = open_clip.factory
    open_clip_load = factory.load_checkpoint
    open_clip_read = factory.load_state_dict

    def load(module: Any, path: str, *rest: Any, **options: Any) -> Any:
        if Path(path).suffix in NUMPY_SUFFIXES:
            with checkpoint_errors(path):
                return open_clip_load(module, path, *rest, **options)
        weights = load_checkpoint(str(path), trusted, module.state_dict().keys())
        factory.load_state_dict = lambda *_, **__: weights
        try:
            return open_clip_load(module, path, *rest, **options)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{path} does not fit {model}: {describe_mismatch(error)}") from error
        finally:
            factory.load_state_dict = open_clip_read

    factory.load_checkpoint = load
    try:
        yield
    finally:
        factory.load_checkpoint = open_clip_load


@contextlib.contextmanager
def without_remote_code_prompt() -> Iterator[None]:
    """Within it, transformers does not ask on the terminal whether to run a model's own Python; the answer is no."""
    try:
        from transformers import dynamic_module_utils
    except ImportError:
        yield
        return
    seconds = getattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", None)
    if seconds is None:
        yield
        return
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


@dataclass(frozen=True)
class ModelPlugin:
    """Architectures that open_clip does not ship.

    ``configs`` is a folder of open_clip's model descriptions, NAME.json. ``convert_state_dict(model, state)`` returns a
    checkpoint under the model's own names, or None when it is not one that the plugin knows. A description whose
    ``text_cfg`` has ``"tower": tower`` gets the text tower ``build_text_tower(embed_dim, **rest_of_text_cfg)``; without
    ``tower`` the descriptions are of open_clip's own towers. ``preprocess`` is what open_clip assumes of the images of
    the bare names in ``configs`` and in ``preprocess_also``, where a caller does not say otherwise; its own assumption
    is OpenAI's mean and std.
    """

    configs: Path
    convert_state_dict: Callable[[Any, State], State | None]
    tower: str | None = None
    build_text_tower: Callable[..., Any] | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    preprocess_also: frozenset[str] = frozenset()


def register_models(plugin: ModelPlugin) -> None:
    """Make a plugin's names known to open_clip; where it lacks a part, `unavailable` says so for each of the names."""
    import open_clip

    names = {path.stem for path in plugin.configs.glob("*.json")}
    missing = missing_parts(MODEL_PARTS)
    if missing:
        reason = f"open_clip {version('open_clip_torch')} has no {', '.join(missing)}; install {TRIED_VERSIONS}"
        unavailable.update(dict.fromkeys(names, reason))
        return
    open_clip.add_model_config(plugin.configs)
    open_clip_build = open_clip.model._build_text_tower
    open_clip_convert = open_clip.factory.convert_state_dict
    open_clip_create = open_clip.factory.create_model

    def build_text_tower(embed_dim: int, text_cfg: Any, *rest: Any, **options: Any) -> Any:
        named = text_cfg.get("tower") if isinstance(text_cfg, dict) else None
        if plugin.build_text_tower is None or named != plugin.tower:
            return open_clip_build(embed_dim, text_cfg, *rest, **options)
        arguments = {name: value for name, value in text_cfg.items() if name not in ("tower", "tokenizer_kwargs")}
        return plugin.build_text_tower(embed_dim, **arguments)

    def convert_state_dict(model: Any, state: State) -> Any:
        converted = plugin.convert_state_dict(model, state)
        return open_clip_convert(model, state) if converted is None else converted

    def create_model(model_name: str, *rest: Any, **options: Any) -> Any:
        # for a bare name without a tag, open_clip would assume OpenAI's mean and std
        if model_name in names | plugin.preprocess_also:
            options["force_preprocess_cfg"] = {**plugin.preprocess, **(options.get("force_preprocess_cfg") or {})}
        return open_clip_create(model_name, *rest, **options)

    open_clip.model._build_text_tower = build_text_tower
    open_clip.factory.convert_state_dict = convert_state_dict
    open_clip.factory.create_model = create_model
    open_clip.create_model = create_model


def register_towers(tower: str, build_image_tower: Callable[..., Any], build_text_tower: Callable[..., Any]) -> None:
    """Make towers known that stand in descriptions of any name, as in exported folders.

    A ``vision_cfg`` with ``"tower": tower`` gets ``build_image_tower(embed_dim, quick_gelu, **rest_of_vision_cfg)``,
    such a ``text_cfg`` ``build_text_tower(embed_dim, quick_gelu, **rest_of_text_cfg)``. The description needs
    ``"custom_text": true``. Where open_clip lacks a part, it refuses the unknown key ``tower``.
    """
    import open_clip

    if missing_parts(TOWER_PARTS):
        return

    def building(build: Callable[..., Any], open_clip_build: Callable[..., Any]) -> Callable[..., Any]:
        def build_tower(embed_dim: int, *rest: Any, **options: Any) -> Any:
            config, *others = rest or (None,)
            if not isinstance(config, dict) or config.get("tower") != tower:
                return open_clip_build(embed_dim, *rest, **options)
            arguments = {name: value for name, value in config.items() if name not in ("tower", *TOKENIZER_KEYS)}
            quick_gelu = others[0] if others else options.get("quick_gelu", False)
            return build(embed_dim, quick_gelu, **arguments)

        return build_tower

    for part, build in zip(TOWER_PARTS, (build_image_tower, build_text_tower), strict=True):
        name = part.partition(".")[2]
        setattr(open_clip.model, name, building(build, getattr(open_clip.model, name)))


def build_image_tower(embed_dim: int, vision_cfg: Mapping[str, Any], quick_gelu: bool) -> Any:
    """Return the image tower alone of open_clip's description of a CLIP, with random weights.

    Raises UserError where open_clip lacks the part that builds it.
    """
    import open_clip

    missing = missing_parts(TOWER_PARTS)
    if missing:
        raise UserError(
            f"an image tower alone cannot be built: open_clip {version('open_clip_torch')} has no "
            f"{', '.join(missing)}; install {TRIED_VERSIONS}"
        )
    return open_clip.model._build_vision_tower(embed_dim, dict(vision_cfg), quick_gelu)
