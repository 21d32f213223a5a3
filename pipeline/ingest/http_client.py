"""One image from the web: its bytes, or a short named reason why there are none.

Every connection, also after a redirect or for an address in digits, goes through one socket factory that refuses
addresses outside the public internet: a list from the web must not reach services of the user's own network.
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
from enum import Enum
from importlib.metadata import version
from itertools import count
from types import TracebackType
from typing import Any

import aiohttp
import yarl
from aiohttp import http_exceptions

from pipeline.ingest.addresses import is_public
from pipeline.ingest.backpressure import AdmissionGate, PrioritySemaphore
from pipeline.ingest.dns import LOOKUP_FAILED, CachingResolver, DnsError

USER_AGENT = "clipmill"
OPT_OUT = frozenset({"noai", "noimageai", "noindex", "noimageindex"})  # img2dataset's defaults
FIRST_PAUSE_S = 0.5  # before the second try; doubled for each one after
MAX_REDIRECTS = 5
KEEPALIVE_S = 5  # of a connection without a request
DNS_CACHE_S = 600
DNS_CACHE_NAMES = 20_000
CHUNK_BYTES = 1 << 16
# an ampersand of a link as a web page's source has it
ESCAPED_AMPERSAND = re.compile(r"&(?:amp;|#38;|#x26;)+", re.IGNORECASE)

TIMEOUT = "timeout"
NOT_PUBLIC = "not a public address"
REFUSED = "connection refused"
LOST = "connection lost"
FAILED = "connection failed"
TEMPORARY_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
# reasons that may pass with time: these are tried again, at once and by `ingest --retry-failed`
TEMPORARY_REASONS = frozenset(
    {
        TIMEOUT,
        REFUSED,
        LOST,
        FAILED,
        LOOKUP_FAILED,
        *(f"HTTP {status}" for status in TEMPORARY_STATUSES),
    }
)
# what aiohttp raises to reasons, the first that fits
REASONS: tuple[tuple[type[Exception], str], ...] = (
    (aiohttp.ClientConnectorDNSError, LOOKUP_FAILED),
    (aiohttp.ClientSSLError, "TLS error"),
    (aiohttp.TooManyRedirects, "too many redirects"),
    (aiohttp.NonHttpUrlClientError, "not an http address"),
    (aiohttp.InvalidURL, "bad address"),
    (aiohttp.ClientPayloadError, LOST),
    (aiohttp.ServerDisconnectedError, LOST),
    (aiohttp.ClientResponseError, "not HTTP"),
    (http_exceptions.HttpProcessingError, "not HTTP"),
    (ValueError, "bad address"),  # what yarl and idna raise
)
LOST_CODES = (errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED)


class FetchError(Exception):
    """No bytes; the message is a short, stable reason fit for counting.

    ``retry_after_s``: seconds that the server asked us to wait before another try.
    """

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class FetchRules:
    """Limits of the downloads.

    ``timeout_s`` is the time of one try from name look-up to last byte, ``retries`` the tries after the first.
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


class RequestState(Enum):
    """What a request does."""

    WAITING_FOR_HOST = 1  # the host has as many requests as are allowed, or asked for a pause
    WAITING_FOR_SLOT = 2  # as many requests are in flight as are allowed, or decoders are behind
    IN_FLIGHT = 3
    BACKING_OFF = 4  # the pause between two tries
    DONE = 5


@dataclass
class Request:
    """Where a request stands, for those who must decide whether to wait for it.

    ``started_at``: when the first try began (monotonic seconds), 0 before. ``priority``: requests are served in the
    order they were made, at a second try too.
    """

    state: RequestState = RequestState.WAITING_FOR_HOST
    started_at: float = 0.0
    priority: int = field(default_factory=count().__next__)

    @property
    def is_on_network(self) -> bool:
        """Whether the host, and not a limit of ours, is what keeps it waiting."""
        return self.state in (RequestState.WAITING_FOR_HOST, RequestState.IN_FLIGHT, RequestState.BACKING_OFF)


