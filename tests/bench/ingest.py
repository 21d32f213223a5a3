#!/usr/bin/env python3
"""`clipmill ingest` against img2dataset 1.47: the same loopback server, the same photos, the same run.

    python tests/bench/ingest.py [--photos 3000] [--pairs 5] [--work FOLDER] [--shard-sizes 1000 1500]

img2dataset is installed into an environment of its own below FOLDER. Both write WebDataset shards of JPEGs of quality
95, shorter side 256, ratio kept, smaller images not enlarged; img2dataset has as many processes as there are cores
and 64 threads in each. The server is nginx where it is installed, else demo/serve.py.

Two rates per run. `command`: photos by the seconds from the start of the command to its end. `steady`: photos by the
seconds from the first shard's start to the last one's end, both from the shards' own stats, so without start-up.
`cpu` is the milliseconds of processor time per photo of all processes of a command, the server's left out; the
ratio of two does not depend on what else the machine does. Memory is the largest sum of the proportional set sizes of a
command's processes, looked at twice a second. The limit is decoding, resizing and encoding alone, our own, in a
process per core, without network, tar or Parquet.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from statistics import median

import pyarrow.parquet as pq
from photos import write_photos

from pipeline.ingest.images import ImageRules, convert

ROOT = Path(__file__).parents[2]
PORT = 8357
# set, every process would compile the modules that it imports
KEEPING_MODULES = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
NGINX = """
worker_processes 1; daemon off; pid {work}/nginx.pid; error_log {work}/nginx.err;
events {{ worker_connections 8192; }}
http {{ access_log off; sendfile on; keepalive_requests 1000000; default_type image/jpeg;
  client_body_temp_path {work}; proxy_temp_path {work}; fastcgi_temp_path {work}; uwsgi_temp_path {work};
  scgi_temp_path {work}; server {{ listen 127.0.0.1:{port} backlog=4096; root {work}/photos; }} }}
"""


@contextmanager
def served(work: Path):
    """A web server for ``work/photos``."""
    if nginx := shutil.which("nginx"):
        (work / "nginx.conf").write_text(NGINX.format(work=work, port=PORT))
        command = [nginx, "-c", str(work / "nginx.conf")]
    else:
        command = [sys.executable, str(ROOT / "demo/serve.py"), str(work / "photos"), str(PORT)]
    print("server:", Path(command[0]).name if nginx else "demo/serve.py")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        time.sleep(2)
        yield
    finally:
        process.terminate()
        process.wait()


def rival(work: Path) -> Path:
    """img2dataset's command, installed when it is not there yet."""
    folder = work / "img2dataset-1.47"
    command = folder / "bin/img2dataset"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin/pip", "install", "-q", "img2dataset==1.47.0"], check=True)
    return command


def children(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    try:
        text = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:
        return []
    return [pid, *chain.from_iterable(children(int(child)) for child in text.split())]


def resident(pid: int) -> int:
    """Proportional set size in KiB: pages that processes share are counted once."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except OSError:
        return 0


def cpu_seconds() -> float:
    """Processor time of all commands that have ended, and of their own ended processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(command: list[str], output: Path, photos: int) -> dict[str, float]:
    """Run a command that fills ``output`` with shards; its rates, its processor time and its memory."""
    shutil.rmtree(output.parent if output.name == "raw" else output, ignore_errors=True)
    peak = 0
    used = cpu_seconds()
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=KEEPING_MODULES)
        while process.poll() is None:
            peak = max(peak, sum(map(resident, children(process.pid))))
            time.sleep(0.5)
        seconds = time.monotonic() - start
        used = cpu_seconds() - used
        log.seek(0)
        if process.returncode:
            sys.exit(f"{command[0]} failed:\n{log.read().decode()[-3000:]}")
    stats = [json.loads(path.read_text()) for path in sorted(output.glob("*_stats.json"))]
    good = sum(entry["successes"] for entry in stats)
    if good != photos:
        sys.exit(f"{command[0]}: {good} of {photos} photos")
    span = max(entry["end_time"] for entry in stats) - min(entry["start_time"] for entry in stats)
    return {"command": photos / seconds, "steady": photos / span, "cpu": 1000 * used / photos, "MiB": peak / 1024}


