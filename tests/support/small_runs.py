"""Folders of runs as `clipmill train` writes them, without training: students whose masks are applied in mid-run."""

import json
import math
from pathlib import Path
from typing import Any

from shards_spec.files import write_json

WHOLE = {"width": 64, "heads": 4, "neurons": 256}
CUT = 40  # the step in which the masks are applied
STEPS = 60


def tower(width: int, heads: list[int], neurons: list[int], tokens: int = 0) -> dict[str, Any]:
    """A tower of student.json."""
    counts = {"parameters": 1000 * width, "token_embedding": tokens, "blocks": 900 * width, "macs": 20_000 * width}
    return {"width": width, "heads": heads, "neurons": neurons, "sparsity": 0.3, **counts}


def table_of(share: float) -> dict[str, Any]:
    """A student.json of which about a share of the units is left; the last layer has lost its heads."""
    neurons = [int(share * 256), int(share * 200)]
    image = tower(int(share * 64), [int(share * 4), 0], neurons)
    text = tower(int(share * 60), [3, 1], neurons, tokens=55_173)
    sums = {"parameters": 200_000, "macs": 1_500_000, "sparsity": 1 - share}
    return {"step": CUT, "masks": False, "image": image, "text": text, **sums}


def description_of(share: float) -> dict[str, Any]:
    """The open_clip_config.json of the student of `table_of`."""
    table, towers = table_of(share), {}
    for name, part in (("image", "vision_cfg"), ("text", "text_cfg")):
        sizes = {kind: table[name][kind] for kind in ("width", "heads", "neurons")}
        towers[part] = {"tower": "tinyclip", **sizes, "original": WHOLE}
    return {"model_cfg": {"embed_dim": 16, **towers}}


def write_masked_run(run: Path, start: float = 1.0, end: float = 0.5, **config: Any) -> None:
    """A run whose student goes from one share of its weights to another."""
    run.mkdir(parents=True)
    fields = {"recipe": "tinyclip", "inherit": "auto", "model": "ViT-M-32", "sparsity": 1 - end, "from_run": ""}
    write_json(str(run / "config.json"), {**fields, **config})
    write_json(str(run / "environment.json"), {"torch": "2.15.0"})
    write_json(str(run / "student.json"), table_of(end))
    write_json(str(run / "open_clip_config.json"), description_of(end))
    lines = [masked_line(step, start, end) for step in range(1, STEPS + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def masked_line(step: int, start: float, end: float) -> dict[str, Any]:
    """A line of metrics.jsonl: with masks up to `CUT`, without from there on."""
    done = min(step / CUT, 1)
    left = start + (end - start) * done
    line: dict[str, Any] = {"step": step, "epoch": step / 10, "samples_seen": 4 * step, "loss": 5 / step}
    line |= {"losses": {"affinity": 5 / step}, "lr": 1e-3, "grad_norm": 1.0, "samples_per_s": 100.0, "seconds": step}
    line |= {"sparsity": 1 - left, "parameters": round(400_000 * left)}
    if step < CUT:
        line |= {"sparsity_target": 1 - end, "lambda": 10 + step / 8, "beta": 10 + step / 9}
        line["losses"] = {"affinity": 3 / step, "sparsity": 2 / step}
    if step % 20 == 0:
        line["eval"] = {"acc1": 0.2 + step / 100 * end, "acc5": 0.9}
    return line


def metrics_line(step: int, loss: float, name: str = "affinity") -> str:
    """A line of metrics.jsonl of a plain run, whose second loss is called ``name``."""
    line = {"step": step, "epoch": 0.5, "samples_seen": step * 64, "loss": loss, "lr": 1e-3, "grad_norm": 1.0}
    line |= {"losses": {"contrastive": loss / 2, name: loss / 2}, "logit_scale": 14.3, "samples_per_s": 100.0}
    measured = {"eval": {"acc1": step / 200, "image_retrieval_recall@5": 0.1}} if step % 25 == 0 else {}
    return json.dumps(line | {"seconds": 0.6 * step} | measured)


def write_plain_run(run: Path, name: str = "affinity", path: str = "") -> Path:
    """A run of 100 steps with one loss that is not finite, a checkpoint, and results on two sets.

    ``name`` is text from outside in the names of losses and the config, ``path`` in the environment.
    """
    (run / "eval").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step_100.pt").write_bytes(bytes(2_500_000))
    lines = [metrics_line(step, 5 / step if step != 7 else math.nan, name) for step in range(1, 101)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_json(str(run / "config.json"), {"recipe": "siclip", "optim": {"lr": 0.001, "betas": [0.9, 0.98]}, "x": name})
    write_json(str(run / "environment.json"), {"torch": "2.7.1", "path": path})
    recall = {f"{way}_retrieval_recall@{k}": k / 20 for way in ("image", "text") for k in (1, 5, 10)}
    results = {
        "cifar": ("zeroshot_classification", {"acc1": 0.615, "acc5": math.nan, "mean_per_class_recall": 0.6}),
        "coco": ("zeroshot_retrieval", recall),
    }
    for dataset, (task, metrics) in results.items():
        about = {"dataset": dataset, "model": "siclip", "pretrained": None, "task": task, "metrics": metrics}
        write_json(str(run / "eval" / f"{dataset}.json"), about)
    return run
