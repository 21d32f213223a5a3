"""transformers: a plain CLIP as a folder that `CLIPModel` and `CLIPProcessor` load."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from shards_spec.files import UserError, write_bytes
from shards_spec.library_errors import short
from shards_spec.models import LoadedModel
from training.export.comparison import Encoders
from training.export.config import ExportConfig
from training.export.plain_vit import check_plain_text, check_plain_vit
from training.export.to_open_clip import as_dtype
from training.models.classifier import Classifier
from training.models.plain_vit import PlainTransformer
from training.runs.model_folder import write_model

TARGET = "transformers"
INTERPOLATIONS = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # open_clip's names, transformers'
BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
USAGE = """```python
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("FOLDER")
processor = CLIPProcessor.from_pretrained("FOLDER")
texts = ["a photo of a cat", "a photo of a dog"]
inputs = processor(text=texts, images=Image.open("cat.jpg"), padding=True, truncation=True, return_tensors="pt")
print(model(**inputs).logits_per_image.softmax(-1))
```
"""


def write(folder: Path, student: LoadedModel, config: ExportConfig) -> None:
    """Write config.json, model.safetensors, the image processor's settings and the tokenizer's files.

    Raises UserError for a student that is no plain CLIP (the message names what is not), when transformers is not
    installed, or when the folder has another model.
    """
    from safetensors.torch import save

    transformers = _transformers()
    if isinstance(student.model, Classifier):
        raise UserError(f"--format {TARGET}: {config.run} is an image classifier; use --format timm")
    image = check_plain_vit(student.model, TARGET)
    text = check_plain_text(student.model, TARGET)
    processor = _image_processor(student, transformers)
    tokenizer = _check_tokenizer(student)
    weights = as_dtype(clip_weights(student.model), config.dtype)
    write_model(str(folder), "model.safetensors", save(weights, metadata={"format": "pt"}), config.overwrite)
    clip_config = _clip_config(student, image, text)
    with TemporaryDirectory() as local:
        clip_config.dtype = torch.float16 if config.dtype == "fp16" else torch.float32
        clip_config.save_pretrained(local)
        processor.save_pretrained(local)
        _save_tokenizer(local, tokenizer, text_length(student), transformers)
        for path in sorted(Path(local).rglob("*")):
            if path.is_file():
                write_bytes(str(folder / path.relative_to(local)), path.read_bytes())


def _transformers() -> Any:
    """The module. Raises UserError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"--format {TARGET}: transformers is not installed ({short(error)}); `pip install -c constraints.txt "
            "transformers`"
        ) from error
    return transformers


def _check_tokenizer(student: LoadedModel) -> SimpleTokenizer:
    """The student's tokenizer. Raises UserError for one that CLIP's tokenizer in transformers is not."""
    tokenizer = student.tokenizer
    settings = (student.config.get("text_cfg") or {}).get("tokenizer_kwargs") or {}
    others = sorted(set(settings) - {"bpe_path", "context_length"})
    if not isinstance(tokenizer, SimpleTokenizer):
        reason = f"its tokenizer is {type(tokenizer).__name__}, not CLIP's byte pairs"
    elif others:
        reason = f"its tokenizer has {', '.join(others)}"
    elif tokenizer.eot_token_id != tokenizer.vocab_size - 1:
        reason = "its tokenizer has tokens behind that of a text's end"
    else:
        return tokenizer
    raise UserError(f"--format {TARGET}: {TARGET} has no such model: {reason}; use --format open_clip or onnx")


def text_length(student: LoadedModel) -> int:
    """Return the tokens of a text."""
    return int(student.tokenizer.context_length)


def _clip_config(student: LoadedModel, image: PlainTransformer, text: PlainTransformer) -> Any:
    """The CLIPConfig of a student."""
    from transformers import CLIPConfig

    tokenizer = student.tokenizer
    embedding: Any = getattr(student.model, "text", student.model).token_embedding
    dim = int(student.config["embed_dim"])
    return CLIPConfig(
        text_config={
            **_sizes(text, dim),
            "vocab_size": embedding.num_embeddings,
            "max_position_embeddings": text_length(student),
            "bos_token_id": tokenizer.sot_token_id,
            "eos_token_id": tokenizer.eot_token_id,
            "pad_token_id": tokenizer.eot_token_id,  # behind the end, where the causal mask hides it
        },
        vision_config={**_sizes(image, dim), "image_size": image.image_size, "patch_size": image.patch_size},
        projection_dim=dim,
        architectures=["CLIPModel"],
    )


def _sizes(tower: PlainTransformer, dim: int) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "projection_dim": dim,
        "hidden_act": "quick_gelu" if tower.quick_gelu else "gelu",
        "layer_norm_eps": 1e-5,
    }


