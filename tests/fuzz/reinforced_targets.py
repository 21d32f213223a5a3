"""A target for the tars of DataCompDR, whose members hold archives and lists of augmentations."""

import json
import random
from pathlib import Path
from typing import Any

from fuzz.mutate import NUMBERS
from fuzz.target import Input, Target, placed, read_source
from PIL import Image
from small_datacompdr import packed, reinforced, reinforced_tar


class ReinforcedTar(Target):
    """DataCompDR's tars as a source and as vectors; their archives and augmentations alone, too."""

    def make(self, valid: Path) -> list[Input]:
        found = list[Input]()
        for form in ("npz", "pth.gz"):
            samples = [reinforced(number, "http://h", form=form) for number in range(2)]
            found += [("x.tar", reinforced_tar(samples)), (f"x.{form}", samples[0].members[form])]
            vectors = {"image_emb": samples[0].image_emb, "text_emb": samples[0].text_emb}
            found.append((f"x.{form}", packed(vectors, form)))
            found += [("x.json", json.dumps(sample.parameters).encode()) for sample in samples]
        return found

    def made_up(self, rng: random.Random) -> Input:
        """Augmentations of any numbers and shapes."""
        odd: list[Any] = [None, True, "a", [], {}, -1.5, float("nan"), float("inf"), 10**400, *NUMBERS[:12]]

        def value(usual: Any) -> Any:
            return usual if rng.random() < 0.8 else rng.choice(odd)

        stored = []
        for _ in range(rng.randrange(4)):
            box = [value(rng.randrange(40)) for _ in range(rng.choice([4, 4, 4, 4, 3]))]
            operations = [[value(rng.randrange(14)), value(rng.choice([0.0, 0.09, 9.0, 7, 178.5]))] for _ in range(2)]
            flip = [value(True)] if rng.random() < 0.3 else []
            stored.append(value([value(box), *flip, value(operations)]))
        return "x.json", json.dumps(value(stored)).encode()

    def run(self, folder: Path, path: str, data: bytes) -> None:
        from pipeline.cache.datacompdr_sample import (
            SourceTar,
            parse_augmentations,
            read_npz,
            read_pth_gz,
            recorded_views,
        )
        from pipeline.ingest.source_files import SourceFile
        from shards_spec.files import DataError
        from shards_spec.views import RecordedSpec, apply_view, unpack_recorded

        if path == "x.npz":
            read_npz(data)
        elif path == "x.pth.gz":
            read_pth_gz(data)
        elif path == "x.json":
            image = Image.new("RGB", (90, 80))
            for view in recorded_views(parse_augmentations(data.decode(errors="replace")), image.size, 1):
                apply_view(image, RecordedSpec(), unpack_recorded(view.pack()), 16)
        else:
            tar = SourceTar(SourceFile(placed(folder, path, data), path, len(data), ""))
            for uid in tar.uids:
                try:
                    tar.read(uid)
                except DataError:
                    continue
            read_source(str(folder / path))
