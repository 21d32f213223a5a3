"""Linear layers for decoding, with weights reordered once for oneDNN: the only use of ``torch.ops.mkldnn``."""

import platform
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

Linear = Callable[[Tensor], Tensor]
OPERATIONS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")  # private to torch
ROWS = 32  # for which oneDNN chooses the weight's layout: a usual number of captions decoded together


def can_prepack(weight: Tensor) -> bool:
    """Whether this torch has the operations, and they take a weight of this type on this processor."""
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in OPERATIONS):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def prepack_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """``x @ weight.T + bias`` as a function of x (.., in), for a weight (out, in) that is used many times.

    On an x86 CPU the weight is reordered once for oneDNN. With the few rows of decoding that is two to three times as
    fast as `F.linear`, which reorders it at every call, and a row's result is the same for any number of rows. Where
    `can_prepack` is false, it is `F.linear`.
    """
    if not can_prepack(weight):
        return partial(F.linear, weight=weight, bias=bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)

    def linear(x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return result

    return linear
