"""Drawings and cut-out photographs that Debian ships, with what people wrote about them.

    openclipart-png, openclipart-svg    8,121 drawings in the public domain; title, description and keywords are in the
                                        RDF of each SVG, and the PNG has the same path
    tuxpaint-stamps-default             785 stamps with a caption in up to a hundred languages (GPL-2)

All are read from where the packages put them. Titles say what is shown, or the name of a collection, an author, a word
in Italian or French, or something else than is shown: they are as good as texts of the web are.
"""

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path

OPENCLIPART = Path("/usr/share/openclipart")
STAMPS = Path("/usr/share/tuxpaint/stamps")
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
HELD_OUT = 5  # one family of drawings of so many is kept from training
FEWEST_WORDS = 3  # of a description that is one; shorter ones are an author's name or a word of the title
COLLECTION = re.compile(r"^part of\b", re.IGNORECASE)  # "Part of the Flat Icon Collection (Wed Aug 25 …)"
CREDIT = re.compile(r"^clip ?art by [^-]+ - ", re.IGNORECASE)
NO_TEXT = re.compile(r"hash\(|^hash$|^0x|@|^eps converted|^\W*$", re.IGNORECASE)  # of a script, an address, a program
VARIANT = re.compile(r"[\d_]+[a-z]?$")  # red_pear_02 is a variant of red_pear_01

# What a folder of either package shows, in nouns whose first sense in WordNet is meant; the longest path counts.
CLASSES = {
    "animals/amphibians": "frog",
    "animals/birds": "bird",
    "animals/bugs": "insect",
    "animals/dinosaur": "dinosaur",
    "animals/dinosaurs": "dinosaur",
    "animals/fish": "fish",
    "animals/insects": "insect",
    "animals/mammals/big_cats": "cat",
    "animals/mammals/bovines": "cow",
    "animals/mammals/cats": "cat",
    "animals/mammals/dogs": "dog",
    "animals/mammals/equines": "horse",
    "animals/mammals/horses": "horse",
    "animals/mammals/housecats": "cat",
    "buildings": "building",
    "buildings/furniture": "furniture",
    "buildings/homes": "house",
    "clothes": "clothing",
    "clothes/hats": "hat",
    "computer/buttons": "button",
    "computer/hardware": "computer",
    "education/books": "book",
    "food/beverages": "beverage",
    "food/breads_and_carbs": "bread",
    "food/dessert": "dessert",
    "food/desserts": "dessert",
    "food/fruit": "fruit",
    "food/meats_and_eggs": "meat",
    "food/vegetables": "vegetable",
    "geography": "map",
    "geography/astronomy": "planet",
    "hobbies/music": "instrument",
    "household/tools": "tool",
    "office/telephone": "telephone",
    "people/bodypart": "body",
    "people/clothing": "clothing",
    "people/clothing/hats": "hat",
    "people/stickmen": "person",
    "plants/flowers": "flower",
    "plants/trees": "tree",
    "recreation/games/cards": "card",
    "recreation/games/chess": "chess",
    "recreation/music": "instrument",
    "recreation/sports": "sport",
    "recreation/toys": "toy",
    "shapes/arrows": "arrow",
    "shapes/stars": "star",
    "signs_and_symbols/clocks": "clock",
    "signs_and_symbols/flags": "flag",
    "signs_and_symbols/weather": "weather",
    "space/planets": "planet",
    "special/patterns": "pattern",
    "sports": "sport",
    "symbols/alphabets": "letter",
    "symbols/chess": "chess",
    "symbols/money": "money",
    "tools": "tool",
    "tools/weapons": "weapon",
    "town/houses": "house",
    "transportation/boating": "boat",
    "transportation/vehicles": "car",
    "vehicles/auto": "car",
    "vehicles/ship": "boat",
}


@dataclass(frozen=True)
class Drawing:
    """A drawing or photograph, and the texts that people gave it; absent ones are empty."""

    name: str
    """path below the server, ``openclipart/animals/…/cat.png``"""
    file: Path
    title: str = ""
    description: str = ""
    keywords: tuple[str, ...] = ()
    translations: dict[str, str] = field(default_factory=dict)
    """the title by language, English left out"""

    @property
    def folder(self) -> str:
        """The folder within the package, ``animals/mammals``."""
        return self.name.partition("/")[2].rpartition("/")[0]

    @property
    def label(self) -> str | None:
        """The class of its folder; None where that shows no one kind of thing."""
        parts = self.folder.split("/")
        paths = ("/".join(parts[:length]) for length in range(len(parts), 0, -1))
        return next((CLASSES[path] for path in paths if path in CLASSES), None)

    @cached_property
    def is_held_out(self) -> bool:
        """Whether it is kept from training: by a hash of its name, so that variants of a drawing are on one side."""
        family = VARIANT.sub("", Path(self.name).stem)
        return int(sha256(family.encode()).hexdigest(), 16) % HELD_OUT == 0


def plain(text: str | None) -> str:
    """Return a text as people read it: one line, no underscores, no credit; empty where it is not one of people."""
    line = " ".join((text or "").replace("_", " ").split())
    line = CREDIT.sub("", line)
    return "" if NO_TEXT.search(line) or COLLECTION.match(line) else line


def _work(root: ET.Element) -> ET.Element:
    """Return what the RDF says of the drawing; what it says of people is deeper, under the same names."""
    return next((element for element in root.iter() if element.tag.endswith("}Work")), root)


def openclipart() -> list[Drawing]:
    """Return all drawings of Open Clip Art, by name; those without a title of their own have an empty one."""
    drawings = []
    for path in sorted(OPENCLIPART.glob("svg/**/*.svg")):
        below = path.relative_to(OPENCLIPART / "svg").with_suffix(".png")
        file = OPENCLIPART / "png" / below
        if not file.is_file():
            continue
        work = _work(ET.parse(path).getroot())
        subject = work.find(f"{DUBLIN_CORE}subject")
        items = [] if subject is None else [item.text for item in subject.iter()]
        description = plain(work.findtext(f"{DUBLIN_CORE}description"))
        drawings.append(
            Drawing(
                name=f"openclipart/{below.as_posix()}",
                file=file,
                title=plain(work.findtext(f"{DUBLIN_CORE}title")),
                description=description if len(description.split()) >= FEWEST_WORDS else "",
                keywords=tuple(dict.fromkeys(filter(None, map(plain, items)))),
            )
        )
    return drawings


def stamps() -> list[Drawing]:
    """Return the stamps that have a caption, by name."""
    drawings = []
    for path in sorted(STAMPS.glob("**/*.png")):
        text = path.with_suffix(".txt")
        if not text.is_file():
            continue
        english, *others = text.read_text(encoding="utf-8", errors="replace").splitlines()
        pairs = (line.partition(".utf8=") for line in others)
        translations = {language: plain(line) for language, _, line in pairs if not language.startswith("en")}
        drawings.append(
            Drawing(
                name=f"stamps/{path.relative_to(STAMPS).as_posix()}",
                file=path,
                title=plain(english),
                translations={language: line for language, line in translations.items() if line},
            )
        )
    return drawings
