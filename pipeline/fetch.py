"""One picture from the web: bytes, or a short named reason why not.

Every connection, also after a redirect or for an address in digits, goes through one socket factory that refuses
what is not globally routable: a list from the web must not reach services of the own network.
"""

import asyncio
import errno
import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from types import TracebackType
from typing import Any

import aiohttp
from aiohttp import http_exceptions

AGENT = "clipmill"
OPT_OUT = frozenset({"noai", "noimageai", "noindex", "noimageindex"})  # img2dataset's defaults
NOT_PUBLIC = "not a public address"
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
RETRY_PAUSE_S = 0.5
PIECE = 1 << 16


class FetchError(Exception):
    """No bytes; the message is a short, stable reason fit for counting. ``again``: another try may help."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


@dataclass(frozen=True)
class FetchRules:
    """``timeout_s`` is the time of one try from name look-up to last byte, ``retries`` the tries after the first."""

    timeout_s: float = 10.0
    max_bytes: int = 20_000_000
    retries: int = 1
    allow_private: bool = False
    ignore_opt_out: bool = False


class Fetcher:
    """A session for many pictures; use as ``async with Fetcher(rules, concurrency) as fetcher``."""

    def __init__(self, rules: FetchRules, concurrency: int) -> None:
        self._rules = rules
        self._concurrency = concurrency

    async def __aenter__(self) -> "Fetcher":
        # name look-ups block a thread each; the loop's own pool is too small for lists with a host per row
        self._threads = ThreadPoolExecutor(self._concurrency, "names")
        asyncio.get_running_loop().set_default_executor(self._threads)
        connector = aiohttp.TCPConnector(
            limit=self._concurrency,
            resolver=aiohttp.ThreadedResolver(),
            ttl_dns_cache=300,
            socket_factory=None if self._rules.allow_private else public_socket,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=self._rules.timeout_s),
            headers={
                "User-Agent": f"Mozilla/5.0 (compatible; {AGENT}/{version(AGENT)})",
                "Accept": "image/*,*/*;q=0.5",
            },
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def get(self, url: str) -> bytes:
        """The body of ``url``. Raises FetchError."""
        for tries_left in range(self._rules.retries, -1, -1):
            try:
                return await self._try(url)
            except FetchError as error:
                if not error.again or tries_left == 0:
                    raise
                await asyncio.sleep(RETRY_PAUSE_S)
        raise AssertionError("the last try returns or raises")

    async def _try(self, url: str) -> bytes:
        if not url.lower().startswith(("http://", "https://")):
            raise FetchError("not an http address")
        try:
            async with self._session.get(url, max_redirects=5) as response:
                return await self._read(response)
        except (aiohttp.ClientError, http_exceptions.HttpProcessingError, TimeoutError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # our own limit, not the server's fault: every later row would fail for it
            raise explain(error) from error

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        if not 200 <= response.status < 300:
            raise FetchError(f"HTTP {response.status}", again=response.status >= 500)
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
        if not body:
            raise FetchError("empty body")
        return bytes(body)


def explain(error: Exception) -> FetchError:
    """A named reason for what aiohttp and the operating system raise."""
    if isinstance(error, TimeoutError):
        return FetchError("timeout", again=True)
    if isinstance(error, aiohttp.ClientConnectorError) and NOT_PUBLIC in str(error.os_error):
        return FetchError(NOT_PUBLIC)
    for kind, reason, again in REASONS:
        if isinstance(error, kind):
            return FetchError(reason, again)
    if isinstance(getattr(error, "os_error", error), ConnectionRefusedError):
        return FetchError("connection refused", again=True)
    return FetchError("connection failed", again=True)


REASONS: tuple[tuple[type[Exception], str, bool], ...] = (  # the first that fits
    (aiohttp.ClientConnectorDNSError, "name not found", True),
    (aiohttp.ClientSSLError, "TLS error", False),
    (aiohttp.TooManyRedirects, "too many redirects", False),
    (aiohttp.NonHttpUrlClientError, "not an http address", False),
    (aiohttp.InvalidURL, "bad address", False),
    (aiohttp.ClientPayloadError, "connection lost", True),
    (aiohttp.ServerDisconnectedError, "connection lost", True),
    (aiohttp.ClientResponseError, "not HTTP", False),
    (http_exceptions.HttpProcessingError, "not HTTP", False),
    (ValueError, "bad address", False),  # what yarl and idna raise
    (ConnectionResetError, "connection lost", True),
)


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


def is_public(address: str) -> bool:
    """Whether an IP address in digits is globally routable; an IPv4 address that hides in IPv6 must be so too."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        return ip.is_global and ip in GLOBAL_UNICAST
    return ip.is_global and not ip.is_multicast


def public_socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket for one of ``getaddrinfo``'s answers. Raises OSError when the address is not public."""
    family, kind, protocol, _, where = address
    if not is_public(where[0]):
        raise OSError(errno.EACCES, NOT_PUBLIC)
    return socket.socket(family, kind, protocol)
