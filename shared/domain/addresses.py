"""Which IP addresses are public: neither a network's own, nor a way around that."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address, reached by a NAT64
# RFC 8215: such prefixes of a network's own. RFC 4291 section 2.5.5.1: IPv4 addresses once written as IPv6 ones.
_NON_PUBLIC = (IPv6Network("64:ff9b:1::/48"), IPv6Network("::/96"))


def is_public(text: str) -> bool:
    """True for a global unicast address, and where an IPv4 address is wrapped in it, only if that is one too.
    ValueError for what is no address; a zone (`%eth0`) is passed over."""
    return _is_public(ip_address(text.partition("%")[0]))


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if not address.is_global or address.is_multicast:
        return (
            isinstance(address, IPv6Address)
            and address.ipv4_mapped is not None
            and _is_public(address.ipv4_mapped)
        )
    if isinstance(address, IPv4Address):
        return True
    if address.is_site_local or any(address in network for network in _NON_PUBLIC):
        return False
    wrapped = address.sixtofour
    if address in _NAT64:
        wrapped = IPv4Address(address.packed[-4:])
    return wrapped is None or _is_public(wrapped)
