"""A tiny real DNS server on loopback: addresses, names that do not exist, servers that fail, stay silent, or change.

with serve_names({"good.test": ["127.0.0.1"], "gone.test": NXDOMAIN}) as dns:
    ... f"127.0.0.1:{dns.port}" ...; dns.queries["good.test"]
"""

import ipaddress
import struct
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from socketserver import BaseRequestHandler, ThreadingUDPServer

from web_server import in_background

# codes of answers
SERVFAIL = 2
NXDOMAIN = 3
REFUSED = 5
SILENT = -1  # not a code: no answer is sent
A, AAAA = 1, 28
TYPES = {A: "A", AAAA: "AAAA"}

Answer = int | Sequence[str] | Sequence[Sequence[str]]  # lists in a list: one per question, the last for ever


class _Handler(BaseRequestHandler):
    def handle(self) -> None:
        data, sock = self.request
        number, flags, questions = struct.unpack("!HHH", data[:6])
        if questions != 1:
            return
        name, end = _read_name(data)
        kind = int.from_bytes(data[end : end + 2], "big")
        found = self.server.answer(name, kind)
        if found == SILENT:
            return
        records = [] if isinstance(found, int) else [_record(address) for address in found]
        code = found if isinstance(found, int) else 0
        head = struct.pack("!HHHHHH", number, 0x8480 | flags & 0x0100 | code, 1, len(records), 0, 0)
        sock.sendto(head + data[12 : end + 4] + b"".join(records), self.client_address)


def _read_name(data: bytes) -> tuple[str, int]:
    """The question's name in small letters, and where it ends."""
    labels, at = [], 12
    while length := data[at]:
        labels.append(data[at + 1 : at + 1 + length].decode("latin-1"))
        at += 1 + length
    return ".".join(labels).lower(), at + 1


def _record(address: str) -> bytes:
    """An answer for the question's name, not to be kept (TTL 0)."""
    packed = ipaddress.ip_address(address).packed
    return struct.pack("!HHHIH", 0xC00C, A if len(packed) == 4 else AAAA, 1, 0, len(packed)) + packed


class NameServer(ThreadingUDPServer):
    """``queries`` counts questions by name, and by (name, "A") and (name, "AAAA")."""

    daemon_threads = True

    def __init__(self, names: Mapping[str, Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.names = dict(names)
        self.port: int = self.server_address[1]
        self.queries: Counter[str | tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def answer(self, name: str, kind: int) -> int | list[str]:
        """A code, or the addresses of this kind; names that are not listed do not exist."""
        with self._lock:
            self.queries[name] += 1
            self.queries[name, TYPES.get(kind, str(kind))] += 1
            turn = self.queries[name, TYPES.get(kind, str(kind))] - 1
        found = self.names.get(name, NXDOMAIN)
        if isinstance(found, int):
            return found
        if found and not isinstance(found[0], str):
            found = found[min(turn, len(found) - 1)]
        version = {A: 4, AAAA: 6}.get(kind)
        return [address for address in found if ipaddress.ip_address(address).version == version]


@contextmanager
def serve_names(names: Mapping[str, Answer]):
    """Yields the NameServer."""
    with in_background(NameServer(names)) as server:
        yield server
