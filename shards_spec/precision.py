"""The numbers that models compute with: names, torch's types, and what ``auto`` means."""

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "fp16"]
PrecisionOption = Literal["auto", "fp32", "bf16", "fp16"]  # as the command line takes it


def dtype_of(precision: Precision) -> "torch.dtype":
    """The torch type of a precision."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def precision_of(name: str) -> Precision:
    """The precision that a torch type's name is of, such as ``bfloat16``: records have those."""
    precisions: dict[str, Precision] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    return precisions[name]


def resolve_precision(
    option: PrecisionOption, device: str, *, before: str | None = None, emulated: bool = True
) -> Precision:
    """What ``auto`` means: what a run had ``before``, else bf16 on a CUDA device that has it, else fp32.

    ``emulated``: whether bf16 counts that the device's driver emulates, which is slower and needs as little memory.
    """
    import torch

    if option != "auto":
        return option
    if before in get_args(Precision):
        return before  # type: ignore[return-value]  # one of them, as was just seen
    has_bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=emulated)
    return "bf16" if has_bf16 else "fp32"
