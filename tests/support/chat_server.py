"""A real server on loopback that speaks the protocol of OpenAI's chat completions, as vLLM serves it.

It decodes the image of each request and describes what is there (its colour and its size), with words drawn by the
request's seed. ``serve_chat`` yields the server; tests set its attributes to have it refuse, hang or reset.
"""

import base64
import io
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image
from web_server import in_background

MODEL = "acme/looker-7b"
WORDS = ["bright", "small", "old", "quiet", "round", "distant", "plain", "tiny", "odd", "warm"]
KNOWN_FIELDS = {"model", "messages", "max_tokens", "temperature", "top_p", "seed", "n", "logprobs"}


class ChatServer(ThreadingHTTPServer):
    """``behave(body, image, time)`` gives what happens at the nth ``time`` that an image comes: ok, or a fault."""

    request_queue_size = 256
    daemon_threads = True
    key = ""
    takes_n = takes_extras = True
    answers = 0
    behave: Callable[[dict[str, Any], Image.Image, int], str] = staticmethod(lambda body, image, time: "ok")

    def handle_error(self, request, client_address) -> None:
        pass  # clients that go away are part of the tests


class ChatHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        if self._refused_key():
            return
        if self.path == "/v1/models":
            self.send_json(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        else:
            self._error(404, "no such page")

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if self._refused_key():
            return
        if self.path != "/v1/chat/completions":
            self._error(404, "no such page")
            return
        body = json.loads(raw)
        with self.server.lock:
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            self.complete(body)
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def complete(self, body: dict[str, Any]) -> None:
        url, prompt = (part for part in body["messages"][0]["content"])
        assert prompt["type"] == "text"
        head, _, data = url["image_url"]["url"].partition(",")
        assert head == "data:image/jpeg;base64"
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        image.load()
        with self.server.lock:
            self.server.times[data] += 1
            time_of_image = self.server.times[data]
            self.server.bodies.append({**body, "messages": prompt["text"], "size": image.size})
        unknown = set(body) - KNOWN_FIELDS
        if unknown and not self.server.takes_extras:
            self._error(400, f"unrecognized request argument: {sorted(unknown)[0]}")
        elif body.get("n", 1) > 1 and not self.server.takes_n:
            self._error(422, "n must be 1")
        else:
            getattr(self, f"_{self.server.behave(body, image, time_of_image)}")(body, image)

    def _ok(self, body: dict[str, Any], image: Image.Image, text: Callable[[int], str] | None = None) -> None:
        red, green, blue = image.convert("RGB").resize((1, 1)).getpixel((0, 0))
        names = {red: "red", green: "green", blue: "blue"}
        drawn = random.Random(body["seed"])
        size = f"{image.width} by {image.height}"
        describe = text or (
            lambda _: f"a {drawn.choice(WORDS)} {drawn.choice(WORDS)} {names[max(names)]} thing of {size}\n"
        )
        choices = []
        for index in range(body.get("n", 1)):
            content = describe(index)
            words = content.split()
            cut = len(words) > body["max_tokens"]
            choice = {
                "index": index,
                "message": {"role": "assistant", "content": " ".join(words[: body["max_tokens"]])},
                "finish_reason": "length" if cut else "stop",
            }
            if body.get("logprobs"):
                choice["logprobs"] = {"content": [{"token": word, "logprob": -0.25} for word in words]}
            choices.append(choice)
        with self.server.lock:
            self.server.answers += 1
        self.send_json(200, {"object": "chat.completion", "model": MODEL, "choices": choices[::-1]})

    def _same(self, body: dict[str, Any], image: Image.Image) -> None:
        self._ok(body, image, lambda _: "always the same")

    def _loop(self, body: dict[str, Any], image: Image.Image) -> None:
        self._ok(body, image, lambda _: "a dog a dog a dog a dog")

    def _strange(self, body: dict[str, Any], image: Image.Image) -> None:
        token = {"token": "x", "logprob": None}
        message = {"content": [{"type": "text", "text": 'a \ud83d\x00 "dog" &amp; cat'}]}
        choice = {"index": 0, "message": message, "finish_reason": None, "logprobs": {"content": [token]}}
        self.send_json(200, {"choices": [choice]})

    def _silent(self, body: dict[str, Any], image: Image.Image) -> None:
        self._ok(body, image, lambda _: "")

    def _null(self, body: dict[str, Any], image: Image.Image) -> None:
        with self.server.lock:
            self.server.answers += 1
        self.send_json(200, {"choices": [{"message": {"content": None}}] * body.get("n", 1)})

    def _endless(self, body: dict[str, Any], image: Image.Image) -> None:
        self.send_json(200, {"choices": [{"message": {"content": "so many words " * 4000}}] * body.get("n", 1)})

    def _busy(self, body: dict[str, Any], image: Image.Image) -> None:
        self._error(429, "slow down", {"Retry-After": "0"})

    def _broken(self, body: dict[str, Any], image: Image.Image) -> None:
        self._error(500, "the engine has a fault")

    def _unwanted(self, body: dict[str, Any], image: Image.Image) -> None:
        self._error(400, "the image is too large for the model")

    def _gone(self, body: dict[str, Any], image: Image.Image) -> None:
        self._error(404, "the model was unloaded")

    def _hang(self, body: dict[str, Any], image: Image.Image) -> None:
        self.server.let_go.wait(30)

    def _slow(self, body: dict[str, Any], image: Image.Image) -> None:
        time.sleep(0.05)
        self._ok(body, image)

    def _reset(self, body: dict[str, Any], image: Image.Image) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _nonsense(self, body: dict[str, Any], image: Image.Image) -> None:
        self._bytes(200, b'{"choices": [{"message": ')

    def _odd(self, body: dict[str, Any], image: Image.Image) -> None:
        self.send_json(200, {"choices": [{"message": {"content": 7}}]})

    def _none(self, body: dict[str, Any], image: Image.Image) -> None:
        self.send_json(200, {"choices": []})

    def _flood(self, body: dict[str, Any], image: Image.Image) -> None:
        self._bytes(200, b" " * (5 << 20))

    def _elsewhere(self, body: dict[str, Any], image: Image.Image) -> None:
        self._bytes(307, b"", {"Location": "http://other.example/v1"})

    def _refused_key(self) -> bool:
        given = self.headers.get("Authorization", "")
        if given == (f"Bearer {self.server.key}" if self.server.key else ""):
            return False
        self._error(401, f"Incorrect API key provided: {given.removeprefix('Bearer ')}.")
        return True

    def _error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self.send_json(status, {"error": {"message": message, "type": "error", "code": status}}, headers)

    def send_json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._bytes(status, json.dumps(value).encode(), headers)

    def _bytes(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serve_chat() -> Iterator[ChatServer]:
    """The server while the block runs; ``url`` is what --server takes, ``bodies`` are the requests with images."""
    server = ChatServer(("127.0.0.1", 0), ChatHandler)
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    server.lock, server.let_go = threading.Lock(), threading.Event()
    server.times, server.bodies = Counter(), []
    server.at_once = server.most_at_once = 0
    with in_background(server):
        try:
            yield server
        finally:
            server.let_go.set()
