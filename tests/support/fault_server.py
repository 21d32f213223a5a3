"""A real-socket web server for every kind of trouble that lists from the web meet, and for good links, fast.

Each kind has a loopback address of its own, so that also what happens before a request (refused, reset, garbage) is
told apart by address alone, on one port. The server is a process of its own: it can be killed and started again, and
takes no time from the process under test. ``python tests/support/fault_server.py PORT FOLDER`` prints its port when it
listens.
`ingest_apart` runs `clipmill ingest` in a process of its own too, so that one that hangs is an error and ends.
"""

import asyncio
import errno
import io
import json
import os
import random
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import urllib.request
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow.parquet as pq
from PIL import ExifTags, Image
from web_server import make_image

GOOD_HOSTS = [f"127.0.0.{n}" for n in range(1, 17)]
MAX_BYTES = 1_000_000  # the kinds expect this ingest --max-bytes,
TIMEOUT_S = 1.5  # this --timeout-s and --retries 1
LINK = "http://{host}:{port}/{kind}?n={n}"
OPENSSL = shutil.which("openssl")


# images


@lru_cache(maxsize=1)
def _plain() -> bytes:
    return make_image(1)


def marked(text: str) -> bytes:
    """A JPEG of its own for each text: a comment holds it."""
    note, data = text.encode(), _plain()
    return data[:2] + b"\xff\xfe" + struct.pack(">H", len(note) + 2) + note + data[2:]


def good_body(number: int | str) -> bytes:
    """What /good/NUMBER answers."""
    return marked(f"good {number}")


def encoded(form: str, mode: str = "RGB", size: tuple[int, int] = (96, 64), **options) -> bytes:
    """A drawing in any form."""
    return make_image(5, size, form, mode, **options)


def zeros(mebibytes: int) -> bytes:
    """Raw deflate data of as many MiB of zeros, a thousandth of them long, made at once."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * mebibytes + b"\x03\x00"


def _chunk(name: bytes, data: bytes, crc_off: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) ^ crc_off)


def png(width: int, height: int, packed: bytes, *more: bytes, crc_off: int = 0) -> bytes:
    """A PNG of one bit a pixel around a zlib stream."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header)
    return start + b"".join(more) + _chunk(b"IDAT", packed, crc_off) + _chunk(b"IEND", b"")


def png_bomb() -> bytes:
    return png(50_000, 50_000, b"\x78\xda" + zeros(50_000 * 6251 // (1 << 20)))


def text_bomb() -> bytes:
    text = _chunk(b"zTXt", b"Comment\0\0\x78\xda" + zeros(500))
    return png(8, 8, zlib.compress(bytes(16)), text)


def gif_bomb() -> bytes:
    side = struct.pack("<HH", 65_535, 65_535)
    return b"GIF89a" + side + b"\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0" + side + b"\0\x02\x02\x44\x01\0;"


def jpeg_bomb() -> bytes:
    data = bytearray(_plain())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 65_000, 65_000)
    return bytes(data)


def ico_bomb() -> bytes:
    bomb = png_bomb()
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(bomb), 22) + bomb


def bmp_bomb() -> bytes:
    return b"BM" + struct.pack("<IIIIiiHHIIIIII", 62, 0, 62, 40, 60_000, 60_000, 1, 1, 0, 0, 0, 0, 0, 0) + bytes(8)


def frames(form: str) -> bytes:
    images = [Image.new("RGB", (40, 30), (n * 60, 10, 200)) for n in range(3)]
    file = io.BytesIO()
    images[0].save(file, form, save_all=True, append_images=images[1:], duration=100)
    return file.getvalue()


def blank(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (9, 99, 199)).save(file, "PNG")
    return file.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return encoded("JPEG", exif=exif)


def odd_profile() -> bytes:
    """A profile of the right form that no image viewer has seen: 3,000 bytes of a made-up RGB space."""
    profile = struct.pack(">I", 3000) + b"test\x02\x10\0\0mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(2960)
    return encoded("JPEG", icc_profile=profile)


def deflate(data: bytes, window: int) -> bytes:
    packer = zlib.compressobj(wbits=window)
    return packer.compress(data) + packer.flush()


# answers


