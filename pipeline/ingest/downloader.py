"""Rows to images, many shards at a time: one event loop that fetches, processes that decode, a bound on everything.

Rows of several shards are in progress at once, the earliest first, so that neither the network nor a core waits for
the last slow host of a shard. A shard that takes twice as long as the others gives up its late requests.
"""

import asyncio
import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from types import TracebackType

from pipeline.ingest.backpressure import AdmissionGate
from pipeline.ingest.decode_pool import DecodePool, DecoderFailed
from pipeline.ingest.http_client import (
    TIMEOUT,
    Fetcher,
    FetchError,
    FetchRules,
    Request,
    RequestState,
)
from pipeline.ingest.image_bytes import ImageReadError, clear_read_cache, read_image_bytes
from pipeline.ingest.images import RESIZE, EncodedImage, ImageRules, Outcome, to_outcome
from pipeline.ingest.rows import ImageRef, Row
from shards_spec.messages import counted

LATE_FACTOR = 2.0  # a shard is late after this many times the median duration of the last finished ones
MIN_FINISHED = 3  # shards before that median is used
MIN_GRACE_S = 3.0  # no request is given up earlier, however short the median
LAST_SHARDS = 100  # that the median is taken of
POLL_S = 0.3
LOCAL_READERS = 8  # threads that read images which need no download
BODIES_PER_DECODER = 32  # that may wait for it
REASONS_SHOWN = 4

Origin = str | ImageRef  # of an image: its link, or its place in the source. One that occurs twice is fetched once


@dataclass
class DownloadTally:
    """What this run has done so far; read by the progress line from another thread."""

    started: float = field(default_factory=time.monotonic)
    given: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    image_bytes: int = 0
    warned: bool = False

    def add(self, outcome: Outcome) -> None:
        """Count one row."""
        if isinstance(outcome, EncodedImage):
            self.outcomes["success"] += 1
            self.image_bytes += len(outcome.data)
        else:
            self.outcomes[outcome] += 1

    def format(self, rows_left: int | None) -> str:
        """Rate, success rate, the most common reasons, and the time left when ``rows_left`` is known."""
        rows = sum(self.outcomes.values())
        if not rows:
            return ""
        seconds = max(time.monotonic() - self.started, 1e-9)
        good = self.outcomes["success"]
        parts = [f"{counted(rows, 'row', style=',')}, {good / seconds:.0f} images/s, {100 * good / rows:.1f} % good"]
        most_common = [(reason, n) for reason, n in self.outcomes.most_common(REASONS_SHOWN + 1) if reason != "success"]
        parts += [f"{reason} {100 * n / rows:.1f} %" for reason, n in most_common[:REASONS_SHOWN]]
        if rows_left is not None:
            parts.append(f"about {_duration(rows_left * seconds / rows)} left")
        return ", ".join(parts)


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


@dataclass
class _Download:
    """One origin on its way to an image."""

    request: Request
    task: "asyncio.Task[Outcome]"

    @property
    def outcome(self) -> Outcome:
        """Of a finished one; those that are late have been cancelled."""
        return TIMEOUT if self.task.cancelled() else self.task.result()


