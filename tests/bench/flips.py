#!/usr/bin/env python3
"""How often a caption depends on its batch, which only the last bits of float sums can bring about.

    python tests/bench/flips.py ROOT --model local-dir:DIR [--images 500] [--batches 1 3 32] [--precision fp32]

Writes five nucleus captions of each of ROOT's first images in batches of different sizes (and with the images in
reverse) and compares the tokens with those of batches of 64.
"""

import argparse
from itertools import chain, islice

import torch

from pipeline.caption.captioner import Captioner
from pipeline.caption.decoding import Decoding
from pipeline.caption.requests import CaptionRequest
from shards_spec.files import join
from shards_spec.images import decode_rgb
from shards_spec.layout import shard_name
from shards_spec.manifest import shard_ids
from shards_spec.models import load_model
from shards_spec.tar import read_shard


def main() -> None:
    """Print the share of captions that differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root")
    parser.add_argument("--model", required=True)
    parser.add_argument("--pretrained")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 3, 32])
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    loaded = load_model(options.model, options.pretrained, device=options.device, precision=options.precision)
    tars = (join(options.root, "raw", f"{shard_name(shard)}.tar") for shard in shard_ids(join(options.root, "raw")))
    samples = islice(chain.from_iterable(map(read_shard, tars)), options.images)
    captioner = Captioner(loaded, Decoding(), 5, batch_size=64)
    requests = [CaptionRequest(s.key, captioner.preprocess(decode_rgb(s.image))[0], tuple(range(5))) for s in samples]

    def texts(work: list[CaptionRequest], batch_size: int) -> dict[str, list[tuple[str, int]]]:
        captioner.batch_size = batch_size
        answers = captioner.caption(work)
        return {
            request.key: [(c.text, c.num_tokens) for c in answer.captions]
            for request, answer in zip(work, answers, strict=True)
        }

    expected = texts(requests, 64)
    tokens = sum(length for _, length in chain.from_iterable(expected.values()))
    for batch_size in options.batches:
        found = texts(list(reversed(requests)), batch_size)
        pairs = chain.from_iterable(zip(row, found[key], strict=True) for key, row in expected.items())
        differ = sum(one != other for one, other in pairs)
        print(
            f"batches of {batch_size}, reversed, against 64: {differ} of {5 * len(expected)} captions differ "
            f"({tokens:,} tokens; {options.precision}, {torch.get_num_threads()} threads)"
        )


if __name__ == "__main__":
    main()
