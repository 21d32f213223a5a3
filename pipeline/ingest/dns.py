"""Host names to addresses: a bounded number of look-ups at a time, each with a timeout, failures cached.

Lists from the web name a host per few rows, many of them gone; a resolver that is asked for all at once, and again
for each row, is what the users of img2dataset complain of most. c-ares (aiodns) asks without a thread per look-up;
aiohttp caches the answers; this adds the bound and a cache of failures.
"""

import asyncio
import socket
import time
from collections import OrderedDict

import aiodns.error
from aiohttp import AsyncResolver
from aiohttp.abc import AbstractResolver, ResolveResult

MAX_LOOKUPS = 128  # at a time
TIMEOUT_S = 2.5  # of the first question to a server; c-ares doubles it for the second
MAX_CACHED_FAILURES = 50_000  # names
NOT_FOUND = "name not found"  # the server says that there is no such name
LOOKUP_FAILED = "name look-up failed"  # may pass with time
CACHE_S = {NOT_FOUND: 3600.0, LOOKUP_FAILED: 30.0}
NOT_FOUND_CODES = (aiodns.error.ARES_ENOTFOUND, aiodns.error.ARES_ENODATA, aiodns.error.ARES_EBADNAME)


class DnsError(OSError):
    """No address for a name; ``reason``, which is also its text, is `NOT_FOUND` or `LOOKUP_FAILED`."""

    def __init__(self, reason: str) -> None:
        super().__init__(None, reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class CachingResolver(AbstractResolver):
    """aiohttp's resolver for one session; ``nameservers`` (addresses, ``HOST:PORT`` allowed) replace the system's."""

    def __init__(self, nameservers: tuple[str, ...] = ()) -> None:
        servers = list(nameservers) or None  # None: as /etc/resolv.conf says
        self._resolver = AsyncResolver(nameservers=servers, timeout=TIMEOUT_S, tries=2)
        self._lookups = asyncio.Semaphore(MAX_LOOKUPS)
        self._failures = OrderedDict[str, tuple[float, str]]()  # name -> (when it expires, reason)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Addresses of ``host``. Raises DnsError."""
        expires_at, reason = self._failures.get(host, (0.0, ""))
        if time.monotonic() < expires_at:
            raise DnsError(reason)
        try:
            async with self._lookups:
                return await self._resolver.resolve(host, port, family)
        except OSError as error:
            code = error.__cause__.args[0] if error.__cause__ and error.__cause__.args else None
            reason = NOT_FOUND if code in NOT_FOUND_CODES else LOOKUP_FAILED
            self._cache_failure(host, reason)
            raise DnsError(reason) from error

    def _cache_failure(self, host: str, reason: str) -> None:
        self._failures[host] = (time.monotonic() + CACHE_S[reason], reason)
        self._failures.move_to_end(host)
        if len(self._failures) > MAX_CACHED_FAILURES:
            self._failures.popitem(last=False)

    async def close(self) -> None:
        """Cancel the look-ups in progress."""
        await self._resolver.close()
