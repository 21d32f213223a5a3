"""Small tars in the form of apple/DataCompDR, made by its public description; images are drawn by `web_server`."""

import gzip
import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from small_data import tar_bytes
from torchvision.transforms import InterpolationMode, RandAugment, RandomResizedCrop
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op
from web_server import make_image

from shards_spec.files import json_bytes
from shards_spec.sample import Sample

OPERATIONS = list(RandAugment()._augmentation_space(31, (224, 224)))  # Apple's list has the same order
SIDE = 224
DIM = 16  # of both teachers' vectors together


def draw_parameters(image: Image.Image, generator: np.random.Generator) -> list:
    """What Apple's RandomResizedCrop and RandAugment draw for an image, as ``param_aug`` holds it."""
    torch.manual_seed(int(generator.integers(1 << 31)))
    crop = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
    space = RandAugment()._augmentation_space(31, (SIDE, SIDE))
    operations = []
    for _ in range(2):
        index = int(generator.integers(len(OPERATIONS)))
        magnitudes, signed = space[OPERATIONS[index]]
        magnitude = float(magnitudes[9]) if magnitudes.ndim else 0.0
        operations.append([index, -magnitude if signed and generator.random() < 0.5 else magnitude])
    return [list(map(int, crop)), operations]


def replay(image: Image.Image, parameters: list, side: int = SIDE) -> np.ndarray:
    """(S, S, 3) uint8: an augmentation as Apple's code applies it again, by torchvision."""
    (top, left, height, width), operations = parameters
    view = F.resized_crop(image, top, left, height, width, [side, side], InterpolationMode.BICUBIC)
    for index, magnitude in operations:
        view = _apply_op(view, OPERATIONS[index], magnitude, interpolation=InterpolationMode.NEAREST, fill=None)
    return np.asarray(view)


@dataclass
class Reinforced:
    """A sample of DataCompDR: ``url`` gives ``image``; members can be changed before it is written."""

    uid: str
    url: str
    image: bytes
    captions: list[str]
    parameters: list
    image_emb: np.ndarray
    text_emb: np.ndarray
    members: dict[str, bytes] = field(default_factory=dict)


def unit(values: np.ndarray) -> np.ndarray:
    """Both halves of each row normalised, as two teachers give them."""
    halves = values.reshape(len(values), 2, -1)
    return (halves / np.linalg.norm(halves, axis=2, keepdims=True)).reshape(len(values), -1).astype(np.float32)


def packed(embeddings: dict[str, np.ndarray], form: str) -> bytes:
    """The member ``npz``, or ``pth.gz`` with bfloat16."""
    file = io.BytesIO()
    if form == "npz":
        np.savez(file, **embeddings)
        return file.getvalue()
    torch.save({name: torch.tensor(values, dtype=torch.bfloat16) for name, values in embeddings.items()}, file)
    return gzip.compress(file.getvalue())


def reinforced(
    number: int, base: str, *, form: str = "npz", views: int = 3, captions: int = 2, dim: int = DIM
) -> Reinforced:
    """Sample ``number``, whose image `web_server` serves under ``base``/good/``number``."""
    generator = np.random.default_rng(number)
    image = make_image(number)
    uid = hashlib.sha256(str(number).encode()).hexdigest()[:32]
    texts = [f"picture {number} says {index}" for index in range(captions)]
    opened = Image.open(io.BytesIO(image))
    parameters = [draw_parameters(opened, generator) for _ in range(views)]
    image_emb = unit(generator.normal(size=(views, dim)))
    text_emb = unit(generator.normal(size=(1 + captions, dim)))
    sample = Reinforced(uid, f"{base}/good/{number}", image, texts, parameters, image_emb, text_emb)
    digest = hashlib.sha256(image).hexdigest()
    sample.members = {
        "url.txt": sample.url.encode(),
        "syn.json": json.dumps({"syn_text": texts}).encode(),
        "paug.json": json.dumps({"param_aug": json.dumps(parameters) if number % 2 else parameters}).encode(),
        form: packed({"image_emb": image_emb, "text_emb": text_emb}, form),
        "json": json.dumps({"uid": uid, "sha256": digest}).encode(),
    }
    return sample


def reinforced_tar(samples: list[Reinforced]) -> bytes:
    """A tar of samples."""
    members = list[tuple[str, str | bytes]]()
    for sample in samples:
        members += [(f"{sample.uid}.{name}", data) for name, data in sample.members.items()]
    return tar_bytes(members)


def write_reinforced(folder: Path, tars: list[list[Reinforced]]) -> str:
    """The tars in a folder, named as Apple's are; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, samples in enumerate(tars):
        (folder / f"{number:08d}.tar").write_bytes(reinforced_tar(samples))
    return str(folder)


def final_sample(number: int, sample: Reinforced, captions: list[str], **changes) -> Sample:
    """A sample as `pack` leaves it."""
    width, height = Image.open(io.BytesIO(sample.image)).size
    meta = {"uid": sample.uid, "tar": "00000000.tar", "original_width": width, "original_height": height, "exif": "{}"}
    meta |= {f"syn_{index}": text for index, text in enumerate(captions)}
    meta |= {"synsets": [[] for _ in range(1 + len(captions))], **changes}
    return Sample(f"{number:09d}", {"jpg": sample.image, "txt": b"", "json": json_bytes(meta)})
