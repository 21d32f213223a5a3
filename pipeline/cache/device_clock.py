"""Points in a device's work, and the seconds between them, without making the host wait for the device."""

import time

import torch

Moment = torch.cuda.Event | float


class DeviceClock:
    """Takes moments on ``device``: a CUDA device reaches them later than its host asks, a CPU at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def moment(self) -> Moment:
        """The moment at which the device has done what it was given until now."""
        if self.device.type != "cuda":
            return time.monotonic()
        # blocking: a host that waits leaves its core to the renderers
        event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self, moment: Moment) -> None:
        """Block until the device is there."""
        if isinstance(moment, torch.cuda.Event):
            moment.synchronize()

    def seconds(self, begin: Moment, end: Moment) -> float:
        """Seconds between two moments that the device has reached."""
        if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            return float(begin.elapsed_time(end)) / 1e3
        if isinstance(begin, float) and isinstance(end, float):
            return end - begin
        raise TypeError("two moments of different devices")
