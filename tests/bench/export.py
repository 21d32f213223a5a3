#!/usr/bin/env python3
"""Images and texts per second of a student in torch, in compiled torch, and in onnxruntime with 32 and 8 bits.

    python tests/bench/export.py [--models NAME …] [--batches 1 16] [--seconds 2] [--threads 2] [--skip-compiled]

Models are written by the functions of `clipmill export` and run in turn; a figure is the median of the passes that fit
into ``--seconds``, by the clock; with ``--threads 1`` by the time of the CPU, which stands a busy machine. The branches
of MobileCLIP and SiCLIP are fused in all rows. Weights are random, which changes no speed; ``static`` takes its scales
from noise. Per row: images/s and texts/s by batch size, and MB of the files.
"""

import argparse
import logging
import os
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from shards_spec.models import LoadedModel, load_model
from training.export.comparison import Encoders, encoders_of, passes_per_second
from training.export.config import ExportConfig
from training.export.onnx_int8 import quantize
from training.export.onnx_model import IMAGE_FILE, PIXELS, TEXT_FILE, TOKENS, load_onnx
from training.export.probe import noise
from training.export.reparameterized import has_branches, reparameterized
from training.export.to_onnx import write

MODELS = ("MobileCLIP-S0", "SiCLIP-S0", "TinyCLIP-ViT-40M-32-Text-19M")


def compiled(student: LoadedModel) -> Encoders:
    """The towers by torch.compile, for batches of any size."""
    image, text = (torch.compile(encode) for encode in (student.model.encode_image, student.model.encode_text))
    return Encoders(
        lambda pixels: image(pixels, normalize=True), lambda texts: text(student.tokenizer(texts), normalize=True)
    )


def rates(encoders: Encoders, student: LoadedModel, args: argparse.Namespace) -> list[float]:
    """Images/s of each batch size, then texts/s."""
    side = student.image_size
    clock = time.process_time if args.threads == 1 else time.perf_counter
    found = list[float]()
    for batch in args.batches:
        pixels = torch.randn(batch, 3, side, side)
        found.append(batch * passes_per_second(lambda pixels=pixels: encoders.image(pixels), args.seconds, clock))
    for batch in args.batches:
        texts = [f"a photo of {number} dogs on a beach" for number in range(batch)]
        found.append(batch * passes_per_second(lambda texts=texts: encoders.text(texts), args.seconds, clock))
    return found


def measure(name: str, args: argparse.Namespace) -> None:
    """Print the rows of a model."""
    student = load_model(name, random_weights=True)
    if has_branches(student):
        student = reparameterized(student)
    show(name, "torch", rates(encoders_of(student), student, args))
    if not args.skip_compiled:
        show(name, "torch compiled", rates(compiled(student), student, args))
    with TemporaryDirectory() as local:
        fp32 = Path(local, "fp32")
        write(fp32, student, ExportConfig("run", str(fp32), format="onnx"))
        probe = noise(student)
        inputs = {IMAGE_FILE: (PIXELS, probe.pixels), TEXT_FILE: (TOKENS, student.tokenizer(probe.texts))}
        for kind in ("fp32", "dynamic", "static"):
            folder = Path(local, kind)
            if kind != "fp32":
                shutil.copytree(fp32, folder)
                for file, (input_name, tensor) in inputs.items():
                    quantize(folder / file, kind, input_name, tensor)
            megabytes = sum(path.stat().st_size for path in folder.glob("*.onnx")) / 1e6
            label = f"onnx {'' if kind == 'fp32' else 'int8 '}{kind}"
            exported = encoders_of(load_onnx(str(folder), torch.get_num_threads()))
            show(name, label, rates(exported, student, args), f"{megabytes:.0f}")


def show(name: str, label: str, found: list[float], megabytes: str = "") -> None:
    """Print one row of the table."""
    print(f"| {name} | {label} | {' | '.join(f'{rate:.1f}' for rate in found)} | {megabytes} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-compiled", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    print(f"torch {torch.__version__}, {args.threads} threads, load {os.getloadavg()[0]:.1f}\n")
    columns = [f"{what}/s, batch {batch}" for what in ("images", "texts") for batch in args.batches]
    print(f"| model | runs in | {' | '.join(columns)} | MB |\n|{'---|' * (len(columns) + 3)}")
    for name in args.models:
        measure(name, args)


if __name__ == "__main__":
    main()
