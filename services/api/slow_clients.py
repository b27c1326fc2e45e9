"""Clients that read slowly, and which of them is ended when proxied places or space in the cache are scarce.

The kernel says how many bytes a client has acknowledged. What was written says little: megabytes fit into the buffers.
While nothing is scarce, a slow client or a paused player is left alone, up to `public_api.send_stall_limit`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from typing import Protocol

import structlog

from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.ports.state_store import StateStore

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
        return usage.used + usage.reserved > high_watermark or await state.space_requested() > 0
    except StateStoreUnavailable:
        return False


def bytes_acknowledged(connection: socket.socket) -> int | None:
    """Return tcpi_bytes_acked. None where the system does not tell."""
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
    except OSError:
        return None
    return int(struct.unpack_from("Q", info, _BYTES_ACKED)[0]) if len(info) >= _BYTES_ACKED + 8 else None
