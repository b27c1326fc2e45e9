"""Which client a request is from: the peer of its connection, or what a trusted reverse proxy says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

from sanic import Request

_MAX_HOPS = 16  # proxies in a row that are believed
_IPV6_PREFIX = 64  # bits that one client shares: it chooses the others itself

_Address = IPv4Address | IPv6Address


class ClientAddresses:
    """Reads X-Forwarded-For as far as trusted proxies have written it."""

    def __init__(self, trusted_proxies: Iterable[str]) -> None:
        """`trusted_proxies`: addresses or networks."""
        self._trusted = [ip_network(text, strict=False) for text in trusted_proxies]

    def client_of(self, peer: str, forwarded_for: Sequence[str]) -> str:
        """Return the client's address; of IPv6, its network of 64 bits. See `address_of`."""
        return _group(self._address_of(peer, forwarded_for))

    def address_of(self, peer: str, forwarded_for: Sequence[str]) -> str:
        """Return the client's address, empty if it is unknown.

        `peer`: the address of the connection; anything else, as of a Unix socket, counts as a trusted proxy.
        `forwarded_for`: the lines of X-Forwarded-For. From its end backwards, each entry was written by the proxy after
        it, so the first that is not a trusted proxy is the client. What stands before it, the client may have made up.
        """
        address = self._address_of(peer, forwarded_for)
        return "" if address is None else str(address)

    def _address_of(self, peer: str, forwarded_for: Sequence[str]) -> _Address | None:
        address = _parse(peer)
        if not self._trusted or (address is not None and not self._is_trusted(address)):
            return address
        for entry in reversed(",".join(forwarded_for).rsplit(",", _MAX_HOPS)[-_MAX_HOPS:]):
            claimed = _parse(entry.strip())
            if claimed is None:
                break
            address = claimed
            if not self._is_trusted(address):
                break
        return address

    def _is_trusted(self, address: _Address) -> bool:
        return any(address in network for network in self._trusted)


def client_of_request(addresses: ClientAddresses, request: Request) -> str:
    """Return the address of the client that sent the request."""
    peer = request.conn_info.client_ip if request.conn_info else ""
    return addresses.client_of(peer, request.headers.getall("x-forwarded-for", ()))


def _parse(text: str) -> _Address | None:
    """An address; also with a port or in brackets, as some proxies write it."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return address if mapped is None else mapped


def _group(address: _Address | None) -> str:
    if isinstance(address, IPv6Address):
        return str(IPv6Network((address, _IPV6_PREFIX), strict=False))
    return "unknown" if address is None else str(address)
