"""A small real web server on loopback with every kind of answer that lists from the web meet."""

import io
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from urllib.parse import unquote

from PIL import Image, ImageDraw
from small_data import draw


def make_image(seed: int, size: tuple[int, int] = (96, 64), form: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    """An encoded drawing that differs from seed to seed."""
    image = Image.new("RGB", size, (seed * 37 % 256, seed * 91 % 256, 120))
    ImageDraw.Draw(image).ellipse((4, 4, size[0] // 2 + seed % 7, size[1] - 5), "white")
    file = io.BytesIO()
    image.convert(mode).save(file, form, **options)
    return file.getvalue()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.strip("/")
        with self.server.lock:
            self.server.requests[name] += 1
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            self._answer(name)
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def _answer(self, name: str) -> None:
        kind, _, rest = name.partition("/")
        kind = kind.partition("?")[0]
        answer = getattr(self, f"_{kind}", None)
        if answer is None or name in self.server.gone:
            self._send(404, b"no such page")
        else:
            answer(rest)

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _good(self, rest: str) -> None:
        time.sleep(self.server.delay_s)
        self._send(200, make_image(int(rest.partition("?")[0])))

    def _again(self, rest: str) -> None:
        scene, file = Image.open(io.BytesIO(draw(rest)[0])), io.BytesIO()
        scene.save(file, "JPEG", quality=60)
        self._send(200, file.getvalue())

    def _scene(self, rest: str) -> None:
        self._send(200, draw(rest)[0])

    def _exif(self, rest: str) -> None:
        exif = Image.Exif()
        exif[0x010F], exif[0x0110] = "Acme", "A 1"
        exif.get_ifd(0x8769).update({0x8827: 200, 0x9003: "2020:01:02 03:04:05"})
        self._send(200, make_image(int(rest), exif=exif))

    def _sized(self, rest: str) -> None:
        width, height = rest.split("x")
        self._send(200, make_image(5, (int(width), int(height))))

    def _noise(self, rest: str) -> None:
        noise = Image.effect_noise((256, 256), 100 + int(rest) % 50).convert("RGB")
        file = io.BytesIO()
        noise.save(file, "JPEG", quality=95)
        self._send(200, file.getvalue())

    def _busy(self, rest: str) -> None:
        if self.server.requests[f"busy/{rest}"] == 1:
            self._send(429, b"later", Retry_After=self.server.retry_after)
        else:
            self._good(rest)

    def _html(self, _) -> None:
        self._send(200, b"<html>not an image</html>", Content_Type="image/jpeg")

    def _empty(self, _) -> None:
        self._send(200, b"")

    def _cut(self, _) -> None:
        self._send(200, make_image(1, (200, 200))[:900])

    def _lost(self, _) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5000")
        self.end_headers()
        self.wfile.write(b"x" * 100)
        self.close_connection = True

    def _slow(self, rest: str) -> None:
        time.sleep(float(rest.partition("?")[0]))
        self._send(200, make_image(2))

    def _large(self, _) -> None:
        self._send(200, make_image(3) + bytes(300_000))

    def _unsized(self, _) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(make_image(3) + bytes(300_000))
        self.close_connection = True

    def _optout(self, rest: str) -> None:
        self._send(200, make_image(4), X_Robots_Tag=rest.replace("+", " "))

    def _redirect(self, rest: str) -> None:
        self._send(302, b"", Location=unquote(rest))

    def _status(self, rest: str) -> None:
        self._send(int(rest.partition("?")[0]), b"status")

    def _flaky(self, rest: str) -> None:
        if self.server.requests[f"flaky/{rest}"] == 1:
            self._send(503, b"later")
        else:
            self._good(rest)


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    delay_s = 0.0
    retry_after = "1"
    at_once = most_at_once = 0

    def handle_error(self, request, client_address) -> None:
        pass  # clients that go away are part of the tests


@contextmanager
def in_background(server: BaseServer):
    """The server, serving in a thread until the block ends."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve(host: str = "127.0.0.1"):
    """Yields the server; ``server.url`` is its root, ``server.requests`` counts paths."""
    server = _Server((host, 0), _Handler)
    server.requests, server.lock = Counter(), threading.Lock()
    server.gone = set()  # paths that are there no more
    server.url = f"http://{host}:{server.server_port}"
    with in_background(server):
        yield server
