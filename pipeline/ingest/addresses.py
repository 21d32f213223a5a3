"""Which IP addresses are public: a list from the web must not reach services of the user's own network.

Special-purpose addresses are all those of IANA's registries (iana-ipv4-special-registry and iana-ipv6-special-registry,
as of 2025); the few of them that can be reached from everywhere (AS112, AMT, anycast of PCP and TURN) serve no images.
Python's ``is_global`` changes with its version and lets some of them through.
"""

import ipaddress

SPECIAL_V4_TEXTS = (
    "0.0.0.0/8",  # this network
    "10.0.0.0/8",  # private
    "100.64.0.0/10",  # shared, behind a provider's NAT; metadata of some clouds
    "127.0.0.0/8",  # loopback
    "168.63.129.16/32",  # not in the registry: the host of every virtual machine of Azure
    "169.254.0.0/16",  # link-local; metadata of most clouds
    "172.16.0.0/12",  # private
    "192.0.0.0/24",  # protocol assignments; metadata of some clouds
    "192.0.2.0/24",  # documentation
    "192.31.196.0/24",  # AS112
    "192.52.193.0/24",  # AMT
    "192.88.99.0/24",  # relays of 6to4, deprecated
    "192.168.0.0/16",  # private
    "192.175.48.0/24",  # AS112
    "198.18.0.0/15",  # benchmarks
    "198.51.100.0/24",  # documentation
    "203.0.113.0/24",  # documentation
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, and broadcast
)
GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")  # what is outside is loopback, local, multicast or not assigned
SPECIAL_V6_TEXTS = (
    "2001::/23",  # protocol assignments: Teredo (see below), benchmarks, ORCHID, AMT, AS112, DRIP
    "2001:db8::/32",  # documentation
    "2620:4f:8000::/48",  # AS112
    "3fff::/20",  # documentation
)
SPECIAL_V4 = tuple(ipaddress.IPv4Network(text) for text in SPECIAL_V4_TEXTS)
SPECIAL_V6 = tuple(ipaddress.IPv6Network(text) for text in SPECIAL_V6_TEXTS)
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # but not 64:ff9b:1::/48, which is for private networks


def is_public(address: str) -> bool:
    """Whether an IP address, in digits, is of the public internet.

    IPv4 addresses embedded in an IPv6 address must be public, too. Raises ValueError when it is no address.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in SPECIAL_V4)
    embedded = _embedded(ip)
    if embedded:
        return all(is_public(str(inner)) for inner in embedded)
    return ip in GLOBAL_V6 and not any(ip in network for network in SPECIAL_V6)


def _embedded(ip: ipaddress.IPv6Address) -> tuple[ipaddress.IPv4Address, ...]:
    """IPv4 addresses that packets to an IPv6 address are sent to in the end: mapped, NAT64, 6to4, Teredo's two."""
    if ip in NAT64:
        return (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF),)
    inner = ip.ipv4_mapped or ip.sixtofour
    return (inner,) if inner is not None else ip.teredo or ()
