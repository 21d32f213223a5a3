"""Small real data for tests: drawn images with true captions, raw shards, a tiny CoCa."""

import io
import json
import random
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from shards_spec.files import join, json_bytes, read_json, sha256_file, write_json
from shards_spec.layout import shard_name
from shards_spec.manifest import SEAL, Done, shard_ids, stats_seal, write_stage
from shards_spec.sample import Sample
from shards_spec.tar import write_shard

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (240, 210, 40)}
SHAPES = ("ball", "box", "cross")
BPE = Path(__file__).parents[2] / "demo" / "models" / "coca" / "bpe.txt.gz"


def draw(seed: str, size: int = 48) -> tuple[bytes, str]:
    """A JPEG of one coloured shape and the caption that is true of it."""
    rng = random.Random(seed)
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    image = Image.new("RGB", (size + rng.randrange(16), size), (rng.randrange(90, 120),) * 3)
    x, y, side = rng.randrange(size // 2), rng.randrange(size // 2), size // 3
    pen = ImageDraw.Draw(image)
    if shape == "ball":
        pen.ellipse((x, y, x + side, y + side), COLOURS[colour])
    elif shape == "box":
        pen.rectangle((x, y, x + side, y + side), COLOURS[colour])
    else:
        pen.line((x, y, x + side, y + side), COLOURS[colour], 5)
        pen.line((x, y + side, x + side, y), COLOURS[colour], 5)
    if size > 200:  # large images are there to take space
        noise = Image.effect_noise(image.size, 60).convert("RGB")
        image = Image.blend(image, noise, 0.3)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue(), f"a {colour} {shape} on a wall"


def tar_bytes(members: list[tuple[str, str | bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar as others make them: members in the given order."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in members:
            content = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def write_raw(
    root: str,
    shards: int = 2,
    per_shard: int = 6,
    seed: int = 0,
    size: int = 48,
    lost: int | None = None,
    captions: bool = True,
    padding: int = 0,
) -> None:
    """ROOT/raw as `ingest` leaves it, images of ``size`` pixels, every fifth input failed, all of shard ``lost``.

    An image has ``padding`` random bytes more, at most 65,533, in a comment, which decoders skip.
    """
    totals: dict[str, int] = {}
    config = {"image_size": 256, "shard_size": per_shard}
    for shard in range(shards):
        samples, rows = [], []
        for index in range(per_shard):
            key = f"{shard:05d}{index:04d}"
            image, caption = draw(f"{seed}/{key}", size)
            image = padded(image, key, padding)
            caption = caption if captions else ""
            status = "failed_to_download" if index % 5 == 4 or shard == lost else "success"
            rows.append({"url": f"http://h/{key}", "caption": caption, "key": key, "status": status})
            if status == "success":
                width, height = Image.open(io.BytesIO(image)).size
                meta = {**rows[-1], "width": width, "height": height}
                samples.append(Sample(key, {"jpg": image, "txt": caption.encode(), "json": json_bytes(meta)}))
        name = f"raw/{shard_name(shard)}"
        _, tar_hash = write_shard(join(root, f"{name}.tar"), samples)
        pq.write_table(pa.Table.from_pylist(rows), join(root, f"{name}.parquet"))
        counts = {"success": len(samples), "HTTP 404": len(rows) - len(samples)}
        counts = {reason: number for reason, number in counts.items() if number}
        outputs = {f"{name}.tar": tar_hash, f"{name}.parquet": sha256_file(join(root, f"{name}.parquet"))}
        Done("ingest", shard, config, counts, {"rows": f"{seed}/{shard}"}, outputs).write(join(root, "raw"))
        for reason, number in counts.items():
            totals[reason] = totals.get(reason, 0) + number
    write_stage(root, "ingest", {"config": config, "shards": shards, "counts": dict(sorted(totals.items()))}, "test")


def padded(image: bytes, seed: str, padding: int) -> bytes:
    """A JPEG with so many random bytes in a comment behind its first marker."""
    if not padding:
        return image
    comment = b"\xff\xfe" + (padding + 2).to_bytes(2, "big") + random.Random(seed).randbytes(padding)
    return image[:2] + comment + image[2:]


def write_final(root: str, shards: list[list[Sample]]) -> None:
    """ROOT/shards as `pack` leaves them, of these samples."""
    for shard, samples in enumerate(shards):
        path = f"shards/{shard_name(shard)}.tar"
        count, digest = write_shard(join(root, path), samples)
        Done("pack", shard, {}, {"success": count}, {}, {path: digest}).write(join(root, "shards"))
    sizes = {f"{shard_name(shard)}.tar": len(samples) for shard, samples in enumerate(shards)}
    write_json(join(root, "shards/sizes.json"), sizes)
    write_stage(root, "pack", {"config": {}, "shards": len(shards), "counts": {}})


def vouch(root: str, folder: str, shard: int, *paths: str) -> None:
    """Let a done-record tell the hashes of files as they are now, as if its stage had written them so."""
    record = join(root, folder, f"{shard_name(shard)}_stats.json")
    stats = read_json(record)
    stats["clipmill"]["outputs"] |= {path: sha256_file(join(root, path)) for path in paths}
    stats["clipmill"][SEAL] = stats_seal(stats)
    write_json(record, stats)


def timm_checkpoint(folder: Path) -> str:
    """A checkpoint of timm's test_vit with a classifier of seven classes; returns its path."""
    import timm
    import torch

    torch.manual_seed(0)
    path = folder / "vit.pt"
    torch.save(timm.create_model("test_vit", num_classes=7).state_dict(), path)
    return str(path)


def tiny_coca(folder: Path, seed: int = 0, spread: float = 1.0) -> str:
    """A CoCa of 2 + 2 layers with random weights as an open_clip local-dir; returns its model name.

    ``spread`` widens the output projection so that random weights do not say the same word for ever.
    """
    stack = {"context_length": 16, "width": 32, "heads": 2, "layers": 2}
    config = {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "attn_pooler_queries": 8,
            "output_tokens": True,
        },
        "text_cfg": {**stack, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**stack, "attn_pooler_heads": 2},
        "custom_text": True,
    }
    return write_coca(folder, config, seed, spread)


def narrow_coca(folder: Path, name: str) -> str:
    """One of open_clip's CoCa models with its own structure, but narrow: 2 layers, the head widths kept in kind."""
    import open_clip

    config = open_clip.get_model_config(name)
    vision, text, multimodal = config["vision_cfg"], config["text_cfg"], config["multimodal_cfg"]
    vision |= {"width": 48, "layers": 2, "head_width": 12, "image_size": 4 * vision["patch_size"]}
    vision |= {"attn_pooler_heads": 4, "attn_pooler_queries": 12}
    if "hf_model_name" in text:
        text |= write_roberta(folder, width=48)
    else:
        text |= {"width": 48, "heads": 4, "layers": 2}
    multimodal |= {"width": 48, "heads": 4, "layers": 2}
    return write_coca(folder, {**config, "embed_dim": 48}, spread=3)


def write_roberta(folder: Path, width: int, layers: int = 2, heads: int = 4, wide: int = 96) -> dict[str, object]:
    """Random weights of a RoBERTa and a tokenizer as Hugging Face keeps them; returns the text_cfg that names them."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [f"a {colour} {shape} on a wall" for colour in COLOURS for shape in SHAPES],
        trainers.BpeTrainer(vocab_size=400, special_tokens=list(special.values()), initial_alphabet=alphabet),
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = transformers.RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=wide,
        max_position_embeddings=100,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    transformers.RobertaModel(config).save_pretrained(folder / "roberta")
    names = {"hf_model_name": str(folder / "roberta"), "hf_tokenizer_name": str(folder)}
    return {**names, "width": width, "vocab_size": tokenizer.get_vocab_size()}


def write_coca(folder: Path, config: dict, seed: int = 0, spread: float = 1.0) -> str:
    """Random weights of a CoCa as an open_clip local-dir, the demo's small byte-pair vocabulary with it."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if "hf_model_name" not in config["text_cfg"]:
        size = open_clip.tokenizer.SimpleTokenizer(bpe_path=str(BPE)).vocab_size
        config["text_cfg"] |= {"tokenizer_kwargs": {"bpe_path": "bpe.txt.gz"}, "vocab_size": size}
        shutil.copy(BPE, folder / "bpe.txt.gz")
    config["multimodal_cfg"]["vocab_size"] = config["text_cfg"]["vocab_size"]
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}")
    with torch.no_grad():
        model.text_decoder.text_projection.normal_(std=0.2)  # open_clip leaves it as uninitialised memory
        for parameter in model.text_decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2 * spread)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def run_stage(
    stage: str, root: str, model: str = "", *, views: int = 2, workers: int = 1, shard_size: int | None = None
) -> None:
    """caption, pack, vocab or cache a ROOT, with names and settings that the tests share."""
    from pipeline.cache.config import CacheConfig
    from pipeline.cache.stage import cache
    from pipeline.caption.config import CaptionConfig
    from pipeline.caption.decoding import Decoding
    from pipeline.caption.stage import caption
    from pipeline.labels.vocab_stage import VocabConfig, vocab
    from pipeline.pack.config import PackConfig
    from pipeline.pack.stage import pack

    match stage:
        case "caption":
            caption(CaptionConfig(root, model, name="cap", num_captions=2, decoding=Decoding(max_tokens=8)))
        case "pack":
            pack(PackConfig(root, workers=workers, shard_size=shard_size))
        case "vocab":
            vocab(VocabConfig(root, min_count=2))
        case "cache":
            cache(CacheConfig(root, model, name="tea", views=views))
        case _:
            raise ValueError(stage)


def covered_by(root: str, source: str, vocabulary: Any) -> dict[str, int]:
    """What a vocabulary covers of the final shards, whose captions of ``source`` are counted for it."""
    from pipeline.labels.vocab_parts import count_labels
    from pipeline.labels.vocab_stage import coverage

    found = [count_labels(root, shard, source) for shard in shard_ids(f"{root}/shards")]
    return coverage([own.table for own in found], sum(own.samples for own in found), vocabulary)


def build_all(root: str, model: str, views: int, shard_size: int | None = None) -> None:
    """caption, pack, vocab and cache a ROOT that has its raw/."""
    for stage in ("caption", "pack", "vocab", "cache"):
        run_stage(stage, root, model, views=views, shard_size=shard_size)


def tree(root: str) -> dict[str, str]:
    """Path to hash of everything below ROOT but the logs."""
    files = (path for path in Path(root).rglob("*") if path.is_file() and "logs" not in path.parts)
    return {path.relative_to(root).as_posix(): sha256_file(str(path)) for path in files}
