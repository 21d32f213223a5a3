"""One image from the web: bytes, or a short named reason why not.

Every connection, also after a redirect or for an address in digits, goes through one socket factory that refuses
what is not of the public internet: a list from the web must not reach services of the own network.
"""

import asyncio
import errno
import re
import socket
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from itertools import count
from types import TracebackType
from typing import Any

import aiohttp
import yarl
from aiohttp import http_exceptions

from pipeline.ingest.addresses import is_public
from pipeline.ingest.backpressure import Gate, Slots
from pipeline.ingest.dns import NameFailed, Names

AGENT = "clipmill"
OPT_OUT = frozenset({"noai", "noimageai", "noindex", "noimageindex"})  # img2dataset's defaults
NOT_PUBLIC = "not a public address"
FIRST_PAUSE_S = 0.5  # before the first further try; doubled for each one after
PIECE = 1 << 16
ESCAPED = re.compile(r"&(?:amp;|#38;|#x26;)+", re.IGNORECASE)  # an ampersand of a link as a web page's source has it
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})  # statuses that may pass with time
MAY_PASS = frozenset({
    "timeout", "connection refused", "connection lost", "connection failed", "name look-up failed",
    *(f"HTTP {status}" for status in BUSY),
})  # fmt: skip


class FetchError(Exception):
    """No bytes; the message is a short, stable reason fit for counting.

    ``after``: seconds the server asked us to wait before another try.
    """

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


@dataclass(frozen=True)
class FetchRules:
    """``timeout_s`` is the time of one try from name look-up to last byte, ``retries`` the tries after the first.

    ``concurrency`` requests are in flight at most, ``per_host`` of them to one host. ``nameservers`` replace the
    system's.
    """

    timeout_s: float = 10.0
    max_bytes: int = 20_000_000
    retries: int = 1
    concurrency: int = 64
    per_host: int = 16
    allow_private: bool = False
    ignore_opt_out: bool = False
    nameservers: tuple[str, ...] = ()


@dataclass
class Link:
    """Where a request stands, for those who must decide whether to wait for it.

    ``phase``: it waits for its ``host`` (busy with others), for a ``slot`` of ours, for the answer to a ``try`` or in
    a ``pause`` between two; ``done`` after. ``started``: when the first try began (monotonic seconds), 0 before.
    ``number``: who came first is served first, also at a second try.
    """

    phase: str = "host"
    started: float = 0.0
    number: int = field(default_factory=count().__next__)


@dataclass
class _Host:
    """What is under way to one host.

    ``resume`` is when it wants to be asked again (monotonic seconds). ``silent`` counts time-outs: a host that has
    never done anything else (``answered``) is given up after ``patience`` of them, but for a ``probe`` now and then.
    """

    slots: Slots
    patience: int
    users: int = 0
    resume: float = 0.0
    silent: int = 0
    answered: bool = False
    probe: float = 0.0

    @property
    def is_dead(self) -> bool:
        """Whether it is not worth waiting for."""
        return not self.answered and self.silent >= self.patience

    def is_skipped(self, every_s: float) -> bool:
        """Whether not to try it now: it is dead, but for a probe from time to time."""
        now = time.monotonic()
        if not self.is_dead or now >= self.probe:
            self.probe = now + every_s
            return False
        return True


