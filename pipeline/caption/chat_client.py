"""A client of an OpenAI-compatible chat endpoint (``POST URL/chat/completions``), as vLLM serves one.

Many threads ask at once; their requests run in one event loop, in a thread of its own. A request that fails for a
reason that may pass is tried again after a growing pause. An endpoint that answers nobody any more stops the command,
so that no shard is finished without its captions; one image that keeps failing has a reason of its own.
"""

import asyncio
import json
import logging
import os
import re
import threading
import time
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any, TypeVar

import aiohttp

from pipeline.ingest.http_client import CHUNK_BYTES, TEMPORARY_REASONS, explain, parse_retry_after
from shards_spec.files import UserError
from shards_spec.suggest import did_you_mean

log = logging.getLogger(__name__)
KEY_VARIABLE = "CLIPMILL_API_KEY"
FIRST_PAUSE_S = 1.0  # before the second try; doubled for each one after
LONGEST_PAUSE_S = 60.0
START_TIMEOUT_S = 20.0  # for the list of models, which costs a server nothing
MAX_ANSWER_BYTES = 1 << 22
SHORTEST_SECRET = 6  # characters; what is shorter ("none") says that there is no key, and may be part of any word
MESSAGE_CHARS = 300  # of a server's message that are shown
BUSY = "HTTP 429"
MALFORMED = "malformed answer"
TOO_LARGE = "answer too large"  # a reason, as the one before
RETRIED = TEMPORARY_REASONS | {MALFORMED}
REFUSALS = ("HTTP 400", "HTTP 413", "HTTP 415", "HTTP 422", TOO_LARGE)  # of one request alone
T = TypeVar("T")


@dataclass(frozen=True)
class ChatChoice:
    """One answer: its text, whether the model ended it itself, and what the server says of its tokens."""

    text: str
    ended: bool
    logprob: float | None = None
    num_tokens: int | None = None


class ChatError(Exception):
    """No answer to one request, though others may be answered.

    ``reason`` is short and fit for counting, the message has what the server said, too. ``pause_s``: seconds that it
    asked us to wait. ``began``: when the try that failed was begun (monotonic seconds).
    """

    def __init__(self, reason: str, said: str = "", pause_s: float = 0.0, began: float = 0.0) -> None:
        super().__init__(f"{reason}: {said}" if said else reason)
        self.reason = reason
        self.pause_s = pause_s
        self.began = began


