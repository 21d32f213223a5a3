"""The code and the environment at submission: a queued job runs the code that was submitted, whatever changes later."""

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
from itertools import chain
from pathlib import Path
from typing import Any

from shards_spec.files import UserError
from slurm.options import JOBS_ADVICE

log = logging.getLogger(__name__)
CODE = ("clipmill.py", "pipeline", "shards_spec", "slurm", "training")
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")  # how the names of variables end that hold secrets
KEPT = ("CLIPMILL_", "CONDA_", "CUDA_", "LD_LIBRARY_PATH", "MKL_", "NCCL_", "OMP_", "PATH", "PYTHON", "VIRTUAL_ENV")


def snapshot(folder: Path) -> Path:
    """A copy of this code below ``folder``, named by its content; made once, and used only when it is unchanged.

    Jobs run what lies there, so it belongs to this user alone; where another user or a changed copy has the name, a
    new copy is made beside it. Raises UserError for a path that PYTHONPATH cannot hold.
    """
    if ":" in str(folder):
        raise UserError(
            f"{folder}: PYTHONPATH cannot hold a path with ':', so jobs would not run this code; {JOBS_ADVICE}"
        )
    source = Path(__file__).resolve().parents[1]
    paths = chain.from_iterable(_files(source / name) for name in CODE)
    files = {path.relative_to(source): path.read_bytes() for path in paths}
    name = _hash(files)[:16]
    for copy in (folder / name, folder / f"{name}-{os.getuid()}"):
        if not os.path.lexists(copy):
            _write_copy(files, copy)
        if _is_intact(copy, files):
            return copy
        log.warning("%s is not this user's copy of the code, or was changed: not used", copy)
    copy = folder / f"{name}-{secrets.token_hex(4)}"
    _write_copy(files, copy)
    return copy


def _write_copy(files: dict[Path, bytes], copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{copy.name}.", suffix=".tmp", dir=copy.parent))  # for this user alone
    for path, data in files.items():
        (temporary / path).parent.mkdir(parents=True, exist_ok=True)
        (temporary / path).write_bytes(data)
    try:
        os.rename(temporary, copy)
    except OSError:  # another submission was first
        shutil.rmtree(temporary)
        if not copy.is_dir():
            raise


def _is_intact(copy: Path, files: dict[Path, bytes]) -> bool:
    """Whether a folder is this user's alone and has these files and no others, nor links.

    Compiled files, which Python runs without comparing them with the source, are deleted: jobs make them again.
    """
    status = copy.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        return False
    copy.chmod(0o700)
    for compiled in [path for path in copy.rglob("__pycache__") if not path.is_symlink()]:
        shutil.rmtree(compiled)
    found = [path for path in copy.rglob("*") if path.is_symlink() or not path.is_dir()]
    if any(path.is_symlink() or not path.is_file() for path in found):
        return False
    return {path.relative_to(copy): path.read_bytes() for path in found} == files


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
    """Where a submission was made and with what; of the variables those that change how code runs, but no secrets."""
    packages = [found.metadata for found in distributions()]  # read here, once: a name alone takes as long
    kept = [name for name in sorted(os.environ) if name.startswith(KEPT) and not name.endswith(SECRET)]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": socket.gethostname(),
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": dict(sorted((one["Name"], one["Version"]) for one in packages)),
        "variables": {name: os.environ[name] for name in kept},
    }
