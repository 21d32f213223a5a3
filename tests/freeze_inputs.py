"""What `freeze.py` gives to the commands: drawn images with captions in several forms, evaluation sets, a CoCa.

All of it is made here, of Python's own random numbers and Pillow, so that it changes with neither the demo's words nor
the processor. Only the models' descriptions are the demo's.
"""

import io
import json
import os
import random
import shutil
import tarfile
from pathlib import Path

DEMO_MODELS = Path(__file__).resolve().parents[1] / "demo" / "models"
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (240, 210, 40)}
SHAPES = ("ball", "box", "cross", "ring")
PLACES = {"on a wall": (150, 150, 160), "in the snow": (245, 245, 250), "at night": (20, 20, 50)}
CLASSES = ("ball", "box", "n02084071", "golden retriever", "ring", "blue jay", "rubber snow", "zyzzyva zz")
Pair = tuple[bytes, str]


def write_inputs() -> None:
    """Everything, into the current folder."""
    pairs = [draw(f"scene {number}") for number in range(26)]
    write_folder(Path("folder"), pairs)
    write_tars(Path("foreign"), pairs[:10])
    write_table(Path("table.parquet"), [*pairs[:8], pairs[2]])
    write_retrieval(Path("eval/retrieval"))
    write_labelled(Path("eval/zeroshot"))
    Path("classes.txt").write_text("\n".join(CLASSES))
    shutil.copytree(DEMO_MODELS, "models")
    write_weights(Path("models/coca"))
    for path in Path().rglob("*"):
        os.utime(path, (1e9, 1e9))  # `ingest` tells by them whether a source is as it was


def draw(seed: str, shape: str | None = None, form: str = "JPEG") -> Pair:
    """An image of one or two coloured shapes, in PNG on nothing, and the caption that is true of it."""
    from PIL import Image, ImageDraw

    rng = random.Random(seed)
    place = rng.choice(list(PLACES))
    size = (72 + rng.randrange(24), 72 + rng.randrange(24))
    image = Image.new("RGBA", size, PLACES[place] if form == "JPEG" else (0, 0, 0, 0))
    pen, things = ImageDraw.Draw(image), []
    for number in range(1 if shape else rng.choice((1, 1, 2))):
        colour, own, side = rng.choice(list(COLOURS)), shape or rng.choice(SHAPES), 18 + rng.randrange(14)
        x, y = 36 * number + rng.randrange(8), rng.randrange(40)
        draw_shape(pen, own, (x, y, x + side, y + side), COLOURS[colour])
        things.append(f"a {colour} {own}")
    file = io.BytesIO()
    image.convert("RGB" if form == "JPEG" else "RGBA").save(file, form, quality=90)
    return file.getvalue(), f"{' and '.join(things)} {place}"


def draw_shape(pen, shape: str, box: tuple[int, int, int, int], colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    if shape == "ball":
        pen.ellipse(box, colour)
    elif shape == "box":
        pen.rectangle(box, colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=5)
    else:
        pen.line((left, top, right, bottom), colour, 6)
        pen.line((left, bottom, right, top), colour, 6)


def write_folder(folder: Path, pairs: list[Pair]) -> None:
    """Image and text files, with a copy, a copy saved anew, a torn file, an empty caption, and one to mend."""
    from PIL import Image

    folder.mkdir()
    again = io.BytesIO()
    Image.open(io.BytesIO(pairs[3][0])).save(again, "JPEG", quality=75)
    odd = [(pairs[0][0], "a copy of the first"), (again.getvalue(), "the fourth, saved anew")]
    odd += [(pairs[5][0][:900], "a torn image"), (draw("empty")[0], "")]
    odd += [(draw("to mend")[0], "a dog &amp;\u200b a cat\x07"), (draw("of symbols")[0], "http://h/a_b.jpg")]
    for number, (image, caption) in enumerate([*pairs, *odd]):
        (folder / f"{number:03d}.jpg").write_bytes(image)
        (folder / f"{number:03d}.txt").write_text(caption, encoding="utf-8")


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_tars(folder: Path, pairs: list[Pair]) -> None:
    """Two tars of others with json members; the second has PNG with transparency."""
    forms = {"jpg": pairs, "png": [draw(f"drawing {number}", form="PNG") for number in range(8)]}
    for shard, (ending, part) in enumerate(forms.items()):
        members = []
        for number, (image, caption) in enumerate(part):
            meta = json.dumps({"caption": caption, "score": number / 8}).encode()
            key = f"s{shard}{number:03d}"
            members += [(f"{key}.{ending}", image), (f"{key}.json", meta), (f"{key}.txt", caption.encode())]
        write_tar(folder / f"{shard:05d}.tar", members)


def write_table(path: Path, pairs: list[Pair]) -> None:
    """Parquet as on Hugging Face, with a column of its own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"image": {"bytes": image, "path": f"{number}.jpg"}, "caption": caption, "width_cm": number / 4}
        for number, (image, caption) in enumerate(pairs)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_retrieval(root: Path, count: int = 12) -> None:
    """CLIP_benchmark's layout, two captions an image."""
    members = []
    for number in range(count):
        image, caption = draw(f"pair {number}")
        texts = f"{caption}\nnumber {number}: {caption}".encode()
        members += [(f"s{number:04d}.jpg", image), (f"s{number:04d}.txt", texts)]
    write_tar(root / "test" / "0.tar", members)
    (root / "test" / "nshards.txt").write_text("1")
    (root / "dataset_type.txt").write_text("retrieval")


def write_labelled(root: Path, count: int = 24) -> None:
    """CLIP_benchmark's layout: images of the shapes, for training and to measure on."""
    for split in ("train", "test"):
        members = []
        for number in range(count):
            label = number % len(SHAPES)
            members += [(f"s{number:04d}.jpg", draw(f"{split} {number}", SHAPES[label])[0])]
            members += [(f"s{number:04d}.cls", str(label).encode())]
        write_tar(root / split / "0.tar", members)
        (root / split / "nshards.txt").write_text("1")
    (root / "classnames.txt").write_text("\n".join(SHAPES))
    (root / "zeroshot_classification_templates.txt").write_text("a {c}\na photo of a {c}")


def write_weights(folder: Path, seed: int = 0) -> None:
    """Random weights of an open_clip folder, the same on every processor: no torch arithmetic is in them."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    model, rng = open_clip.create_model(f"local-dir:{folder}"), random.Random(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim > 1:
            wide = 0.5 if "text_decoder" in name else 0.12  # lest random weights say one word for ever
            numbers = torch.tensor([wide * (2 * rng.random() - 1) for _ in range(parameter.numel())])
            parameter.data = numbers.reshape(parameter.shape)
        elif parameter.ndim == 1:
            parameter.data = torch.full_like(parameter, float(name.endswith("weight")))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