@dataclass
class _Host:
    """The requests to one host.

    ``paused_until``: when it may be asked again (monotonic seconds). ``timeouts`` counts: a host that has never done
    anything else (``answered``) is given up after ``max_timeouts`` of them, except for a try now and then
    (``next_probe_at``).
    """

    slots: PrioritySemaphore
    max_timeouts: int
    users: int = 0
    paused_until: float = 0.0
    timeouts: int = 0
    answered: bool = False
    next_probe_at: float = 0.0

    @property
    def is_unresponsive(self) -> bool:
        """Whether it is not worth waiting for."""
        return not self.answered and self.timeouts >= self.max_timeouts

    def skip_request(self, probe_every_s: float) -> bool:
        """Whether to fail a request without a try: the host is unresponsive, and it is not yet time to probe it."""
        now = time.monotonic()
        if self.is_unresponsive and now < self.next_probe_at:
            return True
        self.next_probe_at = now + probe_every_s
        return False

    def count_failure(self, reason: str) -> None:
        """Note how a try failed."""
        if reason == TIMEOUT:
            self.timeouts += 1
        else:
            self.answered = True


class Fetcher:
    """A session for many images; use as ``async with Fetcher(rules, gate) as fetcher``."""

    def __init__(self, rules: FetchRules, gate: AdmissionGate | None = None) -> None:
        self._rules = rules
        self._gate = gate or AdmissionGate(rules.concurrency)
        self._hosts = dict[str, _Host]()

    async def __aenter__(self) -> "Fetcher":
        self._slots = PrioritySemaphore(self._rules.concurrency)
        self._resolver = CachingResolver(self._rules.nameservers)
        connector = aiohttp.TCPConnector(
            limit=0,  # the limit is self._slots: a request that waits for its host must not hold a slot
            resolver=self._resolver,
            ttl_dns_cache=DNS_CACHE_S,
            dns_cache_max_size=DNS_CACHE_NAMES,
            keepalive_timeout=KEEPALIVE_S,
            socket_factory=None if self._rules.allow_private else public_socket,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=self._rules.timeout_s),
            headers={
                "User-Agent": f"Mozilla/5.0 (compatible; {USER_AGENT}/{version('clipmill')})",
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
        await self._resolver.close()  # aiohttp closes its own resolver only

    @property
    def waiting(self) -> int:
        """Requests that wait for one of our slots."""
        return self._slots.waiting

    async def get(self, url: str, request: Request | None = None) -> bytes:
        """The body of ``url``; ``request`` is kept up to date meanwhile. Raises FetchError."""
        address = _parse_url(url)
        request = request or Request()
        async with self._host(address.host or "") as host:
            for tries in range(self._rules.retries + 1):
                if (wait := host.paused_until - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                try:
                    return await self._wait_and_try(address, host, request)
                except FetchError as error:
                    pause = max(error.retry_after_s, FIRST_PAUSE_S * 2**tries)
                    is_final = str(error) not in TEMPORARY_REASONS or host.is_unresponsive
                    if tries == self._rules.retries or is_final or pause > self._rules.timeout_s:
                        raise
                    if error.retry_after_s:  # the host itself named a time: all who ask it wait as long
                        host.paused_until = max(host.paused_until, time.monotonic() + pause)
                    request.state = RequestState.BACKING_OFF
                    await asyncio.sleep(pause)
        raise AssertionError("the last try returns or raises")

    async def _wait_and_try(self, address: yarl.URL, host: _Host, request: Request) -> bytes:
        """One try, once the host and we have a slot for it."""
        request.state = RequestState.WAITING_FOR_HOST
        async with host.slots.hold(request.priority):
            if host.skip_request(self._rules.timeout_s):
                raise FetchError(TIMEOUT)
            request.state = RequestState.WAITING_FOR_SLOT
            async with self._slots.hold(request.priority):
                await self._gate.enter()
                request.state = RequestState.IN_FLIGHT
                request.started_at = request.started_at or time.monotonic()
                try:
                    body = await self._try(address)
                except BaseException as error:
                    self._gate.leave()
                    if isinstance(error, FetchError):
                        host.count_failure(str(error))
                    raise
                host.answered = True
                request.state = RequestState.DONE
                return body

    @asynccontextmanager
    async def _host(self, name: str) -> AsyncIterator[_Host]:
        """The host's record; dropped with its last request, so that memory does not grow with the list."""
        per_host = self._rules.per_host
        host = self._hosts.setdefault(name, _Host(PrioritySemaphore(per_host), max_timeouts=per_host))
        host.users += 1
        try:
            yield host
        finally:
            host.users -= 1
            if not host.users:
                del self._hosts[name]

    async def _try(self, address: yarl.URL) -> bytes:
        try:
            async with self._session.get(address, max_redirects=MAX_REDIRECTS) as response:
                return await self._read(response)
        except (aiohttp.ClientError, http_exceptions.HttpProcessingError, TimeoutError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # our own limit, not the server's fault: every later row would fail for it
            raise explain(error) from error

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        if not 200 <= response.status < 300:
            retry_after_s = 0.0
            if response.status in (429, 503):
                retry_after_s = parse_retry_after(response.headers.get("Retry-After", ""))
            raise FetchError(f"HTTP {response.status}", retry_after_s)
        if not self._rules.ignore_opt_out and opted_out(response.headers.getall("X-Robots-Tag", [])):
            raise FetchError("opted out")
        limit = self._rules.max_bytes
        if (response.content_length or 0) > limit:
            raise FetchError("too large")
        body = bytearray()
        async for chunk in response.content.iter_chunked(CHUNK_BYTES):
            body += chunk
            if len(body) > limit:
                raise FetchError("too large")
        unpacked = _unpack(body, response.headers.get("Content-Encoding", ""), limit)
        if not unpacked:
            raise FetchError("empty body")
        return bytes(unpacked)


def _parse_url(url: str) -> yarl.URL:
    """The address to ask for; its query as it is written. Raises FetchError."""
    if not url.lower().startswith(("http://", "https://")):
        raise FetchError("not an http address")
    try:
        url = ESCAPED_AMPERSAND.sub("&", url)
        address = yarl.URL(url)
        if not address.host:
            raise FetchError("bad address")
        query = url.partition("#")[0].partition("?")[2].strip()
        if query.isascii() and query.isprintable() and " " not in query:
            # yarl would rewrite the query, and signatures are made of its exact text
            exact = f"?{query}" if query else ""
            address = yarl.URL(f"{address.scheme}://{address.raw_authority}{address.raw_path}{exact}", encoded=True)
    except ValueError as error:
        raise FetchError("bad address") from error
    return address


def parse_retry_after(value: str) -> float:
    """Seconds asked for by a Retry-After header, which holds seconds or a date; 0 when it makes no sense."""
    try:
        if value.strip().isdecimal():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def _unpack(body: bytearray, encoding: str, limit: int) -> bytes | bytearray:
    """The body without its Content-Encoding, at most ``limit`` bytes. We ask for none; some servers use one anyway."""
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
        return FetchError(TIMEOUT)
    if isinstance(error, aiohttp.ClientConnectorError):
        if NOT_PUBLIC in str(error.os_error):
            return FetchError(NOT_PUBLIC)
        if isinstance(error.os_error, DnsError):
            return FetchError(error.os_error.reason)
    for kind, reason in REASONS:
        if isinstance(error, kind):
            return FetchError(reason)
    cause = getattr(error, "os_error", error)
    code = getattr(cause, "errno", None)
    if isinstance(cause, ConnectionRefusedError) or code == errno.ECONNREFUSED:
        return FetchError(REFUSED)
    is_lost = isinstance(cause, ConnectionError) or code in LOST_CODES
    return FetchError(LOST if is_lost else FAILED)


def opted_out(headers: list[str]) -> bool:
    """Whether X-Robots-Tag headers forbid use: a directive for all, or one for our user agent."""
    for header in headers:
        agent, colon, rest = header.partition(":")
        if colon and "," not in agent:
            if agent.strip().lower() != USER_AGENT:
                continue
            header = rest
        if OPT_OUT & {directive.strip().lower() for directive in header.split(",")}:
            return True
    return False


def public_socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket for one address of a name, given as `socket.getaddrinfo` gives it.

    Raises OSError when the address is not public.
    """
    family, kind, protocol, _, host_and_port = address
    if not is_public(host_and_port[0]):
        raise OSError(errno.EACCES, NOT_PUBLIC)
    return socket.socket(family, kind, protocol)
