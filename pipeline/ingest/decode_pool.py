"""Processes that turn bytes into images, kept busy by the event loop; an image that kills or hangs one costs itself.

Each process has two images in its socket, so that it never waits for the next one.
"""

import asyncio
import gc
import multiprocessing
import pickle
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

from pipeline.core.workers import die_with_parent
from shards_spec.files import UserError

AHEAD = 2  # images in a process: the one it works on, and the next
BUFFER = 1 << 22  # bytes of the socket's buffer: most images fit
START_S = 60  # a busy machine starts a process slowly; its first image is not to blame
STILLBORN = 5  # processes that die one after the other without an answer: a bug, not an image
CRASHED, TOO_LONG = "decoder crashed", "decoding took too long"
LENGTH = struct.Struct("<Q")
STARTED = b"\x01"

Work = Callable[[bytes], Any]


class DecoderFailed(Exception):
    """The process died or took too long over this image; the message is the reason."""


@dataclass
class _Job:
    data: bytes
    answer: "asyncio.Future[Any]"


class Decoders:
    """``number`` processes that answer ``work(data)``; use as ``async with Decoders(...) as decoders``.

    ``work`` must be picklable and must not raise; ``timeout_s`` is the longest it may take for one image.
    """

    def __init__(self, work: Work, number: int, timeout_s: float) -> None:
        self._work, self._number, self._timeout_s = work, number, timeout_s
        self._stillborn = 0
        self._exit_code: int | None = None

    async def __aenter__(self) -> "Decoders":
        self._jobs = asyncio.Queue[_Job]()
        self._tasks = [asyncio.create_task(self._keep_alive()) for _ in range(self._number)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def convert(self, data: bytes) -> Any:
        """What ``work(data)`` returns. Raises DecoderFailed, UserError when no process stays alive."""
        if self._stillborn >= STILLBORN:
            raise self._dead()
        job = _Job(data, asyncio.get_running_loop().create_future())
        self._jobs.put_nowait(job)
        return await job.answer

    async def _keep_alive(self) -> None:
        """One process, started again when it dies; when it does so before any answer, again and again, jobs fail."""
        while self._stillborn < STILLBORN:
            process, channel = _start(self._work)
            reader, writer = await asyncio.open_connection(sock=channel)
            given, room = asyncio.Queue[_Job](), asyncio.Semaphore(AHEAD)
            sender = asyncio.create_task(self._send(writer, given, room))
            try:
                await self._receive(reader, given, room)
            finally:
                sender.cancel()
                writer.transport.abort()
                process.kill()
                process.join()
                self._exit_code = process.exitcode
                while not given.empty():  # not to blame: for another process
                    self._jobs.put_nowait(given.get_nowait())
        while not self._jobs.empty():
            job = self._jobs.get_nowait()
            if not job.answer.done():
                job.answer.set_exception(self._dead())

    def _dead(self) -> UserError:
        return UserError(
            f"{STILLBORN} decoder processes died before they answered once, the last with exit code {self._exit_code}; "
            "where memory is short, fewer --workers need less; else the lines above say why"
        )

    async def _send(self, writer: asyncio.StreamWriter, given: "asyncio.Queue[_Job]", room: asyncio.Semaphore) -> None:
        while True:
            await room.acquire()
            job = await self._jobs.get()
            given.put_nowait(job)
            writer.write(LENGTH.pack(len(job.data)))
            writer.write(job.data)

    async def _receive(
        self, reader: asyncio.StreamReader, given: "asyncio.Queue[_Job]", room: asyncio.Semaphore
    ) -> None:
        """Answers in the order of the jobs, until the process dies or takes too long."""
        answered = False
        while True:
            job, started, answer = await given.get(), False, None
            try:
                async with asyncio.timeout(self._timeout_s + (0 if answered else START_S)):
                    started = await reader.readexactly(1) == STARTED
                async with asyncio.timeout(self._timeout_s):
                    answer = pickle.loads(await reader.readexactly(LENGTH.unpack(await reader.readexactly(8))[0]))
            except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
                if not started:
                    self._stillborn += not answered
                    self._jobs.put_nowait(job)
                elif not job.answer.done():
                    reason = TOO_LONG if isinstance(error, TimeoutError) else CRASHED
                    job.answer.set_exception(DecoderFailed(reason))
                return
            answered, self._stillborn = True, 0
            if not job.answer.done():  # cancelled: nobody waits for it any more
                job.answer.set_result(answer)
            room.release()


def _start(work: Work) -> tuple[BaseProcess, socket.socket]:
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, work), daemon=True)
    process.start()
    theirs.close()
    ours.setblocking(False)
    return process, ours


def _serve(channel: socket.socket, work: Work) -> None:
    """The process: a length and bytes come in, a mark that work began and a pickled answer go out."""
    die_with_parent()
    gc.freeze()  # what is imported stays: the collector need not look at it again
    channel.setblocking(True)
    stream = channel.makefile("rb", buffering=BUFFER)
    while header := stream.read(LENGTH.size):
        data = stream.read(LENGTH.unpack(header)[0])
        channel.sendall(STARTED)
        answer = pickle.dumps(work(data), pickle.HIGHEST_PROTOCOL)
        channel.sendall(LENGTH.pack(len(answer)) + answer)
