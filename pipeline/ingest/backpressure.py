"""What bounds the work of an event loop: a semaphore with priorities, and a gate that limits the bodies in memory."""

import asyncio
import heapq
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class PrioritySemaphore:
    """A semaphore that serves the smallest priority number first."""

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._queue = list[tuple[int, asyncio.Future[None]]]()

    @asynccontextmanager
    async def hold(self, priority: int) -> AsyncIterator[None]:
        """Wait for a slot and hold it for the length of the block."""
        if self._free:
            self._free -= 1
        else:
            turn = asyncio.get_running_loop().create_future()
            heapq.heappush(self._queue, (priority, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._release()  # the slot was already ours: pass it on
                raise
        try:
            yield
        finally:
            self._release()

    @property
    def waiting(self) -> int:
        """How many wait for a slot."""
        return len(self._queue)

    def _release(self) -> None:
        """Give a slot to the first in the queue that still waits."""
        while self._queue:
            _, turn = heapq.heappop(self._queue)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class AdmissionGate:
    """Requests may start while fewer than ``limit`` bodies wait for a decoder; this bounds the memory for bodies.

    A request that has entered ends in `leave` when there is no body after all, else in the end of `decoding`.
    """

    def __init__(self, limit: int) -> None:
        self.waiting = 0  # bodies
        self._limit = limit
        self._queue = deque[asyncio.Future[None]]()

    async def enter(self) -> None:
        """Wait until there is room, first come, first served."""
        if self.waiting < self._limit and not self._queue:
            return
        turn = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.leave()  # we had been let in: let the next one in instead
            raise

    def leave(self) -> None:
        """Let the next one in; two, when so few bodies wait that decoders may run dry."""
        if self.waiting >= self._limit:
            return
        for _ in range(2 if 2 * self.waiting < self._limit else 1):
            self._admit_next()

    def _admit_next(self) -> None:
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    @asynccontextmanager
    async def decoding(self) -> AsyncIterator[None]:
        """Around the time that a body waits for its decoder and is decoded."""
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1
            self.leave()
