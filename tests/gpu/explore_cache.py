"""What open_clip's attention costs, what compiled blocks would bring, and where a pass's time goes."""

import time
from typing import Any
from unittest.mock import patch

import torch
from open_clip.transformer import ResidualAttentionBlock


def top_kernels(work: Any, what: str, device: str) -> None:
    """Print the kernels that took longest."""
    from torch.profiler import ProfilerActivity, profile

    work()
    activities = [ProfilerActivity.CUDA] if device == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        work()
        if device == "cuda":
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(f"--- {what}", profiler.key_averages().table(sort_by=key, row_limit=18, max_name_column_width=90), flush=True)


def explore(loaded: Any, dry: bool, device: str) -> None:
    """Report."""
    from figures import figure
    from measure_cache import IMAGE, TEXT, images_per_s, share_of_ceiling, texts_per_s

    passes = 2 if dry else 6

    def report(what: str, images: bool = True, texts: bool = True) -> None:
        if images:
            rate = images_per_s(loaded, 256, passes)
            figure(f"explore: images, {what}", rate, "views/s", share=share_of_ceiling(IMAGE, rate, device))
        if texts:
            rate = texts_per_s(loaded, 256, 4 * passes)
            figure(f"explore: texts, {what}", rate, "texts/s", share=share_of_ceiling(TEXT, rate, device))

    side = loaded.image_size
    pixels = torch.randint(0, 256, (64, side, side, 3), dtype=torch.uint8, device=device)
    tokens = loaded.tokenizer(["a photo of a thing on a table"] * 256).to(device)
    from pipeline.cache.teacher import Teacher

    teacher = Teacher(loaded, 64)
    with torch.inference_mode():
        top_kernels(lambda: teacher._encode_images(pixels), "images, 64 rows", device)
        top_kernels(lambda: teacher._encode_tokens(tokens), "texts, 256 rows", device)
        before = teacher._encode_tokens(tokens), teacher._encode_images(pixels)
    blocks = [block for block in loaded.model.modules() if isinstance(block, ResidualAttentionBlock)]
    own = [vars(block).pop("attention", None) for block in blocks]
    with torch.inference_mode():
        after = teacher._encode_tokens(tokens), teacher._encode_images(pixels)
    differences = [(a - b).abs().max().item() for a, b in zip(before, after, strict=True)]
    print("open_clip's attention differs by", differences, "of", [a.abs().max().item() for a in before], flush=True)
    with patch("pipeline.cache.teacher.fuse_attention", lambda model: 0):
        report("open_clip's attention")
    if dry:
        return
    for block, fused in zip(blocks, own, strict=True):
        block.attention = fused
    start = time.perf_counter()
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
    report("compiled blocks", texts=False)
    print("compiled in", time.perf_counter() - start, flush=True)
    report("compiled blocks", images=False)
    print("compiled in", time.perf_counter() - start, flush=True)
