"""The folder that an exported model is written into."""

from pathlib import Path

from shards_spec.files import UserError, write_bytes

# of which a folder with a model has two, open_clip's or timm's
MODEL_FILES = ("open_clip_config.json", "open_clip_model.safetensors", "config.json", "model.safetensors")


def write_model(folder: str, name: str, data: bytes, overwrite: bool) -> None:
    """Write the weights ``folder/name``, the first file of a model folder.

    Raises UserError when the folder is a RUN, or (unless ``overwrite``) has a model already, but for this very one:
    weights of one model beside the config of another load as neither.
    """
    if Path(folder, "checkpoints").exists():
        raise UserError(f"--to {folder} is a RUN; name a folder of its own for the model")
    weights = Path(folder, name)
    others = [file for file in MODEL_FILES if Path(folder, file).exists()]
    if others and not overwrite and not (weights.is_file() and weights.read_bytes() == data):
        raise UserError(f"--to {folder} has another model ({others[0]}); name another folder, or give --overwrite")
    write_bytes(str(weights), data)
