#!/usr/bin/env python3
"""README's image of a report: `clipmill report` of the demo's dataset, drawn by headless Chromium.

    make demo && python docs/screenshot.py [ROOT]        writes docs/report.png

ROOT is demo-run/scenes unless named. On the left is the top of the page, on the right its contact sheet.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
WIDTH = 1120  # of each of the two pages
HEIGHT = 1440
SHOWN = 1600  # width of the image of both
SHEET_ONLY = "<style>header, footer, section:not(:has(.sheet)) { display: none } section { margin-top: 24px }</style>"


def draw(chromium: str, page: Path) -> Image.Image:
    """The first HEIGHT pixels of a page."""
    shot = page.with_suffix(".png")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    flags += [f"--user-data-dir={page.parent}/profile", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}"]
    subprocess.run([chromium, *flags, page.as_uri()], check=True, capture_output=True, timeout=120)
    return Image.open(shot).convert("RGB")


def main() -> None:
    """Write docs/report.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", default=HERE.parent / "demo-run" / "scenes", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "report.png")
    options = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        parser.error("Chromium is not installed")
    with tempfile.TemporaryDirectory() as work:
        page, sheet = Path(work, "page.html"), Path(work, "sheet.html")
        subprocess.run(["clipmill", "report", str(options.root), "--output", str(page)], check=True)
        sheet.write_text(page.read_text().replace("</head>", f"{SHEET_ONLY}</head>"))
        both = Image.new("RGB", (2 * WIDTH, HEIGHT))
        both.paste(draw(chromium, page), (0, 0))
        both.paste(draw(chromium, sheet), (WIDTH, 0))
    shown = both.resize((SHOWN, SHOWN * HEIGHT // (2 * WIDTH)), Image.Resampling.LANCZOS)
    shown.quantize(160, dither=Image.Dither.NONE).save(options.out, optimize=True)
    print(f"{options.out}: {options.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
