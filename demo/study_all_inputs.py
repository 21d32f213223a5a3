#!/usr/bin/env python3
"""What `make study-all` trains and measures on: descriptions of its models, and small copies of the labelled images.

python demo/study_all_inputs.py models REAL OUT     descriptions below OUT/models, with the byte pairs of `make real`
python demo/study_all_inputs.py images WEB OUT      OUT/labelled and OUT/heldout, the shorter side 64 px
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from shards_spec.files import DataError
from shards_spec.images import decode_rgb

SIDE = 48  # px of transformers
PATCH = 8
CONVOLVED_SIDE = 64  # px of MobileCLIP and SiCLIP, which halve it five times
EMBED = 128
MEASURED_SIDE = 64  # px of the shorter side of images that are measured on, as the largest model of the study takes
HALF = [0.5, 0.5, 0.5]
# layers and width of a CLIP's image tower and of its text tower; the student is what TinyCLIP makes of the large one
PLAIN = {"student": ((4, 96), (2, 96)), "large": ((6, 128), (2, 128))}
HEAD = 32  # dimensions of an attention head
TOWERS = {"mobileclip": ("mci_tiny", 0), "siclip": ("siclip_tiny", 4)}  # image tower, text blocks that share attention
TIMM: dict[str, tuple[str, dict[str, Any]]] = {  # towers of the student's shape for methods without a text tower
    "tower": ("vit_tiny_patch16_224", {}),
    "mini": ("mini_deit_tiny_patch16_224", {}),
}


def plain_clip(name: str, text: dict[str, Any]) -> dict[str, Any]:
    """Return open_clip's description of a CLIP of two plain transformers."""
    (layers, width), (text_layers, text_width) = PLAIN[name]
    image = {"image_size": SIDE, "layers": layers, "width": width, "head_width": HEAD, "patch_size": PATCH}
    return {
        "embed_dim": EMBED,
        "vision_cfg": image,
        "text_cfg": {**text, "width": text_width, "heads": text_width // HEAD, "layers": text_layers},
        "custom_text": True,
    }


def mobile_clip(name: str, text: dict[str, Any]) -> dict[str, Any]:
    """Return the description of MobileCLIP-S0 or of SiCLIP at an eighth of the width."""
    tower, share = TOWERS[name]
    image = {"timm_model_name": tower, "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": None}
    sizes = {"tower": "mct", "width": 96, "heads": 3, "layers": 4, "kernel_size": 11, "share": share}
    dropped = {"timm_drop": 0.0, "timm_drop_path": 0.0, "image_size": CONVOLVED_SIDE}
    return {"embed_dim": EMBED, "vision_cfg": image | dropped, "text_cfg": text | sizes, "custom_text": True}


def write_models(real: Path, out: Path) -> None:
    """Write a folder for each model, without weights."""
    given = json.loads((real / "models/student/open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    text = {name: given[name] for name in ("context_length", "vocab_size", "tokenizer_kwargs")}
    seen = {"mean": HALF, "std": HALF, "interpolation": "bicubic", "resize_mode": "shortest"}
    as_mobileclip = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear", "resize_mode": "shortest"}
    models = {name: {"model_cfg": plain_clip(name, text), "preprocess_cfg": seen} for name in PLAIN}
    models |= {name: {"model_cfg": mobile_clip(name, text), "preprocess_cfg": as_mobileclip} for name in TOWERS}
    for name, config in models.items():
        write_json(out / name / "open_clip_config.json", config)
        shutil.copyfile(real / "models/bpe.txt.gz", out / name / "bpe.txt.gz")
    (depth, width), _ = PLAIN["student"]
    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": width, "depth": depth, "num_heads": width // HEAD}
    views = {"input_size": [3, SIDE, SIDE], "mean": HALF, "std": HALF, "crop_pct": 1.0, "interpolation": "bicubic"}
    for name, (architecture, options) in TIMM.items():
        model = {"architecture": architecture, "num_classes": 0, "model_args": sizes | options, "pretrained_cfg": views}
        write_json(out / name / "config.json", model)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object, and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_images(web: Path, out: Path) -> None:
    """Write copies as PNG under the same names, of the pixels that are evaluated.

    They are read in every measurement, and some originals have millions of pixels.
    """
    for folder in ("labelled", "heldout"):
        for path in sorted((web / folder).rglob("*.*")):
            copy = out / path.relative_to(web)
            if copy.exists():
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                image = decode_rgb(path.read_bytes(), as_benchmark=True)
            except DataError:  # `clipmill evalset` leaves it out, and counts why
                shutil.copyfile(path, copy)
                continue
            scale = MEASURED_SIDE / min(image.size)
            if scale < 1:
                image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
            image.save(copy, "PNG")


def main() -> None:
    """Write what the first argument names."""
    source, out = map(Path, sys.argv[2:])
    if sys.argv[1] == "models":
        write_models(source, out / "models")
    else:
        write_images(source, out)


if __name__ == "__main__":
    main()
