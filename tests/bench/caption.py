#!/usr/bin/env python3
"""Captioning: captions per second against open_clip's own `generate`, in one run, and where the time goes.

    python tests/bench/caption.py [--model coca_ViT-B-32] [--batches 4 32] [--captions 1 5] [--tokens 30] [--threads 2]
    python tests/bench/caption.py --device cuda --precision bf16 --model coca_ViT-L-14 --batches 64 256 --rival none
                                  [--no-graphs]

The rival runs in a process of its own with transformers 4.46, which its `generate` needs (`make test` installs it to
VENV/transformers-4.46; or --rival DIR). Weights are random, which the time does not depend on; both sides encode the
images, draw by top-k 50 and write captions of `--tokens` tokens with the start token, none ends early. For N captions
the rival has to be called N times; one call is timed, the faster of two.

Operations are counted by torch's own formulas on both sides (multiply and add are two; products, attention,
convolutions). The limits are this machine's: a large product, and reading memory.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

if TYPE_CHECKING:  # the rival's process has another transformers, and does not import clipmill
    from pipeline.caption.coca import Coca, EncodedImages

CC12M = 12_423_374  # rows of the published list
START, END = 49406, 49407


def build(model: str, device: str, precision: str) -> nn.Module:
    """The model with random weights, on both sides the same way."""
    import open_clip

    torch.manual_seed(0)
    name = precision if precision == "fp32" else f"pure_{precision}"
    built = open_clip.create_model(model, device=device, precision=name).eval()
    nn.init.normal_(built.text_decoder.text_projection, std=0.02)  # open_clip leaves it uninitialised
    return built


def random_images(model: nn.Module, count: int) -> torch.Tensor:
    """Noise of the model's size."""
    size = model.visual.image_size
    weight = model.text_decoder.text_projection
    return torch.randn(count, 3, *(size if isinstance(size, tuple) else (size, size))).to(weight.device, weight.dtype)


def clock(work, device: str) -> float:
    """Seconds of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Operations(TorchDispatchMode):
    """Adds up the operations of products, attention and convolutions by torch's own formulas, in units of 1e9."""

    total = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func._overloadpacket
        if packet is torch.ops.mkldnn._linear_pointwise:
            out = func(*args, **kwargs)
            self.total += 2 * out.numel() * args[0].shape[-1] / 1e9
            return out
        if packet not in flop_registry:
            with self:  # what it is made of
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        self.total += flop_registry[packet](*args, **kwargs, out_val=out) / 1e9
        return out


def count(work) -> float:
    """Operations of one call, in units of 1e9."""
    torch.backends.mha.set_fastpath_enabled(False)  # it is one operation that has no formula
    with Operations() as operations, torch.no_grad():
        work()
    torch.backends.mha.set_fastpath_enabled(True)
    return operations.total


def rival(options: argparse.Namespace) -> None:
    """Prints JSON: seconds of one caption for each image of a batch, operations of one caption of one image."""
    torch.set_num_threads(options.threads)
    model = build(options.model, options.device, options.precision)

    def work(images: torch.Tensor) -> None:
        model.generate(
            images, generation_type="top_k", top_k=50, seq_len=options.tokens, min_seq_len=options.tokens - 1
        )

    operations = count(lambda: work(random_images(model, 1)))
    seconds = {}
    for batch in options.batches:
        images = random_images(model, batch)
        seconds[batch] = min(clock(lambda i=images: work(i), options.device) for _ in range(2))
    print(json.dumps({"operations": operations, "seconds": seconds}))


def product_limit(device: str, dtype: torch.dtype) -> float:
    """1e9 operations per second of a large product, the best of five."""
    side = 2048 if device == "cpu" else 8192
    a = torch.randn(side, side, device=device, dtype=dtype)
    (a @ a).sum()
    return 2 * side**3 / min(clock(lambda: a @ a, device) for _ in range(5)) / 1e9


def reading_limit(device: str) -> float:
    """1e9 bytes per second of reading memory, the best of five."""
    long = torch.zeros(2**26 if device == "cpu" else 2**30, device=device)
    long.sum()
    return long.nbytes / min(clock(lambda: long.sum(), device) for _ in range(5)) / 1e9


class Writer:
    """Writes captions of ``tokens`` tokens, the start token counted: drawn by ``method``, none ends early."""

    def __init__(self, coca: "Coca", tokens: int, graphs: bool, method: str = "top_k") -> None:
        from pipeline.caption.cuda_graphs import graphs_for
        from pipeline.caption.decoding import Decoding
        from pipeline.caption.static_sampling import StaticSampler

        self.coca = coca
        self.decoding = Decoding(method, top_k=50, top_p=0.9, min_tokens=tokens - 2, max_tokens=tokens - 1)
        self.sampler = StaticSampler(coca, self.decoding, graphs_for(coca.device)) if graphs else None

    def write(self, encoded: "EncodedImages", captions: int) -> None:
        """``captions`` of each image."""
        from pipeline.caption.sampling import generate

        pairs = list(product(range(len(encoded.features)), range(captions)))
        owners = [image for image, _ in pairs]
        names = [f"{image}/{n}" for image, n in pairs]
        if self.sampler:
            self.sampler.generate(encoded, owners, names)
        else:
            generate(self.coca, encoded, owners, names, self.decoding)


