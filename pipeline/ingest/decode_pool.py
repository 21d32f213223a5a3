"""Processes that turn bytes into images, kept busy by the event loop.

A crash or timeout of a decoder fails only the image it worked on. Each process has two images in its socket, so that it
never waits for the next one.
"""

import asyncio
import gc
import pickle
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

from pipeline.core.workers import die_with_parent, keep_freed_memory, spawn_context
from shards_spec.files import UserError

IMAGES_PER_PROCESS = 2  # the one it works on, and the next
SOCKET_BUFFER_BYTES = 1 << 22  # most images fit
START_TIMEOUT_S = 60  # more for the first image: a busy machine starts a process slowly
MAX_STARTUP_FAILURES = 5  # processes that die one after the other without an answer: a bug, not an image
CRASHED = "decoder crashed"
TOO_LONG = "decoding took too long"
LENGTH = struct.Struct("<Q")
STARTED = b"\x01"  # what a process answers when it begins with an image

Work = Callable[[bytes], Any]


class DecoderFailed(Exception):
    """The process died or took too long over this image; the message is the reason."""


@dataclass
class _Job:
    data: bytes
    answer: "asyncio.Future[Any]"


class DecodePool:
    """``processes`` of them answer ``work(data)``; use as ``async with DecodePool(...) as pool``.

    ``work`` must be picklable and must not raise; ``timeout_s`` is the longest it may take for one image.
    """

    def __init__(self, work: Work, processes: int, timeout_s: float) -> None:
        self._work = work
        self._processes = processes
        self._timeout_s = timeout_s
        self._startup_failures = 0
        self._exit_code: int | None = None

    async def __aenter__(self) -> "DecodePool":
        self._jobs = asyncio.Queue[_Job]()
        self._tasks = [asyncio.create_task(self._keep_alive()) for _ in range(self._processes)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def convert(self, data: bytes) -> Any:
        """What ``work(data)`` returns. Raises DecoderFailed, UserError when no process stays alive."""
        if self._startup_failures >= MAX_STARTUP_FAILURES:
            raise self._startup_error()
        job = _Job(data, asyncio.get_running_loop().create_future())
        self._jobs.put_nowait(job)
        return await job.answer

    async def _keep_alive(self) -> None:
        """Run one process, started again when it dies; when several die before any answer, all jobs fail."""
        while self._startup_failures < MAX_STARTUP_FAILURES:
            process, channel = _start(self._work)
            reader, writer = await asyncio.open_connection(sock=channel)
            sent = asyncio.Queue[_Job]()
            room = asyncio.Semaphore(IMAGES_PER_PROCESS)
            sender = asyncio.create_task(self._send(writer, sent, room))
            try:
                await self._receive(reader, sent, room)
            finally:
                sender.cancel()
                writer.transport.abort()
                process.kill()
                process.join()
                self._exit_code = process.exitcode
                while not sent.empty():  # images it had not begun are for another process
                    self._jobs.put_nowait(sent.get_nowait())
        while not self._jobs.empty():
            job = self._jobs.get_nowait()
            if not job.answer.done():
                job.answer.set_exception(self._startup_error())

    def _startup_error(self) -> UserError:
        return UserError(
            f"{MAX_STARTUP_FAILURES} decoder processes died before they answered once, the last with exit code "
            f"{self._exit_code}; where memory is short, fewer --workers need less; else the lines above say why"
        )

    async def _send(self, writer: asyncio.StreamWriter, sent: "asyncio.Queue[_Job]", room: asyncio.Semaphore) -> None:
        """Send jobs to one process as it has room for them."""
        while True:
            await room.acquire()
            job = await self._jobs.get()
            sent.put_nowait(job)
            writer.write(LENGTH.pack(len(job.data)))
            writer.write(job.data)

    async def _receive(
        self, reader: asyncio.StreamReader, sent: "asyncio.Queue[_Job]", room: asyncio.Semaphore
    ) -> None:
        """Answer the jobs sent, in their order, until the process dies or takes too long."""
        has_answered = False
        while True:
            job = await sent.get()
            started = False
            try:
                async with asyncio.timeout(self._timeout_s + (0 if has_answered else START_TIMEOUT_S)):
                    started = await reader.readexactly(1) == STARTED
                async with asyncio.timeout(self._timeout_s):
                    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                    answer = pickle.loads(await reader.readexactly(length))
            except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
                if not started:  # the image is not to blame
                    self._startup_failures += not has_answered
                    self._jobs.put_nowait(job)
                elif not job.answer.done():
                    reason = TOO_LONG if isinstance(error, TimeoutError) else CRASHED
                    job.answer.set_exception(DecoderFailed(reason))
                return
            has_answered = True
            self._startup_failures = 0
            if not job.answer.done():  # it is when the download was cancelled meanwhile
                job.answer.set_result(answer)
            room.release()


def _start(work: Work) -> tuple[BaseProcess, socket.socket]:
    """A decoder process, and our end of its socket."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    process = spawn_context().Process(target=_serve, args=(theirs, work), daemon=True)
    process.start()
    theirs.close()
    ours.setblocking(False)
    return process, ours


def _serve(channel: socket.socket, work: Work) -> None:
    """What a process does: a length and bytes come in, `STARTED`, a length and the pickled answer go out."""
    die_with_parent()
    keep_freed_memory()
    gc.freeze()  # what is imported stays: the collector need not look at it again
    channel.setblocking(True)
    stream = channel.makefile("rb", buffering=SOCKET_BUFFER_BYTES)
    while header := stream.read(LENGTH.size):
        data = stream.read(LENGTH.unpack(header)[0])
        channel.sendall(STARTED)
        answer = pickle.dumps(work(data), pickle.HIGHEST_PROTOCOL)
        channel.sendall(LENGTH.pack(len(answer)) + answer)
