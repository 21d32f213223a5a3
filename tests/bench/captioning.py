#!/usr/bin/env python3
"""Captioning: our decoding against what open_clip does per token, in one run.

    python tests/bench/captioning.py [--model coca_ViT-B-32] [--batch 4] [--captions 5] [--tokens 30] [--threads 2]

The rival is the loop of open_clip's `generate` without its transformers dependency: for each of N captions the image is
encoded again and every token feeds the whole prefix through the model. Weights are random (the time does not depend on
them); both sides draw from the same nucleus. Prints seconds of both and the ratio.
"""

import argparse
import time

import torch

from pipeline.coca import Decoding, _choose, generate
from shards_spec.models import load_model


@torch.no_grad()
def recompute(model: torch.nn.Module, images: torch.Tensor, decoding: Decoding, start: int) -> torch.Tensor:
    """(B, T) tokens, the whole prefix again at each token."""
    tokens = torch.full((len(images), 1), start)
    latent, embeddings = model._encode_image(images)
    for _ in range(decoding.max_tokens):
        out = model(images, tokens, image_latent=latent, image_embs=embeddings, output_labels=False)
        chosen = _choose(out["logits"][:, -1], decoding, torch.rand(len(images), dtype=torch.float64), None)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
    return tokens


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="coca_ViT-B-32")
    parser.add_argument("--batch", type=int, default=4, help="pictures")
    parser.add_argument("--captions", type=int, default=5, help="captions per picture")
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = load_model(options.model, random_weights=True).model
    torch.nn.init.normal_(model.text_decoder.text_projection, std=0.02)  # open_clip leaves it uninitialised
    size = model.visual.image_size
    images = torch.randn(options.batch, 3, *((size, size) if isinstance(size, int) else size))
    decoding = Decoding("nucleus", options.captions, max_tokens=options.tokens, min_tokens=options.tokens - 1)
    keys = [str(i) for i in range(options.batch)]
    generate(model, images[:1], keys[:1], decoding, 49406, 49407)  # warm up

    start = time.perf_counter()
    generate(model, images, keys, decoding, 49406, 49407)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(options.captions):
        recompute(model, images, decoding, 49406)
    theirs = time.perf_counter() - start
    print(
        f"{options.model}, {options.batch} pictures x {options.captions} captions x {options.tokens} tokens, "
        f"{options.threads} threads: recompute {theirs:.2f} s, cached {ours:.2f} s, ratio {theirs / ours:.1f}"
    )


if __name__ == "__main__":
    main()
