"""The demo's scenes, copies of them as the web makes them, and scenes that differ in one thing."""

import io
import math
import random
from collections.abc import Iterator
from dataclasses import replace

from PIL import Image

from demo.scenes import BACKGROUNDS, CELL, CELLS, GRID, THINGS, Scene, Thing, _apart, _put, draw_scene, make_scene

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def copied(data: bytes, rng: random.Random, crop: float = 0.1) -> bytes:
    """An encoded image cropped by up to ``crop`` an axis, scaled by 0.5 to 2, mirrored or not, quality 40 to 95."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    edges = []
    for side in image.size:
        gone = rng.uniform(0, crop) * side
        low = rng.uniform(0, gone)
        edges.append((round(low), round(side - gone + low)))
    (left, right), (top, bottom) = edges
    image = image.crop((left, top, right, bottom))
    scale = math.exp(rng.uniform(math.log(0.5), math.log(2)))
    image = image.resize((round(image.width * scale), round(image.height * scale)), rng.choice(FILTERS))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return jpeg(image, rng.randint(40, 95))


def scene(name: object) -> Scene:
    return make_scene(random.Random(str(name)))


def drawn(one: Scene) -> bytes:
    return jpeg(draw_scene(one))


def shown(one: Scene) -> frozenset:
    """What is seen of a scene, whatever the order of its things."""
    return frozenset([one.background, *((thing.name, thing.size, *_cell(thing)) for thing in one.things)])


def mirrored(one: Scene) -> frozenset:
    """What would be seen of its mirror image, were all things symmetric, as many glyphs nearly are."""
    places = [(thing, *_cell(thing)) for thing in one.things]
    turned = [(thing.name, thing.size, GRID - CELLS[thing.size] - column, row) for thing, column, row in places]
    return frozenset([one.background, *turned])


def alike(one: Scene, rng: random.Random) -> Iterator[Scene]:
    """Scenes that differ in one thing: its ground, or a thing gone, replaced, moved, or of another size."""
    yield replace(one, background=rng.choice([name for name in BACKGROUNDS if name != one.background]))
    place = rng.randrange(len(one.things))
    thing = one.things[place]
    others = one.things[:place] + one.things[place + 1 :]
    if others:
        yield replace(one, things=others)
    names = {other.name for other in one.things}
    name = rng.choice([name for name in THINGS if name not in names])
    yield replace(one, things=(*others, _put(name, thing.size, *_cell(thing))))
    for size in CELLS:
        last = GRID - CELLS[size]
        moved = _put(thing.name, size, rng.randint(0, last), rng.randint(0, last))
        squares = [(*_cell(other), CELLS[other.size]) for other in (*others, moved)]
        if _apart(squares):
            yield replace(one, things=(*others, moved))


def _cell(thing: Thing) -> tuple[int, int]:
    """Column and row of a thing: it stands in the middle of its cells."""
    side = CELLS[thing.size] * CELL
    left, top, right, bottom = thing.box
    return round((left + right - side) / 2 / CELL), round((top + bottom - side) / 2 / CELL)
