"""The card's own limits, against which the other figures are held: a large bf16 product, and copying memory."""

import torch
from figures import ceiling, figure, options, seconds_of


def main() -> None:
    """Measure and report."""
    where = options(__doc__)
    figure("card: bf16 product of 8192 x 8192", ceiling(where.device) / 1e12, "TFLOP/s")
    source = torch.randn(2**24 if where.dry else 2**30, device=where.device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds_of(lambda: target.copy_(source), where.device)
    figure("card: memory, bytes read and written", copied / 1e9, "GB/s")
    if where.device.startswith("cuda"):
        on_host = torch.empty(2**28, pin_memory=True)
        sent = on_host.nbytes / seconds_of(lambda: target[: 2**28].copy_(on_host, non_blocking=True), where.device)
        figure("card: copy from pinned host memory", sent / 1e9, "GB/s")


if __name__ == "__main__":
    main()
