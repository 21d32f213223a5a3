"""What makes a folder a model that others load: weights, description and tokenizer."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from shards_spec.files import UserError, read_bytes, read_json, write_bytes, write_json
from shards_spec.models import LoadedModel

BPE = "bpe.txt.gz"
TEXT_TOWER = "text_tower"  # with the description of a text tower of transformers'

# of which a folder has those of one model: open_clip's, timm's or transformers', ONNX graphs, a classifier's classes
MODEL_FILES = (
    "open_clip_config.json",
    "open_clip_model.safetensors",
    "config.json",
    "model.safetensors",
    "image.onnx",
    "text.onnx",
    "onnx_config.json",
    "classifier.json",
    "vocabulary.tsv",
)
# those that libraries and this package open a folder by; without one it loads as nothing
DESCRIPTIONS = ("open_clip_config.json", "config.json", "onnx_config.json")
# what lies beside these, of the same model: its card, its tokenizer of open_clip's or transformers', its text tower
COMPANIONS = (
    "README.md",
    BPE,
    TEXT_TOWER,
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def write_model(folder: str, name: str, data: bytes, overwrite: bool) -> None:
    """As `write_models`, of weights in one file."""
    write_models(folder, {name: data}, overwrite)


def write_models(folder: str, weights: Mapping[str, bytes], overwrite: bool) -> None:
    """Write the files of weights, the first ones of a model folder.

    With ``overwrite`` all files of the former model go first, since its classes or its tokenizer beside other weights
    would be taken for theirs. Raises UserError when the folder is a RUN, or (unless ``overwrite``) has a model already,
    but for this very one: weights of one model beside the config of another load as neither.
    """
    check_no_run(folder)
    others = [file for file in MODEL_FILES if Path(folder, file).exists()]
    present = {name: Path(folder, name) for name in weights if Path(folder, name).is_file()}
    is_this = bool(present) and all(path.read_bytes() == weights[name] for name, path in present.items())
    if others and not is_this and not overwrite:
        raise UserError(f"--to {folder} has another model ({others[0]}); name another folder, or give --overwrite")
    if others and overwrite:
        remove_descriptions(folder)  # first of all: what is left after a kill loads as nothing
        for file in (*others, *COMPANIONS):
            _remove(Path(folder, file))
    for name, data in weights.items():
        write_bytes(str(Path(folder, name)), data)


def check_no_run(folder: str) -> None:
    """Raise UserError for a folder of `clipmill train`, finished or not: its config.json is needed to resume it."""
    config = Path(folder, "config.json")
    has_stages = any(Path(folder).glob("stage-*"))
    if Path(folder, "checkpoints").exists() or has_stages or (config.is_file() and "recipe" in read_json(str(config))):
        raise UserError(f"--to {folder} is a RUN; name a folder of its own for the model")


def remove_descriptions(folder: str) -> None:
    """Remove what a folder's model is opened by, so that nothing loads it."""
    for name in DESCRIPTIONS:
        _remove(Path(folder, name))


def _remove(path: Path) -> None:
    """Remove a file or a folder, where it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_open_clip_config(folder: str, student: LoadedModel, model: str) -> None:
    """Write ``open_clip_config.json`` of a student, with tokenizer and text tower's description if it has its own.

    ``model`` is the name it was loaded by. Nothing in it names another folder, so that this one can be moved.
    """
    import open_clip

    config = json.loads(json.dumps(student.config))
    text = config.get("text_cfg") or {}
    source = bpe_file(model, config)
    if source is not None:
        write_bytes(str(Path(folder) / BPE), read_bytes(str(source)))
        text["tokenizer_kwargs"]["bpe_path"] = BPE
    if text.get("hf_tokenizer_name"):  # open_clip takes the files beside its config, whatever the name says
        text["hf_tokenizer_name"] = Path(text["hf_tokenizer_name"]).name
        _write_saved(student.tokenizer.tokenizer, Path(folder))
    if Path(text.get("hf_model_name") or "").is_absolute():  # else it is a name of the Hub
        text["hf_model_name"] = TEXT_TOWER
        _write_saved(student.model.text.config, Path(folder, TEXT_TOWER))
    preprocess = open_clip.get_model_preprocess_cfg(student.model)
    write_json(str(Path(folder) / "open_clip_config.json"), {"model_cfg": config, "preprocess_cfg": preprocess})


def _write_saved(part: Any, folder: Path) -> None:
    """Write what ``save_pretrained`` of a part of transformers' writes, each file whole."""
    with TemporaryDirectory() as near:
        part.save_pretrained(near)
        for path in sorted(Path(near).rglob("*")):
            if path.is_file():
                write_bytes(str(folder / path.relative_to(near)), path.read_bytes())


def with_absolute_bpe(student: LoadedModel, model: str) -> LoadedModel:
    """Return a student whose config names its own BPE file by its whole path, so that it is found by any name.

    ``model`` is the name it was loaded by.
    """
    source = bpe_file(model, student.config)
    if source is None:
        return student
    text = student.config["text_cfg"]
    kwargs = text["tokenizer_kwargs"] | {"bpe_path": str(source.resolve())}
    return replace(student, config=student.config | {"text_cfg": text | {"tokenizer_kwargs": kwargs}})


def bpe_file(model: str, config: dict[str, Any]) -> Path | None:
    """Return the BPE file of a model that brings its own; None for CLIP's. Raises UserError when it is not there."""
    named = ((config.get("text_cfg") or {}).get("tokenizer_kwargs") or {}).get("bpe_path")
    if not named:
        return None
    folder = Path(model.removeprefix("local-dir:"))
    candidates = [folder / Path(named).name] if folder.is_dir() else []
    for candidate in [*candidates, Path(named)]:
        if candidate.exists():
            return candidate
    raise UserError(f"model {model!r} names the BPE file {named}, which is not there")