class Peer(asyncio.Protocol):
    """One connection; good links are answered at once, the kinds that need time by a task."""

    def __init__(self, server: "Server", kind: str | None) -> None:
        self.server, self.kind = server, kind
        self.target, self.first = "", True
        self.closed, self._room = asyncio.Event(), asyncio.Event()
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._room.set()
        if self.kind and KINDS[self.kind].at_accept:
            self._give(KINDS[self.kind].answer)

    def connection_lost(self, _error: Exception | None) -> None:
        self.closed.set()
        self._room.set()

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def data_received(self, data: bytes) -> None:
        if self.kind and KINDS[self.kind].at_accept:
            return
        self._head += data
        if self._head.startswith(b"\x16\x03"):  # a TLS client: what nginx says to one on its plain port
            self.send(reply(b"", "400 Bad Request", "Connection: close"))
            self.close()
        while b"\r\n\r\n" in self._head and not self._transport.is_closing():
            head, _, self._head = self._head.partition(b"\r\n\r\n")
            self._answer(head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")[1])

    def _answer(self, target: str) -> None:
        self.target = target
        self.server.requests[target] += 1
        self.first = self.server.requests[target] == 1
        name, _, rest = target.split("?")[0].strip("/").partition("/")
        if name == "good":
            self.send(reply(good_body(rest)))
        elif name == "_counts":
            self.send(reply(json.dumps(self.server.requests).encode()))
        elif name in WAYS:
            self._give(WAYS[name])
        elif self.kind:
            kind = KINDS[self.kind]
            self._give(kind.once if self.first and kind.once is not None else kind.answer)
        else:
            self.send(reply(b"no such page", "404 Not Found"))

    def _give(self, answer: "Answer") -> None:
        if isinstance(answer, bytes):
            self.send(_filled(answer, self.server.port))
        else:
            task = asyncio.ensure_future(answer(self))
            self.server.tasks.add(task)
            task.add_done_callback(self.server.tasks.discard)

    def send(self, data: bytes) -> None:
        if not self.closed.is_set():
            self._transport.write(data)

    async def room(self) -> None:
        """Wait until the other side has read what it was sent."""
        await self._room.wait()

    def close(self) -> None:
        self._transport.close()

    def reset(self) -> None:
        """RST in place of FIN."""
        linger = struct.pack("ii", 1, 0)
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._transport.abort()


Answer = bytes | Callable[[Peer], Awaitable[None]]


@lru_cache(maxsize=1000)
def _filled(answer: bytes, port: int) -> bytes:
    return answer.replace(b"{port}", str(port).encode()).replace(b"{refused}", HOSTS["refused"].encode())


def reply(body: bytes = b"", status: str = "200 OK", *headers: str, length: int | str | None = -1) -> bytes:
    """A whole answer; ``length`` None leaves the Content-Length out."""
    lines = [f"HTTP/1.1 {status}", *headers]
    if length is not None:
        lines.append(f"Content-Length: {len(body) if length == -1 else length}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8") + body


def redirect(target: str, status: str = "302 Found") -> bytes:
    return reply(b"", status, f"Location: {target}")


def chunks(*pieces: bytes, extension: str = "", trailer: bytes = b"") -> bytes:
    """An answer in chunks."""
    body = b"".join(f"{len(piece):x}{extension}\r\n".encode() + piece + b"\r\n" for piece in pieces)
    return reply(body + b"0\r\n" + trailer + b"\r\n", "200 OK", "Transfer-Encoding: chunked", length=None)


def then_close(data: bytes) -> Answer:
    async def act(peer: Peer) -> None:
        peer.send(data)
        peer.close()

    return act


def then_reset(data: bytes) -> Answer:
    async def act(peer: Peer) -> None:
        peer.send(data)
        await asyncio.sleep(0.02)  # else the RST may overtake the data
        peer.reset()

    return act


def then_drip(data: bytes, piece: bytes, pause_s: float) -> Answer:
    """Data, then small pieces for ever."""

    async def act(peer: Peer) -> None:
        peer.send(data)
        while not peer.closed.is_set():
            await asyncio.sleep(pause_s)
            peer.send(piece)

    return act


def slowly(data: bytes, pause_s: float) -> Answer:
    """Byte by byte."""

    async def act(peer: Peer) -> None:
        for byte in data:
            peer.send(bytes([byte]))
            await asyncio.sleep(pause_s)

    return act


def then_flood(data: bytes, piece: bytes) -> Answer:
    """Data, then pieces as fast as they are read, for ever."""

    async def act(peer: Peer) -> None:
        peer.send(data)
        while not peer.closed.is_set():
            peer.send(piece)
            await peer.room()
            await asyncio.sleep(0)

    return act


async def silence(_peer: Peer) -> None:
    """Nothing, for ever."""


def only(targets: list[str], body: bytes) -> Answer:
    """The image when the request is for one of these, else 404."""

    async def act(peer: Peer) -> None:
        peer.send(reply(body) if peer.target in targets else reply(b"no such page", "404 Not Found"))

    return act


async def _hop(peer: Peer) -> None:
    """/hop/3 leads to /hop/2 and so on, /hop/0 to an image; with ?slow each takes 0.6 s."""
    left = int(peer.target.split("?")[0].rpartition("/")[2])
    slow = peer.target.endswith("?slow")
    await asyncio.sleep(0.6 * slow)
    peer.send(redirect(f"/hop/{left - 1}{'?slow' * slow}") if left else reply(good_body("hop")))


async def _late(peer: Peer) -> None:
    """/late/SECONDS/NUMBER answers with /good/NUMBER's image after a while."""
    seconds, _, number = peer.target.removeprefix("/late/").partition("/")
    await asyncio.sleep(float(seconds))
    peer.send(reply(good_body(number)))


async def _photo(peer: Peer) -> None:
    """/photo/NUMBER: an image that takes a decoder about 50 ms."""
    peer.send(reply(marked_photo(peer.target.rpartition("/")[2])))


@lru_cache(maxsize=1)
def _large() -> bytes:
    file = io.BytesIO()
    noise = random.Random(1).randbytes(800 * 800)  # Pillow's own noise depends on what a process drew before
    Image.frombytes("L", (800, 800), noise).convert("RGB").save(file, "WEBP", quality=20)
    return file.getvalue()


def marked_photo(number: int | str) -> bytes:
    """What /photo/NUMBER answers: WebP chunks of unknown name are to be ignored, this one holds the number."""
    note, data = f"{number:>10}".encode(), _large()
    size = struct.unpack("<I", data[4:8])[0] + 8 + len(note)
    return b"RIFF" + struct.pack("<I", size) + data[8:] + b"note" + struct.pack("<I", len(note)) + note


async def _once(peer: Peer) -> None:
    """/once/NUMBER is busy the first time, then /good/NUMBER's image."""
    number = peer.target.rpartition("/")[2]
    peer.send(reply(b"", "503 Busy") if peer.first else reply(good_body(number)))


WAYS: dict[str, Answer] = {"hop": _hop, "late": _late, "once": _once, "photo": _photo}


# the kinds


@dataclass(frozen=True)
class Kind:
    """``expected`` lists all right ends; ``body`` is the image of a success.

    ``once`` is the answer to the first request for a link, ``at_accept`` gives the answer before there is a request,
    ``tls``: the address speaks TLS with a certificate of our own.
    """

    expected: tuple[str, ...]
    answer: Answer
    body: bytes
    once: Answer | None = None
    url: str = LINK
    at_accept: bool = False
    tls: bool = False


KINDS: dict[str, Kind] = {}
DONE = "success"
LOST = "connection lost"
BAD = "bad address"
NOT_HTTP = "not HTTP"
LATE = "timeout"
LARGE = "too large"
NO_NAME = ("name not found", "name look-up failed")  # which of them depends on the machine's DNS
NO_IMAGE = "resize: not an image"
BROKEN = ("resize: broken image", "resize: truncated image")


def kind(name: str, expected: str | tuple[str, ...], answer: Answer | None = None, body: bytes | None = None, **more):
    """Add a kind; without ``answer`` it is the image ``body``, without that one of its own."""
    body = marked(name) if body is None else body
    ends = (expected,) if isinstance(expected, str) else expected
    KINDS[name] = Kind(ends, reply(body) if answer is None else answer, body, **more)


# fmt: off
def _connections() -> None:
    jpeg = marked("half")
    whole, half = reply(jpeg), reply(jpeg)[: -len(jpeg) // 2]
    kind("fine", DONE)
    kind("refused", "connection refused")
    kind("blackhole", LATE)
    kind("close_at_accept", LOST, then_close(b""), at_accept=True)
    kind("reset_at_accept", LOST, then_reset(b""), at_accept=True)
    kind("silent_at_accept", LATE, silence, at_accept=True)
    for way, act in (("close", then_close), ("reset", then_reset)):
        kind(f"{way}_before_header", LOST, act(b""))
        kind(f"{way}_mid_status", (LOST, NOT_HTTP), act(whole[:11]))
        kind(f"{way}_mid_header", (LOST, NOT_HTTP), act(whole[:30]))
        kind(f"{way}_mid_body", LOST, act(half))
        kind(f"{way}_once", DONE, once=act(b""))
        kind(f"{way}_mid_body_once", DONE, once=act(half))
    kind("silent_header", LATE, silence)
    kind("slow_header", LATE, slowly(whole, 0.3))
    kind("slow_once", DONE, once=silence)
    kind("endless_header_drip", LATE, then_drip(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n", 0.2))
    kind("endless_header_flood", (NOT_HTTP, LATE), then_flood(b"HTTP/1.1 200 OK\r\n", b"X-A: bbbbbbb\r\n" * 1000))
    kind("endless_header_line", (NOT_HTTP, LATE), then_flood(b"HTTP/1.1 200 OK\r\nX-A: ", b"b" * 10_000))
    kind("endless_early_hints", (LATE, NOT_HTTP), then_drip(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.01))
    kind("slow_body", LATE, slowly(whole, 0.02))
    kind("stalled_body", LATE, half)
    open_end = reply(length=None)
    kind("trickle_without_end", LATE, then_drip(open_end + jpeg, b"x", 0.1))
    kind("endless_body", LARGE, then_flood(open_end + jpeg, bytes(50_000)))
    chunked = reply(b"", "200 OK", "Transfer-Encoding: chunked", length=None)
    kind("endless_chunks", LARGE, then_flood(chunked, b"c350\r\n" + bytes(50_000) + b"\r\n"))
    kind("tiny_chunks", DONE, chunks(*(jpeg[n : n + 1] for n in range(len(jpeg)))), jpeg)


def _lengths() -> None:
    jpeg = marked("lengths")
    kind("large_by_length", LARGE, reply(jpeg, length=MAX_BYTES + 1))
    kind("large_by_bytes", LARGE, then_close(reply(jpeg + bytes(MAX_BYTES), length=None)))
    kind("length_in_the_exabytes", LARGE, reply(jpeg, length=10**18))
    kind("length_overflow", (LARGE, NOT_HTTP), reply(jpeg, length="9" * 40))
    kind("length_too_long", LOST, then_close(reply(jpeg, length=len(jpeg) + 100)))
    kind("length_too_short", (BROKEN[1], NOT_HTTP), reply(jpeg, length=len(jpeg) // 2))
    kind("an_answer_to_nobody_behind", DONE, reply(jpeg) + reply(marked("of nobody")), jpeg)
    kind("length_negative", NOT_HTTP, reply(jpeg, length=-5))
    kind("length_a_word", NOT_HTTP, reply(jpeg, length="many"))
    kind("length_empty", (NOT_HTTP, "empty body"), reply(jpeg, length=""))
    kind("two_lengths", NOT_HTTP, reply(jpeg, "200 OK", f"Content-Length: {len(jpeg) - 1}"))
    kind("chunks_good", DONE, chunks(jpeg[:99], jpeg[99:], extension=";a=b", trailer=b"X-Sum: 1\r\n"), jpeg)
    gap = b"\r\n\r\n"
    kind("chunk_size_bad", (NOT_HTTP, LOST), chunks(jpeg).replace(gap, gap + b"xyz", 1))
    kind("chunk_size_huge", (NOT_HTTP, LOST, LARGE), chunks(jpeg).replace(gap, gap + b"f" * 15, 1))
    kind("chunk_cut", LOST, then_close(chunks(jpeg)[:-40]))
    kind("chunk_end_missing", LOST, then_close(chunks(jpeg)[:-5]))
    both = reply(chunks(jpeg).partition(gap)[2], "200 OK", "Transfer-Encoding: chunked", length=7)
    kind("chunks_and_length", (NOT_HTTP, DONE), both, jpeg)
    kind("without_length", DONE, then_close(reply(jpeg, length=None)), jpeg)
    kind("http_1_0", DONE, then_close(b"HTTP/1.0 200 OK\r\n\r\n" + jpeg), jpeg)


BAD_LINKS = {
    "brackets": "http://[bad/x.jpg", "port": "http://127.0.0.1:99999999/x", "port_word": "http://127.0.0.1:x/x",
    "no_host": "http:///x.jpg", "only_scheme": "http://", "space_in_host": "http://a b/x.jpg",
    "long_label": f"http://{'a' * 70}.test/x.jpg", "empty_label": "http://a..test/x.jpg",
    "long_name": f"http://{'a.' * 200}test/x.jpg",
}
OTHER_LINKS = {
    "file": "file:///etc/passwd", "ftp": "ftp://127.0.0.1/x.jpg", "data": "data:image/png;base64,AAAA",
    "javascript": "javascript:1", "s3": "s3://bucket/x.jpg",
}


def _redirects() -> None:
    kind("hops_4", DONE, redirect("/hop/3"), good_body("hop"))
    kind("hops_12", "too many redirects", redirect("/hop/11"))
    kind("hops_slow", LATE, redirect("/hop/4?slow"))
    kind("redirect_loop", "too many redirects", redirect("/loop"))
    kind("redirect_once_then_good", DONE, once=redirect("/again"))
    for status in (301, 303, 307, 308):
        kind(f"redirect_{status}", DONE, redirect("/good/r", f"{status} Else"), good_body("r"))
    kind("redirect_nowhere", "HTTP 302", reply(b"", "302 Found"))
    kind("redirect_host", DONE, redirect("http://127.0.0.2:{port}/good/h"), good_body("h"))
    kind("redirect_host_short", DONE, redirect("//127.0.0.2:{port}/good/h"), good_body("h"))
    kind("redirect_raw_unicode", DONE, redirect("/good/ü ä"), good_body("%C3%BC%20%C3%A4"))
    kind("redirect_fragment", DONE, redirect("/good/f#top"), good_body("f"))
    kind("redirect_refused", "connection refused", redirect("http://{refused}:{port}/x"))
    for name, target in OTHER_LINKS.items():
        kind(f"redirect_{name}", "not an http address", redirect(target))
    for name, target in BAD_LINKS.items():
        kind(f"redirect_bad_{name}", (BAD, *NO_NAME), redirect(target))
    kind("redirect_long", (NOT_HTTP, BAD), redirect("/" + "a" * 200_000))


AFTER = {
    "hour": "3600", "date": "Wed, 21 Oct 2099 07:28:00 GMT", "past": "Wed, 21 Oct 2015 07:28:00 GMT", "word": "soon",
    "minus": "-1", "power": "²", "huge": "9" * 500, "point": "0.1", "year_0": "Wed, 21 Oct 0000 07:28:00 GMT",
}


def _statuses() -> None:
    jpeg = marked("status")
    for status in (300, 304, 400, 401, 402, 403, 404, 406, 408, 410, 415, 418, 451, 500, 502, 503, 504, 520, 999):
        kind(f"status_{status}", f"HTTP {status}", reply(b"" if status == 304 else b"no", f"{status} Something"))
    kind("status_204", "empty body", reply(b"", "204 No Content", length=None))
    kind("status_206", DONE, reply(jpeg, "206 Partial", f"Content-Range: bytes 0-{len(jpeg) - 1}/{len(jpeg)}"), jpeg)
    kind("status_401_basic", "HTTP 401", reply(b"", "401 No", 'WWW-Authenticate: Basic realm="x"'))
    upgrade = reply(b"", "101 Switching Protocols", "Upgrade: x", "Connection: upgrade")
    kind("status_101", ("HTTP 101", NOT_HTTP), upgrade)
    kind("status_100_first", DONE, reply(b"", "100 Continue", length=None) + reply(jpeg), jpeg)
    kind("status_103_first", DONE, reply(b"", "103 Early Hints", "Link: </a>", length=None) + reply(jpeg), jpeg)
    kind("status_without_words", DONE, reply(jpeg, "200"), jpeg)
    kind("status_no_number", NOT_HTTP, reply(jpeg, "OK"))
    kind("error_with_endless_body", "HTTP 404", then_flood(reply(b"", "404 No", length=None), bytes(50_000)))
    kind("status_500_once", DONE, once=reply(b"", "500 Oh"))
    for status in (429, 503):
        kind(f"status_{status}_once", DONE, once=reply(b"", f"{status} Later"))
        kind(f"status_{status}_once_after_1_s", DONE, once=reply(b"", f"{status} Later", "Retry-After: 1"))
        for name, value in AFTER.items():
            later = reply(b"", f"{status} Later", f"Retry-After: {value}")
            kind(f"status_{status}_after_{name}", f"HTTP {status}", later)


def _protocols() -> None:
    jpeg = marked("protocols")
    garbage = bytes(range(255, -1, -1)) * 4
    for name, data in {"garbage": garbage, "ssh": b"SSH-2.0-OpenSSH_9.6\r\n", "smtp": b"220 mail ESMTP\r\n"}.items():
        kind(f"{name}_at_accept", (NOT_HTTP, LOST), data, at_accept=True)
        kind(f"{name}_then_close", (NOT_HTTP, LOST), then_close(data))
    kind("image_without_header", (NOT_HTTP, LOST), then_close(jpeg))
    kind("header_1_mb", NOT_HTTP, reply(jpeg, "200 OK", "X-A: " + "b" * 1_000_000))
    many = reply(jpeg, "200 OK", *(f"X-{n}: {n}" for n in range(10_000)))
    kind("headers_10000", (NOT_HTTP, DONE), many, jpeg)
    kind("header_without_colon", NOT_HTTP, reply(jpeg, "200 OK", "what is this"))
    kind("header_with_nul", NOT_HTTP, reply(jpeg, "200 OK", "X-A: a\0b"))
    kind("header_raw_unicode", DONE, reply(jpeg, "200 OK", 'Content-Disposition: filename="ü.jpg"'), jpeg)
    kind("header_latin_1", DONE, reply(jpeg).replace(b"\r\n", b"\r\nX-A: \xfc\r\n", 1), jpeg)
    bare = reply(jpeg).partition(b"\r\n\r\n")[0].replace(b"\r\n", b"\n") + b"\n\n" + jpeg
    kind("newlines_alone", (NOT_HTTP, DONE), bare, jpeg)
    cookies = [f"Set-Cookie: a{n}={'x' * 1000}" for n in range(10)]
    kind("cookies_10_kb", DONE, reply(jpeg, "200 OK", *cookies), jpeg)
    secure = {"url": "https://{host}:{port}/x?n={n}"}
    kind("tls_to_plain_port", "TLS error", **secure)
    kind("tls_silent", LATE, silence, at_accept=True, **secure)
    kind("tls_alert", "TLS error", b"\x15\x03\x03\0\x02\x02\x28", at_accept=True, **secure)
    kind("tls_garbage", "TLS error", garbage, at_accept=True, **secure)
    kind("tls_reset", (LOST, "TLS error"), then_reset(b""), at_accept=True, **secure)
    kind("tls_close", (LOST, "TLS error"), then_close(b""), at_accept=True, **secure)


def _encodings() -> None:
    jpeg = marked("encodings")
    gzip, wbits = deflate(jpeg, zlib.MAX_WBITS | 16), zlib.MAX_WBITS

    def packed(name: str, expected: str | tuple[str, ...], data: bytes, encoding: str) -> None:
        kind(name, expected, reply(data, "200 OK", f"Content-Encoding: {encoding}"), jpeg)

    packed("gzip", DONE, gzip, "gzip")
    packed("gzip_upper", DONE, gzip, "GZIP")
    packed("gzip_x", DONE, gzip, "x-gzip")
    packed("identity", DONE, jpeg, "identity")
    packed("deflate", DONE, deflate(jpeg, wbits), "deflate")
    packed("deflate_raw", DONE, deflate(jpeg, -wbits), "deflate")
    packed("gzip_bomb_900_mb", LARGE, b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + zeros(900), "gzip")
    packed("gzip_bomb_10_gb", LARGE, b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + zeros(10_000), "gzip")
    packed("deflate_bomb", LARGE, b"\x78\xda" + zeros(900), "deflate")
    for name in ("zstd-foo", "br", "aes128gcm"):
        packed(f"encoding_{name}", "unknown Content-Encoding", jpeg, name)
    broken = ("broken Content-Encoding", *BROKEN, NO_IMAGE)
    packed("gzip_cut", broken, gzip[:-60], "gzip")
    packed("gzip_broken", broken, gzip[:40] + b"\xff" * 40 + gzip[80:], "gzip")
    packed("gzip_but_plain", (*broken, DONE), jpeg, "gzip")
    packed("gzip_empty", "empty body", deflate(b"", wbits | 16), "gzip")


def _images() -> None:
    jpeg, bits = marked("images"), zlib.compress(bytes(16))
    for name, body in {
        "cmyk_jpeg": encoded("JPEG", "CMYK"), "grey_jpeg": encoded("JPEG", "L"), "gif_animated": frames("GIF"),
        "progressive": encoded("JPEG", progressive=True), "png_16_bits": encoded("PNG", "I;16"),
        "png_palette_alpha": encoded("PNG", "P", transparency=3), "png_alpha": encoded("PNG", "RGBA"),
        "png_1_bit": png(8, 8, bits), "webp_animated": frames("WEBP"), "bmp": encoded("BMP"), "tiff": encoded("TIFF"),
        "ico": encoded("ICO"), "one_pixel": blank(1, 1), "wide": blank(20_000, 2), "rotated": rotated(),
        "odd_profile": odd_profile(), "junk_behind": jpeg + b"<html>" * 50, "png_data_crc": png(8, 8, bits, crc_off=1),
    }.items():
        kind(f"image_{name}", DONE, body=body)
    for name, body in {
        "html": b"<html>no image</html>", "json": b'{"error": 1}', "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "pdf": b"%PDF-1.7\n%", "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "nul": bytes(5000),
        "mp4": b"\0\0\0\x18ftypmp42" + bytes(40), "one_byte": b"x",
    }.items():
        kind(f"{name}_as_jpeg", NO_IMAGE, reply(body, "200 OK", "Content-Type: image/jpeg"))
    kind("image_as_html", DONE, reply(jpeg, "200 OK", "Content-Type: text/html"), jpeg)
    kind("empty", "empty body", reply())
    kind("empty_without_length", "empty body", then_close(reply(length=None)))
    kind("empty_chunks", "empty body", chunks())
    large, noise = make_image(1, (200, 200)), encoded("PNG", size=(200, 200))
    kind("jpeg_truncated", BROKEN[1], body=large[:900])
    kind("jpeg_header_alone", (*BROKEN, NO_IMAGE), body=jpeg[:20])
    kind("jpeg_broken_middle", (*BROKEN, DONE), body=large[:1000] + bytes(range(7, 47)) + large[1040:])
    kind("png_truncated", BROKEN, body=noise[: len(noise) // 2])
    kind("png_header_crc", (*BROKEN, NO_IMAGE), body=noise[:29] + bytes(4) + noise[33:])
    kind("png_broken_data", BROKEN, body=png(8, 8, b"\x78\xda" + b"\xff" * 30))
    kind("png_broken_middle", BROKEN, body=noise[:99] + b"\xff" * 40 + noise[139:])
    kind("png_no_pixels", (*BROKEN, NO_IMAGE), body=png(0, 0, zlib.compress(b"")))
    many = "resize: too many pixels"
    for name, body in {"png": png_bomb(), "gif": gif_bomb(), "jpeg": jpeg_bomb(), "bmp": bmp_bomb()}.items():
        kind(f"bomb_{name}", many, body=body)
    kind("bomb_ico", (many, *BROKEN, NO_IMAGE), body=ico_bomb())
    kind("bomb_png_text", DONE, body=text_bomb())


def _links() -> None:
    here = "http://{host}:{port}"
    for name, link, *targets in (
        ("unicode_percent", here + "/%C3%BC/%E7%8C%AB.jpg", "/%C3%BC/%E7%8C%AB.jpg"),
        ("unicode_raw", here + "/ü/猫.jpg", "/%C3%BC/%E7%8C%AB.jpg"),
        ("spaces", here + "/a b/c d.jpg", "/a%20b/c%20d.jpg"),
        ("fragment", here + "/f.jpg#page=1", "/f.jpg"),
        ("password", "http://user:pass%40word@{host}:{port}/p.jpg", "/p.jpg"),
        ("upper_scheme", "HTTP://{host}:{port}/u.jpg", "/u.jpg"),
        ("query", here + "/q.jpg?a=1&b=%2B%26&c=x+y", "/q.jpg?a=1&b=%2B%26&c=x+y"),
        ("query_signed", here + "/q.jpg?sign=a%2Fb%3D%3D", "/q.jpg?sign=a%2Fb%3D%3D"),
        ("no_path", here, "/"),
        ("no_path_query", here + "?x=1", "/?x=1"),
        ("percent_slash", here + "/a%2Fb.jpg", "/a%2Fb.jpg"),
        ("percent_alone", here + "/100%.jpg", "/100%25.jpg", "/100%.jpg"),
        ("brackets", here + "/a[1]|b.jpg", "/a%5B1%5D%7Cb.jpg", "/a[1]|b.jpg"),
        ("long", here + "/" + "l" * 6000, "/" + "l" * 6000),
        ("dots", here + "/a/../b.jpg", "/b.jpg"),
    ):
        kind(f"link_{name}", DONE, only(targets, marked(name)), marked(name), url=link)
    for name, link in BAD_LINKS.items():
        kind(f"link_bad_{name}", (BAD, *NO_NAME), url=link)
    for name, link in {**OTHER_LINKS, "no_scheme": "//127.0.0.1/x.jpg", "word": "x.jpg"}.items():
        kind(f"link_{name}", "not an http address", url=link)


def _robots() -> None:
    jpeg = marked("robots")
    for name, out, *lines in (
        ("noai", True, "noai"), ("noimageai", True, "noimageai"), ("noindex", True, "noindex"), ("upper", True, "NOAI"),
        ("listed", True, "nofollow, noimageindex"), ("second", True, "all", "noai"), ("us", True, "clipmill: noai"),
        ("others", False, "googlebot: noindex"), ("all", False, "all"), ("nofollow", False, "nofollow"),
    ):
        headers = [f"X-Robots-Tag: {line}" for line in lines]
        kind(f"robots_{name}", "opted out" if out else DONE, reply(jpeg, "200 OK", *headers), jpeg)
    kind("robots_on_404", "HTTP 404", reply(jpeg, "404 No", "X-Robots-Tag: noai"))
    kind("robots_on_redirect", DONE, reply(b"", "302 Found", "Location: /good/o", "X-Robots-Tag: noai"), good_body("o"))


def _certified() -> None:
    """Kinds that need the openssl command; who does not trust the certificate has a TLS error with each."""
    jpeg = marked("tls")
    half = reply(jpeg)[: -len(jpeg) // 2]
    secure = {"url": "https://{host}:{port}/x?n={n}", "tls": True}
    kind("tls_self_signed", "TLS error", reply(jpeg), jpeg, **secure)
    kind("tls_other_name", "TLS error", reply(jpeg), jpeg, **secure)
    kind("tls_close_mid_body", "TLS error", then_close(half), **secure)
    kind("tls_reset_mid_body", "TLS error", then_reset(half), **secure)
    kind("plain_to_tls_port", (NOT_HTTP, LOST), reply(jpeg), tls=True)
# fmt: on


GROUPS = [_connections, _lengths, _redirects, _statuses, _protocols, _encodings, _images, _links, _robots, _certified]
for group in GROUPS:
    group()


HOSTS = {name: f"127.0.{1 + n // 250}.{1 + n % 250}" for n, name in enumerate(KINDS)}
KIND_AT = {host: name for name, host in HOSTS.items()}
TROUBLES = {name: entry.expected for name, entry in KINDS.items() if not entry.tls}
CERTIFIED = {name: entry.expected for name, entry in KINDS.items() if entry.tls}


def link(name: str, port: int, number: int = 0) -> str:
    """The address of a kind; ``number`` tells several links of it apart, where its form allows."""
    return KINDS[name].url.format(host=HOSTS[name], port=port, kind=name, n=number)


def good_link(number: int, port: int, host: str | None = None) -> str:
    """The address of a good image; those of 16 numbers in a row have hosts of their own."""
    return f"http://{host or GOOD_HOSTS[number % len(GOOD_HOSTS)]}:{port}/good/{number}"


# the server


class Server:
    """Listens at every address on one port."""

    def __init__(self, port: int, folder: Path, good_only: bool) -> None:
        self.requests, self.tasks = Counter[str](), set[asyncio.Future]()
        hosts = [*GOOD_HOSTS, *(() if good_only else KIND_AT)]
        self._sockets = _bind(hosts, port)
        self.port = next(iter(self._sockets.values())).getsockname()[1]
        self._tls = None if good_only else _certificate(folder)

    async def run(self) -> None:
        """Serve until the process is killed."""
        loop = asyncio.get_running_loop()
        for host, listener in self._sockets.items():
            name = KIND_AT.get(host)
            if name == "blackhole":
                self._fill(listener)
            elif name != "refused":  # bound, not listening: refused, and nobody else gets the port
                secure = name is not None and KINDS[name].tls
                if not secure or self._tls:
                    context = self._tls if secure else None
                    await loop.create_server(
                        lambda name=name: Peer(self, name), sock=listener, ssl=context, backlog=1024
                    )
        print(self.port, flush=True)
        await asyncio.Event().wait()

    def _fill(self, listener: socket.socket) -> None:
        """A queue of one that is full: Linux drops what else asks to connect."""
        listener.listen(0)
        self._waiting = [socket.socket() for _ in range(4)]
        for waiting in self._waiting:
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())


def _bind(hosts: list[str], port: int) -> dict[str, socket.socket]:
    """A socket per host, all of one port; a free one when ``port`` is 0."""
    for _ in range(20):
        bound, number = dict[str, socket.socket](), port
        try:
            for host in hosts:
                bound[host] = socket.socket()
                bound[host].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                bound[host].bind((host, number))
                number = bound[host].getsockname()[1]
            return bound
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port:
                raise
            for listener in bound.values():
                listener.close()
    raise OSError("no port is free at every address")


def _certificate(folder: Path) -> ssl.SSLContext | None:
    """A self-signed certificate for all addresses but that of tls_other_name; None without the openssl command."""
    if not OPENSSL:
        return None
    key, cert = folder / "key.pem", folder / "cert.pem"
    names = ",".join(f"IP:{HOSTS[name]}" for name in CERTIFIED if name != "tls_other_name")
    command = [OPENSSL, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=clipmill test"]
    command += ["-addext", f"subjectAltName={names}", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


def _end_with_parent() -> None:
    """Our parent holds the other end of our standard input."""
    sys.stdin.buffer.read()
    signal.raise_signal(signal.SIGKILL)


class FaultServer:
    """The server process, for a test; use as ``with serve_faults(folder) as server``."""

    def __init__(self, folder: Path, good_only: bool = False) -> None:
        self._folder, self._options = folder, ["good_only"] * good_only
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start it, on the same port as before."""
        command = [sys.executable, __file__, str(self.port), str(self._folder), *self._options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server did not start, its status is {self.process.wait()}")
        self.port = int(line)

    def kill(self) -> None:
        """End it at once, in the middle of whatever it does."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def link(self, name: str, number: int = 0) -> str:
        return link(name, self.port, number)

    def good(self, number: int, host: str | None = None) -> str:
        return good_link(number, self.port, host)

    def way(self, path: str, host: str = GOOD_HOSTS[0]) -> str:
        """The address of one of WAYS, such as ``late/20/7``."""
        return f"http://{host}:{self.port}/{path}"

    def counts(self) -> Counter[str]:
        """Requests since its start, by their targets."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/_counts") as answer:
            return Counter(json.load(answer))


@contextmanager
def serve_faults(folder: Path, good_only: bool = False):
    """Yields a FaultServer; ``folder`` is for its certificate."""
    server = FaultServer(folder, good_only)
    try:
        yield server
    finally:
        server.kill()


RUN = """
import json, re, resource, sys, time
from pathlib import Path
from pipeline.ingest.config import IngestConfig
from pipeline.ingest.stage import ingest
if __name__ == "__main__":
    start = time.monotonic()
    ingest(IngestConfig(**json.loads(sys.argv[1])))
    # not ru_maxrss, which has in it what the process that started this one held
    own = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    peaks = [kib / 1024 for kib in (own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)]
    print(json.dumps({"seconds": time.monotonic() - start, "MiB": peaks[0], "decoder MiB": peaks[1]}))
"""
DEFAULTS = {"format": "cc12m", "allow_private": True, "workers": 1, "image_size": 48, "shard_size": 1000}


def start_ingest(
    root: Path, links: list[str], environment: dict[str, str] | None = None, before: str = "", **options
) -> subprocess.Popen:
    """`ingest` of a list of links, each its own caption, as a process; ``before`` is Python that it runs first."""
    root.parent.mkdir(parents=True, exist_ok=True)
    source = root.with_suffix(".tsv")
    source.write_text("".join(f"{link}\tcaption {n}\n" for n, link in enumerate(links)), encoding="utf-8")
    config = json.dumps({"root": str(root), "source": str(source), **DEFAULTS, **options})
    surroundings = {**os.environ, **(environment or {})}
    return subprocess.Popen([sys.executable, "-c", before + RUN, config], env=surroundings, stdout=subprocess.PIPE)


def finish_ingest(process: subprocess.Popen, limit_s: float) -> dict[str, float]:
    """Its seconds and memory. Raises TimeoutExpired when it hangs, CalledProcessError when it fails."""
    try:
        output = process.communicate(timeout=limit_s)[0]
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, "ingest")
    return json.loads(output)


def ingest_apart(root: Path, links: list[str], limit_s: float, **options) -> dict[str, float]:
    """Start an ingest in a process of its own and wait for it; see `start_ingest` and `finish_ingest`."""
    return finish_ingest(start_ingest(root, links, **options), limit_s)


def rows_of(root: Path) -> list[dict]:
    """The rows of all shards of ROOT/raw, in their order."""
    rows = list[dict]()
    for path in sorted((root / "raw").glob("*.parquet")):
        rows += pq.read_table(path).to_pylist()
    return rows


def outcome(row: dict) -> str:
    """How a row ended: ``success`` or the reason."""
    return row["error_message"] or DONE


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    asyncio.run(Server(int(sys.argv[1]), Path(sys.argv[2]), len(sys.argv) > 3).run())
