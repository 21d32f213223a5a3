"""What a model costs: parameters, multiplications, images and texts per second, memory, bytes of its weights.

Multiplications (MACs) are counted by torch over the forward pass of one image and one text of full length: products
and convolutions, as papers count them. Speed and memory are measured on pixels and tokens that are ready, so that they
are the model's alone. A model that has another form for inference (MobileCLIP, SiCLIP) is measured in that form. Images
one by one, a thousand in a row on a CPU, is the protocol of SiCLIP (arXiv 2411.14789, table 3).
"""

import copy
import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from shards_spec.display import shown
from shards_spec.files import UserError
from shards_spec.models import LoadedModel
from training.export.onnx_model import OnnxClassifier, OnnxModel, graph_files, load_onnx
from training.models.parameter_count import count_parameters

COST_FILE = "cost.json"
ONNX_COST_FILE = "cost_onnx.json"  # of the towers of an export, beside the student's own
BATCH = 64  # besides batches of one
ROUNDS = 3  # of a batch, after one that warms up; the median counts
TEXTS = 100  # texts one by one at most
MIB = 2**20
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # written to clear_refs: the peak of resident memory begins anew (proc(5))


def measure_cost(loaded: LoadedModel, devices: list[str], *, in_a_row: int, bf16: bool = False) -> dict[str, Any]:
    """Return what a model costs.

    Args:
        loaded: The model; it is copied, and stays as it is.
        devices: Those that speed and memory are measured on.
        in_a_row: Images taken one by one.
        bf16: Measure speed and memory under autocast.

    Returns:
        ``parameters`` by part, as they are trained, and of the form for ``inference`` all together; of that form
        ``macs`` by tower (one image, one text), ``weights_bytes`` with tied weights once, and ``speed``, an object per
        device: ``device``, ``name``, ``threads``, ``images_per_s`` and ``texts_per_s`` by batch size, ``in_a_row``
        images, ``peak_mib`` by batch size. And ``image_size``, ``precision``.

    Raises:
        UserError: The model has no parameters in torch: it is run by another library (see `measure_onnx_cost`).
    """
    if next(loaded.model.parameters(), None) is None:
        raise UserError(
            "--cost counts what a model does in torch, and this one has no parameters there: give the RUN or the "
            "folder that it was exported from"
        )
    model = inference_form(loaded.model)
    passes = _passes(loaded, model)
    return {
        "parameters": count_parameters(loaded.model) | {"inference": count_parameters(model)["total"]},
        "macs": {name: count_macs(run, make(1)) for name, (run, make) in passes.items()},
        "weights_bytes": weights_bytes(model),
        "image_size": loaded.image_size,
        "precision": "bf16" if bf16 else "fp32",
        "speed": [_speed(model.to(device), passes, device, in_a_row=in_a_row, bf16=bf16) for device in devices],
    }


def measure_onnx_cost(model: OnnxModel | OnnxClassifier, *, in_a_row: int) -> dict[str, Any]:
    """Return what the towers of an ONNX export cost on the CPU, with as many threads as torch has.

    Args:
        model: The export; its graphs are read once more.
        in_a_row: Images taken one by one.

    Returns:
        As `measure_cost`, without what a graph does not say: no parameters, no MACs, no peak of memory.
        ``precision`` is that of the export, such as "int8 dynamic", ``runtime`` names the library.
    """
    loaded = load_onnx(model.folder, torch.get_num_threads())
    speed = _speed(loaded.model, _passes(loaded, loaded.model), "cpu", in_a_row=in_a_row, bf16=False)
    return {
        "parameters": {},
        "macs": {},
        "weights_bytes": sum(file.stat().st_size for file in graph_files(model.folder)),
        "image_size": loaded.image_size,
        "precision": model.description["dtype"],
        "runtime": "onnxruntime",
        "speed": [speed | {"peak_mib": {}}],  # onnxruntime took its memory before
    }


def inference_form(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the CPU in the form that inference takes: branches that can be merged are."""
    from timm.utils.model import reparameterize_model

    merged: nn.Module = reparameterize_model(copy.deepcopy(model).cpu().eval())
    return merged


def count_macs(run: Callable[[Tensor], object], inputs: Tensor) -> int:
    """Return the multiplications with an addition of a forward pass: products of matrices and convolutions.

    Fused attention layers hide their products from the count, so they are off meanwhile.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2


def weights_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights and buffers, what is tied once, as a file of safetensors holds them."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.numel()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


Pass = tuple[Callable[[Tensor], object], Callable[[int], Tensor]]


def _passes(loaded: LoadedModel, model: nn.Module) -> dict[str, Pass]:
    """Per tower its forward pass, and a function that makes its input of a batch size."""
    side = loaded.image_size

    def pixels(batch: int) -> Tensor:
        return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0))

    if loaded.tokenizer is None or not hasattr(model, "encode_text"):
        return {"image": (model, pixels)}

    def tokens(batch: int) -> Tensor:
        made: Tensor = loaded.tokenizer(["a photo of a small brown dog on a beach"] * batch)
        return made

    clip: Any = model
    return {"image": (clip.encode_image, pixels), "text": (clip.encode_text, tokens)}