def weight_bytes(coca: "Coca") -> int:
    """Bytes of the weights that a token reads."""
    decoded = (coca.text.transformer, coca.decoder.resblocks, coca.decoder.cross_attn)
    read = coca.decoder.text_projection.numel()
    read += sum(p.numel() for p in chain.from_iterable(part.parameters() for part in decoded))
    kv = sum(b.block.attn.in_proj_weight.numel() * 2 // 3 for b in coca.cross_blocks)
    return (read - kv) * coca.decoder.text_projection.element_size()


def bytes_read(coca: "Coca", images: int, captions: int, tokens: int) -> int:
    """Bytes that writing must read at least: per token weights, the images' keys and values, the captions' caches."""
    encoded = coca.encode_images(random_images(coca.model, 1))
    cross = sum(layer.nbytes for layer in (*encoded.keys, *encoded.values))
    blocks = [*coca.text_blocks, *coca.blocks]
    cached = sum(2 * block.heads * block.head_width for block in blocks) * coca.dtype.itemsize
    steps = tokens - 1
    return steps * (weight_bytes(coca) + images * cross) + images * captions * cached * steps * (steps + 1) // 2


def ours(options: argparse.Namespace) -> dict:
    """Seconds, parts and operations per (batch, captions)."""
    import open_clip

    from pipeline.caption.coca import Coca

    coca = Coca(build(options.model, options.device, options.precision), open_clip.tokenizer.SimpleTokenizer())
    writer = Writer(coca, options.tokens, options.graphs)
    eager = Writer(coca, options.tokens, graphs=False)
    measured = {}
    for batch in options.batches:
        images = random_images(coca.model, batch)
        encoded = coca.encode_images(images)
        for captions in options.captions:
            one = images[:1]
            seen = coca.encode_images(one)
            for _ in range(3 if options.graphs else 1):  # graphs are captured when their work comes again
                writer.write(encoded, captions)
            measured[f"{batch} {captions}"] = {
                "encode": min(
                    clock(lambda i=images: coca.encode_images(i), options.device) for _ in range(options.repeat)
                ),
                "write": min(
                    clock(lambda e=encoded, c=captions: writer.write(e, c), options.device)
                    for _ in range(options.repeat)
                ),
                "encode operations": batch * count(lambda o=one: coca.encode_images(o)),
                "write operations": batch * count(lambda e=seen, c=captions: eager.write(e, c)),
            }
    return {"measured": measured, "weights": weight_bytes(coca), "dtype": coca.dtype}


def main() -> None:
    """Measure both sides and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="coca_ViT-B-32")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 32], help="images")
    parser.add_argument("--captions", type=int, nargs="+", default=[1, 5], help="captions per image")
    parser.add_argument("--tokens", type=int, default=30, help="open_clip's seq_len")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--repeat", type=int, default=3, help="of ours; the fastest counts. The rival runs once")
    parser.add_argument(
        "--graphs", action=argparse.BooleanOptionalAction, help="memory that stays for CUDA graphs; by default on a GPU"
    )
    parser.add_argument("--rival", default=str(Path(sys.prefix) / "transformers-4.46"), help="a folder, or none")
    parser.add_argument("--rival-side", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rival_side:
        return rival(options)
    if options.graphs is None:
        options.graphs = options.device != "cpu"
    torch.set_num_threads(options.threads)
    theirs = None
    if options.rival != "none":
        command = [sys.executable, __file__, "--rival-side", *sys.argv[1:]]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": options.rival}, stdout=subprocess.PIPE, text=True, check=True
        )
        theirs = json.loads(done.stdout.splitlines()[-1])
    found = ours(options)
    fastest = product_limit(options.device, found["dtype"])
    reading = reading_limit(options.device)
    where = torch.cuda.get_device_name() if options.device != "cpu" else f"{options.threads} CPU threads"
    print(f"{options.model}, {options.tokens} tokens, {options.precision}, {where}")
    print(f"limits: a large product {fastest:,.0f} GFLOP/s, reading {reading:.1f} GB/s")
    for setting, part in found["measured"].items():
        batch, captions = map(int, setting.split())
        seconds, operations = part["encode"] + part["write"], part["encode operations"] + part["write operations"]
        number = batch * captions
        line = f"{batch:4} images x {captions}: {number / seconds:8.2f} captions/s"
        if theirs:
            rival_seconds = captions * theirs["seconds"][str(batch)]
            fewer = theirs["operations"] * number / operations
            line += f", open_clip {number / rival_seconds:5.2f}: {rival_seconds / seconds:.1f} x"
            line += f"; operations {fewer:.1f} x fewer"
        print(line)
        steps = options.tokens - 1
        print(
            f"       images {part['encode']:6.2f} s at {part['encode operations'] / part['encode']:6,.0f} GFLOP/s, "
            f"tokens {part['write']:6.2f} s at {part['write operations'] / part['write']:6,.0f} GFLOP/s, weights at "
            f"{steps * found['weights'] / part['write'] / 1e9:.1f} GB/s"
        )
        if options.device != "cpu" and captions == 5:
            print(f"       12.4 M images x 5 captions: {CC12M * 5 / (number / seconds) / 3600:.1f} hours")
    return None


if __name__ == "__main__":
    main()
