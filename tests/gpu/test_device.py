"""What `auto` means where there is a card."""

from cuda_only import only_on_cuda

from shards_spec.models import pick_device, pick_devices
from shards_spec.precision import resolve_precision


def test_auto_is_every_card_and_bf16(device):
    import torch

    precise = resolve_precision("auto", device)
    if device.startswith("cuda"):
        assert pick_devices("auto") == [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        assert precise == ("bf16" if torch.cuda.get_device_capability()[0] >= 8 else precise)
    else:
        assert precise == "fp32"


def test_the_card_is_used_by_default(device):
    only_on_cuda(device)
    assert pick_device("auto").startswith("cuda")