def _image_processor(student: LoadedModel, transformers: Any) -> Any:
    """CLIPImageProcessor with the student's preprocessing. Raises UserError for one that it does not have."""
    import open_clip

    preprocess = open_clip.get_model_preprocess_cfg(student.model)
    mode = preprocess.get("resize_mode", "shortest")
    interpolation = preprocess.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or interpolation not in INTERPOLATIONS:
        raise UserError(
            f"--format {TARGET}: CLIPImageProcessor has no resizing by {mode} with {interpolation}; use --format "
            "open_clip or onnx"
        )
    side = student.image_size
    square = {"height": side, "width": side}
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": side} if mode == "shortest" else square,
        do_center_crop=mode == "shortest",
        crop_size=square,
        resample=INTERPOLATIONS[interpolation],
        image_mean=list(student.mean),
        image_std=list(student.std),
    )


def _save_tokenizer(folder: str, tokenizer: SimpleTokenizer, length: int, transformers: Any) -> None:
    """Write the files of CLIPTokenizer with open_clip's vocabulary and merges."""
    vocabulary = {SPECIAL.get(token, token): number for token, number in tokenizer.encoder.items()}
    with TemporaryDirectory() as local:
        Path(local, "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks)]
        Path(local, "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
        saved = transformers.CLIPTokenizerFast.from_pretrained(local, model_max_length=length)
        saved.save_pretrained(folder)
        for name in ("vocab.json", "merges.txt"):  # for readers that build the tokenizer from them
            Path(folder, name).write_bytes(Path(local, name).read_bytes())


def clip_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of CLIPModel from that of a plain CLIP of open_clip's."""
    source: Any = model
    text: Any = getattr(model, "text", model)
    visual = source.visual
    weights = {
        "logit_scale": source.logit_scale.reshape(()),
        "visual_projection.weight": visual.proj.mT,
        "text_projection.weight": text.text_projection.mT,
        "vision_model.embeddings.class_embedding": visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": visual.positional_embedding,
        "text_model.embeddings.token_embedding.weight": text.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": text.positional_embedding,
    }
    norms = {
        "vision_model.pre_layrnorm": visual.ln_pre,  # transformers' spelling
        "vision_model.post_layernorm": visual.ln_post,
        "text_model.final_layer_norm": text.ln_final,
    }
    for name, norm in norms.items():
        weights |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
    for tower, transformer in (("vision_model", visual.transformer), ("text_model", text.transformer)):
        for layer, block in enumerate(transformer.resblocks):
            weights |= _block_weights(f"{tower}.encoder.layers.{layer}", block)
    return {name: weight.detach() for name, weight in weights.items()}


def _block_weights(prefix: str, block: nn.Module) -> dict[str, Tensor]:
    """The tensors of one block by transformers' names."""
    attention: Any = block.attn
    weights = dict[str, Tensor]()
    for ours, theirs in BLOCK_NAMES.items():
        layer: Any = block.get_submodule(ours)
        weights |= {f"{prefix}.{theirs}.weight": layer.weight, f"{prefix}.{theirs}.bias": layer.bias}
    matrices = zip("qkv", attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    for letter, matrix, bias in matrices:
        weights[f"{prefix}.self_attn.{letter}_proj.weight"] = matrix
        weights[f"{prefix}.self_attn.{letter}_proj.bias"] = bias
    return weights


def load(folder: Path, student: LoadedModel, config: ExportConfig) -> Encoders:
    """Return the encoders of the folder in transformers, texts through its own tokenizer."""
    transformers = _transformers()
    transformers.utils.logging.disable_progress_bar()  # of a few milliseconds
    model = transformers.CLIPModel.from_pretrained(str(folder), dtype=torch.float32).eval()
    processor = transformers.CLIPProcessor.from_pretrained(str(folder))

    def text(texts: list[str]) -> Tensor:
        tokens = processor(text=texts, padding=True, truncation=True, return_tensors="pt")
        return unit(model.text_model(**tokens).pooler_output, model.text_projection)

    return Encoders(
        lambda pixels: unit(model.vision_model(pixel_values=pixels).pooler_output, model.visual_projection), text
    )


def unit(pooled: Tensor, projection: nn.Module) -> Tensor:
    """Return projected features (B, E) of unit length, of pooled ones (B, D)."""
    return nn.functional.normalize(projection(pooled), dim=-1)


def usage(student: LoadedModel) -> str:
    """Return how to load the folder, for its card."""
    return USAGE


def needed_module(student: LoadedModel) -> str | None:
    """Return None: transformers has the architecture."""
    return None
