"""What bounds the work of an event loop: slots that go to the earliest, and a gate before what takes memory."""

import asyncio
import heapq
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Slots:
    """A semaphore that serves the smallest number first."""

    def __init__(self, free: int) -> None:
        self._free = free
        self._waiting = list[tuple[int, asyncio.Future[None]]]()

    @asynccontextmanager
    async def hold(self, number: int) -> AsyncIterator[None]:
        """Around what needs a slot."""
        if self._free:
            self._free -= 1
        else:
            turn = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (number, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._next()  # it was our turn: let the next one have it
                raise
        try:
            yield
        finally:
            self._next()

    @property
    def queue(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def _next(self) -> None:
        while self._waiting:
            _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class Gate:
    """Requests may start while fewer than ``limit`` bodies wait for a decoder: memory is bounded by it.

    Who enters says `leave` when there is no body after all, else the body's end says it.
    """

    def __init__(self, limit: int) -> None:
        self.waiting = 0
        self._limit = limit
        self._queue = deque[asyncio.Future[None]]()

    async def enter(self) -> None:
        """Wait until there is room, in order."""
        if self.waiting < self._limit and not self._queue:
            return
        turn = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.leave()  # it was our turn: let the next one have it
            raise

    def leave(self) -> None:
        """Let the next one in; two, when so few bodies wait that decoders may run dry."""
        if self.waiting < self._limit:
            for _ in range(2 if 2 * self.waiting < self._limit else 1):
                while self._queue and (turn := self._queue.popleft()):
                    if not turn.done():
                        turn.set_result(None)
                        break

    @asynccontextmanager
    async def body(self) -> AsyncIterator[None]:
        """Around the time that a body waits and is decoded."""
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1
            self.leave()
