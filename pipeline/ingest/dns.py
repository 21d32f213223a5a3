"""Host names to addresses: a bounded number of look-ups at a time, each with a time-out, failures remembered.

Lists from the web name a host per few rows, many of them gone; a resolver that is asked for all at once, and again
for each row, is what the users of img2dataset complain of most. c-ares (aiodns) asks without a thread per look-up;
aiohttp caches the answers; this adds the bound and the memory of failures.
"""

import asyncio
import socket
import time
from collections import OrderedDict

import aiodns.error
from aiohttp import AsyncResolver
from aiohttp.abc import AbstractResolver, ResolveResult

LOOKUPS = 128  # at a time
TIMEOUT_S = 2.5  # of the first question to a server; c-ares doubles it for the second
REMEMBERED = 50_000  # failed names
FORGET_S = {"name not found": 3600.0, "name look-up failed": 30.0}
ABSENT = (aiodns.error.ARES_ENOTFOUND, aiodns.error.ARES_ENODATA, aiodns.error.ARES_EBADNAME)


class NameFailed(OSError):
    """No address; the message is ``name not found`` (the server says so) or ``name look-up failed`` (it may pass)."""

    def __init__(self, reason: str) -> None:
        super().__init__(None, reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class Names(AbstractResolver):
    """aiohttp's resolver for one session; ``nameservers`` (addresses, ``HOST:PORT`` allowed) replace the system's."""

    def __init__(self, nameservers: tuple[str, ...] = ()) -> None:
        servers = list(nameservers) or None  # None: as /etc/resolv.conf says
        self._inner = AsyncResolver(nameservers=servers, timeout=TIMEOUT_S, tries=2)
        self._lookups = asyncio.Semaphore(LOOKUPS)
        self._failed = OrderedDict[str, tuple[float, str]]()  # name -> (when to forget, reason)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Addresses of ``host``. Raises NameFailed."""
        until, reason = self._failed.get(host, (0.0, ""))
        if time.monotonic() < until:
            raise NameFailed(reason)
        try:
            async with self._lookups:
                return await self._inner.resolve(host, port, family)
        except OSError as error:
            code = error.__cause__.args[0] if error.__cause__ and error.__cause__.args else None
            reason = "name not found" if code in ABSENT else "name look-up failed"
            self._remember(host, reason)
            raise NameFailed(reason) from error

    def _remember(self, host: str, reason: str) -> None:
        self._failed[host] = (time.monotonic() + FORGET_S[reason], reason)
        self._failed.move_to_end(host)
        if len(self._failed) > REMEMBERED:
            self._failed.popitem(last=False)

    async def close(self) -> None:
        """Give up what is under way."""
        await self._inner.close()
