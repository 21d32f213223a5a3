"""Downloads: limits per host and in all, tries again, private addresses, opt-out headers."""

import asyncio
import socket
import time

import pytest
from small_ingest import gather
from web_server import make_image, serve

from pipeline.ingest import http_client
from pipeline.ingest.http_client import Fetcher, FetchError, FetchRules, opted_out

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


def test_requests_to_one_host_are_limited(server):
    server.delay_s, server.most_at_once = 0.02, 0
    try:
        gather([f"{server.url}/good/{n}" for n in range(40)], per_host=5)
        assert 2 <= server.most_at_once <= 5
        server.most_at_once = 0
        gather([f"{server.url}/good/{n}" for n in range(40)], per_host=40, concurrency=3)
        assert 2 <= server.most_at_once <= 3
    finally:
        server.delay_s = 0.0


def test_links_that_wait_for_a_busy_host_hold_no_slot(server):
    with serve("127.0.0.2") as slow:
        urls = [f"{slow.url}/slow/0.5?{n}" for n in range(8)] + [f"{server.url}/good/{n}" for n in range(20)]

        async def run() -> float:
            rules = FetchRules(timeout_s=10, allow_private=True, concurrency=2, per_host=1)
            async with Fetcher(rules) as fetcher:
                slow_ones = [asyncio.create_task(fetcher.get(url)) for url in urls[:8]]
                start = time.monotonic()
                await asyncio.gather(*(fetcher.get(url) for url in urls[8:]))
                seconds = time.monotonic() - start
                assert not all(task.done() for task in slow_ones)
                for task in slow_ones:
                    task.cancel()
                await asyncio.gather(*slow_ones, return_exceptions=True)
                return seconds

        assert asyncio.run(run()) < 4 * 0.5  # eight slow ones in a row take 4 s


def test_a_host_that_never_answers_is_given_up():
    with socket.create_server(("127.0.0.1", 0), backlog=1) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        assert gather([f"{url}/{n}" for n in range(200)], timeout_s=0.5, per_host=4) == ["timeout"] * 200
        assert time.monotonic() - start < 10, "200 links, 4 at a time, two tries of 0.5 s take 50 s"


def test_retry_after_is_obeyed_when_it_is_short(server):
    server.retry_after = "1"
    start = time.monotonic()
    assert gather([f"{server.url}/busy/1"]) == [make_image(1)]
    assert time.monotonic() - start >= 1
    server.retry_after = "3600"
    start = time.monotonic()
    assert gather([f"{server.url}/busy/2"]) == ["HTTP 429"]
    assert time.monotonic() - start < 2
    assert server.requests["busy/2"] == 1


@pytest.mark.parametrize(
    ("path", "tries"),
    [("status/500", 3), ("status/404", 1), ("status/403", 1), ("lost", 3), ("html", 1), ("status/410", 1)],
)
def test_only_what_may_pass_is_tried_again(server, path, tries):
    before = server.requests[f"{path}?again"]
    gather([f"{server.url}/{path}?again"], retries=2)
    assert server.requests[f"{path}?again"] - before == tries


def get(url: str, **rules) -> bytes:
    async def run() -> bytes:
        async with Fetcher(FetchRules(timeout_s=2, **rules)) as fetcher:
            return await fetcher.get(url)

    return asyncio.run(run())


def test_each_hop_of_a_redirect_is_checked(server, monkeypatch):
    monkeypatch.setattr(http_client, "is_public", lambda address: address == "127.0.0.1")
    assert get(f"{server.url}/redirect/{server.url}/good/5") == make_image(5)
    with serve("127.0.0.2") as inner:
        for target in (inner.url, f"http://[::1]:{inner.server_port}", "http://169.254.169.254"):
            with pytest.raises(FetchError, match=r"^not a public address$"):
                get(f"{server.url}/redirect/{target}/good/5")
        assert not inner.requests


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], False),
        (["all"], False),
        (["NoAI"], True),
        (["nofollow, noimageai"], True),
        (["nofollow", "noindex"], True),
        (["googlebot: noindex"], False),
        (["clipmill: noindex"], True),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST"], False),
        (["noai, unavailable_after: 25 Jun 2010 15:00:00 PST"], True),
    ],
)
def test_opt_out_headers(headers, expected):
    assert opted_out(headers) == expected


def test_ignoring_opt_out_and_other_schemes(server):
    assert get(f"{server.url}/optout/noai", allow_private=True, ignore_opt_out=True) == make_image(4)
    for url in ("file:///etc/passwd", "ftp://h/x", "data:image/png;base64,AAAA", "//h/x", "x"):
        with pytest.raises(FetchError, match=r"^not an http address$"):
            get(url)
