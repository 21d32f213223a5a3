"""What computes the self-attention of a caption's new token: a Triton kernel on a CUDA device, where there is one."""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from shards_spec.library_errors import short

log = logging.getLogger(__name__)
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
SMALLEST_WIDTH = 16  # of a head


@cache
def kernel_for(width: int, dtype: torch.dtype, device: torch.device) -> Attend | None:
    """`decode_attention.attend` when it works for heads of this width; None leaves it to torch.

    It is tried once: Triton may be missing, and it compiles with the system's C compiler. What then is wrong is logged.
    """
    if device.type != "cuda" or width < SMALLEST_WIDTH or width & (width - 1):
        return None
    try:
        from pipeline.caption.decode_attention import attend

        keys = torch.zeros(1, 1, 1, width, dtype=dtype, device=device)
        attend(torch.zeros(1, 1, 3 * width, dtype=dtype, device=device), keys, torch.zeros_like(keys), 0)
    except Exception as error:  # of many kinds: of imports, compilers, drivers
        log.warning("no kernel for attention here, so captions take longer: %s", short(error))
        return None
    return attend
