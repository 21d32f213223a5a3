"""Graphs of towers in 8 bits, by onnxruntime's quantisation."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

BATCH = 8
OPERATORS = ["MatMul", "Gemm", "Gather"]  # matrix products and the table of tokens


class CalibrationInputs:
    """The inputs of a graph batch by batch, as onnxruntime's calibration asks for them."""

    def __init__(self, name: str, inputs: Tensor) -> None:
        self.batches: Iterator[dict[str, np.ndarray]] = iter(
            [{name: part.numpy()} for part in torch.split(inputs, BATCH)]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch, None behind the last one."""
        return next(self.batches, None)


def quantize(path: Path, kind: Literal["dynamic", "static"], input_name: str, inputs: Tensor) -> None:
    """Replace a graph by one of 8 bits.

    Weights are int8 with a scale per channel. With "dynamic", activations get a scale in each pass and convolutions
    stay in float32, since onnxruntime has no fast 8 bits without known scales for them.

    Args:
        path: The graph.
        kind: Where scales of activations come from.
        input_name: The graph's input.
        inputs: What "static" takes them from.
    """
    from onnxruntime import quantization

    with TemporaryDirectory() as local:
        prepared = Path(local, "prepared.onnx")
        quantization.quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        shared: dict[str, Any] = {"per_channel": True, "weight_type": quantization.QuantType.QInt8}
        if kind == "dynamic":
            quantization.quantize_dynamic(str(prepared), str(path), op_types_to_quantize=OPERATORS, **shared)
            return
        quantization.quantize_static(
            str(prepared),
            str(path),
            CalibrationInputs(input_name, inputs),
            op_types_to_quantize=[*OPERATORS, "Conv"],
            **shared,
        )
