"""Rows to images, many shards at a time: one event loop that fetches, processes that decode, a bound on everything.

Rows of several shards are under way at once, the earliest first, so that neither the network nor a core waits for
the last slow host of a shard. A shard that takes twice as long as the others gives its late links up.
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

from pipeline.ingest.backpressure import Gate
from pipeline.ingest.decode_pool import DecoderFailed, Decoders
from pipeline.ingest.http_client import MAY_PASS, NOT_PUBLIC, Fetcher, FetchError, FetchRules, Link
from pipeline.ingest.image_bytes import ImageReadError, clear_read_cache, read_image_bytes
from pipeline.ingest.images import RESIZE, EncodedImage, ImageRules, Outcome, to_outcome
from pipeline.ingest.rows import ImageRef, Row

LATE = 2.0  # medians of the finished shards' times: what is on the network then, ends as a time-out
KNOWN = 3  # finished shards before there is a median
GRACE_S = 3.0  # however short that is
TICK_S = 0.3
READERS = 8  # threads that read local images
BODIES = 32  # per decoder: bodies that may wait for it

Origin = str | ImageRef  # of an image: its link, or where it lies. One that is there twice is fetched once


@dataclass
class Tally:
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

    def nothing(self) -> str | None:
        """A word to the user when downloads were tried and not one image came."""
        if self.outcomes["success"] or not self.outcomes:
            return None
        reason = self.outcomes.most_common(1)[0][0]
        if reason == NOT_PUBLIC:
            return f"not one image came, mostly {reason!r}: --allow-private fetches from such addresses"
        if reason in MAY_PASS or reason == "name not found":
            return f"not one image came, mostly {reason!r}: is this machine on the web? No proxy is used"
        return None

    def line(self, rows_left: int | None) -> str:
        """Rate, success rate, the commonest reasons, and the time left when it is known how many rows are."""
        rows, seconds = sum(self.outcomes.values()), max(time.monotonic() - self.started, 1e-9)
        if not rows:
            return ""
        good = self.outcomes["success"]
        reasons = [(n, reason) for reason, n in self.outcomes.most_common(5) if reason != "success"][:4]
        parts = [f"{rows:,} rows, {good / seconds:.0f} images/s, {100 * good / rows:.1f} % good"]
        parts += [f"{reason} {100 * n / rows:.1f} %" for n, reason in reasons]
        if rows_left is not None:
            parts.append(f"about {_duration(rows_left * seconds / rows)} left")
        return ", ".join(parts)


def _result(work: "asyncio.Task[Outcome]") -> Outcome:
    """What a finished row came to; we cancel those that are late."""
    return "timeout" if work.cancelled() else work.result()


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


class Downloader:
    """Turns rows into outcomes; use as ``with Downloader(...) as downloader``; any thread may call its methods."""

    def __init__(self, fetch: FetchRules, images: ImageRules, workers: int, decode_timeout_s: float) -> None:
        self.tally = Tally()
        self._fetch_rules = fetch
        self._decoders = Decoders(partial(to_outcome, rules=images), workers, decode_timeout_s)
        self._workers = workers
        self._seconds = deque[float](maxlen=100)  # of the last finished shards
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="downloads", daemon=True)
        self._readers = ThreadPoolExecutor(READERS, "read")
        self._close = AsyncExitStack()

    def __enter__(self) -> "Downloader":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._readers.shutdown(wait=False, cancel_futures=True)
        clear_read_cache()

    async def _open(self) -> None:
        self._gate = Gate(BODIES * self._workers)
        self._local = asyncio.Semaphore(READERS)
        self._fetcher = await self._close.enter_async_context(Fetcher(self._fetch_rules, self._gate))
        await self._close.enter_async_context(self._decoders)

    async def _shut(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await self._close.aclose()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def outcomes(self, rows: list[Row]) -> list[Outcome]:
        """What became of each row of a shard, in their order; waits for it."""
        return asyncio.run_coroutine_threadsafe(self._outcomes(rows), self._loop).result()

    async def _outcomes(self, rows: list[Row]) -> list[Outcome]:
        self.tally.given += len(rows)
        origins = [None if row.problem else row.image_ref or row.url for row in rows]
        links, works = dict[Origin, Link](), dict[Origin, asyncio.Task[Outcome]]()
        try:
            for origin in dict.fromkeys(origin for origin in origins if origin):
                while self._fetcher.queue > 2 * self._fetch_rules.concurrency:  # the shards before have enough to do
                    await asyncio.sleep(TICK_S)
                links[origin] = Link()
                works[origin] = asyncio.create_task(self._outcome(origin, links[origin]))
            await self._ended(links, works)
        finally:
            for work in works.values():
                work.cancel()
        if begun := [link.started for link in links.values() if link.started]:
            self._seconds.append(time.monotonic() - min(begun))
        self.tally.given -= len(rows) - len(works)  # a link that is there twice counts once
        return [
            _result(works[origin]) if origin else row.problem or "no URL"
            for row, origin in zip(rows, origins, strict=True)
        ]

    async def _ended(self, links: dict[Origin, Link], works: dict[Origin, "asyncio.Task[Outcome]"]) -> None:
        """Wait for all; cancel what is on the network when the shard is late."""
        running, over = set(works.values()), asyncio.Event()

        def ended(work: "asyncio.Task[Outcome]") -> None:
            running.discard(work)
            if work.cancelled() or not work.exception():
                self.tally.add(_result(work))
            if not running:
                over.set()

        for work in works.values():
            work.add_done_callback(ended)
        while works and not over.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await over.wait()
            if running and self._is_late(links, works):
                for origin, work in works.items():
                    if links[origin].phase in ("host", "try", "pause"):
                        work.cancel()

    def _is_late(self, links: dict[Origin, Link], works: dict[Origin, "asyncio.Task[Outcome]"]) -> bool:
        """Whether a shard's time is up: twice the median, and a median since its last link was first tried.

        No link is given up before ``GRACE_S``. Links that wait for a slot of ours are not the network's fault: no
        shard is cut while it has one.
        """
        pending = [links[origin] for origin, work in works.items() if not work.done()]
        if len(self._seconds) < KNOWN or any(link.phase == "slot" for link in pending):
            return False
        begun = [link.started for link in links.values() if link.started]
        if not begun or all(link.phase == "done" for link in pending):
            return False
        usual, now = median(self._seconds), time.monotonic()
        return now > max(min(begun) + LATE * usual, max(begun) + max(usual, GRACE_S))

    async def _outcome(self, origin: Origin, link: Link) -> Outcome:
        try:
            fetch = self._fetcher.get(origin, link) if isinstance(origin, str) else self._read(origin, link)
            data = await fetch
        except (FetchError, ImageReadError) as error:
            return str(error)
        async with self._gate.body():
            try:
                image: Outcome = await self._decoders.convert(data)
            except DecoderFailed as error:
                return f"{RESIZE}{error}"
        return image

    async def _read(self, image_ref: ImageRef, link: Link) -> bytes:
        link.phase = "slot"
        async with self._local:
            await self._gate.enter()
            read: Callable[[], bytes] = partial(read_image_bytes, image_ref, self._fetch_rules.max_bytes)
            try:
                data = await self._loop.run_in_executor(self._readers, read)
            except BaseException:
                self._gate.leave()
                raise
        link.phase = "done"
        return data
