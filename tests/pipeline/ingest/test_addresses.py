"""Which addresses a list may reach: IANA's two registries of special-purpose addresses, entry by entry, and borders."""

import ipaddress

import pytest

from pipeline.ingest.addresses import is_public

# every entry of iana-ipv4-special-registry and iana-ipv6-special-registry, except those that embed other addresses
# (below); then multicast, site-local and what is no global unicast
REGISTERED = [
    "0.0.0.0/8",
    "0.0.0.0/32",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.0.0/29",
    "192.0.0.8/32",
    "192.0.0.9/32",
    "192.0.0.10/32",
    "192.0.0.170/32",
    "192.0.0.171/32",
    "192.0.2.0/24",
    "192.31.196.0/24",
    "192.52.193.0/24",
    "192.88.99.0/24",
    "192.88.99.2/32",
    "192.168.0.0/16",
    "192.175.48.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "240.0.0.0/4",
    "255.255.255.255/32",
    "::1/128",
    "::/128",
    "64:ff9b:1::/48",
    "100::/64",
    "100:0:0:1::/64",
    "2001:1::1/128",
    "2001:1::2/128",
    "2001:1::3/128",
    "2001:2::/48",
    "2001:3::/32",
    "2001:4:112::/48",
    "2001:10::/28",
    "2001:20::/28",
    "2001:30::/28",
    "2001:db8::/32",
    "2620:4f:8000::/48",
    "3fff::/20",
    "5f00::/16",
    "fc00::/7",
    "fe80::/10",
    "224.0.0.0/4",
    "fec0::/10",
    "ff00::/8",
    "4000::/3",
    "::/96",
    "::ffff:0:0:0/96",
    "168.63.129.16/32",
]


@pytest.mark.parametrize("network", REGISTERED)
def test_no_special_purpose_address_is_public(network):
    addresses = ipaddress.ip_network(network)
    for address in (addresses[0], addresses[-1], addresses[addresses.num_addresses // 2]):
        assert not is_public(str(address))
        if addresses.version == 4:
            for embedding in embeddings(str(address)):
                assert not is_public(embedding), embedding


def embeddings(address: str) -> list[str]:
    """The IPv6 addresses whose packets come to an IPv4 address: mapped, NAT64, 6to4, Teredo's client and server."""
    number = int(ipaddress.IPv4Address(address))
    public = int(ipaddress.IPv4Address("8.8.8.8"))
    teredo = 0x20010000 << 96
    return [
        str(ipaddress.IPv6Address(one))
        for one in (
            0xFFFF << 32 | number,
            0x64FF9B << 96 | number,
            0x2002 << 112 | number << 80 | 1,
            teredo | public << 64 | number ^ 0xFFFFFFFF,
            teredo | number << 64 | public ^ 0xFFFFFFFF,
        )
    ]


PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "2606:4700::1111",
    "2a00:1450:4001::1",
    "2001:4860:4860::8888",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.0",
    "168.63.129.15",
    "168.63.129.17",
    "169.253.255.255",
    "169.255.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "191.255.255.255",
    "192.0.1.0",
    "192.0.3.0",
    "192.88.98.255",
    "192.88.100.0",
    "192.167.255.255",
    "192.169.0.0",
    "198.17.255.255",
    "198.20.0.0",
    "198.51.101.0",
    "203.0.114.0",
    "223.255.255.255",
    "2001:200::",
    "2001:db7:ffff::",
    "2001:db9::",
    "2620:4f:8001::",
    "3ffe:ffff::",
    "3fff:1000::",
]


@pytest.mark.parametrize("address", [*PUBLIC, *embeddings("8.8.8.8")])
def test_their_neighbours_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "192.0.0.192", "100.100.100.200", "fd00:ec2::254", "fe80::1%eth0"]
)
def test_metadata_of_clouds_is_not(address):
    assert not is_public(address)