class Downloader:
    """Turns rows into outcomes; use as ``with Downloader(...) as downloader``; any thread may call its methods.

    ``decoders`` is the number of decoder processes, ``decode_timeout_s`` the seconds for one image.
    """

    def __init__(
        self, fetch_rules: FetchRules, image_rules: ImageRules, *, decoders: int, decode_timeout_s: float
    ) -> None:
        self.tally = DownloadTally()
        self._fetch_rules = fetch_rules
        self._decoders = decoders
        self._decode_pool = DecodePool(partial(to_outcome, rules=image_rules), decoders, decode_timeout_s)
        self._shard_seconds = deque[float](maxlen=LAST_SHARDS)  # of the last finished ones
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="downloads", daemon=True)
        self._readers = ThreadPoolExecutor(LOCAL_READERS, "read")
        self._exit_stack = AsyncExitStack()

    def __enter__(self) -> "Downloader":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._readers.shutdown(wait=False, cancel_futures=True)
        clear_read_cache()

    async def _open(self) -> None:
        self._gate = AdmissionGate(BODIES_PER_DECODER * self._decoders)
        self._reader_slots = asyncio.Semaphore(LOCAL_READERS)
        self._fetcher = await self._exit_stack.enter_async_context(Fetcher(self._fetch_rules, self._gate))
        await self._exit_stack.enter_async_context(self._decode_pool)

    async def _close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await self._exit_stack.aclose()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def outcomes(self, rows: list[Row]) -> list[Outcome]:
        """What became of each row of a shard, in their order; waits for all of them."""
        return asyncio.run_coroutine_threadsafe(self._outcomes(rows), self._loop).result()

    async def _outcomes(self, rows: list[Row]) -> list[Outcome]:
        self.tally.given += len(rows)
        origins = [None if row.problem else row.image_ref or row.url for row in rows]
        downloads = dict[Origin, _Download]()
        try:
            for origin in dict.fromkeys(origin for origin in origins if origin):
                while self._fetcher.waiting > 2 * self._fetch_rules.concurrency:  # earlier shards fill the network
                    await asyncio.sleep(POLL_S)
                request = Request()
                downloads[origin] = _Download(request, asyncio.create_task(self._outcome(origin, request)))
            await self._wait_for(list(downloads.values()))
        finally:
            for download in downloads.values():
                download.task.cancel()
        if started := [download.request.started_at for download in downloads.values() if download.request.started_at]:
            self._shard_seconds.append(time.monotonic() - min(started))
        self.tally.given -= len(rows) - len(downloads)  # a link that occurs twice counts once
        return [
            downloads[origin].outcome if origin else row.problem or "no URL"
            for row, origin in zip(rows, origins, strict=True)
        ]

    async def _wait_for(self, downloads: list[_Download]) -> None:
        """Wait until all are finished; cancel those on the network when the shard is late."""
        if not downloads:
            return
        running = {download.task for download in downloads}
        all_finished = asyncio.Event()

        def count(download: _Download, task: "asyncio.Task[Outcome]") -> None:
            running.discard(task)
            if task.cancelled() or not task.exception():
                self.tally.add(download.outcome)
            if not running:
                all_finished.set()

        for download in downloads:
            download.task.add_done_callback(partial(count, download))
        while not all_finished.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await all_finished.wait()
            if running and self._is_late(downloads):
                for download in downloads:
                    if download.request.is_on_network:
                        download.task.cancel()

    def _is_late(self, downloads: list[_Download]) -> bool:
        """Whether a shard's time is up: twice the median, and a median since its last request was first tried.

        No request is given up before ``MIN_GRACE_S``. Those that wait for a slot of ours are not the network's fault:
        no shard is cut short while it has one.
        """
        pending = [download.request.state for download in downloads if not download.task.done()]
        if len(self._shard_seconds) < MIN_FINISHED or RequestState.WAITING_FOR_SLOT in pending:
            return False
        started = [download.request.started_at for download in downloads if download.request.started_at]
        if not started or all(state == RequestState.DONE for state in pending):
            return False
        usual = median(self._shard_seconds)
        shard_limit = min(started) + LATE_FACTOR * usual
        request_limit = max(started) + max(usual, MIN_GRACE_S)
        return time.monotonic() > max(shard_limit, request_limit)

    async def _outcome(self, origin: Origin, request: Request) -> Outcome:
        """Fetch or read one image and decode it."""
        try:
            if isinstance(origin, str):
                data = await self._fetcher.get(origin, request)
            else:
                data = await self._read(origin, request)
        except (FetchError, ImageReadError) as error:
            return str(error)
        async with self._gate.decoding():
            try:
                image: Outcome = await self._decode_pool.convert(data)
            except DecoderFailed as error:
                return f"{RESIZE}{error}"
        return image

    async def _read(self, image_ref: ImageRef, request: Request) -> bytes:
        """The bytes of an image that needs no download. Raises ImageReadError."""
        request.state = RequestState.WAITING_FOR_SLOT
        async with self._reader_slots:
            await self._gate.enter()
            read: Callable[[], bytes] = partial(read_image_bytes, image_ref, self._fetch_rules.max_bytes)
            try:
                data = await self._loop.run_in_executor(self._readers, read)
            except BaseException:
                self._gate.leave()
                raise
        request.state = RequestState.DONE
        return data