class Fetcher:
    """A session for many images; use as ``async with Fetcher(rules, gate) as fetcher``."""

    def __init__(self, rules: FetchRules, gate: Gate | None = None) -> None:
        self._rules = rules
        self._gate = gate or Gate(rules.concurrency)
        self._hosts = dict[str, _Host]()

    async def __aenter__(self) -> "Fetcher":
        self._slots = Slots(self._rules.concurrency)
        self._names = Names(self._rules.nameservers)
        connector = aiohttp.TCPConnector(
            limit=0,  # ours: a request that waits for its host must not hold a slot
            resolver=self._names,
            ttl_dns_cache=600,
            dns_cache_max_size=20_000,
            keepalive_timeout=5,
            socket_factory=None if self._rules.allow_private else public_socket,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=self._rules.timeout_s),
            headers={
                "User-Agent": f"Mozilla/5.0 (compatible; {AGENT}/{version(AGENT)})",
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
            },
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # aiohttp would unpack without a limit of ours
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()
        await self._names.close()  # aiohttp closes its own resolver only

    @property
    def queue(self) -> int:
        """Requests that wait for a slot of ours."""
        return self._slots.queue

    async def get(self, url: str, link: Link | None = None) -> bytes:
        """The body of ``url``; ``link`` is kept up to date meanwhile. Raises FetchError."""
        address, link = _address(url), link or Link()
        async with self._host(address.host or "") as host:
            for tries in range(self._rules.retries + 1):
                if (wait := host.resume - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                try:
                    return await self._next_try(address, host, link)
                except FetchError as error:
                    pause = max(error.after, FIRST_PAUSE_S * 2**tries)
                    last = tries == self._rules.retries or str(error) not in MAY_PASS or host.is_dead
                    if last or pause > self._rules.timeout_s:
                        raise
                    if error.after:  # the host itself named a time: all who ask it wait as long
                        host.resume = max(host.resume, time.monotonic() + pause)
                    link.phase = "pause"
                    await asyncio.sleep(pause)
        raise AssertionError("the last try returns or raises")

    async def _next_try(self, address: yarl.URL, host: _Host, link: Link) -> bytes:
        link.phase = "host"
        async with host.slots.hold(link.number):
            if host.is_skipped(self._rules.timeout_s):
                raise FetchError("timeout")
            link.phase = "slot"
            async with self._slots.hold(link.number):
                await self._gate.enter()
                link.phase, link.started = "try", link.started or time.monotonic()
                try:
                    body = await self._try(address)
                except BaseException as error:
                    self._gate.leave()
                    if isinstance(error, FetchError):
                        silent = str(error) == "timeout"
                        host.silent, host.answered = host.silent + silent, host.answered or not silent
                    raise
                host.answered = True
                link.phase = "done"
                return body

    @asynccontextmanager
    async def _host(self, name: str) -> AsyncIterator[_Host]:
        """The host's record; forgotten when nobody uses it, so that memory does not grow with a list."""
        host = self._hosts.setdefault(name, _Host(Slots(self._rules.per_host), self._rules.per_host))
        host.users += 1
        try:
            yield host
        finally:
            host.users -= 1
            if not host.users:
                del self._hosts[name]

    async def _try(self, address: yarl.URL) -> bytes:
        try:
            async with self._session.get(address, max_redirects=5) as response:
                return await self._read(response)
        except (aiohttp.ClientError, http_exceptions.HttpProcessingError, TimeoutError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # our own limit, not the server's fault: every later row would fail for it
            raise explain(error) from error

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        if not 200 <= response.status < 300:
            after = _retry_after(response.headers.get("Retry-After", "")) if response.status in (429, 503) else 0.0
            raise FetchError(f"HTTP {response.status}", after)
        if not self._rules.ignore_opt_out and opted_out(response.headers.getall("X-Robots-Tag", [])):
            raise FetchError("opted out")
        limit = self._rules.max_bytes
        if (response.content_length or 0) > limit:
            raise FetchError("too large")
        body = bytearray()
        async for piece in response.content.iter_chunked(PIECE):
            body += piece
            if len(body) > limit:
                raise FetchError("too large")
        unpacked = _unpack(body, response.headers.get("Content-Encoding", ""), limit)
        if not unpacked:
            raise FetchError("empty body")
        return bytes(unpacked)


def _address(url: str) -> yarl.URL:
    if not url.lower().startswith(("http://", "https://")):
        raise FetchError("not an http address")
    try:
        url = ESCAPED.sub("&", url)
        address = yarl.URL(url)
        if not address.host:
            raise FetchError("bad address")
        query = url.partition("#")[0].partition("?")[2].strip()
        if query.isascii() and query.isprintable() and " " not in query:  # yarl unquotes; signatures are of the text
            exact = f"?{query}" if query else ""
            address = yarl.URL(f"{address.scheme}://{address.raw_authority}{address.raw_path}{exact}", encoded=True)
    except ValueError as error:
        raise FetchError("bad address") from error
    return address


def _retry_after(value: str) -> float:
    """Seconds asked for by a Retry-After header, which holds seconds or a date; 0 when it makes no sense."""
    try:
        if value.strip().isdecimal():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def _unpack(body: bytearray, encoding: str, limit: int) -> bytes | bytearray:
    """The body without its Content-Encoding; we ask for none, some servers pack images all the same."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity") or not body:
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise FetchError("unknown Content-Encoding")
    raw_deflate = encoding == "deflate" and body[0] & 0x0F != 8  # zlib's header says method 8
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS if raw_deflate else zlib.MAX_WBITS | 32)
    try:
        data = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise FetchError("broken Content-Encoding") from error
    if len(data) > limit:
        raise FetchError("too large")
    return data


def explain(error: Exception) -> FetchError:
    """A named reason for what aiohttp and the operating system raise."""
    if isinstance(error, TimeoutError):
        return FetchError("timeout")
    if isinstance(error, aiohttp.ClientConnectorError):
        if NOT_PUBLIC in str(error.os_error):
            return FetchError(NOT_PUBLIC)
        if isinstance(error.os_error, NameFailed):
            return FetchError(str(error.os_error))
    for kind, reason in REASONS:
        if isinstance(error, kind):
            return FetchError(reason)
    cause = getattr(error, "os_error", error)
    if isinstance(cause, ConnectionRefusedError) or getattr(cause, "errno", None) == errno.ECONNREFUSED:
        return FetchError("connection refused")
    lost = isinstance(cause, ConnectionError) or getattr(cause, "errno", None) in LOST
    return FetchError("connection lost" if lost else "connection failed")


REASONS: tuple[tuple[type[Exception], str], ...] = (  # the first that fits
    (aiohttp.ClientConnectorDNSError, "name look-up failed"),
    (aiohttp.ClientSSLError, "TLS error"),
    (aiohttp.TooManyRedirects, "too many redirects"),
    (aiohttp.NonHttpUrlClientError, "not an http address"),
    (aiohttp.InvalidURL, "bad address"),
    (aiohttp.ClientPayloadError, "connection lost"),
    (aiohttp.ServerDisconnectedError, "connection lost"),
    (aiohttp.ClientResponseError, "not HTTP"),
    (http_exceptions.HttpProcessingError, "not HTTP"),
    (ValueError, "bad address"),  # what yarl and idna raise
)
LOST = (errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED)


def opted_out(headers: list[str]) -> bool:
    """Whether X-Robots-Tag headers forbid use: a directive for all, or one for our user agent."""
    for header in headers:
        agent, colon, rest = header.partition(":")
        if colon and "," not in agent:
            if agent.strip().lower() != AGENT:
                continue
            header = rest
        if OPT_OUT & {directive.strip().lower() for directive in header.split(",")}:
            return True
    return False


def public_socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket for one of the addresses of a name. Raises OSError when the address is not public."""
    family, kind, protocol, _, where = address
    if not is_public(where[0]):
        raise OSError(errno.EACCES, NOT_PUBLIC)
    return socket.socket(family, kind, protocol)