def api_key() -> str:
    """The key of the environment, without white space at its ends; empty when there is none. Raises UserError."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if re.fullmatch("[!-~]*", key) is None:
        raise UserError(
            f"{KEY_VARIABLE} has a line break, a space or another character inside that no key has: set it to the "
            "key alone"
        )
    return key


class ChatClient:
    """Asks the endpoint; use as ``with ChatClient(...) as client`` and call `ask` from any number of threads.

    ``key`` is sent as a bearer token; it is in no message and no record. ``probe`` is the body of a request that the
    endpoint must be able to answer: it tells an endpoint that is down from an image that it cannot stand.
    """

    def __init__(self, url: str, key: str, *, concurrency: int, timeout_s: float, retries: int) -> None:
        self._url = url.rstrip("/").removesuffix("/chat/completions")
        self._key = key
        self._concurrency = concurrency
        self._timeout_s = timeout_s
        self._retries = retries
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chat-client", daemon=True)
        self._lock = threading.Lock()
        self._is_closed = False
        self._paused_until = 0.0
        self._answered_at = 0.0
        self._down: UserError | None = None
        self.probe: dict[str, Any] = {}

    def __enter__(self) -> "ChatClient":
        self._thread.start()
        self._run(self._open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._is_closed = True
            closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
        closing.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def check_model(self, model: str) -> None:
        """Raise UserError when no server is there, it wants another key, or it does not have the model."""
        self._run(self._check_model(model))

    def ask(self, body: dict[str, Any]) -> list[ChatChoice]:
        """The answers to one request, at least one.

        Raises:
            ChatError: This request fails, or failed at every try.
            UserError: The endpoint answers nobody, or not in this way.
        """
        return self._run(self._ask(body))

    # in the event loop

    async def _open(self) -> None:
        self._slots = asyncio.Semaphore(self._concurrency)
        self._probing = asyncio.Lock()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, resolver=aiohttp.ThreadedResolver()),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def _close(self) -> None:
        requests = asyncio.all_tasks() - {asyncio.current_task()}
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        await self._session.close()

    async def _check_model(self, model: str) -> None:
        try:
            answer = await self._request("GET", "/models", None, START_TIMEOUT_S)
        except ChatError as error:
            if error.reason == "HTTP 404":  # an endpoint without that list
                return
            if error.reason == MALFORMED:
                raise self._no_endpoint(error) from error
            raise UserError(
                f"--server {self._url} does not answer ({error}); start it (`vllm serve MODEL`), or check the address"
            ) from error
        models = answer.get("data")
        names = [own.get("id") for own in models if isinstance(own, dict)] if isinstance(models, list) else []
        if names and model not in names:
            raise UserError(
                f"--server-model {model}: {self._url} does not serve it; {did_you_mean(model, [*map(str, names)])}"
            )

    async def _ask(self, body: dict[str, Any]) -> list[ChatChoice]:
        failed_at = time.monotonic()
        failures = 0
        for tries in count():
            if self._down is not None:
                raise self._down
            if (wait := self._paused_until - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            try:
                return await self._try(body)
            except ChatError as error:
                if error.reason not in RETRIED:
                    raise
                # a server that is busy with others will have time for this one, too
                is_busy = error.reason == BUSY and self._answered_at > failed_at
                failures += not is_busy
                failed_at = time.monotonic()
                if failures > self._retries:
                    await self._check_up(error)
                    raise
                pause = min(max(error.pause_s, FIRST_PAUSE_S * 2 ** min(tries, 9)), LONGEST_PAUSE_S)
                if error.pause_s:  # the server itself named a time: all wait as long
                    self._paused_until = max(self._paused_until, time.monotonic() + pause)
                await asyncio.sleep(pause)
        raise AssertionError("count() does not end")

    async def _try(self, body: dict[str, Any]) -> list[ChatChoice]:
        async with self._slots:
            began = time.monotonic()
            try:
                answer = await self._request("POST", "/chat/completions", body, self._timeout_s)
            except ChatError as error:
                error.began = began
                if error.reason in RETRIED or error.reason in REFUSALS:
                    raise
                raise UserError(f"--server {self._url} answers {error}; check the address and the model") from error
        try:
            choices = _choices(answer)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ChatError(MALFORMED, self._said(json.dumps(answer).encode()), began=began) from error
        self._answered_at = time.monotonic()
        return choices

    async def _check_up(self, error: ChatError) -> None:
        """After a request that failed at every try: raise UserError unless the endpoint answers to others.

        It does when it answered anyone since the last try began; else it is asked about the probe.
        """
        async with self._probing:  # one of many that fail together probes for all
            if self._down is None and self._answered_at < error.began:
                try:
                    await self._try(self.probe)
                except ChatError as last:
                    self._down = self._why_down(error, last)
        if self._down is not None:
            raise self._down from error

    def _why_down(self, error: ChatError, last: ChatError) -> UserError:
        """What to say of an endpoint that gives no caption, ``error`` to an image and ``last`` to the probe."""
        if last.reason == BUSY:
            return UserError(
                f"--server {self._url} refuses every request ({last}): is a quota used up? Rerun the same command "
                "later to resume, maybe with a lower --concurrency"
            )
        if self._answered_at:
            return UserError(
                f"--server {self._url} does not answer any more ({error}; then, to another image, {last}); "
                "rerun the same command to resume"
            )
        if last.reason == MALFORMED:
            return self._no_endpoint(last)
        return UserError(
            f"--server {self._url} has answered no request ({last}); check the address, which as a rule ends in /v1, "
            "and the log of the server, then rerun the same command"
        )

    def _no_endpoint(self, error: ChatError) -> UserError:
        return UserError(
            f"--server {self._url} is no OpenAI-compatible endpoint ({error}); check the address, which as a rule ends "
            "in /v1"
        )

    async def _request(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        """The JSON object that the server answers. Raises ChatError, and UserError where no request can succeed."""
        try:
            async with self._session.request(
                method,
                self._url + path,
                json=body,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
                allow_redirects=False,
            ) as response:
                data = await _read(response)
                status, headers = response.status, response.headers
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise ChatError(str(explain(error))) from error
        if status != 200:
            raise self._refusal(status, self._said(data), headers)
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ChatError(MALFORMED, self._said(data)) from error
        if not isinstance(answer, dict):
            raise ChatError(MALFORMED, self._said(data))
        return answer

    def _refusal(self, status: int, said: str, headers: Mapping[str, str]) -> Exception:
        """What an answer other than 200 means."""
        if status in (401, 403):
            unset = "" if self._key else ", which is not set"
            return UserError(
                f"--server {self._url} refuses the key (HTTP {status}: {said}): put it in the environment variable "
                f"{KEY_VARIABLE}{unset}"
            )
        if 300 <= status < 400:
            return UserError(
                f"--server {self._url} redirects to {headers.get('Location', '')[:MESSAGE_CHARS]!r}: give that address"
            )
        return ChatError(f"HTTP {status}", said, parse_retry_after(headers.get("Retry-After", "")))

    def _said(self, data: bytes) -> str:
        """The message in what a server sent; servers may repeat the key that they refuse."""
        is_secret = len(self._key) >= SHORTEST_SECRET
        return _message(data.replace(self._key.encode(), b"***") if is_secret else data)

    # from other threads

    def _submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        with self._lock:
            if self._is_closed:
                work.close()
                raise UserError("interrupted")  # of a thread that outlives the command for a moment
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._submit(work).result()


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body. Raises ChatError when it is too large."""
    body = bytearray()
    async for chunk in response.content.iter_chunked(CHUNK_BYTES):
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise ChatError(TOO_LARGE)
    return bytes(body)


def _choices(answer: dict[str, Any]) -> list[ChatChoice]:
    """The answers by their index. Raises KeyError and the like where they are not as the protocol has them."""
    listed = sorted(answer["choices"], key=lambda choice: int(choice.get("index") or 0))
    if not listed:
        raise ValueError("no choices")
    return [_choice(choice) for choice in listed]


def _choice(choice: dict[str, Any]) -> ChatChoice:
    content = choice["message"].get("content")
    if isinstance(content, list):  # parts, as some servers answer
        content = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(content, str | None):
        raise TypeError(content)
    tokens = (choice.get("logprobs") or {}).get("content")
    ended = choice.get("finish_reason") != "length"
    logprobs = [token["logprob"] for token in tokens or ()]
    if not logprobs or not all(isinstance(logprob, int | float) for logprob in logprobs):
        return ChatChoice(content or "", ended)
    return ChatChoice(content or "", ended, float(sum(logprobs)), len(logprobs))


def _message(data: bytes) -> str:
    """What a server says of an error: the text in its JSON, else the beginning of what it sent."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _shortened(data)
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and name in value:
            value = value[name]
    return _shortened(value.encode(errors="replace") if isinstance(value, str) else data)


def _shortened(data: bytes) -> str:
    return " ".join(data[: 4 * MESSAGE_CHARS].decode(errors="replace").split())[:MESSAGE_CHARS]
