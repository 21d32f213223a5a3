"""What a run's numbers may depend on besides its config."""

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

VERSIONED = ("clipmill", "torch", "open_clip_torch", "timm", "numpy", "pillow", "pyarrow")


def environment(device: str) -> dict[str, Any]:
    """Return versions, code revision, host and device of this process."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONED},
        "git": git_revision(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def git_revision() -> str | None:
    """Return the commit of the checkout this file lies in, ``+`` when it was changed since; None outside a checkout."""
    here = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", ".").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None
