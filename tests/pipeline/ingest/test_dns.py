"""Names of hosts: how often a DNS server is asked, its failures, names whose address changes."""

import itertools
import time

import pytest
from dns_server import NXDOMAIN, SERVFAIL, SILENT, serve_names
from small_ingest import gather
from web_server import make_image, serve

from pipeline.ingest import http_client

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


def test_a_name_is_asked_for_once(server):
    with serve_names({"good.test": ["127.0.0.1"], "gone.test": NXDOMAIN, "broken.test": SERVFAIL}) as dns:
        nameservers = (f"127.0.0.1:{dns.port}",)
        port = server.server_port
        urls = [
            f"http://{host}.test:{port}/good/{n}"
            for n, host in itertools.product(range(30), ("good", "gone", "broken"))
        ]
        found = gather(urls, nameservers=nameservers, retries=0, per_host=3)
        assert found[::3] == [make_image(n) for n in range(30)]
        assert set(found[1::3]) == {"name not found"}
        assert set(found[2::3]) == {"name look-up failed"}
        # an A and an AAAA question each, twice where the server failed; not once per row
        assert 1 <= dns.queries["good.test"] <= 2
        assert 1 <= dns.queries["gone.test"] <= 2 * 3
        assert 1 <= dns.queries["broken.test"] <= 4 * 3


def test_a_dns_server_that_never_answers_ends_in_time():
    with serve_names({"silent.test": SILENT}) as dns:
        start = time.monotonic()
        assert (
            gather(["http://silent.test/x"] * 5, nameservers=(f"127.0.0.1:{dns.port}",), timeout_s=1, retries=0)
            == ["timeout"] * 5
        )
        assert time.monotonic() - start < 10


def test_names_that_change_their_address_reach_nothing_private(server):
    """DNS rebinding: a name that was public a moment ago is checked again at each connection."""
    with serve_names({"rebind.test": [["127.0.0.1"]], "mixed.test": ["127.0.0.1", "10.0.0.1"]}) as dns:
        urls = [f"http://{host}.test:{server.server_port}/good/901" for host in ("rebind", "mixed")]
        found = gather(urls, nameservers=(f"127.0.0.1:{dns.port}",), allow_private=False)
        assert found == ["not a public address"] * 2
    assert server.requests["good/901"] == 0


def test_a_redirect_to_a_name_that_is_private(server, monkeypatch):
    monkeypatch.setattr(http_client, "is_public", lambda address: address == "127.0.0.1")
    with serve("127.0.0.2") as inner, serve_names({"inner.test": ["127.0.0.2"]}) as dns:
        url = f"{server.url}/redirect/http://inner.test:{inner.server_port}/good/5"
        found = gather([url], nameservers=(f"127.0.0.1:{dns.port}",), allow_private=False)
        assert found == ["not a public address"]
        assert not inner.requests