def commands(work: Path, size: int, source: Path) -> dict[str, tuple[list[str], Path]]:
    """What runs, and where its shards lie."""
    ours = [sys.executable, str(ROOT / "clipmill.py"), "ingest", str(work / "ours"), "--source", str(source)]
    ours += ["--allow-private", "--shard-size", str(size), "--image-size", "256"]
    theirs = [str(rival(work)), "--url_list", str(source), "--output_folder", str(work / "theirs")]
    options = {
        "input_format": "tsv",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "processes_count": os.cpu_count(),
        "thread_count": 64,
        "image_size": 256,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "encode_quality": 95,
        "number_sample_per_shard": size,
        "enable_wandb": False,
    }
    for name, value in options.items():
        theirs += [f"--{name}", str(value)]
    return {"clipmill": (ours, work / "ours/raw"), "img2dataset": (theirs, work / "theirs")}


def sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Link to pixels of the image in the shard."""
    sizes: dict[str, tuple[int, int]] = {}
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path, columns=["url", "width", "height"])
        sizes |= {row["url"]: (row["width"], row["height"]) for row in table.to_pylist()}
    return sizes


def _convert(path: Path) -> int:
    return len(convert(path.read_bytes(), ImageRules()).data)


def limit(work: Path, photos: int) -> float:
    """Photos per second of pure decoding, resizing and encoding, all cores."""
    paths = [work / "photos" / f"{number:05d}.jpg" for number in range(photos)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_convert, paths[:200], chunksize=20))
        start = time.monotonic()
        list(pool.map(_convert, paths, chunksize=20))
        return photos / (time.monotonic() - start)


def spread(values: list[float], form: str = ".2f") -> str:
    """``min / median / max``."""
    return " / ".join(format(value, form) for value in (min(values), median(values), max(values)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=3000)
    parser.add_argument("--pairs", type=int, default=5, help="runs of each, one after the other")
    parser.add_argument("--shard-sizes", type=int, nargs="+", default=[1000])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "clipmill-bench")
    options = parser.parse_args()
    work, photos = options.work.resolve(), options.photos
    work.mkdir(parents=True, exist_ok=True)
    total = write_photos(work / "photos", photos)
    print(f"{photos} photos of 300 to 1300 px, {total / photos / 1000:.0f} kB each, {os.cpu_count()} cores")
    source = work / "list.tsv"
    lines = [f"http://127.0.0.1:{PORT}/{number:05d}.jpg\tphoto {number}\n" for number in range(photos)]
    source.write_text("url\tcaption\n" + "".join(lines))
    with served(work):
        for size in options.shard_sizes:
            runs: dict[str, list[dict[str, float]]] = {"clipmill": [], "img2dataset": []}
            for _ in range(options.pairs):
                for name, (command, output) in commands(work, size, source).items():
                    runs[name].append(measure(command, output, photos))
            if sizes(work / "ours/raw") != sizes(work / "theirs"):
                sys.exit("the two did not make images of the same sizes")
            print(f"\n{size} inputs per shard; min / median / max of {options.pairs} pairs")
            for name, found in runs.items():
                forms = {"cpu": ".2f"}
                shown = (f"{key} {spread([run[key] for run in found], forms.get(key, '.0f'))}," for key in found[0])
                print(f"  {name:12}", *shown)
            pairs = list(zip(runs["clipmill"], runs["img2dataset"], strict=True))
            for key in pairs[0][0]:
                print(f"  ratio, {key}: {spread([ours[key] / theirs[key] for ours, theirs in pairs])}")
    pure = limit(work, photos)
    steady = median(run["steady"] for run in runs["clipmill"])
    print(
        f"\ndecoding, resizing, encoding alone: {pure:.0f} photos/s; the last steady rate above is "
        f"{100 * steady / pure:.0f} % of it"
    )


if __name__ == "__main__":
    main()
