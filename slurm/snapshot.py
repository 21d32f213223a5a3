"""The code and the environment as they are at submission: a queued job runs what was submitted, whatever changes."""

import hashlib
import logging
import os
import platform
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from shards_spec.files import UserError
from slurm.options import JOBS_ADVICE

log = logging.getLogger(__name__)
CODE = ("clipmill.py", "pipeline", "shards_spec", "slurm", "training")
KEPT = ("CLIPMILL_", "CONDA_", "CUDA_", "LD_LIBRARY_PATH", "MKL_", "NCCL_", "OMP_", "PATH", "PYTHON", "VIRTUAL_ENV")


def snapshot(folder: Path) -> Path:
    """A copy of this code below ``folder``, named by its content; made once, and only believed when it is that.

    Jobs run what lies there, so it belongs to this user alone; where another user or a changed copy has the name, a
    copy of one's own is made beside it. Raises UserError for a path that PYTHONPATH cannot hold.
    """
    if ":" in str(folder):
        raise UserError(
            f"{folder}: PYTHONPATH cannot hold a path with ':', so jobs would not run this code; {JOBS_ADVICE}"
        )
    source = Path(__file__).resolve().parents[1]
    files = {path.relative_to(source): path.read_bytes() for name in CODE for path in _files(source / name)}
    name = _hash(files)[:16]
    for there in (folder / name, folder / f"{name}-{os.getuid()}"):
        if not os.path.lexists(there):
            _copy(files, there)
        if _intact(there, files):
            return there
        log.warning("%s is not this user's copy of the code, or was changed: not used", there)
    there = folder / f"{name}-{secrets.token_hex(4)}"
    _copy(files, there)
    return there


def _copy(files: dict[Path, bytes], there: Path) -> None:
    there.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{there.name}.", suffix=".tmp", dir=there.parent))  # for this user alone
    for path, data in files.items():
        (making / path).parent.mkdir(parents=True, exist_ok=True)
        (making / path).write_bytes(data)
    try:
        os.rename(making, there)
    except OSError:  # another submission was first
        shutil.rmtree(making)
        if not there.is_dir():
            raise


def _intact(there: Path, files: dict[Path, bytes]) -> bool:
    """Whether a folder is this user's alone and has these files and no others, links neither.

    Compiled files, which Python believes without looking at the source, go: jobs make them again.
    """
    mine = there.lstat()
    if not stat.S_ISDIR(mine.st_mode) or mine.st_uid != os.getuid():
        return False
    there.chmod(0o700)
    for compiled in [path for path in there.rglob("__pycache__") if not path.is_symlink()]:
        shutil.rmtree(compiled)
    found = [path for path in there.rglob("*") if path.is_symlink() or not path.is_dir()]
    if any(path.is_symlink() or not path.is_file() for path in found):
        return False
    return {path.relative_to(there): path.read_bytes() for path in found} == files


def _hash(files: dict[Path, bytes]) -> str:
    digest = hashlib.sha256()
    for path, data in sorted(files.items()):
        digest.update(f"{path} {len(data)}\n".encode() + data)
    return digest.hexdigest()


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
