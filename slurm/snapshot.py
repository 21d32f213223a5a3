"""The code and the environment as they are at submission: a queued job runs what was submitted, whatever changes."""

import hashlib
import os
import platform
import shutil
import socket
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

CODE = ("clipmill.py", "pipeline", "shards_spec", "slurm", "training")
KEPT = ("CLIPMILL_", "CONDA_", "CUDA_", "LD_LIBRARY_PATH", "MKL_", "NCCL_", "OMP_", "PATH", "PYTHON", "VIRTUAL_ENV")


def snapshot(folder: Path) -> Path:
    """A copy of this code below ``folder``, named by its content; made once."""
    source = Path(__file__).resolve().parents[1]
    files = {path.relative_to(source): path.read_bytes() for name in CODE for path in _files(source / name)}
    digest = hashlib.sha256()
    for path, data in sorted(files.items()):
        digest.update(f"{path} {len(data)}\n".encode() + data)
    there = folder / digest.hexdigest()[:16]
    if not there.is_dir():
        making = folder / f".{there.name}.{socket.gethostname()}.{os.getpid()}.tmp"
        for path, data in files.items():
            (making / path).parent.mkdir(parents=True, exist_ok=True)
            (making / path).write_bytes(data)
        try:
            os.rename(making, there)
        except OSError:  # another submission was first
            shutil.rmtree(making)
            if not there.is_dir():
                raise
    return there


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [one for one in path.rglob("*") if one.is_file() and "__pycache__" not in one.parts]


def environment() -> dict[str, Any]:
    """Where a submission was made and with what; of the variables those that change how code runs."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": socket.gethostname(),
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": dict(sorted((found.name, found.version) for found in distributions())),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(KEPT)},
    }
