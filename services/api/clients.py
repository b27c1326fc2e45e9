"""Clients: which one a request is from, and which is ended because it reads slowly while something is scarce.

The kernel says how many bytes a client has acknowledged. What was written says little: megabytes fit into the buffers.
While nothing is scarce, a slow client or a paused player is left alone, up to `public_api.send_stall_limit`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from math import inf
from typing import Protocol

import structlog
from sanic import Request

from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.ports.state_store import StateStore

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


@lru_cache(maxsize=256)  # a client has many requests
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


WINDOW = 10.0
"""Seconds over which a rate is measured."""
SPACE_INTERVAL = 2.0
"""Seconds between two looks at the usage of the cache while a slow client holds an object."""
TOO_SLOW = "client_too_slow"

_BYTES_ACKED = 120  # offset of tcpi_bytes_acked in struct tcp_info, which Linux only extends
_MIN_CROWD = 4  # places of one client address that are never taken from it for another
_ENDED_AT_ONCE = 4  # of so many slow clients that hold cached objects, one is ended at each look

logger = structlog.get_logger()


class Connection(Protocol):
    """A client's connection."""

    def acknowledged(self) -> int | None:
        """Bytes that the client has acknowledged since it connected. None: unknown."""

    def abort_response(self, reason: str) -> None: ...


class SlowClients:
    """The rates of the clients of one process whose responses are not taken at once."""

    def __init__(self, minimum_rate: float) -> None:
        """`minimum_rate`: bytes per second. 0: no client counts as slow."""
        self._minimum_rate = minimum_rate
        self._samples: dict[
            Connection, tuple[float, int]
        ] = {}  # begin of the window, bytes acknowledged then
        self._rates: dict[Connection, float] = {}
        self._places: dict[Connection, str] = {}  # of proxied responses: the client's address

    # Measuring

    def observe(self, connection: Connection, unsent: int, now: float) -> None:
        """Call it every few seconds. `unsent`: bytes that the client has not acknowledged. `now`: monotonic seconds."""
        acknowledged = connection.acknowledged() if unsent else None
        if acknowledged is None:
            self.forget(connection)
            return
        began, before = self._samples.setdefault(connection, (now, acknowledged))
        if now - began >= WINDOW:
            self._rates[connection] = (acknowledged - before) / (now - began)
            self._samples[connection] = (now, acknowledged)

    def forget(self, connection: Connection) -> None:
        """The client has taken everything, or has left."""
        self._samples.pop(connection, None)
        self._rates.pop(connection, None)

    # Places for proxied responses

    @contextmanager
    def place(self, connection: Connection, client: str) -> Iterator[None]:
        """Note that a proxied response is sent on this connection. `client`: its address."""
        self._places[connection] = client
        try:
            yield
        finally:
            self._places.pop(connection, None)

    def free_place(self, client: str) -> bool:
        """End one proxied response for a new one of this client. False: none is to be ended.

        The slowest of those below the minimum rate, else the slowest of the client with the most places, if it has at
        least twice as many as this one would have.
        """
        victim = self._slowest(proxied=True) or self._of_crowd(client)
        if victim is None:
            return False
        self._end(victim, "places")
        return True

    def _of_crowd(self, client: str) -> Connection | None:
        counts = Counter(self._places.values())
        if not counts:
            return None
        crowd, count = counts.most_common(1)[0]
        if crowd == client or count < max(_MIN_CROWD, 2 * (counts[client] + 1)):
            return None
        own = [connection for connection, address in self._places.items() if address == crowd]
        return min(own, key=lambda one: self._rates.get(one, inf))

    # Space in the cache

    async def watch_space(self, state: StateStore, high_watermark: int) -> None:
        """End slow clients of cached objects while space is scarce, until cancelled. What is being sent is not evicted.

        Scarce is a cache above its high watermark, or one from which fetches ask for space, at two looks in a row: the
        evictor needs a moment in any case.
        """
        was_scarce = False
        while True:
            await asyncio.sleep(SPACE_INTERVAL)
            scarce = self._slowest(proxied=False) is not None and await _is_scarce(state, high_watermark)
            if scarce and was_scarce:
                held = sum(1 for one in self._rates if self._is_slow(one) and one not in self._places)
                for _ in range(max(1, held // _ENDED_AT_ONCE)):
                    victim = self._slowest(proxied=False)
                    if victim is not None:
                        self._end(victim, "space")
            was_scarce = scarce

    def _is_slow(self, connection: Connection) -> bool:
        return self._rates[connection] < self._minimum_rate

    def _slowest(self, *, proxied: bool) -> Connection | None:
        slow = [one for one in self._rates if self._is_slow(one) and (one in self._places) is proxied]
        return min(slow, key=self._rates.__getitem__, default=None)

    def _end(self, connection: Connection, scarce: str) -> None:
        rate = self._rates.get(connection)
        self.forget(connection)
        self._places.pop(connection, None)
        logger.info(
            "slow_client_ended", scarce=scarce, bytes_per_second=None if rate is None else round(rate)
        )
        connection.abort_response(TOO_SLOW)


async def _is_scarce(state: StateStore, high_watermark: int) -> bool:
    try:
        usage = await state.usage()
        return usage.used + usage.reserved > high_watermark or any(await state.space_requests())
    except StateStoreUnavailable:
        return False


def bytes_acknowledged(connection: socket.socket) -> int | None:
    """Return tcpi_bytes_acked. None where the system does not tell."""
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
    except OSError:
        return None
    return int(struct.unpack_from("Q", info, _BYTES_ACKED)[0]) if len(info) >= _BYTES_ACKED + 8 else None
