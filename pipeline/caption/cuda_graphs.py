"""Work of fixed shapes as CUDA graphs: launched with one call instead of hundreds of kernels one after the other."""

import logging
from collections.abc import Callable, Hashable
from functools import partial

import torch

from shards_spec.library_errors import is_out_of_memory

log = logging.getLogger(__name__)
Work = Callable[[], None]
Capture = Callable[[Work], Work]


class GraphCache:
    """Runs work by name: as it is the first time, which loads its kernels, as a captured graph from the second time on.

    Work reads and writes tensors that stay where they are, and neither waits for the device nor lets a value on the
    device decide what is done: what it does at its second call is done at every later one. Graphs share the memory of
    what they compute in between, so a graph must not rely on what another left there. ``new_capture`` gives a function
    that makes a graph of work, without doing it, and returns what launches the graph; with None all work runs as it
    is. Where capturing fails, that is logged once and work runs as it is from then on.
    """

    def __init__(self, new_capture: Callable[[], Capture] | None) -> None:
        self._new_capture = new_capture
        self._capture: Capture | None = None
        self._seen = set[Hashable]()
        self._graphs = dict[Hashable, Work]()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, name: Hashable, work: Work) -> None:
        """Do the work that ``name`` stands for. Raises what the work raises, such as a lack of memory."""
        if self._new_capture and name in self._seen and name not in self._graphs:
            self._add(name, work, self._new_capture)
        self._seen.add(name)
        self._graphs.get(name, work)()

    def clear(self) -> None:
        """Forget all work and free the graphs' memory: their tensors have moved."""
        self._graphs.clear()
        self._seen.clear()
        self._capture = None

    def _add(self, name: Hashable, work: Work, new_capture: Callable[[], Capture]) -> None:
        try:
            self._capture = self._capture or new_capture()
            self._graphs[name] = self._capture(work)
        except RuntimeError as error:
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            if is_out_of_memory(error) or is_out_of_memory(cause):
                raise cause from None
            log.warning("no CUDA graphs here, so captions take longer: %s", str(cause).partition("\n")[0])
            self._new_capture = None


def graphs_for(device: torch.device) -> GraphCache:
    """CUDA graphs on a CUDA device; elsewhere work runs as it is."""
    return GraphCache(partial(CudaCapture, device) if device.type == "cuda" else None)


class CudaCapture:
    """Captures work on a CUDA device; its graphs share a stream and a memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """The work as a graph; what other threads do with CUDA meanwhile is allowed, and no part of it."""
        graph = torch.cuda.CUDAGraph()
        captured = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        current = torch.cuda.current_stream(self._device)  # and again after a capture that fails
        with torch.cuda.stream(current), captured:
            work()
        return graph.replay
