"""A tiny dataset with a teacher of weights, its cache, and students that may inherit from it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from small_pruned import shake
from small_training import SIZES, TINY_RESNET, TINY_VIT, tiny_clip, tiny_config, write_packed, write_teacher

from shards_spec.manifest import write_stage
from training.config import ModelConfig
from training.configs.tinyclip import STUDENT, TinyclipConfig
from training.runs.student import new_student

TEACHER = {"layers": 3, "width": 64}  # heads of width 16 in both towers


def edit_text(folder: Path, **fields: Any) -> None:
    """Change the text tower of a model's folder."""
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"] |= fields
    path.write_text(json.dumps(config))


def write_weights(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> str:
    """Give a model's folder weights whose norms and biases are not those of a new one; returns its model name."""
    model = new_student(ModelConfig(f"local-dir:{folder}"), seed).model
    shake(model)
    tensors = {name: value.to(dtype).contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, str(folder / "open_clip_model.safetensors"))
    return f"local-dir:{folder}"


def write_tinyclip_root(root: Path) -> str:
    """A packed dataset with a planted cache, models teacher, resnet (with weights), clip and half (without)."""
    write_teacher(str(root), write_packed(str(root), SIZES))
    block = {"config": {}, "shards": len(SIZES), "counts": {"success": sum(SIZES)}, "metrics": {}}
    write_stage(str(root), "pack", block)
    models = root / "models"
    tiny_clip(models / "teacher", vision={**TINY_VIT, **TEACHER})
    edit_text(models / "teacher", width=64, heads=4, layers=3)
    write_weights(models / "teacher")
    tiny_clip(models / "resnet", vision=TINY_RESNET)
    write_weights(models / "resnet")
    tiny_clip(models / "clip")
    tiny_clip(models / "half", vision={**TINY_VIT, "layers": 2, "width": 48})
    edit_text(models / "half", width=48, heads=3, layers=2)
    return str(root)


def config_of(root: str, out: str | Path, inherit: str = "manual", **fields: Any) -> TinyclipConfig:
    """A small config that inherits from the teacher; with masks of quick learning."""
    wanted = {"inherit": inherit, "teacher_weights": f"local-dir:{root}/models/teacher", **fields}
    if wanted.get("teacher_from") != "live":
        wanted = {"teacher": "planted"} | wanted
    if inherit == "auto" or "stage_models" in fields:
        wanted = {"model": STUDENT} | wanted
    if inherit == "auto":
        wanted = {"mask_lr": 1.2, "sparsity_ramp": 2} | wanted
        wanted = ({} if "stages" in fields else {"sparsity": 0.5}) | wanted
        wanted = ({} if "stage_prune_steps" in fields else {"prune_step": 4}) | wanted
    config: TinyclipConfig = tiny_config("tinyclip", root, str(out), **wanted)
    return config


def plain_config(root: str, out: str | Path = "unused", student: str = "clip", **fields: Any) -> TinyclipConfig:
    """A config of the small student models/STUDENT that inherits nothing."""
    model = f"local-dir:{root}/models/{student}"
    return config_of(root, out, **{"inherit": "none", "teacher_weights": "", "model": model, **fields})
