"""What other attention and compiled blocks would bring the teacher, and where a pass's time goes."""

import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F


def attention(block: Any, q_x: Any, k_x: Any = None, v_x: Any = None, attn_mask: Any = None) -> Any:
    """open_clip's ResidualAttentionBlock.attention by SDPA on contiguous rows; a mask is the causal one."""
    attn = block.attn
    count, length, width = q_x.shape
    packed = F.linear(q_x, attn.in_proj_weight, attn.in_proj_bias).view(count, length, 3, attn.num_heads, -1)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=attn_mask is not None)
    return attn.out_proj(out.transpose(1, 2).reshape(count, length, width))


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
    text = loaded.model.text if hasattr(loaded.model, "text") else loaded.model
    blocks = [*loaded.model.visual.transformer.resblocks, *text.transformer.resblocks]
    for block in blocks:
        block.attention = partial(attention, block)
    if not dry:  # the tiny model's mask is another
        with torch.inference_mode():
            after = teacher._encode_tokens(tokens), teacher._encode_images(pixels)
        print("own attention differs by", *((a - b).abs().max().item() for a, b in zip(before, after, strict=True)))
    report("own attention", texts=not dry)
    if dry:
        return
    start = time.perf_counter()
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
    report("own attention, compiled blocks", texts=False)
    print("compiled in", time.perf_counter() - start, flush=True)
    report("own attention, compiled blocks", images=False)
    print("compiled in", time.perf_counter() - start, flush=True)
