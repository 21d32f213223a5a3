#!/usr/bin/env python3
"""Render the demo's images from the Noto Color Emoji font.

How `demo/images/*.png` were made; run it again only to add or change an image:

    python demo/render_images.py [OUT] [--font NotoColorEmoji.ttf]

Each file is named by a noun of WordNet 3.0 whose first sense (`dog.n.01`) is the thing shown and whose first
lemma is the word itself, so that the word names its label without any guessing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # px: the only strike of the font's CBDT table
LONGEST_SIDE = 72  # px
PALETTE_COLOURS = 128

GLYPHS = {
    "airplane": "✈",
    "apple": "🍎",
    "balloon": "🎈",
    "bicycle": "🚲",
    "bus": "🚌",
    "butterfly": "🦋",
    "cactus": "🌵",
    "camera": "📷",
    "car": "🚗",
    "cat": "🐈",
    "cow": "🐄",
    "crab": "🦀",
    "cupcake": "🧁",
    "dog": "🐕",
    "duck": "🦆",
    "elephant": "🐘",
    "fish": "🐟",
    "flamingo": "🦩",
    "frog": "🐸",
    "giraffe": "🦒",
    "guitar": "🎸",
    "hamburger": "🍔",
    "helicopter": "🚁",
    "horse": "🐎",
    "house": "🏠",
    "key": "🔑",
    "lemon": "🍋",
    "owl": "🦉",
    "penguin": "🐧",
    "pizza": "🍕",
    "rabbit": "🐇",
    "rocket": "🚀",
    "sailboat": "⛵",
    "snail": "🐌",
    "snake": "🐍",
    "strawberry": "🍓",
    "sunflower": "🌻",
    "tractor": "🚜",
    "tree": "🌳",
    "umbrella": "☂",
}


def render(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Return the glyph of `character` as RGBA, cropped to its opaque box, its longest side LONGEST_SIDE px."""
    canvas = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE))
    ImageDraw.Draw(canvas).text((FONT_SIZE // 4, FONT_SIZE // 4), character, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font draws nothing for {character!r}")
    glyph = canvas.crop(box)
    scale = LONGEST_SIDE / max(glyph.size)
    size = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
    return glyph.resize(size, Image.Resampling.LANCZOS)


def main() -> None:
    """Write every image as an optimised palette PNG with transparency."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--font", type=Path, default=FONT)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    font = ImageFont.truetype(str(args.font), FONT_SIZE)
    for word, character in GLYPHS.items():
        image = render(character, font).quantize(PALETTE_COLOURS, method=Image.Quantize.FASTOCTREE)
        image.save(args.out / f"{word}.png", optimize=True)


if __name__ == "__main__":
    main()
