"""Features of an evaluation set: computed by one model, and kept beside the results for other tasks on the same set."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from shards_spec.files import exists, is_url, join, read_bytes, sha256_bytes, sha256_json, write_bytes
from shards_spec.folders import walk
from shards_spec.library_errors import NO_JSON, short

FOLDER = "features"
TEXTS = ("classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt")  # beside the splits
REMOTE_STAMPS = ("size", "ETag", "etag", "md5", "mtime", "LastModified", "last_modified", "updated")
HEADER_BYTES = 8  # of a safetensors file: the length of the JSON that follows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureCache:
    """Tensors of one model in a folder; those of another model or other data, or damaged ones, are computed again.

    Attributes:
        folder: Where the files are; None: nothing is kept.
        model: What the features depend on besides the images and texts: weights, preprocessing, precision.
    """

    folder: str | None = None
    model: str = ""

    def tensors(
        self, name: str, data: Callable[[], str], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return what is kept under a name for data of that hash, else compute and keep it."""
        if self.folder is None:
            return compute()
        from safetensors import SafetensorError
        from safetensors.torch import load, save

        path = join(self.folder, FOLDER, f"{name}.safetensors")
        identity = {"model": self.model, "data": data()}
        if exists(path):
            kept = read_bytes(path)
            if _metadata(kept) == identity:
                try:
                    return load(kept)
                except SafetensorError as error:
                    log.warning("%s is damaged (%s); its features are computed again", path, short(error))
        tensors = compute()
        write_bytes(path, save(tensors, identity))
        return tensors


NO_CACHE = FeatureCache()


def _metadata(data: bytes) -> object:
    """The metadata of a safetensors file; None where it has none."""
    length = int.from_bytes(data[:HEADER_BYTES], "little")
    try:
        header = json.loads(data[HEADER_BYTES : HEADER_BYTES + length])
    except NO_JSON:  # a foreign file
        return None
    return header.get("__metadata__") if isinstance(header, dict) else None


def data_hash(root: str, split: str) -> str:
    """Return a hash of what a split of a set is: its text files, and name, size and time of its other files."""
    texts = {}
    for name in TEXTS:
        path = join(root, name)
        if exists(path):
            texts[name] = sha256_bytes(read_bytes(path))
    folder = join(root, split) if split else root
    files = []
    for prefix, infos in walk(folder):
        for name, info in infos.items():
            if is_url(folder):
                stamp = [str(info[key]) for key in REMOTE_STAMPS if info.get(key)]
            else:
                status = os.stat(os.path.join(folder, prefix, name))
                stamp = [str(status.st_size), str(status.st_mtime_ns)]
            files.append([prefix + name, *stamp])
    return sha256_json([texts, files])