def _speed(model: nn.Module, passes: dict[str, Pass], device: str, *, in_a_row: int, bf16: bool) -> dict[str, Any]:
    """Images and texts per second and the peak of memory on one device."""
    speed: dict[str, Any] = {
        "device": torch.device(device).type,
        "name": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name(),
        "threads": torch.get_num_threads(),
        "in_a_row": in_a_row,
        "peak_mib": {},
    }
    with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        for name, (run, make) in passes.items():
            rates = speed.setdefault(f"{name}s_per_s", {})
            for batch in (1, BATCH):
                inputs = make(batch).to(device)
                with _peak_memory(device, model) as peak:
                    if batch == 1:
                        count = in_a_row if name == "image" else min(TEXTS, in_a_row)
                        took = statistics.fmean(_seconds(run, inputs, count, device))
                    else:
                        took = statistics.median(_seconds(run, inputs, ROUNDS, device))
                rates[str(batch)] = round(batch / took, 2)
                if peak:
                    speed["peak_mib"][str(batch)] = max(peak[0], speed["peak_mib"].get(str(batch), 0.0))
    model.cpu()
    return speed


def _seconds(run: Callable[[Tensor], object], inputs: Tensor, rounds: int, device: str) -> list[float]:
    """Seconds of each of ``rounds`` passes, after one that warms up."""
    took = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run(inputs)
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)
    return took[1:]


@contextmanager
def _peak_memory(device: str, model: nn.Module) -> Iterator[list[float]]:
    """Within, watch memory; the list then has the peak in MiB, and nothing where the system does not tell.

    On CUDA it is what torch has allocated: weights, input and what a pass takes. On Linux's CPUs it is the weights, and
    by how much the resident memory of the process grows: what Python and torch themselves hold does not count.
    """
    peak: list[float] = []
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(round(torch.cuda.max_memory_allocated(device) / MIB, 1))
        return
    try:
        _give_back_freed_memory()
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:  # another system, or a sandbox
        yield peak
        return
    before = _resident_mib("VmRSS")
    yield peak
    peak.append(round(weights_bytes(model) / MIB + max(0.0, _resident_mib("VmHWM") - before), 1))


def _resident_mib(field: str) -> float:
    """MiB of a field of this process's status: resident memory now (VmRSS), or its peak (VmHWM)."""
    lines = [line.split() for line in STATUS.read_text().splitlines()]
    return next((int(words[1]) / 1024 for words in lines if words[0] == f"{field}:"), 0.0)


def _give_back_freed_memory() -> None:
    """Let glibc give back what it keeps for later allocations, which would hide those of a pass."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries keep nothing, or have no such function
    if trim is not None:
        trim(0)


def cpu_name() -> str:
    """Return the CPU's name."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "CPU"


def print_cost(result: dict[str, Any], path: str | None) -> None:
    """Print what a model costs as a table, and the path of its file."""
    table = Table("cost", "value", title=Text(shown(f"{result['pretrained'] or result['model']} · cost")))
    for row in cost_rows(result):
        table.add_row(*row)
    Console().print(table)
    if path:
        print(shown(path))


def cost_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the table: what, and how much."""
    parts = {part: count for part, count in result["parameters"].items() if count}
    if "inference" in parts and parts["inference"] == parts["total"]:
        del parts["inference"]
    rows = [(f"parameters, {part}", f"{count:,}") for part, count in parts.items()]
    rows += [(f"MACs, one {name}", f"{count / 1e6:,.1f} M") for name, count in result["macs"].items()]
    rows.append(("weights", f"{result['weights_bytes'] / 1e6:,.1f} MB"))
    for speed in result["speed"]:
        device = speed["device"]
        for name in ("images", "texts"):
            for batch, rate in speed.get(f"{name}_per_s", {}).items():
                rows.append((f"{name}/s, {device}, batch {batch}", f"{rate:,.1f}"))
        seconds = speed["in_a_row"] / speed["images_per_s"]["1"]
        rows.append((f"{speed['in_a_row']:,} images in a row, {device}", f"{seconds:,.1f} s"))
        for batch, peak in speed["peak_mib"].items():
            rows.append((f"peak memory, {device}, batch {batch}", f"{peak:,.0f} MiB"))
    return rows
